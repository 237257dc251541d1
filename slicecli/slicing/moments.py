"""Sums over tokens: second moments of a stream, and the normal equations of a regression.

Products of a chunk of tokens are taken in the dtype of the stream (at least float32) and summed in float64: a
chunk is short enough that its float32 sum errs by about 1e-6, and the long sum loses nothing.

Legend: d hidden size, t a token, n(x) = x / sqrt(mean(x²) + ε), of a LayerNorm after its mean is subtracted.
"""

from __future__ import annotations

import torch

__all__ = ["CHUNK_TOKENS", "Moments", "add_outer", "add_square", "inverse_scale", "is_finite", "normalise", "widen"]

CHUNK_TOKENS = 4096
BAND_ROWS = 1024
LEAST_BAND_ROWS = 256  # narrower products do not keep a processor busy
BANDS = 8


def normalise(stream: torch.Tensor, epsilon: float, is_centred: bool = False) -> torch.Tensor:
    """Return n(x), what a norm without weight and bias passes on.

    Args:
        stream: Shape (..., d).
        epsilon: The norm's ε.
        is_centred: The norm is a LayerNorm, which subtracts the mean first.

    Returns:
        The same shape, in float32, or in float64 where the stream is float64.
    """
    wide = widen(stream)
    if is_centred:
        wide = wide - wide.mean(-1, keepdim=True)
    return wide * inverse_scale(wide, epsilon)


def inverse_scale(stream: torch.Tensor, epsilon: float, is_centred: bool = False) -> torch.Tensor:
    """Return 1 / sqrt(mean(x²) + ε), what a norm multiplies its input by.

    Args:
        stream: Shape (..., d), float32 or float64.
        epsilon: The norm's ε.
        is_centred: Take the mean square about the mean.

    Returns:
        Shape (..., 1).
    """
    square = stream.var(-1, correction=0, keepdim=True) if is_centred else stream.square().mean(-1, keepdim=True)
    return torch.rsqrt(square + epsilon)


def widen(stream: torch.Tensor) -> torch.Tensor:
    """Return a stream in the dtype for products: float32 at least."""
    return stream if stream.dtype == torch.float64 else stream.float()


def is_finite(tensor: torch.Tensor) -> bool:
    """Say whether a tensor is free of NaN and infinity; its least and largest number tell, in one pass over it."""
    return not tensor.numel() or bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def add_outer(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add Σₜ leftₜ rightₜᵀ to `total` in place.

    Args:
        total: Shape (a, b), float64.
        left: Shape (tokens, a).
        right: Shape (tokens, b).
    """
    for start in range(0, len(left), CHUNK_TOKENS):
        chunk = slice(start, start + CHUNK_TOKENS)
        # a band at a time: the float32 product and its widened copy are as large as the sum itself
        for band in range(0, len(total), BAND_ROWS):
            rows = slice(band, band + BAND_ROWS)
            total[rows] += left[chunk, rows].T @ right[chunk]


def add_square(total: torch.Tensor, rows: torch.Tensor) -> None:
    """Add Σₜ rowₜ rowₜᵀ to `total` in place; what lies below the diagonal is not computed again.

    Args:
        total: Shape (a, a), float64.
        rows: Shape (tokens, a).
    """
    width = len(total)
    size = min(BAND_ROWS, max(LEAST_BAND_ROWS, -(-width // BANDS)))
    for start in range(0, len(rows), CHUNK_TOKENS):
        chunk = rows[start : start + CHUNK_TOKENS]
        for first in range(0, width, size):
            end = min(first + size, width)
            product = chunk[:, first:end].T @ chunk[:, first:]
            total[first:end, first:] += product
            total[end:, first:end] += product[:, end - first :].T


class Moments:
    """The normal equations of a linear regression, for fitted and for held-out tokens apart.

    The regression corrects a map that exists already: its outputs are residuals, target minus what the existing
    map gives. A residual of exactly zero then asks for a correction of exactly zero, whatever the rounding.

    Attributes:
        gram: Σ z zᵀ of fitted and of held-out tokens, float64, each of shape (inputs, inputs).
        cross: Σ z rᵀ with r the residual, of both, float64, each of shape (inputs, outputs).
        residual_energy: Σ |r|² of both, float64.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        def zeros(*shape: int) -> list[torch.Tensor]:
            return [torch.zeros(*shape, dtype=torch.float64, device=device) for _ in range(2)]

        # apart, not stacked, so that the solver can merge them in place
        self.gram = zeros(inputs, inputs)
        self.cross = zeros(inputs, outputs)
        self.residual_energy = zeros(1)

    def add(self, inputs: torch.Tensor, residuals: torch.Tensor, is_held_out: torch.Tensor) -> None:
        """Add tokens.

        Args:
            inputs: z, shape (tokens, inputs).
            residuals: r, shape (tokens, outputs).
            is_held_out: Which tokens are held out, bool of shape (tokens,).
        """
        for index, chosen in enumerate((~is_held_out, is_held_out)):
            some_inputs, some_residuals = inputs[chosen], residuals[chosen]
            add_square(self.gram[index], some_inputs)
            add_outer(self.cross[index], some_inputs, some_residuals)
            self.residual_energy[index] += some_residuals.double().square().sum()
