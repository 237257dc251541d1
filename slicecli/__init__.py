"""Slice the residual stream of decoder language models.

The names below are public, as are `slicecli.adapters` and `slicecli.testing`. They are imported on first use, so that
`import slicecli` stays light: the command line and the plugins import this package at every start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slicecli.errors import SlicecliError, SlicecliWarning
from slicecli.family.hookspecs import hookimpl
from slicecli.modeling import register_when_needed
from slicecli.runtime.versions import __version__

if TYPE_CHECKING:
    from slicecli.api import estimate, evaluate, load, perplexity, recover, slice_model
    from slicecli.evaluation.options import EvaluationOptions
    from slicecli.jobs.options import RecoverOptions, SliceOptions
    from slicecli.jobs.sweep import run_sweep

__all__ = [
    "EvaluationOptions",
    "RecoverOptions",
    "SliceOptions",
    "SlicecliError",
    "SlicecliWarning",
    "__version__",
    "estimate",
    "evaluate",
    "hookimpl",
    "load",
    "perplexity",
    "recover",
    "run_sweep",
    "slice_model",
]

_HOMES = {
    "EvaluationOptions": "slicecli.evaluation.options",
    "RecoverOptions": "slicecli.jobs.options",
    "SliceOptions": "slicecli.jobs.options",
    "run_sweep": "slicecli.jobs.sweep",
}

register_when_needed()


def __getattr__(name: str) -> Any:
    if name in __all__:
        import importlib

        return getattr(importlib.import_module(_HOMES.get(name, "slicecli.api")), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
