"""Slice the residual stream of decoder language models.

The public names below are imported on first use, so that `import slicecli` stays light: the command line and
the plugins import this package at every start.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from slicecli.family.hookspecs import hookimpl
from slicecli.modeling import register_when_needed
from slicecli.runtime.versions import __version__

if TYPE_CHECKING:
    from slicecli.api import estimate, evaluate, load, perplexity, slice_model

__all__ = ["__version__", "estimate", "evaluate", "hookimpl", "load", "perplexity", "slice_model"]

register_when_needed()


def __getattr__(name: str) -> Any:
    if name in __all__:
        from slicecli import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
