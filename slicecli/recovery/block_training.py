"""One block of a slice in training: what it is trained to give, and the steps of the optimiser.

The target is the dense stream after the block in the slice's coordinates, c Qᵀ x⁺, and errors are weighted as in the
refit, by w² = 1 / mean(x⁺²), so that they count as the next norm sees them.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slicecli.linalg.normal_equations import inverse_scale, widen
from slicecli.slicing import modules
from slicecli.slicing.activations import Stream
from slicecli.slicing.context import DenseModel
from slicecli.slicing.layerwise import require_finite
from slicecli.slicing.modules import Calls

if TYPE_CHECKING:
    from slicecli.progress import Progress

__all__ = ["BlockFit", "BlockSchedule", "BlockTraining", "Goals", "Part", "move_streams"]

WARM_UP_SHARE = 0.05
LARGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class BlockSchedule:
    """How long, in what portions and how fast each block is trained.

    Attributes:
        epochs: How often each block sees all rows.
        rows_per_step: Rows of one step, in this process.
        rows_per_pass: Rows that go through a block at once; a divisor of the rows of a step.
    """

    epochs: int
    rows_per_step: int
    rows_per_pass: int
    learning_rate: float
    seed: int


@dataclass(frozen=True)
class BlockFit:
    """What the training of a block did to its mean squared error on the held-out rows.

    Attributes:
        diverged_at: The step at which the gradient was not finite, if it came to that; training stopped there.
    """

    error_before: float
    error_after: float
    diverged_at: int | None = None


@dataclass
class Part:
    """The cached activations of some rows, as far as the pass has come.

    Attributes:
        dense: x, of the teacher.
        own: y, of the slice.
    """

    dense: Stream
    own: Stream


class Goals:
    """What a block is trained to give: c Qᵀ x⁺ for each token, and the root of the weight of its error.

    Args:
        turn: c Q, shape (d, k).
    """

    def __init__(self, turn: torch.Tensor, teacher: DenseModel) -> None:
        self._turn = turn.to(torch.promote_types(teacher.dtype, torch.float32))
        self._teacher = teacher

    def of(self, after: torch.Tensor) -> torch.Tensor:
        """Return both, the goal multiplied by the root, shape (rows, sequence length, k + 1)."""
        wide = widen(after)
        root = inverse_scale(wide, self._teacher.dimensions.epsilon, self._teacher.is_centred)
        return torch.cat([wide @ self._turn * root, root], dim=-1)


@dataclass(frozen=True)
class BlockTraining:
    """A block of the slice, its weights in float32, while it is worked on."""

    student: DenseModel
    index: int
    block: nn.Module
    calls: Calls
    parameters: list[nn.Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.parameters.extend(self.block.parameters())

    def move(self, *streams: Stream) -> int:
        """Run the block over streams; return the length of the tuple it gives, 0 where it gives a tensor."""
        return move_streams(self.student, self._call, f"the slice's activations after block {self.index}", streams)

    def train(
        self,
        training: Part,
        held_out: Part,
        goals: Goals,
        schedule: BlockSchedule,
        dtype: torch.dtype,
        progress: Progress,
    ) -> BlockFit:
        """Train the block, and leave in it its best state by the held-out error, rounded to a dtype."""
        from transformers import get_cosine_schedule_with_warmup

        training_goals, held_out_goals = (
            self.student.activations.filled(goals.of(after).to(self.student.dtype) for after in part.dense)
            for part in (training, held_out)
        )
        passes = schedule.rows_per_step // schedule.rows_per_pass
        steps = schedule.epochs * (len(training.own) // passes)
        optimizer = torch.optim.AdamW(self.parameters, lr=schedule.learning_rate, weight_decay=0.0)
        pace = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARM_UP_SHARE * steps), steps)
        generator = torch.Generator().manual_seed(schedule.seed + self.index)
        first = error = self._error(held_out.own, held_out_goals)
        best = [value.to(dtype, copy=True) for value in self.parameters]
        step, diverged_at = 0, None
        for value in self.parameters:
            value.requires_grad_(True)
        for _ in range(schedule.epochs):
            started = time.perf_counter()
            order = torch.randperm(len(training.own), generator=generator).tolist()
            for numbers in _groups(order, passes) if diverged_at is None else ():
                step += 1
                optimizer.zero_grad()
                for number in numbers:
                    with torch.enable_grad():
                        self._loss(training.own[number], training_goals[number]).div(passes).backward()
                if not self._has_finite_gradient():
                    diverged_at = step
                    break
                optimizer.step()
                pace.step()
            found = self._error(held_out.own, held_out_goals)
            if found < error:
                error = found
                best = [value.to(dtype, copy=True) for value in self.parameters]
            speed = sum(batch.shape[0] * batch.shape[1] for batch in training.own) / (time.perf_counter() - started)
            progress.advance(f"block {self.index + 1}: error {first:.4f} → {error:.4f}, {speed:,.0f} tokens/s")
        for value, kept in zip(self.parameters, best, strict=True):
            value.requires_grad_(False)
            value.grad = None
            value.copy_(kept)
        return BlockFit(first, error, diverged_at)

    def _call(self, batch: torch.Tensor) -> Any:
        is_mixed = self.student.dtype != torch.float32 and self.student.device.type != "cpu"
        with torch.autocast(self.student.device.type, self.student.dtype, enabled=is_mixed):
            return self.calls.of(self.index, batch)(self.block, batch)

    def _loss(self, batch: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        """Return the mean over tokens and coordinates of w² (c Qᵀ x⁺ - y⁺)²."""
        output, wide = widen(modules.first_tensor(self._call(batch))), widen(goal)
        return (output * wide[..., -1:] - wide[..., :-1]).square().mean()

    def _error(self, stream: Stream, goals: Stream) -> float:
        total = sum(float(self._loss(batch, goal)) * len(batch) for batch, goal in zip(stream, goals, strict=True))
        return total / sum(len(batch) for batch in stream)

    def _has_finite_gradient(self) -> bool:
        """Add up the gradients of all processes and clip them; say whether they are numbers."""
        processes = self.student.processes
        gradients = []
        for value in self.parameters:
            if value.grad is None:  # of an expert that no token was sent to here
                value.grad = torch.zeros_like(value)
            gradients.append(value.grad)
        processes.sum_everywhere(*gradients)
        if processes.count > 1:
            torch._foreach_div_(gradients, processes.count)
        return math.isfinite(float(nn.utils.clip_grad_norm_(self.parameters, LARGEST_GRADIENT)))


def _groups(order: Sequence[int], size: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(order) - size + 1, size):
        yield order[start : start + size]


def move_streams(model: DenseModel, run: Callable[[torch.Tensor], Any], what: str, streams: Sequence[Stream]) -> int:
    """Run something over streams in place; return the length of the tuple it gives, 0 where it gives a tensor.

    Args:
        what: What the streams are then, for an error.
    """
    output: Any = None
    for stream in streams:
        for number, batch in enumerate(stream):
            output = run(batch)
            moved = modules.first_tensor(output).to(model.dtype)
            require_finite(moved, what)
            stream[number] = moved
    return len(output) if isinstance(output, tuple) else 0
