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

LayerNorm subtracts the mean, so C knows nothing along the all-ones vector of d numbers, and the sliced stream must
have no mean either. The eigenproblem is then solved in the d − 1 directions without mean, and k − 1 of them are
kept as y = R Vᵀ x: V the kept directions, R (k, k − 1) orthonormal columns orthogonal to the all-ones vector of k
numbers. One dimension is lost, nothing else.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

__all__ = ["Basis", "centred_frame", "principal_basis", "random_rotation", "reader_basis", "with_fixed_signs"]

# share of the identity in M, relative to M's mean eigenvalue
IDENTITY_SHARE = 0.1


@dataclass(frozen=True)
class Basis:
    """Orthonormal directions of the stream, the most important first.

    Attributes:
        vectors: Directions as columns, float64 of shape (d, d), or (d, d - 1) where they are without mean.
        energies: Second moment of the normalised stream along each, float64.
        importances: Eigenvalues of M^½ C M^½, descending: what the readers lose when the basis is cut there.
        is_centred: The stream is read by a LayerNorm, so neither it nor its slice has a mean.
    """

    vectors: torch.Tensor
    energies: torch.Tensor
    importances: torch.Tensor
    is_centred: bool = False

    def leading(self, dim: int) -> torch.Tensor:
        """Return Q, float64 of shape (d, dim): the first `dim` directions, or V Rᵀ of the first `dim` - 1."""
        if not self.is_centred:
            return self.vectors[:, :dim].contiguous()
        kept = self.vectors[:, : dim - 1]
        return kept @ centred_frame(dim, kept.device).T

    def energy_kept(self, dim: int) -> float:
        """Return the share of the normalised stream's second moment inside a slice of `dim` dimensions."""
        return _share(self.energies, dim - self.is_centred)

    def importance_kept(self, dim: int) -> float:
        """Return the share of what the readers see that a slice of `dim` dimensions can give them."""
        return _share(self.importances, dim - self.is_centred)


def centred_frame(size: int, device: torch.device | None = None) -> torch.Tensor:
    """Return R: orthonormal columns that are orthogonal to the all-ones vector.

    They are the columns but the first of the reflection that turns the first axis into that vector.

    Args:
        size: Length of a column.
        device: Where the result lies.

    Returns:
        Float64 of shape (size, size - 1).

    Example:
        >>> bool(centred_frame(3).sum(0).abs().max() < 1e-15)
        True
    """
    normal = torch.full((size,), -1 / math.sqrt(size), dtype=torch.float64, device=device)
    normal[0] += 1.0
    length = normal.square().sum()
    identity = torch.eye(size, dtype=torch.float64, device=device)
    if size == 1:
        return identity[:, 1:]
    return (identity - 2 / length * torch.outer(normal, normal))[:, 1:]


def reader_basis(second_moment: torch.Tensor, metric: torch.Tensor, is_centred: bool = False) -> Basis:
    """Solve for the basis in float64.

    Each direction's sign is fixed by making its largest component positive, so that libraries which return
    either sign give the same basis.

    Args:
        second_moment: C, symmetric, shape (d, d).
        metric: M, symmetric and positive semidefinite, shape (d, d); zero stands for the identity.
        is_centred: The stream is read by a LayerNorm: look only at directions without mean.

    Example:
        >>> basis = reader_basis(torch.diag(torch.tensor([1.0, 3.0])), torch.eye(2))
        >>> basis.energies.tolist()
        [3.0, 1.0]
    """
    moment, weight = second_moment.double(), metric.double()
    frame = centred_frame(len(moment), moment.device) if is_centred else None
    if frame is not None:
        moment, weight = frame.T @ moment @ frame, frame.T @ weight @ frame
    identity = torch.eye(len(moment), dtype=torch.float64, device=moment.device)
    scale = weight.diagonal().mean()
    weight = weight / scale + IDENTITY_SHARE * identity if bool(scale > 0) else identity
    values, vectors = torch.linalg.eigh(weight)
    root = (vectors * values.clamp_min(0.0).sqrt()) @ vectors.T
    importances, directions = torch.linalg.eigh(root @ moment @ root)
    basis, _ = torch.linalg.qr(root @ directions.flip(1))
    energies = ((moment @ basis) * basis).sum(0).clamp_min(0.0)
    if frame is not None:
        basis = frame @ basis
    return Basis(with_fixed_signs(basis), energies, importances.flip(0).clamp_min(0.0), is_centred)


def principal_basis(second_moment: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the eigenvectors of a second moment, the largest first, with their eigenvalues: PCA without a mean.

    Args:
        second_moment: C, symmetric, shape (d, d).

    Returns:
        Orthonormal columns, float64 of shape (d, d), signs fixed as `reader_basis` does; and their energies,
        float64, descending and not negative.
    """
    energies, vectors = torch.linalg.eigh(second_moment.double())
    return with_fixed_signs(vectors.flip(1)), energies.flip(0).clamp_min(0.0)


def random_rotation(size: int, generator: torch.Generator) -> torch.Tensor:
    """Return an orthogonal matrix drawn uniformly (Haar): a Gaussian matrix made orthonormal, float64 on the CPU.

    Args:
        size: Its rows and columns.
        generator: Where the draw comes from.
    """
    gaussian = torch.randn(size, size, dtype=torch.float64, generator=generator)
    rotation, triangle = torch.linalg.qr(gaussian)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0)
    turned: torch.Tensor = rotation * signs
    return turned


def with_fixed_signs(vectors: torch.Tensor) -> torch.Tensor:
    """Turn columns so that the largest component of each is positive."""
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return vectors * torch.where(largest < 0, -1.0, 1.0)


def _share(values: torch.Tensor, dim: int) -> float:
    total = float(values.sum())
    return float(values[:dim].sum()) / total if total else 1.0
