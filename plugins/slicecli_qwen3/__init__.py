"""Qwen3: norms on queries and keys inside the attention, which share the stream norms' epsilon."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Branch, Kept, Linear

ADAPTER = Adapter(
    name="qwen3",
    model_types=("qwen3",),
    branches=(
        Branch(
            module="self_attn",
            norm="input_layernorm",
            readers=(
                Linear("self_attn.q_proj", "query", bias="attention_bias", feeds_norm=True),
                Linear("self_attn.k_proj", "key_value", bias="attention_bias", feeds_norm=True),
                Linear("self_attn.v_proj", "key_value", bias="attention_bias"),
            ),
            writer=Linear("self_attn.o_proj", "query", bias="attention_bias"),
        ),
        Branch(
            module="mlp",
            norm="post_attention_layernorm",
            readers=(
                Linear("mlp.gate_proj", "intermediate_size"),
                Linear("mlp.up_proj", "intermediate_size"),
            ),
            writer=Linear("mlp.down_proj", "intermediate_size"),
        ),
    ),
    kept=(
        Kept("self_attn.q_norm.weight", "head_dim"),
        Kept("self_attn.k_norm.weight", "head_dim"),
    ),
    defaults=MappingProxyType({"num_key_value_heads": 32, "head_dim": 128}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Qwen3 family."""
    register(ADAPTER)
