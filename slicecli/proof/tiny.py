"""Very small models of any family, with random weights in which every parameter matters.

They stand in for the real ones where a declaration is to be proved: a config of the same class with small sizes,
all of them different, so that a shape tells which size it follows.
"""

from __future__ import annotations

from typing import Any

from slicecli.checkpoint.meta_model import build_meta_model, with_plain_experts
from slicecli.errors import SourceError, reason_of

__all__ = ["SIZES", "random_model", "tiny_config"]

SIZES: dict[str, int] = {
    "vocab_size": 304,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 88,
    "ffn_dim": 88,
    "n_inner": 88,
    "ffn_hidden_size": 88,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "n_layers": 2,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "max_position_embeddings": 120,
    "n_positions": 120,
    "max_seq_len": 120,
    "num_experts": 6,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "rotary_dim": 8,
    "eos_token_id": 1,
    "bos_token_id": 0,
}
"""The sizes of a tiny model, by config field."""

MOST_BYTES = 500_000_000  # what is not named above keeps the size it has in a config

# rotations of a fraction of the head (0.25, 0.4, 0.5, 0.75) come out even
HEAD_DIM = 40
# lists with an entry for each layer, which the class makes anew, and what would tie the config to other sizes
_DROPPED = (
    "layer_types",
    "no_rope_layers",
    "id2label",
    "label2id",
    "architectures",
    "head_dim",
    "dtype",
    "torch_dtype",
)
# null stands for a size that follows from others, which some classes do not work out
_MAY_BE_NULL = ("num_key_value_heads",)
# what a class wants to be equal to the hidden size unless it is told otherwise
_FOLLOWS_WIDTH = ("word_embed_proj_dim",)

_ROTATIONS = ("rope_parameters", "rope_scaling")


def tiny_config(like: Any, has_head_dim: bool = True, **changes: Any) -> Any:
    """Return a config of the same class with small sizes."""
    import transformers

    if isinstance(like, str):
        like = transformers.CONFIG_MAPPING[like]()
    fields = like.to_dict()
    fields = {name: value for name, value in fields.items() if name not in _DROPPED}
    fields |= {name: size for name, size in SIZES.items() if fields.get(name) is not None}
    fields |= {name: SIZES[name] for name in _MAY_BE_NULL if name in fields}
    try:
        fields |= {name: None for name in _FOLLOWS_WIDTH if fields.get(name) == like.hidden_size}
        fields |= {name: _short_factors(fields[name], has_head_dim) for name in _ROTATIONS if fields.get(name)}
        fields |= {"pad_token_id": None, **({"head_dim": HEAD_DIM} if has_head_dim else {}), **changes}
        return type(like).from_dict(fields)
    except Exception as error:  # config classes raise what they like
        raise SourceError(f"{type(like).__name__} rejects small sizes: {reason_of(error)}.") from error


def _short_factors(rotation: Any, has_head_dim: bool) -> Any:
    """Return how positions rotate, a list with a factor for each frequency cut to those of a tiny head."""
    if not isinstance(rotation, dict):
        return rotation
    head_dim = HEAD_DIM if has_head_dim else SIZES["hidden_size"] // SIZES["num_attention_heads"]
    count = int(head_dim * rotation.get("partial_rotary_factor", 1.0)) // 2
    return {name: value[:count] if isinstance(value, list) else value for name, value in rotation.items()}


def random_model(config: Any, seed: int = 0, dtype: str = "float32", trust_remote_code: bool = False) -> Any:
    """Build a model of a config with random weights: no bias is zero, no norm weight is one.

    Args:
        dtype: Their dtype.
    """
    import torch
    import transformers

    build_meta_model(config, trust_remote_code, MOST_BYTES)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise SourceError(f"transformers cannot build a small model of this type: {reason_of(error)}.") from error
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() < 2:
                # around 0.7, which is neither the 0 nor the 1 that norms and biases start from
                parameter.copy_(0.7 + 0.3 * noise)
            elif id(parameter) in embeddings:
                parameter.copy_(noise)
            else:
                parameter.copy_(noise * (1.5 / parameter.shape[-1] ** 0.5))
    return with_plain_experts(model.to(getattr(torch, dtype)).eval())
