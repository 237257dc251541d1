"""Least squares with a ridge chosen on held-out tokens.

A map B₀ exists (the projection); the correction Δ minimises Σₜ |rₜ − Δ zₜ|² + λ |Δ|², so the ridge pulls towards
the projection, not towards zero. λ = ridge · mean(diag Σ z zᵀ). The right ridge depends on how many tokens there
are per unknown; the held-out error decides, and an infinite ridge (no correction) is always among the choices.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from slicecli.linalg.cholesky import factorise, restore, substitute
from slicecli.linalg.normal_equations import NormalEquations, combined

__all__ = ["RIDGES", "Correction", "RidgeMemory", "best_ridge", "solve_ridge"]

COLUMNS = 512
TRIED = 128
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@dataclass(frozen=True)
class Correction:
    """The correction of a map.

    Attributes:
        matrix: Δ, float64 of shape (outputs, inputs); zero where the projection was best.
        ridge: The ridge chosen; infinity where the projection was best.
        error: Share of the held-out residual energy that is left: below 1 where the correction helps; of a map with
            many outputs, an estimate.
    """

    matrix: torch.Tensor
    ridge: float
    error: float


class RidgeMemory:
    """Solves one regression after the other, each looking for its ridge where the last of its kind has found one.

    Blocks differ little from each other, so that two or three trials are enough.

    Args:
        found: Ridges by kind, of a search to go on with.

    Attributes:
        found: The last ridge of each kind.
    """

    def __init__(self, found: Mapping[str, float] | None = None) -> None:
        self.found = dict(found or {})

    def solve(self, kind: str, equations: NormalEquations) -> Correction:
        """Solve a regression.

        Args:
            kind: Regressions with the same name have ridges near each other.
            equations: The normal equations; of no use afterwards.
        """
        correction = solve_ridge(equations, start=self.found.get(kind))
        if math.isfinite(correction.ridge):
            self.found[kind] = correction.ridge
        return correction


def solve_ridge(
    equations: NormalEquations, ridges: tuple[float, ...] = RIDGES, start: float | None = None
) -> Correction:
    """Choose the ridge by the held-out error, then solve on all tokens.

    One ridge serves all outputs. Of many, random combinations tell it: their error is that of all but for a few per
    cent, and a trial takes a fraction of the time.

    Args:
        equations: The normal equations; they are merged in place and of no use afterwards.
        ridges: The ridges to try, in ascending order, besides infinity.
        start: The one to try first; `None` takes the middle.
    """
    first = ridges.index(start) if start in ridges else len(ridges) // 2
    tried = _combinations(equations.cross)
    wanted = combined(equations.cross, tried)
    found, best_error = best_ridge(ridges, lambda ridge: _held_out_error(equations, wanted, tried, ridge), first)
    energy = float(equations.residual_energy[1])
    left = max(0.0, 1.0 + best_error / energy) if energy else 1.0
    if not math.isfinite(found):
        return _no_correction(equations)
    gram, cross = equations.merge()
    if not (_add_ridge(gram, found) and factorise(gram)):
        return _no_correction(equations)
    # outputs do not mix, so a few hundred at a time do, and no second solution is held
    for columns in cross.split(COLUMNS, dim=1):
        columns.copy_(substitute(gram, columns))
    return Correction(cross.T, found, left)


def _no_correction(equations: NormalEquations) -> Correction:
    return Correction(equations.cross.zero_().T, math.inf, 1.0)


def best_ridge(ridges: Sequence[float], error_of: Callable[[float], float], first: int) -> tuple[float, float]:
    """Go down from one of the ridges to the least error; return its ridge and it, or infinity and 0.

    The error has one valley in practice: too small a ridge fits noise, too large a one fits nothing. So the ridges
    beyond the first that is worse need not be tried, and each costs as much as the final solution.

    Args:
        ridges: In ascending order.
        error_of: The held-out error at a ridge, against that of no correction; infinite where there is no solution.
        first: Index of the ridge to begin with.
    """
    if not ridges:
        return math.inf, 0.0
    errors: dict[int, float] = {}

    def error_at(index: int) -> float:
        if index not in errors:
            errors[index] = error_of(ridges[index])
        return errors[index]

    best = first
    for direction in (-1, 1):
        while 0 <= best + direction < len(ridges) and error_at(best + direction) <= error_at(best):
            best += direction
    return (ridges[best], error_at(best)) if error_at(best) < 0 else (math.inf, 0.0)


def _combinations(cross: torch.Tensor) -> torch.Tensor | None:
    """Return random sums and differences of all outputs, shape (outputs, tried); `None` where all are tried.

    Over them the mean of Σ (r Ω)² is Σ |r|².
    """
    outputs = cross.shape[1]
    if outputs <= 2 * TRIED:
        return None
    signs = torch.randint(0, 2, (outputs, TRIED), generator=torch.Generator().manual_seed(outputs))
    return ((2 * signs - 1) / math.sqrt(TRIED)).to(cross)


def _held_out_error(
    equations: NormalEquations, wanted: torch.Tensor, outputs: torch.Tensor | None, ridge: float
) -> float:
    """Return Σ |r − Δ z|² − Σ |r|² over held-out tokens, Δ solved on the fitted ones; infinite where it cannot be.

    Args:
        equations: The normal equations, which stay as they are.
        wanted: The cross products of the outputs that are tried, shape (inputs, tried).
        outputs: Which combinations these are.
        ridge: The ridge.
    """
    gram, diagonal = equations.gram, equations.gram.diagonal().clone()
    try:
        if not (_add_ridge(gram, ridge) and factorise(gram)):
            return math.inf
        return equations.change_of_error(substitute(gram, wanted), outputs)
    finally:
        restore(gram, diagonal)


def _add_ridge(gram: torch.Tensor, ridge: float) -> bool:
    """Add λ to the diagonal of a Gram matrix in place; say whether there is anything in it."""
    scale = gram.diagonal().mean()
    gram.diagonal().add_(ridge * scale)
    return bool(scale > 0)
