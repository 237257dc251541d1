"""SmolLM3: Llama's block, some layers without rotary positions."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, attention, gated_mlp

ADAPTER = Adapter(
    name="smollm3",
    model_types=("smollm3",),
    block=Block((attention(bias="attention_bias", writer_bias="attention_bias"), gated_mlp(bias="mlp_bias"))),
    defaults=MappingProxyType({"num_key_value_heads": 4, "tie_word_embeddings": True}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register SmolLM3."""
    register(ADAPTER)
