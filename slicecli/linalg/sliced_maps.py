"""How a map that reads or writes the stream looks in a slice, as pure functions on its tensors.

The sliced stream is y = sqrt(k/d) Qᵀ x. Scaled so, the mean square over its k coordinates is that of a d-vector
whose dropped coordinates are zero, so a norm over y with the *same* ε divides by what the dense norm would:
n'(y) = sqrt(k/d) Qᵀ x / sqrt(|Qᵀx|²/d + ε). No config field but the hidden size changes, and norms inside the
attention that share the config's ε, or a class that fixes it, need no special care.

A LayerNorm subtracts the mean over its k coordinates, which must therefore be zero: the columns of Q are
orthogonal to the all-ones vector of the dense stream (the mean of x is never read) and its rows, seen as vectors of
k numbers, to the all-ones vector of the sliced one (`slicecli.linalg.basis`). The mean coordinate of n'(y) is then
always zero, which leaves a free place: a norm's bias β whose readers W have no bias of their own moves into W,
as the column W β / k added to every column, and the norm's bias becomes 1 everywhere, for W' (γ n' + 1) gains exactly
W β, whatever the norm's weight γ is. So a bias of the final norm survives a head without bias, in the family's own
class.

Symbols: docs/notation.md. The rotation is SliceGPT's (arXiv 2401.15024, theorem 1); the scale and the place of β are
ours.
"""

from __future__ import annotations

import math

import torch

__all__ = [
    "fold_bias",
    "fold_reader",
    "projected_table",
    "projected_writer",
    "projection_for_readers",
    "projection_of_stream",
    "rows_times",
    "stream_scale",
    "usual_gain",
]

# rows of a table that are widened to float64 at a time
TABLE_ROWS = 4096
# such gains are exact in bfloat16, with or without 1 taken off
MOST_DOUBLINGS = 7


def stream_scale(basis: torch.Tensor) -> float:
    """Return sqrt(k/d), the scale of the sliced stream.

    Args:
        basis: Q, shape (d, k).
    """
    width, dim = basis.shape
    return math.sqrt(dim / width)


def projection_of_stream(basis: torch.Tensor) -> torch.Tensor:
    """Return sqrt(k/d) Q, which turns x, as a row, into y.

    Args:
        basis: Q, float64 of shape (d, k).
    """
    return stream_scale(basis) * basis


def projection_for_readers(basis: torch.Tensor) -> torch.Tensor:
    """Return A₀ = sqrt(d/k) Q, which turns n'(y) into n(x) as far as the basis reaches.

    Args:
        basis: Q, float64 of shape (d, k).
    """
    return basis / stream_scale(basis)


def usual_gain(norm_weight: torch.Tensor | None) -> float:
    """Return the power of two next to the root mean square of g, by which a sliced norm multiplies.

    With all of g in the readers these would be several times smaller, or larger, than those of the dense model, and an
    optimiser whose steps are of one size for all weights would be too fast for one norm's readers and too slow for
    another's. A power of two is taken out of them without rounding.

    Args:
        norm_weight: g, shape (d,); `None`, for norms without a weight, gives 1.
    """
    if norm_weight is None:
        return 1.0
    root = float(norm_weight.double().square().mean().sqrt())
    if not root > 0 or not math.isfinite(root):
        return 1.0
    return float(2.0 ** min(max(round(math.log2(root)), -MOST_DOUBLINGS), MOST_DOUBLINGS))


def fold_reader(
    weight: torch.Tensor,
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    matrix: torch.Tensor,
    has_bias: bool,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Return a reader's weight in the slice: W diag(g) A, and W β in the place of the mean where there is no bias.

    Args:
        weight: W, shape (..., outputs, d).
        norm_weight: g, shape (d,); `None` stands for ones.
        norm_bias: β, shape (d,); `None` stands for zeros.
        matrix: A, float64 of shape (d, k); orthogonal to the all-ones vector where β is given.
        has_bias: Whether the reader has a bias, which then takes W β (`fold_bias`).
        dtype: Dtype to round the result to.

    Returns:
        Shape (..., outputs, k).
    """
    inner = matrix if norm_weight is None else norm_weight.double()[:, None] * matrix
    if norm_bias is not None and not has_bias:
        inner = inner + norm_bias.double()[:, None] / matrix.shape[1]
    return rows_times(weight, inner, dtype)


def fold_bias(bias: torch.Tensor, weight: torch.Tensor, norm_bias: torch.Tensor | None) -> torch.Tensor:
    """Return a reader's bias in the slice: b + W β, float64.

    Args:
        bias: b, shape (outputs,).
        weight: W, shape (outputs, d).
        norm_bias: β, shape (d,); `None` stands for zeros.
    """
    folded = bias.double()
    return folded if norm_bias is None else folded + rows_times(weight, norm_bias.double()[:, None]).squeeze(-1)


def projected_writer(weight: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Return B₀ = sqrt(k/d) Qᵀ W, a writer's weight (or bias) as the rotation alone makes it.

    Args:
        weight: W, shape (..., d, inputs), or a bias of shape (d,).
        basis: Q, float64 of shape (d, k).

    Returns:
        Shape (..., k, inputs), or (k,), float64.
    """
    return projection_of_stream(basis).T @ weight.double()


def projected_table(
    table: torch.Tensor, basis: torch.Tensor, is_scaled_by_width: bool = False, dtype: torch.dtype = torch.float64
) -> torch.Tensor:
    """Return an embedding table in the slice: sqrt(k/d) E Q.

    Args:
        table: E, shape (rows, d).
        basis: Q, float64 of shape (d, k).
        is_scaled_by_width: The model multiplies the embeddings by the root of its hidden size, which changes
            from sqrt(d) to sqrt(k) and so brings the scale by itself.
        dtype: Dtype to round the result to.

    Returns:
        Shape (rows, k).
    """
    return rows_times(table, basis if is_scaled_by_width else projection_of_stream(basis), dtype)


def rows_times(table: torch.Tensor, matrix: torch.Tensor, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return table @ matrix, computed in float64 a few thousand rows at a time: a vocabulary is large.

    Args:
        table: Shape (..., rows, d).
        matrix: Float64 of shape (d, k).
        dtype: Dtype to round the result to.
    """
    rows = table.reshape(-1, table.shape[-1])
    product = torch.empty(len(rows), matrix.shape[1], dtype=dtype, device=table.device)
    for part, made in zip(rows.split(TABLE_ROWS), product.split(TABLE_ROWS), strict=True):
        made.copy_(part.double() @ matrix)
    return product.reshape(*table.shape[:-1], matrix.shape[1])
