"""The map from a dense stream to the stream of a slice whose basis is not known.

Least squares over tokens finds a map that is shrunk: what the slice has lost of the stream, the map leaves out too. So
the singular values are put back to the one that all of them have in a slice without loss, y = c Qᵀ x with orthonormal
columns in Q.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import torch

from slicecli.linalg.cholesky import factorise, substitute
from slicecli.linalg.normal_equations import add_outer, add_square

__all__ = ["StreamMap"]

RIDGE = 1e-6
# a LayerNorm slice has one direction that nothing of the dense stream goes to
LEAST_SHARE = 0.1


class StreamMap:
    """Sums up tokens of two streams, and gives the map from one to the other.

    Attributes:
        gram: Σ w² x xᵀ, float64 of shape (d, d).
        cross: Σ w² x yᵀ, float64 of shape (d, k).
    """

    def __init__(self, width: int, dim: int, device: torch.device) -> None:
        self.gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self.cross = torch.zeros(width, dim, dtype=torch.float64, device=device)

    def add(self, dense: torch.Tensor, sliced: torch.Tensor, root: torch.Tensor) -> None:
        """Add tokens.

        Args:
            dense: x, shape (tokens, d).
            sliced: y, shape (tokens, k).
            root: w, shape (tokens, 1).
        """
        weighted = dense * root
        add_square(self.gram, weighted)
        add_outer(self.cross, weighted, sliced * root)

    def solve(self, scale: float) -> torch.Tensor:
        """Return c Q, which turns x, as a row, into y, float64 of shape (d, k); of no use afterwards.

        Args:
            scale: c.
        """
        self.gram.diagonal().add_(RIDGE * self.gram.diagonal().mean())
        factorise(self.gram)
        left, values, right = torch.linalg.svd(substitute(self.gram, self.cross), full_matrices=False)
        values = torch.where(values > LEAST_SHARE * values[0], scale, values)
        found: torch.Tensor = (left * values) @ right
        return found
