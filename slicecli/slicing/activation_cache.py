"""The dense stream at every step, kept from the pass for statistics so that the refit need not run the model again.

Worth it where to compute is slow and to read is fast: on a CPU, while what is written stays in memory that is free.
What is read back is what would be computed, to the bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from slicecli.runtime.microbatch import concat
from slicecli.slicing.activations import ActivationStore, Stream
from slicecli.slicing.modules import BlockRun

__all__ = ["ActivationCache", "CachedBlock"]


@dataclass
class CachedBlock:
    """What the refit has to know of a dense block.

    Attributes:
        inputs: The stream as each step reads it.
    """

    inputs: list[Stream]
    output: Stream
    tuple_lengths: dict[str, int] = field(default_factory=dict)


class ActivationCache:
    """Keeps the activations of all blocks."""

    def __init__(self, store: ActivationStore, count: int) -> None:
        self._store = store
        self._count = count
        self._blocks: list[CachedBlock] = []

    def begin(self, steps: int) -> None:
        """Begin the next block, of so many steps."""
        inputs = [self._store.new_aside() for _ in range(steps)]
        self._blocks.append(CachedBlock(inputs, self._store.new_aside()))

    def add(self, batch: torch.Tensor, norms: Sequence[str], runs: Sequence[tuple[slice, BlockRun]]) -> None:
        """Add a batch to the block that was begun last."""
        block = self._blocks[-1]
        for position, norm in enumerate(norms):
            is_entering = all(run.norm_inputs[norm].data_ptr() == batch[rows].data_ptr() for rows, run in runs)
            if is_entering and len(self._blocks) > 1:
                block.inputs[position] = self._blocks[-2].output  # kept already
            else:
                block.inputs[position].append(concat([run.norm_inputs[norm] for _, run in runs]))
        block.output.append(concat([run.output for _, run in runs]))
        block.tuple_lengths = runs[0][1].tuple_lengths

    def of(self, index: int) -> CachedBlock | None:
        """Return the activations of a block, if those of all are there."""
        return self._blocks[index] if len(self._blocks) == self._count else None
