"""Qwen3: norms on queries and keys inside the attention."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Kept, attention, gated_mlp

QUERY_NORMS = (Kept("self_attn.q_norm.weight", "head_dim"), Kept("self_attn.k_norm.weight", "head_dim"))

ADAPTER = Adapter(
    name="qwen3",
    model_types=("qwen3",),
    block=Block((attention(bias="attention_bias", writer_bias="attention_bias"), gated_mlp()), kept=QUERY_NORMS),
    defaults=MappingProxyType({"num_key_value_heads": 32, "head_dim": 128}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Qwen3 family."""
    register(ADAPTER)
