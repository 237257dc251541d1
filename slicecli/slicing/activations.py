"""Streams wherever they are kept: on the device that computes, in main memory, or on disk.

A stream is a sequence of batches. All kinds are used alike: to read a batch brings it to the device, to assign one puts
it where the stream is kept, and to go through a stream fetches the next batch while the present one is worked on.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Iterator, MutableSequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch

from slicecli.checkpoint.weight_writer import content_of
from slicecli.runtime.placement import Place

__all__ = ["ActivationStore", "Carrier", "Place", "Stream"]

Stream: TypeAlias = "MutableSequence[torch.Tensor]"


class Carrier:
    """Brings tensors to a device while it computes something else."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(self, tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Start to bring a tensor to the device; what is returned gives it once it is there.

        From pinned memory the copy runs beside the computation.
        """
        if self._side is None or tensor.device == self._device:
            return lambda: tensor
        with torch.cuda.stream(self._side):
            moved = tensor.to(self._device, non_blocking=True)
            arrival = self._side.record_event()

        def receive() -> torch.Tensor:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(arrival)
            moved.record_stream(current)  # its memory belongs to the side stream, which must not reuse it too early
            return moved

        return receive

    def pinned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor in main memory, pinned where that makes copies to the device faster."""
        if self._side is None:
            return tensor.cpu()
        held = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        return held.copy_(tensor)


@dataclass(frozen=True)
class ActivationStore:
    """Makes streams of cached activations.

    Attributes:
        folder: Folder on the disk that they are kept on; `None` takes the system's for temporary files.
        spare_bytes: What may be kept beyond what must be, in memory that is free.
    """

    device: torch.device
    place: Place = "device"
    folder: Path | None = None
    spare_bytes: int = 0

    def new(self) -> Stream:
        """Return an empty stream."""
        if self.place == "disk":
            return _DiskActivations(self.device, self._carrier, self.folder)
        if self.place == "host" and self.device.type != "cpu":
            return _HostActivations(self.device, self._carrier)
        return []

    def aside(self, size: int) -> Stream | None:
        """Return an empty stream for what would otherwise be computed again; `None` where there is no room for it."""
        return self.new_aside() if size <= self.spare_bytes else None

    def new_aside(self) -> Stream:
        """Return the same, whether there is room or not.

        On a CPU it is on disk, where the system holds it in memory as long as nothing else wants that.
        """
        return [] if self.device.type != "cpu" else _DiskActivations(self.device, self._carrier, self.folder)

    def filled(self, batches: Iterator[torch.Tensor]) -> Stream:
        """Return a stream of batches."""
        stream = self.new()
        for batch in batches:
            stream.append(batch.to(self.device))
        return stream

    @functools.cached_property
    def _carrier(self) -> Carrier:
        return Carrier(self.device)


class _OffloadedActivations(MutableSequence[torch.Tensor]):
    """A stream that is not kept on the device.

    What is kept for each batch is for the subclasses to say.
    """

    def __init__(self, device: torch.device, carrier: Carrier) -> None:
        self._device = device
        self._carrier = carrier
        self._kept: list[Any] = []

    def _put(self, tensor: torch.Tensor, old: Any) -> Any:
        """Keep a batch, in the place of an old one or a new one, and return what stands for it."""
        raise NotImplementedError

    def _fetch(self, kept: Any) -> Callable[[], torch.Tensor]:
        """Start to bring a batch to the device."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._kept)

    def __getitem__(self, index: Any) -> Any:
        return self._fetch(self._kept[index])()

    def __setitem__(self, index: Any, tensor: Any) -> None:
        self._kept[index] = self._put(tensor, self._kept[index])

    def __delitem__(self, index: Any) -> None:
        del self._kept[index]

    def insert(self, index: int, value: torch.Tensor) -> None:
        """Keep a batch before another."""
        self._kept.insert(index, self._put(value, None))

    def clear(self) -> None:
        """Keep nothing any more."""
        self._kept.clear()

    def __iter__(self) -> Iterator[torch.Tensor]:
        if not self._kept:
            return
        with ThreadPoolExecutor(1, thread_name_prefix="slicecli-stream") as pool:
            ahead = pool.submit(self._fetch, self._kept[0])
            for number in range(len(self._kept)):
                receive = ahead.result()
                if number + 1 < len(self._kept):
                    ahead = pool.submit(self._fetch, self._kept[number + 1])
                yield receive()


class _HostActivations(_OffloadedActivations):
    """A stream in pinned main memory."""

    def _put(self, tensor: torch.Tensor, old: torch.Tensor | None) -> torch.Tensor:
        if old is None or old.shape != tensor.shape or old.dtype != tensor.dtype:
            return self._carrier.pinned(tensor)
        return old.copy_(tensor)

    def _fetch(self, kept: torch.Tensor) -> Callable[[], torch.Tensor]:
        return self._carrier.send(kept)


@dataclass(frozen=True)
class _Slot:
    """Where in the file a batch lies."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Number of bytes."""
        return self.shape.numel() * self.dtype.itemsize


class _DiskActivations(_OffloadedActivations):
    """A stream in a file without a name, which is gone whenever and however the process ends."""

    def __init__(self, device: torch.device, carrier: Carrier, folder: Path | None) -> None:
        super().__init__(device, carrier)
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - as long as the stream
        self._end = 0

    def clear(self) -> None:
        """Keep nothing any more, and give the disk space back."""
        super().clear()
        self._file.truncate(0)
        self._end = 0

    def _put(self, tensor: torch.Tensor, old: _Slot | None) -> _Slot:
        slot = _Slot(self._end if old is None else old.offset, tensor.shape, tensor.dtype)
        if old is None or slot.size > old.size:
            slot = _Slot(self._end, tensor.shape, tensor.dtype)
            self._end += slot.size
        _write_at(self._file.fileno(), content_of(tensor.to("cpu").contiguous()), slot.offset)
        return slot

    def _fetch(self, kept: _Slot) -> Callable[[], torch.Tensor]:
        is_pinned = self._device.type == "cuda"
        tensor = torch.empty(kept.shape, dtype=kept.dtype, pin_memory=is_pinned)
        _read_at(self._file.fileno(), content_of(tensor), kept.offset)
        return self._carrier.send(tensor)


def _write_at(file: int, content: memoryview, offset: int) -> None:
    while content:
        written = os.pwrite(file, content, offset)  # not more than about 2 GB at a time
        content, offset = content[written:], offset + written


def _read_at(file: int, content: memoryview, offset: int) -> None:
    while content:
        read = os.preadv(file, [content], offset)
        if read == 0:
            raise OSError("a file of cached activations is truncated")
        content, offset = content[read:], offset + read
