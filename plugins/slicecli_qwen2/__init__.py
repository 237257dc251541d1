"""Qwen2 and Qwen2.5: biases on query, key and value, none elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, attention, gated_mlp

ADAPTER = Adapter(
    name="qwen2",
    model_types=("qwen2",),
    block=Block((attention(bias=True), gated_mlp())),
    defaults=MappingProxyType({"num_key_value_heads": 32}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Qwen2 family."""
    register(ADAPTER)
