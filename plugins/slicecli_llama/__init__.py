"""Llama 1, 2 and 3.x, the many models published under the same type, and the types that run as Llama."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, PortableClass, Sizes, attention, gated_mlp

BLOCK = Block((attention(bias="attention_bias", writer_bias="attention_bias"), gated_mlp(bias="mlp_bias")))
# LlamaConfig and its like refuse a hidden size that the head count does not divide, even where head_dim is given
DIVISORS = ("num_attention_heads",)


def biases(sizes: Sizes) -> str:
    """Say why a config cannot be Mistral's, which has no biases."""
    return "its biases have no place in Mistral" if sizes.value("attention_bias") or sizes.value("mlp_bias") else ""


LLAMA = Adapter(
    name="llama",
    model_types=("llama",),
    block=BLOCK,
    dim_divisors=DIVISORS,
    defaults=MappingProxyType({"rms_norm_eps": 1e-6}),
    # any dim
    portable=(PortableClass("mistral", MappingProxyType({"sliding_window": None}), obstacle=biases),),
)
INTERNLM3 = Adapter(
    name="internlm3",
    model_types=("internlm3",),
    block=BLOCK,
    dim_divisors=DIVISORS,
    names=MappingProxyType({"attention_bias": "qkv_bias", "mlp_bias": "bias"}),
    defaults=MappingProxyType({"num_key_value_heads": 2, "head_dim": 128, "rms_norm_eps": 1e-5}),
)
EXAONE = Adapter(
    name="exaone",
    model_types=("exaone",),
    block=BLOCK,
    dim_divisors=DIVISORS,
    names=MappingProxyType({"num_hidden_layers": "num_layers", "rms_norm_eps": "layer_norm_epsilon"}),
    defaults=MappingProxyType({"num_key_value_heads": 8, "rms_norm_eps": 1e-5}),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register Llama and the types that run as Llama."""
    register(LLAMA)
    register(INTERNLM3)
    register(EXAONE)
