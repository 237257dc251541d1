"""The loss of distillation: the divergence of a slice's predictions from its teacher's.

Symbols: docs/notation.md.
"""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["CHUNK_NUMBERS", "forward_divergence", "next_token_divergence"]

CHUNK_NUMBERS = 1 << 26
"""Most logits that are held in float32 at once, unless a single position has more."""


def next_token_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """Return for each row the mean of KL(teacher ‖ student) over the positions that have a next token, in nats.

    Args:
        student: Logits, shape (rows, tokens, vocabulary); the gradient flows into these alone.
        teacher: Logits of the same shape, on any device and of any floating-point dtype.
    """
    parts = [forward_divergence(own[:-1], other[:-1]) for own, other in zip(student, teacher, strict=True)]
    return torch.stack(parts) / (student.shape[1] - 1)


def forward_divergence(student: torch.Tensor, teacher: torch.Tensor, chunk: int | None = None) -> torch.Tensor:
    """Return the sum over positions of Σ p (ln p − ln q), p the teacher's and q the student's distribution, in float32.

    The positions are taken in chunks, so that float32 copies of only a few exist at a time. The gradient, q − p, is
    computed with the value and kept in the student's dtype.

    Args:
        student: Logits, shape (positions, vocabulary).
        teacher: Logits of the same shape, on any device and of any floating-point dtype.
        chunk: Positions per chunk; by default as many as have `CHUNK_NUMBERS` logits.
    """
    positions = chunk or max(1, CHUNK_NUMBERS // student.shape[-1])
    divergence: torch.Tensor = _ForwardDivergence.apply(student, teacher, positions)  # type: ignore[no-untyped-call]
    return divergence


class _ForwardDivergence(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: torch.Tensor, teacher: torch.Tensor, chunk: int) -> torch.Tensor:
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.empty_like(student) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            own = torch.log_softmax(student[part], -1, dtype=torch.float32)
            other = torch.log_softmax(teacher[part].to(student.device), -1, dtype=torch.float32)
            probabilities = other.exp()
            total += (probabilities * (other - own)).sum()
            if gradient is not None:
                gradient[part] = own.exp_().sub_(probabilities)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None
