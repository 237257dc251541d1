"""ERNIE 4.5, the dense models: Llama's block with one switch for all biases."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, attention, gated_mlp

ADAPTER = Adapter(
    name="ernie4_5",
    model_types=("ernie4_5",),
    block=Block((attention("use_bias", "use_bias"), gated_mlp("use_bias"))),
    defaults=MappingProxyType(
        {"num_key_value_heads": 2, "head_dim": 128, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}
    ),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register dense ERNIE 4.5."""
    register(ADAPTER)
