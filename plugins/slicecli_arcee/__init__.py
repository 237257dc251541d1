"""Arcee's AFM: Llama's attention, an MLP without gate."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, attention, mlp

ADAPTER = Adapter(
    name="arcee",
    model_types=("arcee",),
    block=Block((attention("attention_bias", "attention_bias"), mlp("mlp.up_proj", "mlp.down_proj", bias="mlp_bias"))),
    # ArceeConfig refuses a hidden size that the head count does not divide
    dim_divisors=("num_attention_heads",),
    defaults=MappingProxyType({"hidden_act": "relu2", "rms_norm_eps": 1e-5}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register Arcee's AFM."""
    register(ADAPTER)
