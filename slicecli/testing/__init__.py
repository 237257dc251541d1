"""Reusable tests: of a family's declaration, and of a slice that you publish or serve.

`AdapterTests` tests every property that a declaration must have; plugin authors subclass it and set the adapter.
`SliceTests` tests a slice. Both also run without any code:

    pytest --pyargs slicecli.testing --slicecli-adapter llama
    pytest --pyargs slicecli.testing --slicecli-slice ./my-slice

The names below are imported on first use: the pytest plugin imports this package at every start of pytest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from slicecli.testing.adapter_tests import AdapterTests
    from slicecli.testing.checkpoints import byte_tokenizer, nonsense_text, save_checkpoint
    from slicecli.testing.slice_tests import SliceTests

__all__ = ["AdapterTests", "SliceTests", "byte_tokenizer", "nonsense_text", "save_checkpoint"]

_HOMES = {
    "AdapterTests": "adapter_tests",
    "SliceTests": "slice_tests",
    "byte_tokenizer": "checkpoints",
    "nonsense_text": "checkpoints",
    "save_checkpoint": "checkpoints",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(f"slicecli.testing.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
