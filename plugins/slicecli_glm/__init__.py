"""GLM-4 9B in its transformers form (type glm): biased query, key and value, gate and up in one linear."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Branch, Linear, attention

ADAPTER = Adapter(
    name="glm",
    model_types=("glm",),
    block=Block(
        (
            attention(bias="attention_bias"),
            Branch(
                norm="post_attention_layernorm",
                readers=(Linear("mlp.gate_up_proj", "2*intermediate_size"),),
                writer=Linear("mlp.down_proj", "intermediate_size"),
                module="mlp",
            ),
        )
    ),
    defaults=MappingProxyType(
        {"num_key_value_heads": 2, "head_dim": 128, "attention_bias": True, "rms_norm_eps": 1.5625e-7}
    ),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register GLM."""
    register(ADAPTER)
