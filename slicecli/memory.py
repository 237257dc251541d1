"""What the process takes from the machine's memory, and giving it back."""

from __future__ import annotations

import ctypes
import platform
import sys
from typing import TYPE_CHECKING

from slicecli.processes import Processes

if TYPE_CHECKING:
    import torch

__all__ = ["available_memory_bytes", "peak_device_memory_bytes", "peak_memory_bytes", "return_freed_memory_at_once"]

_M_MMAP_THRESHOLD = -3
_THRESHOLD_BYTES = 2**20


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


def return_freed_memory_at_once() -> None:
    """Let the C library give large blocks back to the system when they are freed; no effect but on glibc.

    Left alone, glibc raises the size from which it does so to that of the largest block freed, up to 32 MB, and
    keeps what is smaller: blocks of a model come and go in just these sizes, and the peak was up to twice what is
    really in use. The setting is the whole process's, so only the command line makes it.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
