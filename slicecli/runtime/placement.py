"""Where things are computed and kept: devices, device maps, the dtype that suits a device, room for the activations.

To run a model, an accelerate device map assigns its parts to devices. Slicing needs each block only twice, on the one
device that computes; there a device map says where the dense weights are kept in between. Weights kept on disk are read
from the checkpoint whenever they are needed; weights kept in main memory or on a GPU are read once.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from slicecli.errors import RequestError, reason_of, shown
from slicecli.runtime.distributed import Processes
from slicecli.runtime.inputs import local_path, parse_bytes
from slicecli.runtime.json import load_json
from slicecli.runtime.memory import available_memory_bytes

if TYPE_CHECKING:
    import torch


__all__ = [
    "NAMED_MAPS",
    "ActivationPlan",
    "DeviceMap",
    "MaxMemory",
    "Place",
    "Placement",
    "batch_rows",
    "check_sizes",
    "compute_dtype",
    "computing_device",
    "decide_placement",
    "describe_map",
    "mixed_precision",
    "parse_max_memory",
    "pick_device",
    "place_activations",
    "read_device_map",
    "spread_map",
]

NAMED_MAPS = ("auto", "balanced", "balanced_low_0", "sequential")
DISK = "disk"
HOST = "cpu"
BATCH_TOKENS = {"cpu": 2048, "other": 16384}
MEMORY_SHARE = 0.6  # of what is free, for activations; the rest is for blocks and statistics
DeviceMap: TypeAlias = "str | Mapping[str, str | int]"
MaxMemory: TypeAlias = "Mapping[str | int, int]"
Place = Literal["device", "host", "disk"]


def pick_device(name: str) -> torch.device:
    """Return the device to compute on; `auto` is the first GPU, or that of the process, or the CPU."""
    import torch

    if name == "auto":
        return Processes.find().device()
    if Processes.find().count > 1 and name != "cpu":
        raise RequestError(
            f"Several processes cannot share {name}.", "Use --device-map auto, which gives each its own device."
        )
    try:
        device = torch.device(name)
        if device.type == "cpu":
            return torch.device("cpu")  # without a number, which some libraries do not take
        if device.type == "meta":
            raise RuntimeError("it cannot compute")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"There is no device {name!r} here: {reason_of(error)}.",
            f"Use a map ({', '.join(NAMED_MAPS)}, a .json file), cpu or cuda:N.",
        ) from None
    return device


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: the checkpoint's own, but float32 on a CPU, where half precision is slow."""
    import torch

    if device.type == "cpu" and stored in {torch.bfloat16, torch.float16}:
        return torch.float32
    return stored


def mixed_precision(device: torch.device) -> AbstractContextManager[None]:
    """Let float32 weights in training compute in bfloat16, where the device has instructions for it.

    On a CPU that is for gradients alone: what is measured is computed in float32.
    """
    import torch

    is_wanted = device.type != "cpu" or torch.is_grad_enabled()
    return torch.autocast(device.type, torch.bfloat16, enabled=is_wanted and _multiplies_bfloat16(device))


def _multiplies_bfloat16(device: torch.device) -> bool:
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type == "cpu":  # not every version has these
        known = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
        return any(is_supported is not None and bool(is_supported()) for is_supported in known)
    return True


