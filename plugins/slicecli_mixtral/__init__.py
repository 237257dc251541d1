"""Mixtral: experts behind a router in place of the MLP."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Branch, Experts, Linear, attention

ADAPTER = Adapter(
    name="mixtral",
    model_types=("mixtral",),
    block=Block(
        (
            attention(),
            Branch(
                norm="post_attention_layernorm",
                readers=(Linear("mlp.gate", "num_local_experts"),),
                writer=None,
                module="mlp",
                experts=Experts("mlp.experts", "num_local_experts", "2*intermediate_size", "intermediate_size"),
            ),
        )
    ),
    defaults=MappingProxyType(
        {"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
    ),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register Mixtral."""
    register(ADAPTER)
