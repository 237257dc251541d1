"""Llama 1, 2 and 3.x, and the many models published under the same model type."""

from __future__ import annotations

from collections.abc import Callable

from slicecli import hookimpl
from slicecli.adapters import Adapter, attention, gated_mlp

ADAPTER = Adapter(
    name="llama",
    model_types=("llama",),
    branches=(attention(bias="attention_bias", writer_bias="attention_bias"), gated_mlp(bias="mlp_bias")),
    # LlamaConfig refuses a hidden size that the head count does not divide, even where head_dim is given.
    dim_divisors=("num_attention_heads",),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Llama family."""
    register(ADAPTER)
