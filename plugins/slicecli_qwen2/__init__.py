"""Qwen2 and Qwen2.5: biases on query, key and value, none elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, PortableClass, Sizes, attention, gated_mlp


def window(config: Mapping[str, Any]) -> Any:
    """Return the sliding window, which the config class drops unless another field asks for it."""
    return config.get("sliding_window", 4096) if config.get("use_sliding_window") else None


def sliding(sizes: Sizes) -> str:
    """Say why a config cannot be that of a class whose blocks all attend to everything."""
    return "some of its blocks have a sliding window" if sizes.value("sliding_window") else ""


PORTABLE = (
    PortableClass(
        "llama",
        MappingProxyType({"attention_bias": True, "mlp_bias": False}),
        constants=MappingProxyType({"self_attn.o_proj.bias": 0.0}),
        obstacle=sliding,
    ),
    # any dim
    PortableClass(
        "seed_oss",
        MappingProxyType({"attention_bias": True, "attention_out_bias": False, "mlp_bias": False}),
        obstacle=sliding,
    ),
)

ADAPTER = Adapter(
    name="qwen2",
    model_types=("qwen2",),
    block=Block((attention(bias=True), gated_mlp())),
    defaults=MappingProxyType({"num_key_value_heads": 32, "max_window_layers": 28, "rms_norm_eps": 1e-6}),
    derived=MappingProxyType({"sliding_window": window}),
    has_window=lambda sizes, index: index >= sizes.number("max_window_layers"),
    portable=PORTABLE,
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Qwen2 family."""
    register(ADAPTER)
