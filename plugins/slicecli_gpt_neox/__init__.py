"""GPT-NeoX and Pythia: attention and MLP in parallel, each behind a LayerNorm of its own."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Branch, Embedding, Linear, Norm, Sizes, mlp


def block(sizes: Sizes, _index: int) -> Block:
    """Declare the block, parallel unless the config says otherwise."""
    attention = Branch(
        norm="input_layernorm",
        readers=(Linear("attention.query_key_value", "query_key_value", "attention_bias"),),
        writer=Linear("attention.dense", "query", "attention_bias"),
        module="attention",
    )
    feed_forward = mlp("mlp.dense_h_to_4h", "mlp.dense_4h_to_h", bias=True)
    return Block((attention, feed_forward), is_parallel=bool(sizes.value("use_parallel_residual")))


ADAPTER = Adapter(
    name="gpt_neox",
    model_types=("gpt_neox",),
    block=block,
    blocks="gpt_neox.layers",
    embeddings=(Embedding("gpt_neox.embed_in"),),
    final_norm="gpt_neox.final_layer_norm",
    norm=Norm("layer", epsilon="layer_norm_eps", has_bias=True),
    names=MappingProxyType({"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}),
    defaults=MappingProxyType({"attention_bias": True, "use_parallel_residual": True, "layer_norm_eps": 1e-5}),
    stock_obstacle="GPTNeoXAttention takes the width of a head from hidden_size / num_attention_heads.",
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register GPT-NeoX and Pythia."""
    register(ADAPTER)
