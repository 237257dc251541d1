"""How fast accelerators read their memory and multiply, as their vendors say.

The figures are peaks. What a program reaches of them differs little between a dense model and its slice, so ratios of
times made with them say more than the times.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from slicecli.errors import RequestError
from slicecli.runtime.inputs import parse_bytes

__all__ = ["DEVICES", "Device", "custom_device", "device_named"]


@dataclass(frozen=True)
class Device:
    """What bounds the speed of an accelerator.

    Attributes:
        bandwidth: Bytes read from its memory in a second; `None` where that shall be no bound.
        flops: Operations on dense 16-bit matrices in a second, summed in 32 bits, without sparsity; `None` where that
            shall be no bound.
    """

    name: str
    bandwidth: float | None
    flops: float | None
    source: str


def _device(name: str, gigabytes: float, teraflops: float, source: str) -> Device:
    return Device(name, gigabytes * 1e9, teraflops * 1e12, source)


DEVICES: dict[str, Device] = {
    device.name: device
    for device in (
        _device("h200", 4800, 989.5, "NVIDIA H200 Tensor Core GPU data sheet (SXM; half of 1,979 with sparsity)"),
        _device("h100-sxm", 3350, 989.5, "NVIDIA H100 Tensor Core GPU data sheet (SXM; half of 1,979 with sparsity)"),
        _device("h100-pcie", 2000, 756.5, "NVIDIA H100 Tensor Core GPU data sheet (PCIe; half of 1,513 with sparsity)"),
        _device("a100-80gb", 2039, 312, "NVIDIA A100 Tensor Core GPU data sheet (80 GB SXM)"),
        _device("a100-40gb", 1555, 312, "NVIDIA A100 Tensor Core GPU data sheet (40 GB)"),
        _device("l40s", 864, 362.05, "NVIDIA L40S data sheet"),
        _device("l4", 300, 121, "NVIDIA L4 Tensor Core GPU data sheet (half of 242 with sparsity)"),
        _device("a10", 600, 125, "NVIDIA A10 Tensor Core GPU data sheet"),
        _device("t4", 320, 65, "NVIDIA T4 data sheet (float16 only)"),
        _device("v100-32gb", 900, 125, "NVIDIA V100 Tensor Core GPU data sheet (SXM2; float16 only)"),
        _device("rtx-4090", 1008, 165.2, "NVIDIA Ada GPU Architecture white paper (FP32 accumulate)"),
        _device("rtx-3090", 936, 71, "NVIDIA Ampere GA102 GPU Architecture white paper (FP32 accumulate)"),
        _device("mi300x", 5300, 1307.4, "AMD Instinct MI300X data sheet"),
    )
}


def device_named(name: str) -> Device:
    """Return a known accelerator."""
    found = DEVICES.get(name.lower())
    if found is None:
        near = difflib.get_close_matches(name.lower(), DEVICES, n=1)
        hint = f"Did you mean {near[0]!r}? " if near else ""
        raise RequestError(
            f"There is no device named {name!r}.",
            f"{hint}Known: {', '.join(DEVICES)}; for others use --bandwidth and --tflops.",
        )
    return found


def custom_device(bandwidth: str | None = None, tflops: float | None = None) -> Device:
    """Return an accelerator with given figures; where one is missing, only the other bounds it."""
    if bandwidth is None and tflops is None:
        raise RequestError("The device has no figures.", "Pass --bandwidth, --tflops or both.")
    if tflops is not None and not 0 < tflops < float("inf"):
        raise RequestError(f"{tflops} TFLOPS is not a valid speed.", "Use a positive number.")
    speed = None
    if bandwidth is not None:
        try:
            speed = float(parse_bytes(bandwidth.strip().removesuffix("/s")))
        except RequestError:
            raise RequestError(f"{bandwidth!r} is not a bandwidth.", "Write 2TB/s or 900GB/s, for example.") from None
    return Device("custom", speed, None if tflops is None else tflops * 1e12, "given on request")
