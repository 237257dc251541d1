"""Many processes, on one machine or several, that do one job together.

`accelerate launch` and `torchrun` start the same command several times and tell each by environment variables which of
them it is. Every process runs the whole model on its share of the rows, and what they find is summed; the first of
them, the main process, solves, writes and speaks. This module is the only one that talks to other processes; where
there are none it imports nothing.

What is exchanged goes through `torch.distributed`: plain data and CPU tensors by gloo, CUDA tensors by NCCL. A process
that fails leaves the cause in the store in which all have met, and closes its connections, which ends every wait.
"""

from __future__ import annotations

import atexit
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from slicecli.errors import ProcessError, RequestError, SlicecliError, reason_of
from slicecli.runtime.rendezvous import launched, meet, meeting_place, meeting_remedy

if TYPE_CHECKING:
    import torch

__all__ = ["ALONE", "Processes", "Share"]

WORK = timedelta(hours=6)  # to wait for another process's work, or for its download
EXCHANGE = timedelta(minutes=10)  # for GPUs to exchange what all of them have ready
REPORT = timedelta(seconds=8)  # for which a failed worker waits for the main process to report
CHUNK = 2**23  # numbers that are summed at a time
FAILED, REPORTED = "failed", "reported"

Value = TypeVar("Value")


@dataclass(frozen=True)
class Share:
    """What one process takes of some rows.

    Attributes:
        processes: The processes, this one marked as idle where it has no rows.
    """

    rows: slice
    processes: Processes


