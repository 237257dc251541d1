"""Qwen3-MoE: experts behind a router, norms on queries and keys inside the attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Branch, Experts, Linear, PassedThrough, Sizes, attention, gated_mlp

QUERY_NORMS = (
    PassedThrough("self_attn.q_norm.weight", "head_dim"),
    PassedThrough("self_attn.k_norm.weight", "head_dim"),
)

EXPERTS = Branch(
    norm="post_attention_layernorm",
    readers=(Linear("mlp.gate", "num_experts"),),
    writer=None,
    module="mlp",
    experts=Experts("mlp.experts", "num_experts", "2*moe_intermediate_size", "moe_intermediate_size"),
)


def block(sizes: Sizes, index: int) -> Block:
    """Declare a block: every `decoder_sparse_step`-th has experts, but for those listed in `mlp_only_layers`."""
    is_dense = index in (sizes.value("mlp_only_layers") or ())
    has_experts = not is_dense and (index + 1) % sizes.number("decoder_sparse_step") == 0
    attend = attention(bias="attention_bias", writer_bias="attention_bias")
    return Block((attend, EXPERTS if has_experts else gated_mlp()), passed_through=QUERY_NORMS)


def window(config: Mapping[str, Any]) -> Any:
    """Return the sliding window, which the config class drops unless another field asks for it."""
    return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None


ADAPTER = Adapter(
    name="qwen3_moe",
    model_types=("qwen3_moe",),
    block=block,
    names=MappingProxyType({"num_experts": "num_local_experts"}),
    defaults=MappingProxyType(
        {
            "num_key_value_heads": 4,
            "decoder_sparse_step": 1,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "intermediate_size": 6144,
            "rms_norm_eps": 1e-6,
        }
    ),
    mlp_widths=("moe_intermediate_size", "intermediate_size"),
    derived=MappingProxyType({"sliding_window": window}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register Qwen3-MoE."""
    register(ADAPTER)
