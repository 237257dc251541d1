"""Gemma 1: norms that multiply by 1 + weight, and embeddings multiplied by the root of the hidden size."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Norm, attention, gated_mlp

ADAPTER = Adapter(
    name="gemma",
    model_types=("gemma",),
    block=Block((attention(bias="attention_bias", writer_bias="attention_bias"), gated_mlp())),
    norm=Norm(weight_offset=1.0),
    scales_embeddings_by_width=True,
    defaults=MappingProxyType(
        {
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 16,
            "head_dim": 256,
            "tie_word_embeddings": True,
            "rms_norm_eps": 1e-6,
        }
    ),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register Gemma 1."""
    register(ADAPTER)
