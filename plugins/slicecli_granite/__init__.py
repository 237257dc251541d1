"""Granite 3: Llama's block whose branches, embeddings and logits are multiplied by numbers from the config."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, attention, gated_mlp

ADAPTER = Adapter(
    name="granite",
    model_types=("granite",),
    block=Block(
        (
            attention(bias="attention_bias", writer_bias="attention_bias", multiplier="residual_multiplier"),
            gated_mlp(bias="mlp_bias", multiplier="residual_multiplier"),
        )
    ),
    defaults=MappingProxyType({"residual_multiplier": 1.0, "rms_norm_eps": 1e-6}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Granite family."""
    register(ADAPTER)
