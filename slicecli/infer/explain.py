"""What a call computed, judged by its numbers alone: a norm, a linear map, a sum of other calls.

Pure functions on observed calls. All comparisons are of float64 results, which agree to 1e-9 or not at all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from slicecli.adapters import Norm
from slicecli.infer.observe import Call
from slicecli.linalg.normal_equations import normalise

__all__ = [
    "TOLERANCE",
    "LinearForm",
    "Written",
    "classify_norm",
    "explain_change",
    "is_close",
    "linear_form",
    "rows_behind",
]

TOLERANCE = 1e-9
FIXED_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)


@dataclass(frozen=True)
class LinearForm:
    """How a module is a linear map.

    Attributes:
        is_transposed: Its weight is stored as (inputs, outputs).
    """

    inputs: int
    outputs: int
    has_bias: bool
    is_transposed: bool


@dataclass(frozen=True)
class Written:
    """A module whose output is part of a change of the stream.

    Attributes:
        multiplier: The fixed number that multiplies the output.
        gate: The linear whose sigmoid multiplies it besides, for each token.
    """

    call: Call
    multiplier: float
    gate: Call | None = None


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Say whether two float64 results are the same but for rounding; nothing is like an empty one."""
    if one.shape != other.shape or not one.numel():
        return False
    return float((one - other).detach().norm()) <= TOLERANCE * float(other.detach().norm())


def classify_norm(call: Call, width: int, epsilons: Mapping[str, float]) -> Norm | None:
    """Return what kind of norm over the stream a call is, if it is one."""
    weight, bias = getattr(call.module, "weight", None), getattr(call.module, "bias", None)
    if call.entering.shape != call.leaving.shape or call.entering.shape[-1] != width:
        return None
    if any(value is not None and value.shape != (width,) for value in (weight, bias)):
        return None
    candidates: list[tuple[str | float, float]] = [*epsilons.items(), *((value, value) for value in FIXED_EPSILONS)]
    kinds: tuple[Literal["rms", "layer"], ...] = ("rms", "layer")
    for kind, (epsilon, value) in itertools.product(kinds, candidates):
        normal = normalise(call.entering, value, kind == "layer")
        for offset in (0.0,) if weight is None else (0.0, 1.0):
            made = normal if weight is None else normal * (weight + offset)
            if is_close(made if bias is None else made + bias, call.leaving):
                return Norm(kind, epsilon, weight is not None, bias is not None, offset)
    return None


def linear_form(call: Call) -> LinearForm | None:
    """Return how a call's module is a linear map of what entered it, if it is one."""
    weight, bias = getattr(call.module, "weight", None), getattr(call.module, "bias", None)
    if weight is None or weight.dim() != 2:
        return None
    inputs, outputs = call.entering.shape[-1], call.leaving.shape[-1]
    for is_transposed in (False, True):
        matrix = weight.mT if is_transposed else weight
        if matrix.shape == (outputs, inputs):
            made = call.entering @ matrix.mT
            if is_close(made if bias is None else made + bias, call.leaving):
                return LinearForm(inputs, outputs, bias is not None, is_transposed)
    return None


def explain_change(change: torch.Tensor, calls: Sequence[Call], gates: Sequence[Call] = ()) -> list[Written] | None:
    """Explain a change of the stream as fixed multiples of what modules returned.

    Args:
        change: The change, shape (tokens, width).
    """
    # a module that only hands on what one inside it returned explains nothing; the inner one ended first
    calls = [
        call for i, call in enumerate(calls) if not any(is_close(call.leaving, other.leaving) for other in calls[:i])
    ]
    found = _multiples(change, [call.leaving for call in calls])
    if found is not None:
        return [Written(call, multiple) for call, multiple in zip(calls, found, strict=True) if multiple]
    for gate, gated in itertools.product(gates, range(len(calls))):
        columns = [call.leaving for call in calls]
        columns[gated] = torch.sigmoid(gate.leaving) * columns[gated]
        found = _multiples(change, columns)
        if found is not None and found[gated]:
            written = [Written(call, multiple) for call, multiple in zip(calls, found, strict=True)]
            written[gated] = dataclasses.replace(written[gated], gate=gate)
            return [one for one in written if one.multiplier]
    return None


def _multiples(change: torch.Tensor, columns: Sequence[torch.Tensor]) -> list[float] | None:
    """Return the multiples of the columns that sum up to a change, 0 for those without part in it."""
    if not columns:
        return None
    matrix = torch.stack([column.flatten() for column in columns], dim=1)
    solution = torch.linalg.lstsq(matrix, change.flatten()[:, None]).solution.squeeze(1)
    if not is_close(matrix @ solution, change.flatten()):
        return None
    return [value if abs(value) > TOLERANCE else 0.0 for value in solution.tolist()]


def rows_behind(table: torch.Tensor, made: torch.Tensor) -> torch.Tensor:
    """Return the rows of a table that an embedding returned, without the scale it may have given them.

    Args:
        table: Shape (rows, width), no two rows in the same direction.
        made: What the embedding returned, shape (tokens, width).
    """
    direction = nn.functional.normalize(made, dim=-1) @ nn.functional.normalize(table, dim=-1).mT
    return table[direction.argmax(-1)]
