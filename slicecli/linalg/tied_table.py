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

After the last block L is fitted once more, to what the sliced stream really is there (`fit_final_norm`).

A LayerNorm reads only the k − 1 coordinates without mean, along R, so its gain ℓ acts as Rᵀ diag(ℓ) R, which must have
the eigenvalues of Vᵀ diag(g) V (`gain_of_centred_norm`). Below k = d that is possible only nearly. A row of the table
has one more coordinate, its mean, which the stream does not see and the head does.

Symbols: docs/notation.md. The construction is ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from slicecli.linalg.basis import centred_frame, with_fixed_signs
from slicecli.linalg.ridge import RIDGES, best_ridge
from slicecli.linalg.sliced_maps import stream_scale

__all__ = ["FinalNormSums", "Tie", "fit_final_norm", "gain_of_centred_norm", "tie", "token_metric"]

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
        bias: What the final norm adds, float64 of shape (k,); `None` where the family's norms add nothing.
        table_map: T, which makes of the rows of the dense table those of the slice, float64 of shape (d, k).
    """

    axes: torch.Tensor
    gain: torch.Tensor
    bias: torch.Tensor | None
    table_map: torch.Tensor


def tie(
    basis: torch.Tensor,
    gain: torch.Tensor,
    bias: torch.Tensor | None = None,
    second_moment: torch.Tensor | None = None,
    is_centred: bool = False,
    is_scaled_by_width: bool = False,
    head_weight: float = HEAD_WEIGHT,
) -> Tie:
    """Solve for the axes, the gain and the table of a tied slice.

    Args:
        basis: Q, float64 of shape (d, k).
        gain: g of the final norm, float64 of shape (d,).
        bias: β of the final norm, float64 of shape (d,), where it has one.
        second_moment: C, of what the dense final norm passes on before its gain, up to a factor; float64 of shape
            (d, d). Without it the table is E e P, which the head has no say in.
        is_centred: The norms subtract the mean; Q is V Rᵀ.
        is_scaled_by_width: The class multiplies embeddings by the root of its hidden size.
        head_weight: ρ.

    Example:
        >>> found = tie(torch.eye(2, dtype=torch.float64), torch.tensor([3.0, 2.0], dtype=torch.float64))
        >>> found.gain.tolist()
        [2.0, 3.0]
    """
    axes, gains = (_centred_axes if is_centred else _axes)(basis, gain)
    shrink = stream_scale(axes)
    scale = 1.0 if is_scaled_by_width else shrink
    sliced_gain = gains / (scale * shrink)
    table_map = scale * axes
    if is_centred:  # the stream does not see the mean of a row, but the head does
        table_map = table_map + scale / math.sqrt(axes.numel())
    if second_moment is not None:
        entering = shrink * axes * sliced_gain
        seen = second_moment @ entering
        gram = entering.T @ seen
        mean = gram.diagonal().mean()
        if bool(mean > 0):
            weight = head_weight / mean
            identity = torch.eye(len(gram), dtype=torch.float64, device=gram.device)
            table_map = torch.linalg.solve(
                identity + weight * gram, table_map + weight * gain[:, None] * seen, left=False
            )
    sliced_bias = None if bias is None else torch.linalg.lstsq(table_map, bias[:, None]).solution[:, 0]
    return Tie(axes, sliced_gain, sliced_bias, table_map)


def _axes(basis: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return P and Λ."""
    gains, turn = torch.linalg.eigh(basis.T @ (gain[:, None] * basis))
    return with_fixed_signs(basis @ turn), gains


