"""Mistral 7B and its relatives: Llama's block without biases, and no rule on the hidden size."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Branch, Linear

ADAPTER = Adapter(
    name="mistral",
    model_types=("mistral",),
    branches=(
        Branch(
            module="self_attn",
            norm="input_layernorm",
            readers=(
                Linear("self_attn.q_proj", "query"),
                Linear("self_attn.k_proj", "key_value"),
                Linear("self_attn.v_proj", "key_value"),
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
    defaults=MappingProxyType({"num_key_value_heads": 8}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Mistral family."""
    register(ADAPTER)
