"""The pytest plugin: options, fixtures and a marker; heavy packages are imported only where a fixture is used.

It is loaded at every start of pytest in an environment that has this program, so nothing here may cost anything
there.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from slicecli.testing.adapter_tests import Subject
    from slicecli.testing.loopback_hub import LoopbackHub
    from slicecli.testing.slice_tests import SliceUnderTest

__all__: list[str] = []

SUITE = "slicecli_suite"
SERVING_TEST = "test_the_program_that_serves_it_predicts_as_transformers_does"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the suites."""
    group = parser.getgroup("slicecli", "slicing language models")
    group.addoption(
        "--slicecli-adapter",
        metavar="NAME",
        help="Adapters that `--pyargs slicecli.testing` tests, separated by commas; default: all that are installed.",
    )
    group.addoption(
        "--slicecli-model",
        metavar="PATH_OR_ID",
        help="Test the adapter on this checkpoint instead of a tiny random model; takes the memory of three copies.",
    )
    group.addoption(
        "--slicecli-slice", metavar="PATH_OR_ID", help="The slice that `slice_under_test` gives where no marker does."
    )
    group.addoption(
        "--slicecli-text",
        metavar="NAME|FILE",
        help="Text for the perplexity of the slice; default: the one in its record.",
    )
    group.addoption(
        "--slicecli-tolerance",
        metavar="F",
        type=float,
        default=0.02,
        help="How much worse than recorded a perplexity may be, as a fraction; default: %(default)s.",
    )
    group.addoption(
        "--slicecli-device", metavar="DEVICE", default="cpu", help="Where to compute; default: %(default)s."
    )
    group.addoption(
        "--slicecli-serve",
        choices=("llama.cpp", "vllm"),
        help="Run the slice in this program too, where it is installed, and compare its predictions with those of "
        "transformers.",
    )
    group.addoption("--slicecli-report", metavar="FILE", help="Write what the suites found to this file, as JSON.")


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers, and the report where one is asked for."""
    config.addinivalue_line(
        "markers",
        "slicecli_slice(path_or_id, text=None, tolerance=None, max_perplexity=None): the slice that "
        "`slice_under_test` gives, and how good it must be",
    )
    config.addinivalue_line(
        "markers", "slicecli_requires(*capabilities): skip where the adapter under test does not declare them"
    )
    config.addinivalue_line("markers", f"{SUITE}: a test of slicecli's suites, which the report lists")
    path = config.getoption("slicecli_report")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Report(config, Path(path)), "slicecli-report")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what was not asked for: of `--pyargs slicecli.testing` a suite, of `SliceTests` a program's test."""
    unwanted = {
        "slicecli.testing.test_adapter" if config.getoption("slicecli_slice") else "slicecli.testing.test_slice"
    }
    if config.getoption("slicecli_adapter") or config.getoption("slicecli_model"):
        unwanted.discard("slicecli.testing.test_adapter")
    out = [item for item in items if getattr(getattr(item, "module", None), "__name__", "") in unwanted]
    if not config.getoption("slicecli_serve"):
        out += [item for item in items if item.name == SERVING_TEST and SUITE in item.keywords and item not in out]
    if out:
        config.hook.pytest_deselected(items=out)
        items[:] = [item for item in items if item not in out]


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what is under test, where something is."""
    under_test = {name: config.getoption(f"slicecli_{name}") for name in ("adapter", "model", "slice")}
    named = [f"{name} {value}" for name, value in under_test.items() if value]
    if not named:
        return None
    versions = ", ".join(f"{package} {number}" for package, number in _versions().items())
    return f"slicecli: {', '.join(named)} ({versions})"


def _versions() -> dict[str, str]:
    from slicecli.runtime.versions import __version__, package_versions

    return {"slicecli": __version__, **package_versions()}


class _Report:
    """Collects the outcomes of the suites' tests and writes them at the end."""

    def __init__(self, config: pytest.Config, path: Path) -> None:
        self._config = config
        self._path = path
        self._tests: dict[str, dict[str, Any]] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep an outcome: of the call, or of whatever came before and did not pass."""
        if SUITE not in report.keywords or (report.when != "call" and report.passed):
            return
        message = ""
        if report.failed or report.skipped:
            longrepr: Any = report.longrepr
            crash = getattr(longrepr, "reprcrash", None)
            message = crash.message if crash else str(longrepr[2] if isinstance(longrepr, tuple) else longrepr)
        self._tests[report.nodeid] = {
            "name": report.nodeid,
            "outcome": report.outcome,
            "seconds": round(report.duration, 3),
            "message": message,
            "measured": dict(report.user_properties),
        }

    def pytest_sessionfinish(self) -> None:
        """Write the report."""
        tests = list(self._tests.values())
        option = self._config.getoption
        document = {
            "adapter": option("slicecli_adapter"),
            "model": option("slicecli_model"),
            "slice": option("slicecli_slice"),
            "device": option("slicecli_device"),
            "versions": _versions(),
            "outcomes": {
                outcome: sum(test["outcome"] == outcome for test in tests)
                for outcome in ("passed", "failed", "skipped")
            },
            "tests": tests,
        }
        self._path.write_text(json.dumps(document, indent=2, default=str) + "\n", encoding="utf-8")


@pytest.fixture(scope="class")
def slicecli_subject(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Subject:
    """The model that a class of `slicecli.testing.AdapterTests` tests its adapter on."""
    from slicecli.testing.adapter_tests import make_subject

    return make_subject(request, tmp_path_factory.mktemp("slicecli"))


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., Any]:
    """A function that gives a tiny random model of a family: `tiny_model("llama")`.

    It takes the name of an adapter or a model type, then config fields to change, a `seed` and a `dtype`. Every
    parameter of the model matters: no bias is zero and no norm weight is one.
    """
    from slicecli.family.plugins import plugins
    from slicecli.proof.tiny import random_model, tiny_config
    from slicecli.testing.adapter_tests import tiny_of

    def make(name: str, seed: int = 0, dtype: str = "float32", **changes: Any) -> Any:
        adapters = plugins().adapters
        adapter = adapters.get(name) or next((one for one in adapters.values() if name in one.model_types), None)
        if adapter is None:
            return random_model(tiny_config(name, **changes), seed, dtype)
        model_type = name if name in adapter.model_types else adapter.model_types[0]
        return random_model(tiny_of(adapter, model_type, **changes), seed, dtype)

    return make


@pytest.fixture
def tiny_checkpoint(tiny_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """A function that gives a folder with a tiny model and a tokenizer; it takes what `tiny_model` takes."""
    from slicecli.testing.checkpoints import save_checkpoint

    def make(name: str, **changes: Any) -> Path:
        return save_checkpoint(tiny_model(name, **changes), tmp_path / f"tiny-{name}")

    return make


@pytest.fixture(scope="session")
def embedded_model() -> Path:
    """The folder of the embedded model: a trained Llama of hidden size 96, for tests where quality matters."""
    from slicecli.data.demo import MODEL_FOLDER

    return MODEL_FOLDER


@pytest.fixture(scope="session")
def assert_logits_close() -> Callable[..., float]:
    """A function that compares two models' logits on the same tokens, in float64 where the models are.

    `assert_logits_close(model, other, token_ids, tolerance=1e-9)` returns the relative error that it allowed.
    """
    from slicecli.proof.declaration import logits, relative_error

    def check(model: Any, other: Any, token_ids: Any, tolerance: float = 1e-9) -> float:
        error = relative_error(logits(other, token_ids), logits(model, token_ids))
        assert error <= tolerance, f"the logits differ by {error:.1e}, more than {tolerance:.0e}"
        return error

    return check


@pytest.fixture
def isolated_hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Hub cache of the test's own, for this process and those it starts; no token is visible in it."""
    home = tmp_path / "huggingface"
    home.mkdir()
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_ASSETS_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(home))
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HOME", str(home))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    return home


