"""Nemotron 3 and 4, Minitron: LayerNorms that multiply by 1 + weight, an MLP without gate."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Norm, attention, mlp

ADAPTER = Adapter(
    name="nemotron",
    model_types=("nemotron",),
    block=Block((attention("attention_bias", "attention_bias"), mlp("mlp.up_proj", "mlp.down_proj", bias="mlp_bias"))),
    norm=Norm("layer", epsilon="norm_eps", has_bias=True, weight_offset=1.0),
    defaults=MappingProxyType({"hidden_act": "relu2", "norm_eps": 1e-5}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Nemotron family."""
    register(ADAPTER)
