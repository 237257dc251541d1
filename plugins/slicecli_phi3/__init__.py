"""Phi-3, Phi-3.5-mini and Phi-4: query, key and value in one linear, gate and up in another."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Branch, Linear, PortableClass, Sizes

FRACTION = "partial_rotary_factor"


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


def partial_rotation(sizes: Sizes) -> str:
    """Say why a config cannot be that of a class that rotates whole heads."""
    rope = sizes.value("rope_parameters")
    factor = (rope if isinstance(rope, Mapping) else {}).get(FRACTION, sizes.value(FRACTION, 1.0))
    return "" if factor == 1.0 else "it rotates a part of each head only"


def partial_rotation_or_window(sizes: Sizes) -> str:
    """Say the same, and why the class cannot be one that attends to everything."""
    window = sizes.value("sliding_window")
    is_limited = window is not None and window < sizes.number("max_position_embeddings")
    return "it has a sliding window" if is_limited else partial_rotation(sizes)


def rotation(sizes: Sizes) -> dict[str, Any] | None:
    """Return how positions rotate, without the fraction that is always one here."""
    found = sizes.value("rope_parameters")
    return {name: value for name, value in found.items() if name != FRACTION} if isinstance(found, Mapping) else None


SPLITS = MappingProxyType(
    {
        "self_attn.qkv_proj": (
            Linear("self_attn.q_proj", "query"),
            Linear("self_attn.k_proj", "key_value"),
            Linear("self_attn.v_proj", "key_value"),
        ),
        "mlp.gate_up_proj": (
            Linear("mlp.gate_proj", "intermediate_size"),
            Linear("mlp.up_proj", "intermediate_size"),
        ),
    }
)
PORTABLE = (
    PortableClass(
        "llama",
        MappingProxyType({"attention_bias": False, "mlp_bias": False, "rope_parameters": rotation}),
        SPLITS,
        obstacle=partial_rotation_or_window,
    ),
    # any dim, and a sliding window if there is one
    PortableClass("mistral", MappingProxyType({"rope_parameters": rotation}), SPLITS, obstacle=partial_rotation),
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
    defaults=MappingProxyType({"rms_norm_eps": 1e-5, "max_position_embeddings": 4096}),
    portable=PORTABLE,
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Phi-3 family."""
    register(ADAPTER)
