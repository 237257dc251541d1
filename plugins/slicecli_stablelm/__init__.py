"""StableLM 2 and 3B: LayerNorms around Llama's block, sequential or parallel as the config says."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Kept, Norm, attention, gated_mlp
from slicecli.dimensions import Dimensions


def block(dimensions: Dimensions, _index: int) -> Block:
    """Declare the block as the config arranges it."""
    is_parallel = bool(dimensions.value("use_parallel_residual"))
    norm = "input_layernorm" if is_parallel else "post_attention_layernorm"
    kept: tuple[Kept, ...] = ()
    if dimensions.value("qk_layernorm"):
        heads = {"q_layernorm": dimensions.heads, "k_layernorm": dimensions.key_value_heads}
        kept = tuple(
            Kept(f"self_attn.{name}.norms.{head}.weight", "head_dim")
            for name, count in heads.items()
            for head in range(count)
        )
    return Block((attention("use_qkv_bias"), gated_mlp(norm=norm)), is_parallel, kept)


ADAPTER = Adapter(
    name="stablelm",
    model_types=("stablelm",),
    block=block,
    norm=Norm("layer", epsilon="layer_norm_eps", has_bias=True),
    defaults=MappingProxyType({"num_key_value_heads": 32}),
    stock_obstacle="StableLmAttention takes the width of a head from hidden_size / num_attention_heads.",
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register StableLM."""
    register(ADAPTER)
