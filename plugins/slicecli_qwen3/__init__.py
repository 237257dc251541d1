"""Qwen3: norms on queries and keys inside the attention."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, PassedThrough, attention, gated_mlp

QUERY_NORMS = (
    PassedThrough("self_attn.q_norm.weight", "head_dim"),
    PassedThrough("self_attn.k_norm.weight", "head_dim"),
)


def window(config: Mapping[str, Any]) -> Any:
    """Return the sliding window, which the config class drops unless another field asks for it."""
    return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None


ADAPTER = Adapter(
    name="qwen3",
    model_types=("qwen3",),
    block=Block(
        (attention(bias="attention_bias", writer_bias="attention_bias"), gated_mlp()), passed_through=QUERY_NORMS
    ),
    defaults=MappingProxyType(
        {"num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28, "rms_norm_eps": 1e-6}
    ),
    derived=MappingProxyType({"sliding_window": window}),
    has_window=lambda sizes, index: index >= sizes.number("max_window_layers"),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Qwen3 family."""
    register(ADAPTER)
