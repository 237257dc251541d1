"""Which channels of an MLP go: the inputs of its writer that a regression misses least.

With G = Σ z zᵀ, r the target, and B₀ the map that exists, B = (G + λI)⁻¹(Σ z rᵀ + λ B₀) minimises
Σ |r − B z|² + λ |B − B₀|². Taking input i away and refitting the others adds |Bᵢ|² / [(G + λI)⁻¹]ᵢᵢ to it (Hassibi
and Stork, *Second order derivatives for network pruning: optimal brain surgeon*, 1993). Prices change as inputs go,
so the cheapest go in a few rounds, with prices anew in each.

What every width would cost is known before a slice is made, from the prices of one round: with the inputs in the order
of their prices, the dearest first, G + λI = L Lᵀ, the least error of the map W on the first m is Σ_{j > m} |(Lᵀ Wᵀ)ⱼ|².
At half the channels that is 4 to 7 % more than with prices anew in several rounds.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import torch

from slicecli.linalg.cholesky import factorise, restore, substitute
from slicecli.linalg.normal_equations import NormalEquations

__all__ = ["choose_channels", "removal_losses", "removal_prices"]

COLUMNS = 512
RIDGE = 3e-3
ROUNDS = 6


def choose_channels(
    equations: NormalEquations, start: torch.Tensor, candidates: slice, count: int, rounds: int = ROUNDS
) -> torch.Tensor:
    """Choose which of some inputs of a regression stay, and take the others out of its normal equations.

    Args:
        equations: The normal equations; afterwards those of what stays.
        start: B₀, shape (outputs, inputs).
        candidates: The inputs to choose from, one after the other; all others stay.
        count: How many of them stay.
        rounds: In how many rounds the others go.

    Returns:
        The inputs that stay, in ascending order.
    """
    stays = torch.arange(start.shape[1], device=start.device)
    is_candidate = torch.zeros_like(stays, dtype=torch.bool)
    is_candidate[candidates] = True
    surplus = int(is_candidate.sum()) - count
    for number in range(rounds):
        share = surplus * (number + 1) // rounds - surplus * number // rounds
        if not share:
            continue
        prices = removal_prices(equations.gram, equations.cross, start[:, stays])
        prices[~is_candidate[stays]] = torch.inf
        left = torch.ones_like(stays, dtype=torch.bool)
        left[prices.argsort(stable=True)[:share]] = False
        equations.keep_inputs(left, start[:, stays])
        stays = stays[left]
    return stays


def removal_prices(gram: torch.Tensor, cross: torch.Tensor, start: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """Return by how much the least squared error rises if an input is taken away and the others are refitted.

    Args:
        gram: G, float64 of shape (inputs, inputs); it is written to, and restored afterwards.
        cross: Σ z (r − B₀ z)ᵀ, float64 of shape (inputs, outputs).
        start: B₀, shape (outputs, inputs).
        ridge: λ as a share of the mean of G's diagonal.

    Returns:
        Shape (inputs,).
    """
    diagonal = gram.diagonal().clone()
    try:
        gram.diagonal().add_(ridge * diagonal.mean())
        if not factorise(gram):  # as of tokens that are all zero: what each input adds by itself
            weights = start.double().square().sum(0)
            return weights * diagonal if bool(diagonal.any()) else weights
        norms = torch.zeros_like(diagonal)
        for columns, outputs in zip(cross.split(COLUMNS, dim=1), start.split(COLUMNS), strict=True):
            norms += substitute(gram, columns).add_(outputs.T).square_().sum(1)
        return norms / _diagonal_of_inverse(gram)
    finally:
        restore(gram, diagonal)


def removal_losses(gram: torch.Tensor, weight: torch.Tensor, ridge: float = RIDGE) -> torch.Tensor:
    """Return what a map loses of its own outputs on fewer and fewer of its inputs, refitted each time.

    Args:
        gram: G, float64 of shape (inputs, inputs); of no use afterwards.
        weight: W, shape (outputs, inputs).
        ridge: λ as a share of the mean of G's diagonal.

    Returns:
        Float64 of shape (inputs + 1,): the squared error on the best so many inputs. It is zero on all of them.

    Example:
        >>> removal_losses(torch.diag(torch.tensor([4.0, 1.0])).double(), torch.ones(1, 2), ridge=0.0).tolist()
        [5.0, 1.0, 0.0]
    """
    outputs, diagonal = weight.T.double(), gram.diagonal() + ridge * gram.diagonal().mean()
    gram.diagonal().copy_(diagonal)
    if not factorise(gram):  # as of tokens that are all zero: what each input adds by itself
        lost = (outputs.square().sum(1) * diagonal).sort(descending=True).values
    else:
        prices = outputs.square().sum(1) / _diagonal_of_inverse(gram)
        restore(gram, diagonal)
        dearest_first = prices.argsort(stable=True, descending=True)
        outputs = outputs[dearest_first]
        gram.copy_(gram[dearest_first])
        gram.copy_(gram[:, dearest_first])
        factorise(gram)
        parts = []
        for first in range(0, len(gram), COLUMNS):
            columns = gram[first:, first : first + COLUMNS].tril()
            parts.append((columns.T @ outputs[first:]).square_().sum(1))
        lost = torch.cat(parts)
    return torch.cat([lost.flip(0).cumsum(0).flip(0), lost.new_zeros(1)])


def _diagonal_of_inverse(factor: torch.Tensor) -> torch.Tensor:
    """Return the diagonal of (L Lᵀ)⁻¹: the squared lengths of the columns of L⁻¹, some of them at a time.

    Args:
        factor: L in the lower triangle, shape (n, n); the upper one is not read.
    """
    squares = []
    for first in range(0, len(factor), COLUMNS):
        corner = factor[first:, first:]  # a column of L⁻¹ is zero above its own place
        identity = torch.eye(len(corner), min(COLUMNS, len(corner)), dtype=factor.dtype, device=factor.device)
        squares.append(torch.linalg.solve_triangular(corner, identity, upper=False).square_().sum(0))
    return torch.cat(squares)
