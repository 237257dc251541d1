"""HunYuan v1, the dense models: norms on queries and keys inside the attention."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, PassedThrough, attention, gated_mlp

QUERY_NORMS = (
    PassedThrough("self_attn.query_layernorm.weight", "head_dim"),
    PassedThrough("self_attn.key_layernorm.weight", "head_dim"),
)

ADAPTER = Adapter(
    name="hunyuan_v1_dense",
    model_types=("hunyuan_v1_dense",),
    block=Block((attention("attention_bias", "attention_bias"), gated_mlp()), passed_through=QUERY_NORMS),
    defaults=MappingProxyType({"rms_norm_eps": 1e-5}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register dense HunYuan v1."""
    register(ADAPTER)