def batch_rows(device: torch.device, sequence_length: int) -> int:
    """Return how many rows make a batch of a good size for the device."""
    tokens = BATCH_TOKENS["cpu" if device.type == "cpu" else "other"]
    return max(1, tokens // sequence_length)


def read_device_map(text: str) -> DeviceMap:
    """Return what a text stands for: the name of a map or a device as it is, a JSON file's content."""
    if not text.lower().endswith(".json"):
        return text
    try:
        content = load_json(local_path(text))
    except (OSError, ValueError) as error:
        raise RequestError(f"The device map {text!r} cannot be read: {reason_of(error)}.") from None
    if (
        not isinstance(content, dict)
        or not content
        or not all(isinstance(place, str) or type(place) is int for place in content.values())
    ):
        raise RequestError(
            f"{text!r} is not a device map.", 'Map modules to devices, such as {"": "disk", "model.layers.0": "cpu"}.'
        )
    return content


def parse_max_memory(text: str) -> dict[str | int, int]:
    """Return the most bytes by device, from a text such as `0=20GiB,cpu=64GiB`."""
    found: dict[str | int, int] = {}
    for part in text.split(","):
        name, sign, size = (word.strip() for word in part.partition("="))
        device = int(name) if name.isdecimal() else name
        if not sign or not (isinstance(device, int) or device == HOST) or device in found:
            raise RequestError(f"{text!r} does not give each device a size.", "Write 0=20GiB,cpu=64GiB, for example.")
        found[device] = parse_bytes(size)
    return found


@dataclass(frozen=True)
class Placement:
    """Where the weights of a model that is sliced rest, and what computes.

    Attributes:
        rests: Places by module: `disk`, `cpu`, or a device; the longest name that fits counts, and "" fits all.
    """

    device: torch.device
    rests: Mapping[str, str] = field(default_factory=lambda: {"": DISK})

    def rest_of(self, name: str) -> str:
        """Return where a tensor or module rests."""
        return self.given_for(name) or DISK

    def given_for(self, name: str) -> str | None:
        """Return what the places say of a tensor or module; `None` where that is nothing."""
        while name not in self.rests and name:
            name = name.rpartition(".")[0]
        return self.rests.get(name)

    @property
    def is_plain(self) -> bool:
        """Whether everything rests on disk."""
        return set(self.rests.values()) <= {DISK}

    def describe(self) -> str:
        """Say it in a line."""
        if self.is_plain:
            return f"computing on {self.device}; weights are read from the checkpoint block by block"
        return f"computing on {self.device}; weights are kept: {describe_map(self.rests)}"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"device": str(self.device), "weights": dict(self.rests)}


def describe_map(places: Mapping[str, Any]) -> str:
    """Say a device map in a line; modules that follow each other by number are put together."""
    groups: list[list[Any]] = []
    for name, place in places.items():
        stem, _, number = name.rpartition(".")
        if number.isdecimal() and groups:
            last_stem, _, last, last_place = groups[-1]
            if (last_stem, last_place) == (stem, place) and last == int(number) - 1:
                groups[-1][2] = int(number)
                continue
        groups.append([stem, int(number), int(number), place] if number.isdecimal() else [name, None, None, place])
    parts = []
    for stem, first, last, place in groups:
        where = f"cuda:{place}" if type(place) is int else place
        numbers = "" if first is None else f".{first}" if first == last else f".{first}-{last}"
        parts.append(f"{(stem + numbers) or 'everything'} on {where}")
    return ", ".join(parts)


def check_sizes(wanted: DeviceMap, max_memory: MaxMemory | None) -> None:
    """Refuse sizes where they would be of no effect."""
    if max_memory is not None and (wanted not in NAMED_MAPS or Processes.find().count > 1):
        raise RequestError(
            "--max-memory only works when one process divides a model among devices.",
            "Use it with --device-map auto, balanced or sequential, in a single process.",
        )


def decide_placement(
    wanted: DeviceMap, max_memory: MaxMemory | None, model: Any, blocks: str, dtype: torch.dtype
) -> Placement:
    """Decide where the weights of a model that is sliced rest.

    Args:
        wanted: `auto`, which keeps nothing unless sizes are given; one of accelerate's other maps; a device that
            computes, keeping nothing; or a map from modules to places.
        max_memory: The most bytes of weights by device, for the named maps.
        dtype: Dtype in which weights are kept.
    """
    check_sizes(wanted, max_memory)
    if not isinstance(wanted, str):
        return _placed_by(wanted, model, blocks)
    if wanted not in NAMED_MAPS or (wanted == "auto" and max_memory is None):
        return Placement(pick_device(wanted))
    if Processes.find().count > 1:
        raise RequestError("With several processes, each reads the whole model.", "Use --device-map auto.")
    places = _map_of_accelerate(wanted, max_memory, model, blocks, dtype)
    return _placed_by(places, model, blocks)


