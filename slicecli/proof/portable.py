"""Proving that a portable class computes what a family's own class does."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from slicecli.checkpoint.configs import portable_config
from slicecli.checkpoint.meta_model import parameter_shapes
from slicecli.checkpoint.portable import Conversion
from slicecli.errors import PluginError, SlicecliError
from slicecli.family.dimensions import Dimensions
from slicecli.family.written_class import WrittenClass
from slicecli.proof.declaration import PROOF_TOLERANCE, logits, relative_error
from slicecli.proof.tiny import random_model, tiny_config

__all__ = ["portable_model", "prove_portable", "prove_portable_class"]

ROWS, LENGTH = 8, 12


def portable_model(model: Any, written: WrittenClass) -> Any:
    """Return a model that is in memory, converted to a portable class."""
    own, conversion = written.own, Conversion(written)
    dtype = str(model.dtype).removeprefix("torch.")
    config = portable_config(model.config, written, own.hidden_size, dtype)
    with no_init_weights():
        made = AutoModelForCausalLM.from_config(config)
    made.tie_weights()
    made = made.to(model.device, model.dtype).eval()
    tensors: dict[str, torch.Tensor] = {}
    head = f"{own.adapter.head.path}.weight"
    for name, tensor in model.state_dict().items():
        if not (own.keeps_tie and name == head):
            tensors |= conversion.convert(name, tensor)
    shapes = parameter_shapes(made)
    try:
        tensors |= {name: value.to(model.device) for name, value in conversion.constants(shapes, model.dtype)}
    except KeyError as error:
        raise _fault(written, f"it has no {error.args[0]}, which `constants` names") from None
    _require_same(written, {name: tuple(value.shape) for name, value in tensors.items()}, shapes)
    made.load_state_dict(tensors, strict=not own.keeps_tie)
    return made


def prove_portable(model: Any, written: WrittenClass, token_ids: torch.Tensor, tolerance: float) -> float:
    """Check on a model that a portable class computes what its own class does; return the relative error.

    Args:
        model: The dense model, with weights; use float64 for a tight tolerance.
        token_ids: Shape (rows, sequence length), on the model's device.
    """
    error = relative_error(logits(portable_model(model, written), token_ids), logits(model, token_ids))
    if error > tolerance:
        raise _fault(written, f"it does not compute the same, the logits change by {error:.1e}")
    return error


def prove_portable_class(written: WrittenClass, config: Any) -> None:
    """Check on a small model with a config like the real one that a portable class computes the same."""
    assert written.portable is not None
    small = tiny_config(config)
    model = random_model(small, dtype="float64")
    own = Dimensions(written.own.adapter, small.to_dict())
    found = WrittenClass.of_portable(own, written.portable)
    token_ids = torch.randint(2, own.vocabulary, (ROWS, LENGTH), generator=torch.Generator().manual_seed(0))
    try:
        prove_portable(model, found, token_ids, PROOF_TOLERANCE)
    except PluginError:
        raise
    except SlicecliError as error:
        raise _fault(written, error.cause) from error


def _require_same(
    written: WrittenClass, found: dict[str, tuple[int, ...]], expected: dict[str, tuple[int, ...]]
) -> None:
    """Check that a conversion gives all tensors of a class, and no others, of its shapes."""
    for names, what in ((expected.keys() - found.keys(), "lacks"), (found.keys() - expected.keys(), "gives it")):
        if names:
            raise _fault(written, f"the conversion {what} {min(names)}")
    wrong = sorted(name for name, shape in expected.items() if found[name] != shape)
    if wrong:
        raise _fault(written, f"the conversion gives {wrong[0]} the shape {found[wrong[0]]}, not {expected[wrong[0]]}")


def _fault(written: WrittenClass, problem: str) -> PluginError:
    return PluginError(
        f"Adapter {written.own.adapter.name!r} declares the portable class {written.model_type} wrongly: {problem}.",
        "Fix the declaration, or use --write-as own.",
    )
