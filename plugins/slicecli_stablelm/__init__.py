"""StableLM 2 and 3B: LayerNorms around Llama's block, sequential or parallel as the config says."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType

from slicecli import hookimpl
from slicecli.adapters import Adapter, Block, Norm, PassedThrough, Sizes, attention, gated_mlp


def block(sizes: Sizes, _index: int) -> Block:
    """Declare the block as the config arranges it."""
    is_parallel = bool(sizes.value("use_parallel_residual"))
    norm = "input_layernorm" if is_parallel else "post_attention_layernorm"
    passed_through: tuple[PassedThrough, ...] = ()
    if sizes.value("qk_layernorm"):
        heads = {"q_layernorm": sizes.heads, "k_layernorm": sizes.key_value_heads}
        passed_through = tuple(
            PassedThrough(f"self_attn.{name}.norms.{head}.weight", "head_dim")
            for name, count in heads.items()
            for head in range(count)
        )
    return Block((attention("use_qkv_bias"), gated_mlp(norm=norm)), is_parallel, passed_through)


ADAPTER = Adapter(
    name="stablelm",
    model_types=("stablelm",),
    block=block,
    norm=Norm("layer", epsilon="layer_norm_eps", has_bias=True),
    defaults=MappingProxyType({"num_key_value_heads": 32, "layer_norm_eps": 1e-5}),
    stock_obstacle="StableLmAttention takes the width of a head from hidden_size / num_attention_heads.",
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Adapter], None]) -> None:
    """Register StableLM."""
    register(ADAPTER)
