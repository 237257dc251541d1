"""A Cholesky factorisation in half the memory: the factor in one triangle, the matrix kept in the other.

To choose a ridge, one Gram matrix is factorised several times, and it is the largest tensor of a slice. A symmetric
matrix has its numbers twice, so the lower triangle can hold the factor while the upper one and a copy of the diagonal
keep the matrix for the next trial.

Symbols: docs/notation.md.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

__all__ = ["factorise", "restore", "substitute"]

BAND = 384


def factorise(matrix: torch.Tensor) -> bool:
    """Write L into the lower triangle, diagonal included; what lies above the diagonal stays.

    Band after band of columns: what the bands before explain is taken off, the corner on the diagonal is factorised,
    and the rest solved against it.

    Args:
        matrix: G, shape (n, n).

    Returns:
        Whether G is numerically positive definite; the lower triangle is of no use where it is not.
    """
    for band in _bands(len(matrix)):
        corner, below = matrix[band, band], matrix[band.stop :, band]
        upper = corner.triu(1)
        matrix[band.start :, band].addmm_(matrix[band.start :, : band.start], matrix[band, : band.start].mT, alpha=-1)
        factor, failure = torch.linalg.cholesky_ex(corner)
        corner.copy_(factor.add_(upper))
        if int(failure):
            return False
        below.copy_(torch.linalg.solve_triangular(corner.mT, below, upper=True, left=False))
    return True


def restore(matrix: torch.Tensor, diagonal: torch.Tensor) -> None:
    """Make a matrix whole again from what lies above its diagonal.

    Args:
        matrix: What `factorise` has written to, shape (n, n).
        diagonal: What the diagonal was, shape (n,).
    """
    for band in _bands(len(matrix)):
        corner = matrix[band, band]
        upper = corner.triu(1)
        corner.copy_(upper + upper.mT)
        matrix[band.stop :, band] = matrix[band, band.stop :].mT
    matrix.diagonal().copy_(diagonal)


def substitute(factor: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """Return (L Lᵀ)⁻¹ R, shape (n, columns).

    Args:
        factor: L in the lower triangle, shape (n, n); the upper one is not read.
        right: R, shape (n, columns).
    """
    half = torch.linalg.solve_triangular(factor, right, upper=False)
    solution: torch.Tensor = torch.linalg.solve_triangular(factor.mT, half, upper=True)
    return solution


def _bands(width: int) -> Iterator[slice]:
    for first in range(0, width, BAND):
        yield slice(first, min(first + BAND, width))
