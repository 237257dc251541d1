"""OPT: LayerNorms, learned positions, an MLP whose linears hang on the block itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Embedding, Norm, attention, mlp


def obstacle(config: Mapping[str, Any]) -> str:
    """Say why a config cannot be sliced: OPT-350m puts its norms after the branches and projects its embeddings."""
    if config.get("do_layer_norm_before") is False:
        return "This OPT config normalises after each branch, so the stream itself passes through norms."
    if config.get("word_embed_proj_dim") not in (None, config.get("hidden_size")):
        return "This OPT config projects its embeddings to the hidden size, which the adapter does not describe."
    if config.get("layer_norm_elementwise_affine") is False:
        return "This OPT config has norms without weight, which the adapter does not describe."
    return ""


ADAPTER = Adapter(
    name="opt",
    model_types=("opt",),
    block=Block(
        (
            attention("enable_bias", "enable_bias", writer="out_proj", norm="self_attn_layer_norm"),
            mlp(
                "fc1",
                "fc2",
                norm="final_layer_norm",
                bias="enable_bias",
                module="",
                activation="activation_fn",
            ),
        )
    ),
    blocks="model.decoder.layers",
    embeddings=(
        Embedding("model.decoder.embed_tokens"),
        # the class counts positions from 2
        Embedding("model.decoder.embed_positions", "max_position_embeddings", extra_rows=2),
    ),
    final_norm="model.decoder.final_layer_norm",
    norm=Norm("layer", epsilon=1e-5, has_bias=True),
    names=MappingProxyType({"intermediate_size": "ffn_dim"}),
    defaults=MappingProxyType(
        {"enable_bias": True, "tie_word_embeddings": True, "intermediate_size": 3072, "max_position_embeddings": 2048}
    ),
    stock_obstacle="OPTAttention takes the width of a head from hidden_size / num_attention_heads.",
    obstacle=obstacle,
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the OPT family."""
    register(ADAPTER)
