"""OLMo 1: LayerNorms without weight or bias, whose epsilon the class fixes."""

from __future__ import annotations

from collections.abc import Callable

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Norm, attention, gated_mlp

ADAPTER = Adapter(
    name="olmo",
    model_types=("olmo",),
    block=Block((attention(bias="attention_bias", writer_bias="attention_bias"), gated_mlp())),
    norm=Norm("layer", epsilon=1e-5, has_weight=False),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register OLMo 1."""
    register(ADAPTER)
