"""One block of a slice in training: the steps of the optimiser, and which state is kept."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slicecli.recovery.objectives import Objective, Part
from slicecli.runtime.placement import mixed_precision
from slicecli.slicing import modules
from slicecli.slicing.activations import Stream
from slicecli.slicing.context import DenseModel
from slicecli.slicing.layerwise import require_finite
from slicecli.slicing.modules import Calls

if TYPE_CHECKING:
    from slicecli.progress import Progress

__all__ = ["BlockFit", "BlockSchedule", "BlockTraining", "move_streams"]

WARM_UP_SHARE = 0.1  # of the steps, in all modes
LARGEST_GRADIENT = 1.0  # norm that gradients are clipped to, in all modes


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
    """What the training of a block did to its loss on the held-out rows.

    Attributes:
        diverged_at: The step at which the gradient was not finite, if it came to that; training stopped there.
    """

    error_before: float
    error_after: float
    diverged_at: int | None = None


@dataclass(frozen=True)
class BlockTraining:
    """A block of the slice, its weights in float32, while it is worked on.

    Attributes:
        parameters: What is trained.
    """

    student: DenseModel
    index: int
    block: nn.Module
    calls: Calls
    parameters: Sequence[nn.Parameter] = ()

    def move(self, *streams: Stream) -> int:
        """Run the block over streams; return the length of the tuple it gives, 0 where it gives a tensor."""
        return move_streams(self.student, self._call, f"the slice's activations after block {self.index}", streams)

    def train(
        self,
        training: Part,
        held_out: Part,
        objective: Objective,
        schedule: BlockSchedule,
        dtype: torch.dtype,
        progress: Progress,
    ) -> BlockFit:
        """Train the block, and leave in it its best state by the held-out error, rounded to a dtype."""
        from transformers import get_cosine_schedule_with_warmup

        training_targets, held_out_targets = objective.targets(training), objective.targets(held_out)
        passes = schedule.rows_per_step // schedule.rows_per_pass
        steps = schedule.epochs * (len(training.own) // passes)
        # fused: without temporary tensors of the size of a weight
        optimizer = torch.optim.AdamW(self.parameters, lr=schedule.learning_rate, weight_decay=0.0, fused=True)
        pace = get_cosine_schedule_with_warmup(optimizer, math.ceil(WARM_UP_SHARE * steps), steps)
        generator = torch.Generator().manual_seed(schedule.seed + self.index)
        first = error = self._error(objective, held_out.own, held_out_targets)
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
                        output = modules.first_tensor(self._call(training.own[number]))
                        objective.learn(output, training_targets[number], 1 / passes)
                if not self._has_finite_gradient():
                    diverged_at = step
                    break
                optimizer.step()
                pace.step()
            found = self._error(objective, held_out.own, held_out_targets)
            if found < error:
                error = found
                best = [value.to(dtype, copy=True) for value in self.parameters]
            speed = sum(batch.shape[0] * batch.shape[1] for batch in training.own) / (time.perf_counter() - started)
            change = f"{objective.name} {first:.4f} → {error:.4f}"
            progress.advance(f"block {self.index + 1}: {change}, {speed:,.0f} tokens/s")
        for value, kept in zip(self.parameters, best, strict=True):
            value.requires_grad_(False)
            value.grad = None
            value.copy_(kept)
        return BlockFit(first, error, diverged_at)

    def _call(self, batch: torch.Tensor) -> Any:
        with mixed_precision(self.student.device):
            return self.calls.of(self.index, batch)(self.block, batch)

    def _error(self, objective: Objective, stream: Stream, targets: Stream) -> float:
        total, count = 0.0, 0
        for batch, target in zip(stream, targets, strict=True):
            total += float(objective.loss(modules.first_tensor(self._call(batch)), target)) * len(batch)
            count += len(batch)
        return total / count

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
