"""What the process takes from the machine's memory, and giving it back."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from typing import TYPE_CHECKING

from slicecli.runtime.distributed import Processes

if TYPE_CHECKING:
    import torch

__all__ = [
    "available_memory_bytes",
    "bound_memory_that_is_kept",
    "make_room",
    "peak_device_memory_bytes",
    "peak_memory_bytes",
    "return_freed_memory",
]

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
_THRESHOLD_BYTES = 2**24
_TRIM_BYTES = 2**26


def peak_memory_bytes() -> int:
    """Return the peak resident memory of this process, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_device_memory_bytes(device: torch.device) -> int | None:
    """Return the peak memory of tensors of this process on a GPU, in bytes; `None` for the CPU."""
    if device.type != "cuda":
        return None
    import torch

    peak: int = torch.cuda.max_memory_allocated(device)
    return peak


def available_memory_bytes(device: torch.device) -> int:
    """Return the memory that is free for new tensors on a device, in bytes; of main memory, this process's share."""
    if device.type == "cuda":
        import torch

        free: int = torch.cuda.mem_get_info(device)[0]
        return free
    import psutil

    return int(psutil.virtual_memory().available) // Processes.find().local_count


def return_freed_memory() -> None:
    """Give memory that was freed and kept back to the system, also from between what is in use; only on glibc."""
    library = _glibc()
    if library is not None:
        library.malloc_trim(0)


def make_room(size: int) -> None:
    """Give freed memory back where something large comes next that what was kept has no room for.

    Args:
        size: Its bytes.
    """
    if size >= _TRIM_BYTES:
        return_freed_memory()


def bound_memory_that_is_kept() -> None:
    """Let the C library keep some freed memory, but not much, and torch ask for huge pages; no effect but on Linux.

    Left alone, glibc raises the size from which it gives blocks back to the system to that of the largest block freed,
    and keeps what is smaller: tensors of a model come and go in just these sizes, and the peak was up to twice what is
    really in use. To give everything back at once costs more: fresh pages took a third of the time of a slice. Fixed
    sizes are between. Where the system gives huge pages to those who ask, torch asks for them: fewer faults, and less
    time. The settings are the whole process's, so only the command line makes them, and before torch is imported.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    library = _glibc()
    if library is not None:
        library.mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
        library.mallopt(_M_TRIM_THRESHOLD, _TRIM_BYTES)
        library.mallopt(_M_ARENA_MAX, 1)  # threads that read ahead would each keep memory of their own


@functools.cache
def _glibc() -> ctypes.CDLL | None:
    """Return the C library if it is glibc; to find that out reads the interpreter's file."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None
