"""Falcon 1: parallel or sequential, one LayerNorm or two, rotary positions or ALiBi, as the config says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Branch, Embedding, Linear, Norm, Sizes, mlp


def block(sizes: Sizes, _index: int) -> Block:
    """Declare the block as the config arranges it."""
    is_new = bool(sizes.value("new_decoder_architecture"))
    is_parallel = is_new or bool(sizes.value("parallel_attn"))
    attention_norm, mlp_norm = "input_layernorm", "input_layernorm"
    if not is_parallel:
        mlp_norm = "post_attention_layernorm"
    elif is_new and sizes.value("num_ln_in_parallel_attn", 2) == 2:
        attention_norm, mlp_norm = "ln_attn", "ln_mlp"
    attention = Branch(
        norm=attention_norm,
        readers=(Linear("self_attention.query_key_value", "query_key_value", "bias"),),
        writer=Linear("self_attention.dense", "query", "bias"),
        module="self_attention",
    )
    feed_forward = mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", norm=mlp_norm, bias="bias")
    return Block((attention, feed_forward), is_parallel)


def key_value_heads(config: Mapping[str, Any]) -> Any:
    """Return the number of key/value heads: one with multi-query attention, all of them in the first architecture."""
    if not config.get("new_decoder_architecture"):
        multi_query = config.get("multi_query")
        return 1 if multi_query is None or multi_query else config.get("num_attention_heads")
    return config.get("num_kv_heads") or config.get("num_attention_heads")


ADAPTER = Adapter(
    name="falcon",
    model_types=("falcon",),
    block=block,
    blocks="transformer.h",
    embeddings=(Embedding("transformer.word_embeddings"),),
    final_norm="transformer.ln_f",
    norm=Norm("layer", epsilon="layer_norm_epsilon", has_bias=True),
    names=MappingProxyType({"intermediate_size": "ffn_hidden_size"}),
    defaults=MappingProxyType({"parallel_attn": True, "tie_word_embeddings": True, "layer_norm_epsilon": 1e-5}),
    derived=MappingProxyType(
        {
            "num_key_value_heads": key_value_heads,
            "intermediate_size": lambda config: config.get("ffn_hidden_size") or 4 * config["hidden_size"],
        }
    ),
    stock_obstacle="FalconAttention takes the width of a head from hidden_size / num_attention_heads.",
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register Falcon 1."""
    register(ADAPTER)
