"""One table for embedding and head: how a slice of a tied model stays tied.

A tied model computes logits E diag(g) n(x) with the table E that it embeds tokens by. A rotation alone unties it,
because diag(g) does not commute with Qᵀ. But any axes of the span of Q serve the rest of the slice equally well, so
those are taken along which the gain is diagonal: with Qᵀ diag(g) Q = U Λ Uᵀ and P = Q U,

    Pᵀ diag(g) P = Λ,

and one table E' = E P serves both roles, with Λ as the gain of the final norm. At k = d nothing is lost. Below it the
head loses what a row of E has outside the span, and both roles share the loss: of all maps T of the rows, E' = E T,
the one of least

    |E' − e E P|² + β Σₜ |E' L n'ₜ − E diag(g) nₜ|²

is taken. n' = sqrt(k/d) Pᵀ n is what the slice's final norm passes on before its gain L = Λ / (e sqrt(k/d)), and e the
scale of the table: sqrt(k/d), or 1 where the class multiplies embeddings by the root of its width. Every row has the
same normal equations, so the table itself drops out:

    T = (e P + β diag(g) C sqrt(k/d) P L) (I + β L C' L)⁻¹,     C = Σₜ n nᵀ,   C' = (k/d) Pᵀ C P.

After the last block L is fitted once more, to what the sliced stream really is there (`fit_gain`).

Symbols: docs/notation.md. The construction is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slicecli.linalg.basis import with_fixed_signs
from slicecli.linalg.ridge import RIDGES, best_ridge
from slicecli.linalg.sliced_maps import stream_scale

__all__ = ["GainSums", "Tie", "fit_gain", "tie", "token_metric"]

# ρ, the weight of the head beside the embedding, β = ρ / mean(diag(L C' L)); from 3 to 100 it makes little difference
HEAD_WEIGHT = 30.0
# times that every token of the vocabulary counts as seen, beside those it was
UNSEEN = 0.1
TABLE_ROWS = 4096


@dataclass(frozen=True)
class Tie:
    """How one table serves as embedding and head of a slice.

    Attributes:
        axes: P, float64 of shape (d, k).
        gain: L, what the final norm multiplies by, float64 of shape (k,).
        table_map: T, which makes of the rows of the dense table those of the slice, float64 of shape (d, k).
    """

    axes: torch.Tensor
    gain: torch.Tensor
    table_map: torch.Tensor


def tie(
    basis: torch.Tensor,
    gain: torch.Tensor,
    second_moment: torch.Tensor | None = None,
    is_scaled_by_width: bool = False,
    head_weight: float = HEAD_WEIGHT,
) -> Tie:
    """Solve for the axes, the gain and the table of a tied slice.

    Args:
        basis: Q, float64 of shape (d, k).
        gain: g of the final norm, float64 of shape (d,).
        second_moment: C, of what the dense final norm passes on before its gain, up to a factor; float64 of shape
            (d, d). Without it the table is E e P, which the head has no say in.
        is_scaled_by_width: The class multiplies embeddings by the root of its hidden size.
        head_weight: ρ.

    Example:
        >>> found = tie(torch.eye(2, dtype=torch.float64), torch.tensor([3.0, 2.0], dtype=torch.float64))
        >>> found.gain.tolist()
        [2.0, 3.0]
    """
    gains, turn = torch.linalg.eigh(basis.T @ (gain[:, None] * basis))
    axes = with_fixed_signs(basis @ turn)
    shrink = stream_scale(axes)
    scale = 1.0 if is_scaled_by_width else shrink
    sliced_gain = gains / (scale * shrink)
    start = scale * axes
    if second_moment is None:
        return Tie(axes, sliced_gain, start)
    entering = shrink * axes * sliced_gain
    seen = second_moment @ entering
    gram = entering.T @ seen
    mean = gram.diagonal().mean()
    if not bool(mean > 0):
        return Tie(axes, sliced_gain, start)
    weight = head_weight / mean
    identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
    table_map = torch.linalg.solve(identity + weight * gram, start + weight * gain[:, None] * seen, left=False)
    return Tie(axes, sliced_gain, table_map)


def token_metric(table: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Return G, which weighs an error of the head's input as the softmax does: Eᵀ (diag(p) − p pᵀ) E.

    That is the Fisher information of a softmax whose probabilities p are those of the tokens in the calibration text.

    Args:
        table: E, shape (vocabulary, d).
        counts: How often each token occurs in the calibration text, shape (vocabulary,).

    Returns:
        Float64 of shape (d, d).
    """
    shares = counts.double() + UNSEEN
    shares /= shares.sum()
    width = table.shape[1]
    square = torch.zeros(width, width, dtype=torch.float64, device=table.device)
    mean = torch.zeros(width, dtype=torch.float64, device=table.device)
    for rows, share in zip(table.split(TABLE_ROWS), shares.to(table.device).split(TABLE_ROWS), strict=True):
        wide = rows.double()
        square += wide.T @ (wide * share[:, None])
        mean += share @ wide
    return square - torch.outer(mean, mean)


@dataclass
class GainSums:
    """What the fit of a gain needs of some tokens.

    Attributes:
        sliced: Σ n' n'ᵀ, float64 of shape (k, k).
        crossed: Σ n n'ᵀ, float64 of shape (d, k).
    """

    sliced: torch.Tensor
    crossed: torch.Tensor


def fit_gain(
    found: Tie, gain: torch.Tensor, metric: torch.Tensor, sums: Sequence[GainSums], ridges: Sequence[float] = RIDGES
) -> torch.Tensor:
    """Return the gain ℓ that minimises Σ (T diag(ℓ) n' − diag(g) n)ᵀ G (T diag(ℓ) n' − diag(g) n), pulled towards L.

    With H = (Tᵀ G T) ∘ Σ n' n'ᵀ and bᵢ = (Tᵀ G diag(g) Σ n n'ᵀ)ᵢᵢ it solves (H + λ I) (ℓ − L) = b − H L. Held-out
    tokens choose λ = ridge · mean(diag H), an infinite one among the choices.

    Args:
        found: T and L.
        gain: g of the dense final norm, float64 of shape (d,).
        metric: G, see `token_metric`.
        sums: Of fitted, then of held-out tokens.
        ridges: The ridges to try.

    Returns:
        Float64 of shape (k,).
    """
    table_map, start = found.table_map, found.gain
    product = table_map.T @ metric
    inner = product @ table_map
    reading = product * gain
    hessians = [inner * one.sliced for one in sums]
    slopes = [(reading * one.crossed.T).sum(1) - hessian @ start for one, hessian in zip(sums, hessians, strict=True)]

    def change(hessian: torch.Tensor, slope: torch.Tensor, ridge: float) -> torch.Tensor:
        pull = ridge * hessian.diagonal().mean() * torch.eye(len(start), dtype=torch.float64, device=start.device)
        solved: torch.Tensor = torch.linalg.solve(hessian + pull, slope)
        return solved

    def held_out_error(ridge: float) -> float:
        step = change(hessians[0], slopes[0], ridge)
        error = float(step @ hessians[1] @ step - 2 * slopes[1] @ step)
        return error if math.isfinite(error) else math.inf

    if not bool(hessians[0].diagonal().mean() > 0):
        return start
    ridge, _ = best_ridge(ridges, held_out_error, len(ridges) // 2)
    if not math.isfinite(ridge):
        return start
    return start + change(hessians[0] + hessians[1], slopes[0] + slopes[1], ridge)
