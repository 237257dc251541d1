"""Running less than a batch at once where the memory does not take a whole one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

__all__ = ["MicroBatches", "concat"]

Result = TypeVar("Result")


class MicroBatches:
    """Runs batches in parts of as many rows as the memory takes: all at first, half as many whenever it runs out.

    Rows are independent of each other, so a result in parts is that of the whole, but for rounding: products of other
    shapes are summed in another order.

    Attributes:
        most: Rows that run at once; `None` until the memory has run out.
    """

    def __init__(self) -> None:
        self.most: int | None = None

    def run(self, work: Callable[[torch.Tensor], Result], batch: torch.Tensor) -> Iterator[tuple[slice, Result]]:
        """Run some work on all of a batch."""
        start = 0
        while start < len(batch):
            rows = slice(start, min(len(batch), start + (self.most or len(batch))))
            result = self._attempt(work, batch[rows])
            if result is not None:
                yield rows, result[0]
                start = rows.stop

    def _attempt(self, work: Callable[[torch.Tensor], Result], piece: torch.Tensor) -> tuple[Result] | None:
        """Run some work; where the memory runs out, halve the micro-batches and return `None`."""
        try:
            return (work(piece),)
        except (RuntimeError, MemoryError) as error:
            from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

            if len(piece) == 1 or not (isinstance(error, MemoryError) or should_reduce_batch_size(error)):
                raise
        # outside of the handler, which keeps what has been computed alive
        self.most = len(piece) // 2
        clear_device_cache(garbage_collection=True)
        return None


def concat(micro_batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return parts of a batch as one tensor, without a copy where there is but one."""
    return micro_batches[0] if len(micro_batches) == 1 else torch.cat(list(micro_batches))
