"""Phi-3, Phi-3.5-mini and Phi-4: query, key and value in one linear, gate and up in another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Branch, Linear


def long_rope_obstacle(config: Mapping[str, Any]) -> str:
    """Say why a config with LongRoPE cannot be sliced in the stock class.

    A sliced config would need factors of another length than the heads (whose width does not change) use.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(rope, Mapping) or (rope.get("short_factor") is None and rope.get("long_factor") is None):
        return ""
    return (
        "this config uses LongRoPE, whose factors Phi3Config ties to hidden_size / num_attention_heads, so no stock "
        "Phi-3 config can describe it. The 4k variants can be sliced."
    )


ADAPTER = Adapter(
    name="phi3",
    model_types=("phi3",),
    block=Block(
        (
            Branch(
                norm="input_layernorm",
                readers=(Linear("self_attn.qkv_proj", "query_key_value"),),
                writer=Linear("self_attn.o_proj", "query"),
                module="self_attn",
            ),
            Branch(
                norm="post_attention_layernorm",
                readers=(Linear("mlp.gate_up_proj", "2*intermediate_size"),),
                writer=Linear("mlp.down_proj", "intermediate_size"),
                module="mlp",
            ),
        )
    ),
    stock_obstacle=long_rope_obstacle,
    defaults=MappingProxyType({"rms_norm_eps": 1e-5}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Phi-3 family."""
    register(ADAPTER)
