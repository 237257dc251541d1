"""Llama 1, 2 and 3.x, and the many models published under the same model type."""

from __future__ import annotations

from collections.abc import Callable

from slicecli import hookimpl
from slicecli.adapters import Adapter, Branch, Linear

ADAPTER = Adapter(
    name="llama",
    model_types=("llama",),
    branches=(
        Branch(
            module="self_attn",
            norm="input_layernorm",
            readers=(
                Linear("self_attn.q_proj", "query", bias="attention_bias"),
                Linear("self_attn.k_proj", "key_value", bias="attention_bias"),
                Linear("self_attn.v_proj", "key_value", bias="attention_bias"),
            ),
            writer=Linear("self_attn.o_proj", "query", bias="attention_bias"),
        ),
        Branch(
            module="mlp",
            norm="post_attention_layernorm",
            readers=(
                Linear("mlp.gate_proj", "intermediate_size", bias="mlp_bias"),
                Linear("mlp.up_proj", "intermediate_size", bias="mlp_bias"),
            ),
            writer=Linear("mlp.down_proj", "intermediate_size", bias="mlp_bias"),
        ),
    ),
    # LlamaConfig refuses a hidden size that the head count does not divide, even where head_dim is given.
    dim_divisors=("num_attention_heads",),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Llama family."""
    register(ADAPTER)
