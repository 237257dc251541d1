"""Models of a config without their weights: to count parameters, and to be filled a block at a time."""

from __future__ import annotations

from typing import Any

from slicecli.errors import SourceError, reason_of
from slicecli.runtime.libraries import quiet_libraries

__all__ = ["build_meta_model", "build_runnable_meta_model", "parameter_shapes", "with_plain_experts"]

MOST_TABLE_BYTES = 1_000_000_000


def build_meta_model(config: Any, trust_remote_code: bool = False, most_bytes: int | None = None) -> Any:
    """Build a model of a config without any memory: parameters and buffers are on `meta`, so that it cannot be run."""
    import torch
    import transformers
    from transformers.initialization import no_init_weights

    try:
        with quiet_libraries(), torch.device("meta"), no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise SourceError(
            f"transformers cannot build a model from this config: {reason_of(error)}.", "Check config.json."
        ) from error
    size = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if most_bytes is not None and size > most_bytes:
        raise SourceError(f"A model with this config takes {size / 1e9:,.2f} GB, too much here.", "Check config.json.")
    return model


def build_runnable_meta_model(config: Any, trust_remote_code: bool = False) -> Any:
    """Build a model of a config without memory for its parameters (all on `meta`), ready for evaluation."""
    import transformers
    from accelerate import init_empty_weights
    from transformers.initialization import no_init_weights

    # those of some classes grow with a number in the config and with nothing in the weights
    tables = sum(buffer.nbytes for buffer in build_meta_model(config, trust_remote_code).buffers())
    if tables > MOST_TABLE_BYTES:
        raise SourceError(
            f"A model with this config precomputes tables of {tables / 1e9:,.2f} GB.",
            "Check max_position_embeddings and similar fields in config.json.",
        )
    try:
        with quiet_libraries(), init_empty_weights(), no_init_weights():
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise SourceError(
            f"transformers cannot build a model from this config: {reason_of(error)}.", "Check config.json."
        ) from error
    model.tie_weights()  # parameters were replaced while the model was built
    return with_plain_experts(model.eval())


def with_plain_experts(model: Any) -> Any:
    """Let a model's experts, if it has any, run eagerly, so that hooks see each one; return the model."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    return model


def parameter_shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's parameters by name."""
    return {name: tuple(value.shape) for name, value in model.named_parameters()}
