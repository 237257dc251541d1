"""GPT-2: LayerNorms, learned positions, weights stored as (inputs, outputs)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Branch, Embedding, Linear, Norm


def obstacle(config: Mapping[str, Any]) -> str:
    """Say why a config cannot be sliced: a decoder of a pair reads another model's states."""
    return (
        "This GPT-2 config has cross-attention, which reads another model." if config.get("add_cross_attention") else ""
    )


ADAPTER = Adapter(
    name="gpt2",
    model_types=("gpt2",),
    block=Block(
        (
            Branch(
                norm="ln_1",
                readers=(Linear("attn.c_attn", "query_key_value", bias=True, is_transposed=True),),
                writer=Linear("attn.c_proj", "query", bias=True, is_transposed=True),
                module="attn",
            ),
            Branch(
                norm="ln_2",
                readers=(Linear("mlp.c_fc", "intermediate_size", bias=True, is_transposed=True),),
                writer=Linear("mlp.c_proj", "intermediate_size", bias=True, is_transposed=True),
                module="mlp",
            ),
        )
    ),
    blocks="transformer.h",
    embeddings=(Embedding("transformer.wte"), Embedding("transformer.wpe", "max_position_embeddings")),
    final_norm="transformer.ln_f",
    norm=Norm("layer", epsilon="layer_norm_epsilon", has_bias=True),
    keeps_width=True,
    names=MappingProxyType(
        {
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        }
    ),
    defaults=MappingProxyType(
        {"tie_word_embeddings": True, "max_position_embeddings": 1024, "layer_norm_epsilon": 1e-5}
    ),
    derived=MappingProxyType(
        {"intermediate_size": lambda config: config.get("n_inner") or 4 * (config.get("n_embd") or 768)}
    ),
    unused_tensors=(r"attn\.masked_bias$",),  # masks that old transformers stored
    stock_obstacle="GPT2Attention takes the width of a head from n_embd / n_head.",
    obstacle=obstacle,
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register GPT-2."""
    register(ADAPTER)
