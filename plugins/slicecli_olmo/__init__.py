"""OLMo 1: LayerNorms without weight or bias, whose epsilon the class fixes."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Norm, PortableClass, Sizes, attention, gated_mlp

EPSILON = 1e-5


def clipping(sizes: Sizes) -> str:
    """Say why a config cannot be that of a class that does not clip queries, keys and values."""
    return "it clips queries, keys and values" if sizes.value("clip_qkv") is not None else ""


def clipping_or_biases(sizes: Sizes) -> str:
    """Say the same, and why it cannot be Mistral's, which has no biases."""
    return "its biases have no place in Mistral" if sizes.value("attention_bias") else clipping(sizes)


NORMS = MappingProxyType(
    {f"{path}.weight": 1.0 for path in ("input_layernorm", "post_attention_layernorm", "model.norm")}
)
PORTABLE = (
    PortableClass(
        "llama",
        MappingProxyType({"rms_norm_eps": EPSILON, "mlp_bias": False}),
        constants=NORMS,
        centres_stream=True,
        obstacle=clipping,
    ),
    # any dim
    PortableClass(
        "mistral",
        MappingProxyType({"rms_norm_eps": EPSILON, "sliding_window": None}),
        constants=NORMS,
        centres_stream=True,
        obstacle=clipping_or_biases,
    ),
)

ADAPTER = Adapter(
    name="olmo",
    model_types=("olmo",),
    block=Block((attention(bias="attention_bias", writer_bias="attention_bias"), gated_mlp())),
    norm=Norm("layer", epsilon=EPSILON, has_weight=False),
    portable=PORTABLE,
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register OLMo 1."""
    register(ADAPTER)
