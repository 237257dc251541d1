"""GPT-J: attention and MLP in parallel behind one LayerNorm; biases in the MLP and the head only."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Branch, Embedding, Linear, Norm, mlp

ADAPTER = Adapter(
    name="gptj",
    model_types=("gptj",),
    block=Block(
        (
            Branch(
                norm="ln_1",
                readers=(
                    Linear("attn.q_proj", "query"),
                    Linear("attn.k_proj", "query"),
                    Linear("attn.v_proj", "query"),
                ),
                writer=Linear("attn.out_proj", "query"),
                module="attn",
            ),
            mlp("mlp.fc_in", "mlp.fc_out", norm="ln_1", bias=True),
        ),
        is_parallel=True,
    ),
    blocks="transformer.h",
    embeddings=(Embedding("transformer.wte"),),
    final_norm="transformer.ln_f",
    head=Linear("lm_head", "vocab_size", bias=True),
    norm=Norm("layer", epsilon="layer_norm_epsilon", has_bias=True),
    names=MappingProxyType(
        {
            "hidden_size": "n_embd",
            "intermediate_size": "n_inner",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
        }
    ),
    derived=MappingProxyType(
        {"intermediate_size": lambda config: config.get("n_inner") or 4 * (config.get("n_embd") or 4096)}
    ),
    stock_obstacle="GPTJAttention takes the width of a head from n_embd / n_head.",
    defaults=MappingProxyType({"layer_norm_epsilon": 1e-5}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register GPT-J."""
    register(ADAPTER)
