"""Phi-1, Phi-1.5 and Phi-2: attention and MLP in parallel behind one LayerNorm, biases throughout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Linear, Norm, PassedThrough, Sizes, attention, mlp

QUERY_NORMS = tuple(
    PassedThrough(f"self_attn.{norm}.{parameter}", "head_dim")
    for norm in ("q_layernorm", "k_layernorm")
    for parameter in ("weight", "bias")
)


def block(sizes: Sizes, _index: int) -> Block:
    """Declare the block; norms on queries and keys are there if the config says so."""
    return Block(
        (attention(True, True, writer="dense"), mlp("mlp.fc1", "mlp.fc2", norm="input_layernorm", bias=True)),
        is_parallel=True,
        passed_through=QUERY_NORMS if sizes.value("qk_layernorm") else (),
    )


def stock_obstacle(config: Mapping[str, Any]) -> str:
    """Say why a config cannot be sliced in the stock class: norms on queries take their width from the hidden size."""
    if not config.get("qk_layernorm"):
        return ""
    return "PhiAttention takes the width of its norms on queries and keys from hidden_size / num_attention_heads."


ADAPTER = Adapter(
    name="phi",
    model_types=("phi",),
    block=block,
    final_norm="model.final_layernorm",
    head=Linear("lm_head", "vocab_size", bias=True),
    norm=Norm("layer", epsilon="layer_norm_eps", has_bias=True),
    stock_obstacle=stock_obstacle,
    defaults=MappingProxyType({"hidden_act": "gelu_new", "layer_norm_eps": 1e-5}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register Phi-1 and Phi-2."""
    register(ADAPTER)