def _centred_axes(basis: torch.Tensor, gain: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return P = V U Xᵀ Rᵀ and ℓ, with Vᵀ diag(g) V = U M Uᵀ and Rᵀ diag(ℓ) R = X M' Xᵀ, M' as near to M as may be."""
    width, dim = basis.shape
    if width == dim:  # Q Qᵀ subtracts the mean, and diag(g) is diagonal as it is
        return basis @ basis.T, gain
    frame = centred_frame(dim, basis.device)
    directions = basis @ frame
    wanted, turn = torch.linalg.eigh(directions.T @ (gain[:, None] * directions))
    gains, own = gain_of_centred_norm(wanted)
    return with_fixed_signs(directions @ turn) @ (frame @ own).T, gains


def gain_of_centred_norm(wanted: torch.Tensor, steps: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Find ℓ such that diag(ℓ), seen from the coordinates without mean, has given eigenvalues.

    Those of Rᵀ diag(ℓ) R are the critical points of Π (x − ℓᵢ), so ℓ starts between them. Gauss-Newton steps follow;
    no ℓ fits all eigenvalues, and the best found is returned.

    Args:
        wanted: Eigenvalues, float64 of shape (k − 1,), ascending.
        steps: Eigenproblems to solve.

    Returns:
        ℓ, float64 of shape (k,), and the eigenvectors of Rᵀ diag(ℓ) R by ascending eigenvalues as columns.
    """
    frame = centred_frame(len(wanted) + 1, wanted.device)
    between = (wanted[1:] + wanted[:-1]) / 2
    gains = torch.cat([2 * wanted[:1] - between[:1], between, 2 * wanted[-1:] - between[-1:]])
    best: tuple[float, torch.Tensor, torch.Tensor] | None = None
    for _ in range(steps):
        found, vectors = torch.linalg.eigh(frame.T @ (gains[:, None] * frame))
        missing = wanted - found
        error = float(missing.square().sum())
        if best is None or error < best[0]:
            best = error, gains, vectors
        slopes = (frame @ vectors).square().T
        square = slopes @ slopes.T
        square.diagonal().add_(1e-6 * square.diagonal().mean())
        gains = gains + slopes.T @ torch.linalg.solve(square, missing)
    assert best is not None
    return best[1:]


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
class FinalNormSums:
    """What the fit of the final norm needs of some tokens, with n⁺ = (n, 1) and n'⁺ = (n', 1).

    Attributes:
        sliced: Σ n'⁺ n'⁺ᵀ, float64 of shape (k + 1, k + 1).
        crossed: Σ n⁺ n'⁺ᵀ, float64 of shape (d + 1, k + 1).
    """

    sliced: torch.Tensor
    crossed: torch.Tensor


def fit_final_norm(
    found: Tie,
    gain: torch.Tensor,
    bias: torch.Tensor | None,
    metric: torch.Tensor,
    sums: Sequence[FinalNormSums],
    ridges: Sequence[float] = RIDGES,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit the final norm's gain ℓ and bias b to the sliced stream as it is after the last block.

    They minimise Σ rᵀ G r with r = T (ℓ ∘ n' + b) − (g ∘ n + β), pulled towards those of the tie. It is one linear
    system (H + λ I) (x − x₀) = h − H x₀ for x = (ℓ, b); the part of ℓ is H = (Tᵀ G T) ∘ Σ n' n'ᵀ and
    hᵢ = (Tᵀ G Σ (g ∘ n + β) n'ᵀ)ᵢᵢ. Held-out tokens choose λ = ridge · mean(diag H), an infinite one among the choices.

    Args:
        found: T, and the gain and bias to start from.
        gain: g of the dense final norm, float64 of shape (d,).
        bias: β of the dense final norm, float64 of shape (d,), where it has one.
        metric: G, see `token_metric`.
        sums: Of fitted, then of held-out tokens.
        ridges: The ridges to try.

    Returns:
        ℓ and, where the norm has a bias, b; float64 of shape (k,) each.
    """
    table_map, dim = found.table_map, len(found.gain)
    product = table_map.T @ metric
    inner = product @ table_map
    start = found.gain if found.bias is None else torch.cat([found.gain, found.bias])
    reading = torch.cat([product * gain, (product @ (torch.zeros_like(gain) if bias is None else bias))[:, None]], 1)

    def equations(one: FinalNormSums) -> tuple[torch.Tensor, torch.Tensor]:
        by_input = reading @ one.crossed  # (k, k + 1)
        hessian, goal = inner * one.sliced[:dim, :dim], by_input[:, :dim].diagonal()
        if bias is not None:
            mixed = inner * one.sliced[:dim, dim:]
            hessian = torch.cat([torch.cat([hessian, mixed], 1), torch.cat([mixed.T, inner * one.sliced[dim, dim]], 1)])
            goal = torch.cat([goal, by_input[:, dim]])
        return hessian, goal - hessian @ start

    hessians, slopes = zip(*map(equations, sums), strict=True)

    def change(hessian: torch.Tensor, slope: torch.Tensor, ridge: float) -> torch.Tensor:
        pull = ridge * hessian.diagonal().mean() * torch.eye(len(start), dtype=torch.float64, device=start.device)
        solved: torch.Tensor = torch.linalg.solve(hessian + pull, slope)
        return solved

    def held_out_error(ridge: float) -> float:
        step = change(hessians[0], slopes[0], ridge)
        error = float(step @ hessians[1] @ step - 2 * slopes[1] @ step)
        return error if math.isfinite(error) else math.inf

    if not bool(hessians[0].diagonal().mean() > 0):
        return found.gain, found.bias
    ridge, _ = best_ridge(ridges, held_out_error, len(ridges) // 2)
    if not math.isfinite(ridge):
        return found.gain, found.bias
    fitted = start + change(hessians[0] + hessians[1], slopes[0] + slopes[1], ridge)
    return fitted[:dim], None if found.bias is None else fitted[dim:]