@pytest.fixture
def loopback_hub(isolated_hub_cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub on this machine, empty, with a cache of the test's own.

    Processes that the test starts use it as they are, with the token of the user `me`. The Hub's client in the test's
    own process does not: it was told at import where the Hub is. There, use `loopback_hub.api()`.
    """
    from slicecli.testing.loopback_hub import LoopbackHub

    with LoopbackHub() as hub:
        wanted = hub.environment(isolated_hub_cache)
        for name in set(os.environ) - set(wanted):
            monkeypatch.delenv(name)
        for name, value in wanted.items():
            if os.environ.get(name) != value:
                monkeypatch.setenv(name, value)
        yield hub


@pytest.fixture
def slice_under_test(request: pytest.FixtureRequest) -> SliceUnderTest:
    """The slice named by the marker `slicecli_slice`, or else by `--slicecli-slice`."""
    from slicecli.testing.slice_tests import SliceUnderTest

    marker = request.node.get_closest_marker("slicecli_slice")
    option = request.config.getoption
    given = dict(marker.kwargs) if marker else {}
    name = marker.args[0] if marker and marker.args else option("slicecli_slice")
    if name is None:
        pytest.skip("no slice is named: give --slicecli-slice, or the marker slicecli_slice")
    tolerance = given.get("tolerance")
    return SliceUnderTest.find(
        str(name),
        text=given.get("text") or option("slicecli_text"),
        tolerance=option("slicecli_tolerance") if tolerance is None else tolerance,
        max_perplexity=given.get("max_perplexity"),
        device=option("slicecli_device"),
        program=option("slicecli_serve") or "",
    )
