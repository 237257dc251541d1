"""StarCoder2: LayerNorms, biases throughout, an MLP without gate."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Norm, attention, mlp

ADAPTER = Adapter(
    name="starcoder2",
    model_types=("starcoder2",),
    block=Block((attention("use_bias", "use_bias"), mlp("mlp.c_fc", "mlp.c_proj", bias="use_bias"))),
    norm=Norm("layer", epsilon="norm_epsilon", has_bias=True),
    defaults=MappingProxyType(
        {
            "hidden_act": "gelu_pytorch_tanh",
            "num_key_value_heads": 2,
            "use_bias": True,
            "tie_word_embeddings": True,
            "norm_epsilon": 1e-5,
        }
    ),
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register StarCoder2."""
    register(ADAPTER)
