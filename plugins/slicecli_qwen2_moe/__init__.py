"""Qwen1.5-MoE and Qwen2-MoE: experts behind a router, and one expert that sees every token behind a gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Branch, Experts, Linear, Sizes, attention, gated_mlp

EXPERTS = Branch(
    norm="post_attention_layernorm",
    readers=(
        Linear("mlp.gate", "num_experts"),
        Linear("mlp.shared_expert.gate_proj", "shared_expert_intermediate_size"),
        Linear("mlp.shared_expert.up_proj", "shared_expert_intermediate_size"),
        Linear("mlp.shared_expert_gate", "1"),
    ),
    writer=Linear("mlp.shared_expert.down_proj", "shared_expert_intermediate_size", gate="mlp.shared_expert_gate"),
    module="mlp",
    experts=Experts("mlp.experts", "num_experts", "2*moe_intermediate_size", "moe_intermediate_size"),
)


def block(sizes: Sizes, index: int) -> Block:
    """Declare a block: every `decoder_sparse_step`-th has experts, but for those listed in `mlp_only_layers`."""
    is_dense = index in (sizes.value("mlp_only_layers") or ())
    has_experts = not is_dense and (index + 1) % sizes.number("decoder_sparse_step") == 0
    return Block((attention(bias="qkv_bias"), EXPERTS if has_experts else gated_mlp()))


def window(config: Mapping[str, Any]) -> Any:
    """Return the sliding window, which the config class drops unless another field asks for it."""
    return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None


ADAPTER = Adapter(
    name="qwen2_moe",
    model_types=("qwen2_moe",),
    block=block,
    defaults=MappingProxyType(
        {
            "num_key_value_heads": 16,
            "decoder_sparse_step": 1,
            "qkv_bias": True,
            "num_experts": 60,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 1408,
            "shared_expert_intermediate_size": 5632,
            "intermediate_size": 5632,
            "max_window_layers": 28,
            "rms_norm_eps": 1e-6,
        }
    ),
    mlp_widths=("moe_intermediate_size", "shared_expert_intermediate_size", "intermediate_size"),
    derived=MappingProxyType({"sliding_window": window}),
    has_window=lambda sizes, index: index % 2 == 0 and index < sizes.number("max_window_layers"),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register Qwen1.5-MoE and Qwen2-MoE."""
    register(ADAPTER)
