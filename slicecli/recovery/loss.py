"""The loss of distillation: the divergence of a slice's predictions from its teacher's.

Symbols: docs/notation.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

__all__ = [
    "CHUNK_NUMBERS",
    "Likeliest",
    "forward_divergence",
    "likeliest_divergence",
    "likeliest_tokens",
    "next_token_divergence",
]

CHUNK_NUMBERS = {"cpu": 1 << 20, "other": 1 << 26}
"""Most logits that are held in float32 at once, unless a single position has more; on a CPU what its caches hold."""


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
    positions = chunk or _chunk(student)
    divergence: torch.Tensor = _ForwardDivergence.apply(student, teacher, positions)  # type: ignore[no-untyped-call]
    return divergence


@dataclass(frozen=True)
class Likeliest:
    """The likeliest tokens of some distributions.

    Attributes:
        tokens: Their ids, int64 of shape (positions, K).
        log_probabilities: Float32 of shape (positions, K).
        log_rest: Logarithm of the probability of all other tokens together, float32 of shape (positions,); minus
            infinity where there are none.
    """

    tokens: torch.Tensor
    log_probabilities: torch.Tensor
    log_rest: torch.Tensor


def likeliest_tokens(logits: torch.Tensor, count: int) -> Likeliest:
    """Return the likeliest tokens, the sum of the others from those themselves.

    Args:
        logits: Shape (positions, vocabulary).
        count: K.
    """
    found = []
    for some in logits.split(_chunk(logits)):
        all_of_them = torch.log_softmax(some, -1, dtype=torch.float32)
        chosen, tokens = all_of_them.topk(count)
        found.append((tokens, chosen, _log_rest(all_of_them, tokens)))
    tokens, chosen, rest = (torch.cat(parts) for parts in zip(*found, strict=True))
    return Likeliest(tokens, chosen, rest)


def likeliest_divergence(student: torch.Tensor, teacher: Likeliest, chunk: int | None = None) -> torch.Tensor:
    """Return the sum over positions of the divergence over the teacher's likeliest tokens and one bucket for the rest.

    It is computed as `forward_divergence` is. The gradient is q - p for the likeliest tokens, and q (1 - t / u) for the
    others, with t and u what teacher and student give to all of those together.

    Args:
        student: Logits, shape (positions, vocabulary).
    """
    positions = chunk or _chunk(student)
    divergence: torch.Tensor = _LikeliestDivergence.apply(  # type: ignore[no-untyped-call]
        student, teacher.tokens, teacher.log_probabilities, teacher.log_rest, positions
    )
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


class _LikeliestDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: torch.Tensor,
        tokens: torch.Tensor,
        log_probabilities: torch.Tensor,
        log_rest: torch.Tensor,
        chunk: int,
    ) -> torch.Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for start in range(0, len(student), chunk):
            part = slice(start, start + chunk)
            own = torch.log_softmax(student[part], -1, dtype=torch.float32)
            chosen, rest = own.gather(-1, tokens[part]), _log_rest(own, tokens[part])
            probabilities, other_rest = log_probabilities[part].exp(), log_rest[part]
            total += (probabilities * (log_probabilities[part] - chosen)).sum()
            has_rest = other_rest > -torch.inf
            total += torch.where(has_rest, other_rest.exp() * (other_rest - rest), 0.0).sum()
            if gradient is not None:
                share = torch.where(has_rest, 1 - (other_rest - rest).exp(), 1.0)
                found = own.exp_().mul_(share[:, None])
                gradient[part] = found.scatter_(-1, tokens[part], chosen.exp() - probabilities)
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx: Any, *outer: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * outer[0], None, None, None, None


def _chunk(logits: torch.Tensor) -> int:
    """Return how many positions make a chunk."""
    return max(1, CHUNK_NUMBERS["cpu" if logits.device.type == "cpu" else "other"] // logits.shape[-1])


def _log_rest(log_probabilities: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the probability of all tokens but some, shape (positions,)."""
    return log_probabilities.scatter(-1, tokens, -torch.inf).logsumexp(-1)
