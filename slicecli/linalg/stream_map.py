"""The map from a dense stream to the stream of a slice whose basis is not known.

Least squares over tokens would find a map that is shrunk: what the slice has lost of the stream, the map leaves out
too. There are two ways around it.

A refit leaves errors c Qᵀ x⁺ - y⁺ behind each block that are uncorrelated with what the block has written,
Δ = y⁺ - y, because a regression leaves none that its inputs explain. So c Q solves

    Σₜ w² Δₜ (c Qᵀ x⁺ₜ - y⁺ₜ)ᵀ = 0

for every block: k equations for each of its columns, solved together in least squares (`WrittenStreamMap`; statistics
calls Δ an instrumental variable).

Where that says too little, the map is found by least squares over tokens, and its singular values are put back to the
one that all of them have in a slice without loss (`StreamMap`).

Symbols: docs/notation.md.
"""

from __future__ import annotations

import torch

from slicecli.errors import TrainingError
from slicecli.linalg.cholesky import factorise, substitute
from slicecli.linalg.normal_equations import add_outer, add_square

__all__ = ["StreamMap", "WrittenStreamMap"]

RIDGE = 1e-6
WRITTEN_RIDGE = 1e-4
LEAST_EQUATIONS = 3
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

        Raises:
            TrainingError: The dense activations do not determine it.
        """
        _factorise(self.gram, "the model's activations are all zero or not finite")
        left, values, right = torch.linalg.svd(substitute(self.gram, self.cross), full_matrices=False)
        values = torch.where(values > LEAST_SHARE * values[0], scale, values)
        found: torch.Tensor = (left * values) @ right
        return found


class WrittenStreamMap:
    """Sums up tokens of two streams behind block after block, and gives the map from one to the other.

    Attributes:
        square, dense, sliced: Of the block at hand: Σ w² Δ Δᵀ, (k, k); Σ w² Δ x⁺ᵀ, (k, d); Σ w² Δ y⁺ᵀ, (k, k). Float64.
    """

    def __init__(self, width: int, dim: int, device: torch.device) -> None:
        self._gram = torch.zeros(width, width, dtype=torch.float64, device=device)
        self._cross = torch.zeros(width, dim, dtype=torch.float64, device=device)
        self._open()

    def _open(self) -> None:
        (width, dim), like = self._cross.shape, self._cross
        self.square, self.dense, self.sliced = (like.new_zeros(dim, size) for size in (dim, width, dim))

    @staticmethod
    def is_determined(blocks: int, width: int, dim: int) -> bool:
        """Say whether so many blocks have equations enough."""
        return blocks * dim >= LEAST_EQUATIONS * width

    def add(self, dense: torch.Tensor, sliced: torch.Tensor, written: torch.Tensor, root: torch.Tensor) -> None:
        """Add tokens behind the block at hand.

        Args:
            dense: x⁺, shape (tokens, d).
            sliced: y⁺, shape (tokens, k).
            written: Δ, shape (tokens, k).
            root: w, shape (tokens, 1).
        """
        weighted = written * root
        add_square(self.square, weighted)
        add_outer(self.dense, weighted, dense * root)
        add_outer(self.sliced, weighted, sliced * root)

    def finish_block(self) -> None:
        """Add the equations of the block at hand, Δ made white."""
        self.square.diagonal().add_(WRITTEN_RIDGE * self.square.diagonal().mean())
        if factorise(self.square):
            dense, sliced = (
                torch.linalg.solve_triangular(self.square, one, upper=False) for one in (self.dense, self.sliced)
            )
            self._gram += dense.T @ dense
            self._cross += dense.T @ sliced
        self._open()

    def solve(self) -> torch.Tensor:
        """Return c Q, which turns x, as a row, into y, float64 of shape (d, k); of no use afterwards.

        Raises:
            TrainingError: The blocks write too little to determine it.
        """
        _factorise(self._gram, "its blocks write next to nothing")
        return substitute(self._gram, self._cross)


def _factorise(gram: torch.Tensor, cause: str) -> None:
    gram.diagonal().add_(RIDGE * gram.diagonal().mean())
    if not factorise(gram):
        raise TrainingError(
            f"The coordinates of the slice cannot be found: {cause}.",
            "Train it in another mode, --mode full or --mode lora.",
        )
