"""Granite 3: Llama's block whose branches, embeddings and logits are multiplied by numbers from the config."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, PortableClass, Sizes, attention, gated_mlp


def embedding_multiplier(sizes: Sizes) -> float:
    """Return what multiplies the embeddings."""
    return float(sizes.value("embedding_multiplier", 1.0))


def epsilon(sizes: Sizes) -> float:
    """Return the epsilon of norms over a stream that is that many times as small."""
    return float(sizes.value("rms_norm_eps") / embedding_multiplier(sizes) ** 2)


def writer_scale(sizes: Sizes) -> float:
    """Return what multiplies a branch's output, in a stream that is that many times as small."""
    return float(sizes.value("residual_multiplier") / embedding_multiplier(sizes))


def query_scale(sizes: Sizes) -> float:
    """Return what multiplies queries where attention scores are divided by the root of the head's width."""
    return float(sizes.value("attention_multiplier", 1.0) * sizes.head_dim**0.5)


def head_scale(sizes: Sizes) -> float:
    """Return what multiplies the logits."""
    return float(1 / sizes.value("logits_scaling", 1.0))


def biases(sizes: Sizes) -> str:
    """Say why a config cannot be Mistral's, which has no biases."""
    return "its biases have no place in Mistral" if sizes.value("attention_bias") or sizes.value("mlp_bias") else ""


# The stream is divided by the multiplier of the embeddings, so that their table (which may be the head too) stays.
SCALES = MappingProxyType(
    {
        "self_attn.q_proj": query_scale,
        "self_attn.o_proj": writer_scale,
        "mlp.down_proj": writer_scale,
        "model.norm": head_scale,
    }
)
PORTABLE = (
    PortableClass("llama", MappingProxyType({"rms_norm_eps": epsilon}), scales=SCALES),
    # any dim
    PortableClass(
        "mistral",
        MappingProxyType({"rms_norm_eps": epsilon, "sliding_window": None}),
        scales=SCALES,
        obstacle=biases,
    ),
)

ADAPTER = Adapter(
    name="granite",
    model_types=("granite",),
    block=Block(
        (
            attention(bias="attention_bias", writer_bias="attention_bias", multiplier="residual_multiplier"),
            gated_mlp(bias="mlp_bias", multiplier="residual_multiplier"),
        )
    ),
    defaults=MappingProxyType({"residual_multiplier": 1.0, "rms_norm_eps": 1e-6}),
    portable=PORTABLE,
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register the Granite family."""
    register(ADAPTER)