def _map_of_accelerate(
    name: str, max_memory: MaxMemory | None, model: Any, blocks: str, dtype: torch.dtype
) -> Mapping[str, str | int]:
    from accelerate import infer_auto_device_map
    from accelerate.utils import get_balanced_memory, get_max_memory

    whole = {type(block).__name__ for block in model.get_submodule(blocks).children()}
    try:
        memory: Any = get_max_memory(None if max_memory is None else dict(max_memory))
        if name != "sequential":
            memory = get_balanced_memory(model, memory, list(whole), dtype=dtype, low_zero=name == "balanced_low_0")
        places: dict[str, str | int] = infer_auto_device_map(model, memory, list(whole), dtype=dtype)
    except (ValueError, RuntimeError) as error:
        raise RequestError(
            f"The model cannot be divided this way: {reason_of(error)}.", "Use other sizes with --max-memory."
        ) from error
    return places


def _placed_by(places: Mapping[str, str | int], model: Any, blocks: str) -> Placement:
    """Return the placement of a device map."""
    rests = spread_map(places, model)
    for name in places:
        if name.startswith(f"{blocks}.") and name.count(".") > blocks.count(".") + 1:
            raise RequestError(
                f"The device map splits a block ({shown(name)}).", f"Place whole blocks: map {blocks}.N."
            )
    return Placement(computing_device(rests), rests)


def spread_map(places: Mapping[str, str | int], model: Any) -> dict[str, str]:
    """Return a device map in which no name is inside another, devices by name."""
    given = Placement(pick_device("cpu"), {name: _name_of(place) for name, place in places.items()})
    names = {name for name, _ in model.named_modules()} | model.state_dict().keys()
    for name in places:
        if name not in names:
            raise RequestError(f"The device map names {shown(name)}, which the model does not have.")
    spread: dict[str, str] = {}

    def enter(name: str, module: Any) -> None:
        inside = f"{name}." if name else ""
        if not any(other != name and other.startswith(inside) for other in places):
            place = given.given_for(name)
            if place is not None:
                spread[name] = place
                return
            missing = next((leaf for leaf, _ in module.named_parameters(prefix=name)), None)
            if missing is not None:
                raise RequestError(f"The device map leaves out {missing}.", 'Map "" to place the rest.')
            return
        own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        spread.update({f"{inside}{leaf}": given.rest_of(f"{inside}{leaf}") for leaf, _ in own})
        for child, part in module.named_children():
            enter(f"{inside}{child}", part)

    enter("", model)
    return spread


def computing_device(places: Mapping[str, str]) -> torch.device:
    """Return what computes where a map has several places: its first GPU, or the CPU."""
    return pick_device(next((place for place in places.values() if place not in {DISK, HOST}), HOST))


def _name_of(place: str | int) -> str:
    name = f"cuda:{place}" if isinstance(place, int) else place
    return name if name in {DISK, HOST} else str(pick_device(name))


@dataclass(frozen=True)
class ActivationPlan:
    """Where the cached activations of a job are kept, and why.

    Attributes:
        place: On the device that computes, in main memory, or on disk.
        budget_bytes: What they may take on the device.
    """

    place: Place
    needed_bytes: int
    budget_bytes: int

    @property
    def spare_bytes(self) -> int:
        """What is left on the device for what need not be kept but saves time."""
        return max(0, self.budget_bytes - self.needed_bytes) if self.place == "device" else 0

    def describe(self) -> str:
        """Say it in a line."""
        where = {"device": "on the device", "host": "in main memory", "disk": "on disk"}[self.place]
        sizes = f"{_gigabytes(self.needed_bytes)} of a device budget of {_gigabytes(self.budget_bytes)}"
        return f"activations {where} ({sizes})"

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return {"activations": self.place, "needed_bytes": self.needed_bytes, "budget_bytes": self.budget_bytes}


def place_activations(
    wanted: Literal["auto", "device", "host", "disk"],
    placement: Placement,
    needed_bytes: int,
    kept_bytes: Mapping[str, int],
) -> ActivationPlan:
    """Decide where activations are cached: on the device if they fit there, else in main memory if they fit there."""
    import torch

    def room_on(device: torch.device) -> int:
        free = available_memory_bytes(device) - kept_bytes.get(str(device), 0)
        return max(0, int(MEMORY_SHARE * free))

    budget = room_on(placement.device)
    place: Place = "disk"
    if wanted != "auto":
        place = wanted
    elif needed_bytes <= budget:
        place = "device"
    elif placement.device.type != "cpu" and needed_bytes <= room_on(torch.device("cpu")):
        place = "host"
    return ActivationPlan(place, needed_bytes, budget)


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
