"""The conformance suite on the adapters that `--slicecli-adapter` names, or on the checkpoint of `--slicecli-model`."""

from __future__ import annotations

from typing import Any

import pytest

from slicecli.testing.adapter_tests import AdapterTests, tiny_of

EVERY = "all"


def _cases(config: pytest.Config) -> dict[str, Any]:
    """Return the adapters asked for, each with a tiny config of each of its model types, by type."""
    from slicecli.family.plugins import plugins

    if config.getoption("slicecli_model"):
        return {"model": None}
    adapters = plugins().adapters
    wanted = config.getoption("slicecli_adapter")
    if wanted is None and config.getoption("slicecli_slice"):
        return {}  # only the gate was asked for
    names = sorted(adapters) if wanted in (None, EVERY) else wanted.split(",")
    unknown = [name for name in names if name not in adapters]
    if unknown:
        raise pytest.UsageError(f"There is no adapter named {unknown[0]!r}; available: {', '.join(sorted(adapters))}.")
    chosen = {model_type: adapters[name] for name in names for model_type in adapters[name].model_types}
    return {model_type: (adapter, tiny_of(adapter, model_type)) for model_type, adapter in chosen.items()}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the suite once for each adapter and model type."""
    if metafunc.cls is TestAdapter:
        cases = _cases(metafunc.config)
        metafunc.parametrize("slicecli_subject", list(cases.values()), ids=list(cases), indirect=True, scope="class")


class TestAdapter(AdapterTests):
    """One adapter, on one of its model types."""
