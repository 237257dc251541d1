"""The shared basis: which directions of the residual stream are kept.

C = Σⱼ Σₜ n(xⱼₜ) n(xⱼₜ)ᵀ over all norm inputs j of the dense model; the basis is made of the eigenvectors of C by
descending eigenvalue. One eigenproblem serves every dim. Normalising first matters because a few tokens of huge
norm dominate the raw stream, and no linear map ever sees that norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Basis", "eigenbasis"]


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions of the stream, the most energetic first.

    Attributes:
        vectors: Directions as columns, float64 of shape (d, d).
        energies: Their eigenvalues, descending and not negative, float64 of shape (d,).
    """

    vectors: torch.Tensor
    energies: torch.Tensor

    def leading(self, dim: int) -> torch.Tensor:
        """Return Q: the first `dim` directions, shape (d, dim)."""
        return self.vectors[:, :dim].contiguous()

    def energy_kept(self, dim: int) -> float:
        """Return the share of the normalised stream's second moment inside the first `dim` directions."""
        total = float(self.energies.sum())
        return float(self.energies[:dim].sum()) / total if total else 1.0


def eigenbasis(second_moment: torch.Tensor) -> Basis:
    """Diagonalise a second moment in float64.

    Each direction's sign is fixed by making its largest component positive, so that libraries which return
    either sign give the same basis.

    Args:
        second_moment: C, symmetric, shape (d, d).
    """
    values, vectors = torch.linalg.eigh(second_moment.double())
    values, vectors = values.flip(0).clamp_min(0.0), vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return Basis(vectors * torch.where(largest < 0, -1.0, 1.0), values)
