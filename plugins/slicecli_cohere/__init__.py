"""Command R and Aya: attention and MLP in parallel behind one LayerNorm without bias."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Norm, PassedThrough, Sizes, attention, gated_mlp

QUERY_NORMS = (PassedThrough("self_attn.q_norm.weight", "query"), PassedThrough("self_attn.k_norm.weight", "key_value"))


def block(sizes: Sizes, _index: int) -> Block:
    """Declare the block; norms on queries and keys are there if the config says so."""
    return Block(
        (attention("attention_bias", "attention_bias"), gated_mlp(norm="input_layernorm")),
        is_parallel=True,
        passed_through=QUERY_NORMS if sizes.value("use_qk_norm") else (),
    )


def window(config: Mapping[str, Any]) -> Any:
    """Return the sliding window, which only the second type has."""
    return config.get("sliding_window", 4096) if config.get("model_type") == "cohere2" else None


ADAPTER = Adapter(
    name="cohere",
    model_types=("cohere", "cohere2"),
    block=block,
    norm=Norm("layer", epsilon="layer_norm_eps"),
    defaults=MappingProxyType({"tie_word_embeddings": True, "sliding_window_pattern": 4, "layer_norm_eps": 1e-5}),
    derived=MappingProxyType({"sliding_window": window}),
    # all but every fourth block
    has_window=lambda sizes, index: (index + 1) % sizes.number("sliding_window_pattern") != 0,
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register Command R and Aya."""
    register(ADAPTER)
