"""Qwen2 and Qwen2.5: biases on query, key and value, none elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Branch, Linear

ADAPTER = Adapter(
    name="qwen2",
    model_types=("qwen2",),
    branches=(
        Branch(
            module="self_attn",
            norm="input_layernorm",
            readers=(
                Linear("self_attn.q_proj", "query", bias=True),
                Linear("self_attn.k_proj", "key_value", bias=True),
                Linear("self_attn.v_proj", "key_value", bias=True),
            ),
            writer=Linear("self_attn.o_proj", "query"),
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
    defaults=MappingProxyType({"num_key_value_heads": 32}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Qwen2 family."""
    register(ADAPTER)
