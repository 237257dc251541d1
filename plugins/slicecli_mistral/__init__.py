"""Mistral 7B, Ministral and their relatives: Llama's block without biases, and no rule on the hidden size."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, attention, gated_mlp

ADAPTER = Adapter(
    name="mistral",
    model_types=("mistral", "ministral"),
    block=Block((attention(), gated_mlp())),
    defaults=MappingProxyType({"num_key_value_heads": 8, "sliding_window": 4096, "rms_norm_eps": 1e-6}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Mistral family."""
    register(ADAPTER)
