"""Which hidden sizes kernels and quantised formats can use.

A format quantises rows in groups, so the group's size must divide the hidden size. Where it does not, GGUF keeps a
matrix in 16 bits, and others refuse the model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

__all__ = [
    "MULTIPLES",
    "formats_of",
    "friendly_multiple",
    "gguf_type",
    "legend",
    "preferred_dims",
    "preferred_widths",
    "why_not_quantised",
    "why_writers_are_not_quantised",
]

# what each multiple is needed for, from the most demanding on
MULTIPLES = {256: "k-quants", 128: "GPTQ, AWQ, Marlin", 64: "bitsandbytes, MLX", 32: "q8_0, q4_0"}
LEAST = min(MULTIPLES)
MOST_STEP = 1 / 32  # of the hidden size: what counts as a small step


class LegalDims(Protocol):
    """What a slice of a model may be."""

    @property
    def hidden_size(self) -> int:
        """The hidden size of the dense model."""
        ...

    @property
    def dim_multiple(self) -> int:
        """What every legal dim is a multiple of."""
        ...

    def legal_dims(self) -> range:
        """Return the dims a slice may have, in ascending order."""
        ...


def formats_of(dim: int) -> str:
    """Return the formats and kernels that can use a hidden size.

    Example:
        >>> formats_of(448)
        'bitsandbytes, MLX, q8_0, q4_0'
    """
    return ", ".join(names for multiple, names in MULTIPLES.items() if dim % multiple == 0)


def legend() -> str:
    """Explain the column with what `friendly_multiple` returns."""
    divisors = ", ".join(f"{multiple} ({names})" for multiple, names in MULTIPLES.items())
    return f"÷: the largest of {divisors} that divides the dim."


def gguf_type(*widths: int) -> str:
    """Return a type for `llama-quantize` whose groups divide all widths; empty where none does."""
    shared = math.gcd(*widths)
    return "Q4_K_M" if shared % max(MULTIPLES) == 0 else "Q8_0" if shared % LEAST == 0 else ""


def friendly_multiple(dim: int) -> int | None:
    """Return the largest of the multiples that divides a hidden size."""
    return next((multiple for multiple in MULTIPLES if dim % multiple == 0), None)


def preferred_dims(sizes: LegalDims, multiple_of: int | None = None, most_step: float = MOST_STEP) -> list[int]:
    """Return legal dims that a number divides: the largest of 256, 128, 64 and 32 that is a small step for the model.

    Where even 32 is a large step, all legal dims are returned.

    Args:
        multiple_of: The number to use instead.
        most_step: What counts as a small step, as a share of the hidden size.
    """
    return preferred_widths(sizes.legal_dims(), sizes.hidden_size, sizes.dim_multiple, multiple_of, most_step)


def preferred_widths(
    legal: range, size: int, least_step: int = 1, multiple_of: int | None = None, most_step: float = MOST_STEP
) -> list[int]:
    """Do the same for legal widths of any kind, such as those of an MLP.

    Args:
        size: The width of the dense model.
        least_step: What every legal width is a multiple of.
    """
    if multiple_of is not None:
        return _divided(legal, multiple_of)
    for multiple in MULTIPLES:
        if math.lcm(least_step, multiple) <= most_step * size:
            return _divided(legal, multiple)
    return list(legal)


def why_not_quantised(dim: int, legal: Sequence[int]) -> str:
    """Say what a hidden size costs that 32 does not divide, and which legal ones do better; empty if 32 divides it."""
    if dim % LEAST == 0:
        return ""
    return (
        f"{LEAST} does not divide a hidden size of {dim}, so GGUF keeps its matrices in 16 bits: a quantised file can "
        f"be larger than the dense model's.{_nearest(dim, legal)}"
    )


def why_writers_are_not_quantised(mlp_dim: int, legal: Sequence[int]) -> str:
    """Say the same of an MLP width, which is the length of the rows of the MLPs' writers."""
    if mlp_dim % LEAST == 0:
        return ""
    return (
        f"{LEAST} does not divide an MLP width of {mlp_dim}, so GGUF keeps the last matrix of every MLP in 16 bits."
        f"{_nearest(mlp_dim, legal)}"
    )


def _nearest(width: int, legal: Sequence[int]) -> str:
    friendly = [other for other in legal if other % LEAST == 0]
    nearest = sorted(sorted(friendly, key=lambda other: abs(other - width))[:2])
    return f" The nearest that it divides: {' and '.join(map(str, nearest))}." if nearest else ""


def _divided(legal: range, multiple: int) -> list[int]:
    return [width for width in legal if width % multiple == 0]