@dataclass(frozen=True)
class Processes:
    """The processes of a job, as one of them sees them.

    All methods that exchange something must be called by all processes, in the same order.

    Attributes:
        local_count: How many there are on this machine.
        is_idle: This one has no rows: it runs along with the others, and adds nothing to sums.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0
    local_count: int = 1
    is_idle: bool = False

    @classmethod
    def find(cls) -> Processes:
        """Return the processes that a launcher has started, or one alone."""
        if _here.found is None:
            found = launched()
            _here.found = ALONE if found is None else cls(*found)
        return _here.found

    @property
    def is_main(self) -> bool:
        """Whether this is the process that solves, writes and speaks."""
        return self.rank == 0

    def stay_alone(self) -> None:
        """Let this process do its job as if there were no other."""
        _here.found = ALONE

    def share(self, rows: int, batch: int) -> Share:
        """Divide rows among the processes, in their order.

        Batches stay whole, because how a batch is rounded depends on its size: so the batches, and with them the
        result, are those of one process.
        """
        least, more = divmod(-(-rows // batch), self.count)
        first = self.rank * least + min(self.rank, more)
        start = min(first * batch, rows)
        stop = min((first + least + (self.rank < more)) * batch, rows)
        return Share(slice(start, stop), replace(self, is_idle=start == stop))

    def deal(self, groups: Sequence[Any]) -> list[int]:
        """Return the indices that are this process's, where what follows each other with an equal value stays together.

        Example:
            >>> Processes(rank=1, count=2).deal("aabbcd")
            [2, 3, 5]
        """
        found, number = [], -1
        for index, value in enumerate(groups):
            number += index == 0 or value != groups[index - 1]
            if number % self.count == self.rank:
                found.append(index)
        return found

    def device(self) -> torch.device:
        """Return this process's own device: the GPU of its number on this machine, or the CPU."""
        import torch

        # as accelerate launch --cpu says it
        if not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true":
            return torch.device("cpu")
        gpus = torch.cuda.device_count()
        if self.local_rank >= gpus:
            raise RequestError(
                f"{self.local_count} processes were started on this machine, but it has only {gpus} GPUs.",
                "Start one process per GPU, or use --device-map cpu.",
            )
        torch.cuda.set_device(self.local_rank)
        return torch.device("cuda", self.local_rank)

    def join(self, notify: Callable[[str], object] = warnings.warn) -> None:
        """Meet the other processes; nothing where that has been done, or there are none.

        Args:
            notify: Takes a sentence that says what is waited for, if that takes some seconds.
        """
        if self.count == 1 or _here.store is not None:
            return
        import torch
        import torch.distributed as dist

        try:
            _here.store = meet(self.rank, self.count, notify)
            if not dist.is_initialized():
                group_store = dist.PrefixStore("group", _here.store)  # type: ignore[attr-defined]
                dist.init_process_group("gloo", store=group_store, rank=self.rank, world_size=self.count, timeout=WORK)
                atexit.register(_leave)
            _here.group = dist.new_group(backend="gloo", timeout=WORK)
            if all(self.gather(torch.cuda.is_available() and dist.is_nccl_available())):
                _here.cuda_group = dist.new_group(backend="nccl", timeout=EXCHANGE)
        except (RuntimeError, ValueError, OSError) as error:
            raise ProcessError(
                f"The {self.count} processes cannot connect at {meeting_place()}: {reason_of(error)}.", meeting_remedy()
            ) from error

    def sum_everywhere(self, *tensors: torch.Tensor) -> None:
        """Add up contiguous tensors of the same shapes over all processes, in place, in all of them."""
        self._sum(tensors, is_everywhere=True)

    def sum_to_main(self, *tensors: torch.Tensor) -> None:
        """Add up contiguous tensors of the same shapes over all processes, in place.

        The sum is in the main process; what is in the others is of no use afterwards.
        """
        self._sum(tensors, is_everywhere=False)

    def sum_square_to_main(self, *tensors: torch.Tensor) -> None:
        """Do the same with symmetric matrices, of which only one half is sent."""
        if self.count == 1:
            return
        for tensor in tensors:
            width = len(tensor)
            rows = max(1, CHUNK // width)
            for first in range(0, width, rows):
                end = min(first + rows, width)
                band = tensor[first:end, first:].contiguous()
                self.sum_to_main(band)
                tensor[first:end, first:] = band
                tensor[end:, first:end] = band[:, end - first :].T

    def tensors_from_main(
        self, make: Callable[[], Sequence[torch.Tensor]], shapes: Sequence[Sequence[int]], device: torch.device
    ) -> list[torch.Tensor]:
        """Let the main process make tensors, and give them to all, so that all go on with the same bits.

        Args:
            shapes: Their shapes. All are float64.
        """
        import torch

        if self.count == 1:
            return list(make())
        if self.is_main:
            tensors = [tensor.to(device, torch.float64).contiguous() for tensor in make()]
        else:
            tensors = [torch.empty(*shape, dtype=torch.float64, device=device) for shape in shapes]
        import torch.distributed as dist

        for tensor in tensors:
            self._exchange(dist.broadcast, tensor, 0, is_cuda=tensor.is_cuda)
        return tensors

    def from_main(self, make: Callable[[], Value]) -> Value:
        """Let the main process do something, and give what it returns to all."""
        if self.count == 1:
            return make()
        import torch.distributed as dist

        values: list[Any] = [make() if self.is_main else None]
        self._exchange(dist.broadcast_object_list, values, 0)
        value: Value = values[0]
        return value

    def gather(self, value: Value) -> list[Value]:
        """Return what each process gives, plain data, in the order of the processes."""
        if self.count == 1:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.count
        self._exchange(dist.all_gather_object, values, value)
        return values

    def barrier(self) -> None:
        """Wait until all processes have come this far."""
        self.gather(None)

    @contextmanager
    def main_of_machine_first(self) -> Iterator[None]:
        """Let one process of each machine do something before the others do it, as with a download they share."""
        if self.local_rank > 0:
            self.barrier()
        yield
        if self.local_rank == 0:
            self.barrier()

    def require_same(self, values: Mapping[str, Any]) -> None:
        """Refuse to work together with processes that have other files, or other versions."""
        everyone = self.gather(dict(values))
        for name in values:
            differing = [rank for rank, theirs in enumerate(everyone) if theirs[name] != everyone[0][name]]
            if differing:
                raise RequestError(
                    f"Process {differing[0]} has a different {name} from the main process.",
                    "Use the same files and versions on all machines.",
                )

    def tell(self, error: BaseException) -> None:
        """Tell the other processes that this one ends with an error; the first to fail is heard."""
        if _here.store is None:  # there are no others, or they have not been met
            return
        if isinstance(error, SlicecliError):
            words = (error.cause, error.remedy, error.exit_code)
        elif isinstance(error, Exception):
            cause = f"Process {self.rank} of {self.count} failed: {type(error).__name__}: {reason_of(error)}."
            words = (cause, "Its own output shows where.", 1)
        else:  # a signal: who sent it knows
            words = ("", "", 1)
        if not isinstance(error, ProcessError):
            with suppress(RuntimeError):
                _here.store.compare_set(FAILED, "", json.dumps(words))
        _disconnect()

    def is_to_report(self, error: BaseException) -> bool:
        """Tell the others of an error that ends this process, and say whether it is this one that shows it to the user.

        The main process shows its own errors, and those of others that it hears of. A process whose error it does not
        hear of in some seconds shows it itself. All wait until somebody has, since a launcher ends the rest once one
        has ended.
        """
        if _here.store is None:
            return True
        from torch.distributed import DistStoreError

        self.tell(error)
        has_heard = isinstance(error, ProcessError)
        try:
            if not self.is_main:
                with suppress(DistStoreError):
                    _here.store.wait([REPORTED], 2 * REPORT if has_heard else REPORT)
                    return False
                if has_heard:
                    return False
            reporter = str(self.rank)
            return bool(_here.store.compare_set(REPORTED, "", reporter) == reporter.encode())
        except RuntimeError:  # the store has gone, and with it whoever kept it
            return self.is_main

    def _sum(self, tensors: Sequence[torch.Tensor], is_everywhere: bool) -> None:
        if self.count == 1:
            return
        import torch.distributed as dist

        operation, root = (dist.all_reduce, ()) if is_everywhere else (dist.reduce, (0,))
        for tensor in tensors:
            if self.is_idle:
                tensor.zero_()
            for part in tensor.view(-1).split(CHUNK):
                self._exchange(operation, part, *root, is_cuda=part.is_cuda)

    def _exchange(self, operation: Callable[..., object], *arguments: Any, is_cuda: bool = False) -> None:
        """Do what all processes do together, or raise what has ended another of them."""
        self.join()
        if is_cuda:
            self.barrier()  # NCCL does not notice that a process will never come
        if _here.group is None:
            raise _end_of_another()
        try:
            operation(*arguments, group=_here.cuda_group if is_cuda else _here.group)
        except RuntimeError as error:
            # the frames of its traceback hold the group, whose connections others wait on
            reason = error.with_traceback(None)
            _disconnect()
            raise _end_of_another() from reason


class _Here:
    """What this process knows of the others: found once, met once."""

    found: Processes | None = None
    store: Any = None
    group: Any = None  # of gloo
    cuda_group: Any = None  # of NCCL, where all processes have a GPU


_here = _Here()
ALONE = Processes()


def _end_of_another() -> ProcessError:
    """Return the error with which another process has ended, as far as it is known."""
    try:
        if _here.store.check([FAILED]):
            return ProcessError(*json.loads(_here.store.get(FAILED)))
    except RuntimeError:
        return ProcessError("The machine of the main process stopped responding.", "Check its output.")
    return ProcessError(
        "Another process of the job ended without reporting an error.",
        "Check its machine: the process may have run out of memory.",
    )


def _disconnect() -> None:
    """Close the connections of gloo, so that nobody waits for this process any longer."""
    import torch.distributed as dist

    group, _here.group = _here.group, None
    if group is not None:
        dist.destroy_process_group(group)


def _leave() -> None:
    """Take leave of the others at the end of the program, unless one of them has failed."""
    import torch.distributed as dist

    if _here.group is not None and dist.is_initialized():
        dist.destroy_process_group()
