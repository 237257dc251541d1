"""The shared basis: which directions of the residual stream are kept.

Two matrices decide. C = Σⱼ Σₜ n(xⱼₜ) n(xⱼₜ)ᵀ over all norm inputs j says where the normalised stream has energy;
M = Σⱼ Mⱼ / tr(Mⱼ Cⱼ) with Mⱼ = diag(g) Σ WᵀW diag(g) over the readers W of norm j says what the readers make of it,
each norm input counting the same. The basis minimises the error that the readers see,

    E |M^½ (n − A Qᵀ n)|²   over Q of rank k and every A,

a reduced-rank regression (Izenman 1975): the span of M^½ U, U the leading eigenvectors of M^½ C M^½. Plain PCA is
the case M = I. A small multiple of I is added to M so that a direction nobody reads strongly is still ranked by
its energy. The spans for different k are nested, so one eigenproblem serves every dim.

Normalising first matters because a few tokens of huge norm dominate the raw stream, and no linear map ever sees
that norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

__all__ = ["Basis", "reader_basis"]

# share of the identity in M, relative to M's mean eigenvalue
IDENTITY_SHARE = 0.1


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions of the stream, the most important first.

    Attributes:
        vectors: Directions as columns, float64 of shape (d, d).
        energies: Second moment of the normalised stream along each, float64 of shape (d,).
        importances: Eigenvalues of M^½ C M^½, descending: what the readers lose when the basis is cut there.
    """

    vectors: torch.Tensor
    energies: torch.Tensor
    importances: torch.Tensor

    def leading(self, dim: int) -> torch.Tensor:
        """Return Q: the first `dim` directions, shape (d, dim)."""
        return self.vectors[:, :dim].contiguous()

    def energy_kept(self, dim: int) -> float:
        """Return the share of the normalised stream's second moment inside the first `dim` directions."""
        return _share(self.energies, dim)

    def importance_kept(self, dim: int) -> float:
        """Return the share of what the readers see that the first `dim` directions can give them."""
        return _share(self.importances, dim)


def reader_basis(second_moment: torch.Tensor, metric: torch.Tensor) -> Basis:
    """Solve for the basis in float64.

    Each direction's sign is fixed by making its largest component positive, so that libraries which return
    either sign give the same basis.

    Args:
        second_moment: C, symmetric, shape (d, d).
        metric: M, symmetric and positive semidefinite, shape (d, d); zero stands for the identity.

    Example:
        >>> basis = reader_basis(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2))
        >>> basis.energies.tolist()
        [3.0, 1.0]
    """
    moment, weight = second_moment.double(), metric.double()
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    scale = weight.diagonal().mean()
    weight = weight / scale + IDENTITY_SHARE * identity if bool(scale > 0) else identity
    values, vectors = torch.linalg.eigh(weight)
    root = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    importances, directions = torch.linalg.eigh(root @ moment @ root)
    basis, _ = torch.linalg.qr(root @ directions.flip(1))
    largest = basis.gather(0, basis.abs().argmax(0, keepdim=True))
    basis = basis * torch.where(largest < 0, -1.0, 1.0)
    energies = ((moment @ basis) * basis).sum(0).clamp_min(0.0)
    return Basis(basis, energies, importances.flip(0).clamp_min(0.0))


def _share(values: torch.Tensor, dim: int) -> float:
    total = float(values.sum())
    return float(values[:dim].sum()) / total if total else 1.0
