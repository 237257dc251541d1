"""Where things are computed and kept: the device, the dtype that suits it, how many rows it takes at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slicecli.errors import RequestError, reason_of
from slicecli.processes import Processes

if TYPE_CHECKING:
    import torch

__all__ = ["batch_rows", "compute_dtype", "pick_device"]

BATCH_TOKENS = {"cpu": 4096, "other": 16384}


def pick_device(name: str) -> torch.device:
    """Return the device to compute on; `auto` is the first GPU, or that of the process, or the CPU.

    Raises:
        RequestError: There is no such device.
    """
    import torch

    if name == "auto":
        return Processes.find().device()
    if Processes.find().count > 1 and name != "cpu":
        raise RequestError(f"Many processes cannot all be on {name}.", "Give --device-map auto: each has its own.")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"There is no device {name!r} here: {reason_of(error)}.", "Give auto, cpu or cuda:N."
        ) from None
    return device


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: the checkpoint's own, but float32 on a CPU, where half precision is slow."""
    import torch

    if device.type == "cpu" and stored in {torch.bfloat16, torch.float16}:
        return torch.float32
    return stored


def batch_rows(device: torch.device, sequence_length: int) -> int:
    """Return how many rows make a batch of a good size for the device."""
    tokens = BATCH_TOKENS["cpu" if device.type == "cpu" else "other"]
    return max(1, tokens // sequence_length)
