"""Seed-OSS: Llama's block with biases on query, key and value."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, attention, gated_mlp

ADAPTER = Adapter(
    name="seed_oss",
    model_types=("seed_oss",),
    block=Block((attention(bias="attention_bias", writer_bias="attention_out_bias"), gated_mlp(bias="mlp_bias"))),
    defaults=MappingProxyType(
        {"num_key_value_heads": 8, "head_dim": 128, "attention_bias": True, "rms_norm_eps": 1e-6}
    ),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register Seed-OSS."""
    register(ADAPTER)
