"""Sums over tokens: second moments of a stream, and the normal equations of a regression.

Products of a chunk of tokens are taken in the dtype of the stream (at least float32) and summed in float64: a
chunk is short enough that its float32 sum errs by about 1e-6, and the long sum loses nothing.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import torch

from slicecli.runtime.memory import make_room

__all__ = [
    "CHUNK_TOKENS",
    "NormalEquations",
    "add_outer",
    "add_square",
    "combined",
    "inverse_scale",
    "is_finite",
    "normalise",
    "widen",
]

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


class NormalEquations:
    """The normal equations of a linear regression, for fitted and for held-out tokens apart.

    The regression corrects a map that exists already: its outputs are residuals, target minus what the existing
    map gives. A residual of exactly zero then asks for a correction of exactly zero, whatever the rounding.

    Held-out tokens are few. Until there are more of them than inputs they are kept as they are, which takes less room
    than their sums and tells the same; then all that are kept are summed up at once.

    Attributes:
        gram: Σ z zᵀ of fitted tokens, float64 of shape (inputs, inputs).
        cross: Σ z rᵀ of fitted tokens with r the residual, float64 of shape (inputs, outputs).
        residual_energy: Σ |r|² of fitted and of held-out tokens, float64 of shape (1,) each.
        held_out: z and r of held-out tokens that are not summed up, shapes (tokens, inputs) and (tokens, outputs).
        held_out_sums: Gram matrix and cross products of those that are.
    """

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        make_room(inputs * inputs * torch.float64.itemsize)
        self.gram = torch.zeros(inputs, inputs, dtype=torch.float64, device=device)
        self.cross = torch.zeros(inputs, outputs, dtype=torch.float64, device=device)
        self.residual_energy = [torch.zeros(1, dtype=torch.float64, device=device) for _ in range(2)]
        self.held_out: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.held_out_sums: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, inputs: torch.Tensor, residuals: torch.Tensor, is_held_out: torch.Tensor) -> None:
        """Add tokens.

        Args:
            inputs: z, shape (tokens, inputs).
            residuals: r, shape (tokens, outputs).
            is_held_out: Which tokens are held out, bool of shape (tokens,).
        """
        is_fitted = ~is_held_out
        some_inputs, some_residuals = inputs[is_fitted], residuals[is_fitted]
        add_square(self.gram, some_inputs)
        add_outer(self.cross, some_inputs, some_residuals)
        self.residual_energy[0] += some_residuals.double().square().sum()
        some_inputs, some_residuals = inputs[is_held_out], residuals[is_held_out]
        self.residual_energy[1] += some_residuals.double().square().sum()
        self.held_out.append((some_inputs, some_residuals))
        if sum(len(rows) for rows, _ in self.held_out) > len(self.gram):
            self.sum_held_out()

    def sum_held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Sum up the held-out tokens, which are not kept any longer; return the sums."""
        if self.held_out_sums is None:
            self.held_out_sums = torch.zeros_like(self.gram), torch.zeros_like(self.cross)
        gram, cross = self.held_out_sums
        for inputs, residuals in self.held_out:
            add_square(gram, inputs)
            add_outer(cross, inputs, residuals)
        self.held_out.clear()
        return self.held_out_sums

    def change_of_error(self, delta: torch.Tensor, outputs: torch.Tensor | None = None) -> float:
        """Return by how much a correction changes Σ |r|² over held-out tokens.

        Args:
            delta: The correction, float64 of shape (inputs, outputs).
            outputs: Combinations of outputs that it is of, float64 of shape (all outputs, outputs); `None` for all.
        """
        change = 0.0
        if self.held_out_sums is not None:
            # Σ |r − Δ z|² = Σ |r|² − 2 ⟨Δ, Σ r zᵀ⟩ + ⟨Δ, Δ Σ z zᵀ⟩
            gram, cross = self.held_out_sums
            change += float((delta * (gram @ delta).sub_(combined(cross, outputs), alpha=2)).sum())
        for inputs, residuals in self.held_out:
            corrected = inputs.double() @ delta
            change += float((corrected * corrected.sub(combined(residuals, outputs), alpha=2)).sum())
        return change

    def keep_inputs(self, stays: torch.Tensor, start: torch.Tensor) -> None:
        """Take inputs out of the regression: what the existing map makes of them is part of the residuals again.

        Args:
            stays: Which inputs stay, bool of shape (inputs,).
            start: The existing map, shape (outputs, inputs).
        """
        given = start[:, ~stays].T.double()
        self.gram, self.cross, added = _without(self.gram, self.cross, stays, given)
        self.residual_energy[0] += added
        if self.held_out_sums is not None:
            *sums, added = _without(*self.held_out_sums, stays, given)
            self.held_out_sums = sums[0], sums[1]
            self.residual_energy[1] += added
        for number, (inputs, residuals) in enumerate(self.held_out):
            whole = residuals + inputs[:, ~stays] @ given.to(inputs)
            self.residual_energy[1] += whole.double().square().sum() - residuals.double().square().sum()
            self.held_out[number] = inputs[:, stays], whole

    def merge(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the held-out tokens to the others, and return Gram matrix and cross products of all."""
        if self.held_out_sums is not None:
            self.gram += self.held_out_sums[0]
            self.cross += self.held_out_sums[1]
            self.held_out_sums = None
        for inputs, residuals in self.held_out:
            add_square(self.gram, inputs)
            add_outer(self.cross, inputs, residuals)
        self.held_out.clear()
        return self.gram, self.cross


def combined(values: torch.Tensor, outputs: torch.Tensor | None) -> torch.Tensor:
    """Return combinations of the columns of a matrix, or the matrix itself."""
    return values if outputs is None else values @ outputs.to(values)


def _without(
    gram: torch.Tensor, cross: torch.Tensor, stays: torch.Tensor, given: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return Gram matrix, in the memory of the old one, and cross products of what stays, and what Σ |r|² gains."""
    explained = gram[:, ~stays] @ given
    added = (given * (explained[~stays] + 2 * cross[~stays])).sum()
    explained += cross
    kept = stays.nonzero().squeeze(1)
    count, flat = len(kept), gram.view(-1)
    for first in range(0, count, BAND_ROWS):  # written where rows are that have been read
        rows = gram[kept[first : first + BAND_ROWS]][:, kept]
        flat[first * count : first * count + rows.numel()] = rows.flatten()
    return flat[: count * count].view(count, count), explained[kept], added
