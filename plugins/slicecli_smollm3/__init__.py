"""SmolLM3: Llama's block, some layers without rotary positions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Sizes, attention, gated_mlp


def window(config: Mapping[str, Any]) -> Any:
    """Return the sliding window, which the model ignores unless another field asks for it."""
    return config.get("sliding_window") if config.get("use_sliding_window") else None


def has_window(sizes: Sizes, index: int) -> bool:
    """Say whether a block's attention has the window: those without rotary positions have it."""
    has_rotation = sizes.value("no_rope_layers")
    if has_rotation:
        return not has_rotation[index]
    return (index + 1) % sizes.number("no_rope_layer_interval") == 0


ADAPTER = Adapter(
    name="smollm3",
    model_types=("smollm3",),
    block=Block((attention(bias="attention_bias", writer_bias="attention_bias"), gated_mlp(bias="mlp_bias"))),
    defaults=MappingProxyType(
        {"num_key_value_heads": 4, "tie_word_embeddings": True, "no_rope_layer_interval": 4, "rms_norm_eps": 1e-6}
    ),
    derived=MappingProxyType({"sliding_window": window}),
    has_window=has_window,
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register SmolLM3."""
    register(ADAPTER)
