"""Writing safetensors files: shards that are laid out first, and filled tensor by tensor.

The format puts a table of names, dtypes, shapes and offsets in front of the data. All of that is known before the first
tensor is computed, so each shard is laid out first and its tensors are written where they belong as they come, in any
order; memory holds one tensor.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from slicecli.checkpoint.dense_weights import checkpoint_tensors, stored_values
from slicecli.checkpoint.folder import file_digest
from slicecli.checkpoint.weight_headers import INDEX_FILE
from slicecli.errors import OutputError, WeightsError
from slicecli.family.slice_plan import DTYPE_CODES

if TYPE_CHECKING:
    import torch

__all__ = ["ModelWriter", "ShardWriter", "content_of", "write_tensors"]

ENTRY_BYTES = 256  # most that a tensor takes in a header of ours
WIDER_DTYPE = {
    "float16": "Use --dtype bfloat16, which has the range of float32.",
    "bfloat16": "Use --dtype float32, which has a slightly larger range.",
}


class ShardWriter:
    """Writes the safetensors shards of a checkpoint whose tensors arrive one by one.

    Args:
        dtype: Dtype of all of them.
        max_shard_size: Most bytes of one shard.
    """

    def __init__(
        self,
        folder: Path,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        max_shard_size: int,
        missing: Sequence[str] | None = None,
    ) -> None:
        import math

        import huggingface_hub

        self._folder = folder
        self._dtype = dtype
        self._shapes = dict(shapes)
        self._size = {name: math.prod(shape) * dtype.itemsize for name, shape in shapes.items()}
        split = huggingface_hub.split_state_dict_into_shards_factory(
            self._size,
            get_storage_size=int,
            filename_pattern="model{suffix}.safetensors",
            max_shard_size=max_shard_size,
        )
        self.files = list(split.filename_to_tensors)
        self._file_of = split.tensor_to_filename
        self._is_sharded = split.is_sharded
        self._offset: dict[str, int] = {}
        self._open: dict[str, BinaryIO] = {}
        self._missing = set(shapes if missing is None else missing)
        self._there = set(shapes) - self._missing
        try:
            for file, names in split.filename_to_tensors.items():
                self._lay_out(file, names, is_new=missing is None)
        except OSError:
            self.close()
            raise

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor at its place.

        Args:
            tensor: Its value on the CPU, of the shape and dtype announced.
        """
        if name in self._there:
            return
        if name not in self._missing:
            raise ValueError(f"{name} is not expected, or was written already")
        if tuple(tensor.shape) != self._shapes[name] or tensor.dtype != self._dtype:
            announced = f"{self._shapes[name]} {self._dtype}"
            raise ValueError(f"{name} is {tuple(tensor.shape)} {tensor.dtype}, where {announced} was announced")
        _require_finite(name, tensor)
        file = self._open[self._file_of[name]]
        file.seek(self._offset[name])
        file.write(content_of(tensor.contiguous()))
        self._missing.remove(name)

    def finish(self) -> dict[str, str]:
        """Close the shards, write the index where there are several, and return each file's SHA-256."""
        if self._missing:
            raise ValueError(f"{len(self._missing)} tensors were never written, among them {min(self._missing)}")
        self.synchronise()
        self.close()
        if self._is_sharded:
            index = {"metadata": {"total_size": sum(self._size.values())}, "weight_map": self._file_of}
            text = json.dumps(index, indent=2, sort_keys=True) + "\n"
            (self._folder / INDEX_FILE).write_text(text, encoding="utf-8")
        return {file: file_digest(self._folder / file) for file in self.files}

    def synchronise(self) -> list[str]:
        """Wait until what was written is on the disk; return the names of the tensors that are not."""
        for file in self._open.values():
            file.flush()
            os.fsync(file.fileno())
        return sorted(self._missing)

    def close(self) -> None:
        """Close all files, even where closing one fails."""
        with ExitStack() as stack:
            for file in self._open.values():
                stack.callback(file.close)
            self._open.clear()

    def _lay_out(self, file: str, names: list[str], is_new: bool) -> None:
        """Write a shard's header, or check what is there, and note where each of its tensors goes."""
        code = DTYPE_CODES[str(self._dtype).removeprefix("torch.")]
        header: dict[str, object] = {"__metadata__": {"format": "pt"}}
        start = 0
        for name in names:
            end = start + self._size[name]
            header[name] = {"dtype": code, "shape": list(self._shapes[name]), "data_offsets": [start, end]}
            self._offset[name] = start
            start = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        head = len(text).to_bytes(8, "little") + text
        for name in names:
            self._offset[name] += len(head)
        handle = (self._folder / file).open("wb" if is_new else "r+b")
        self._open[file] = handle
        if is_new:
            handle.write(head)
            return
        ends = {name: self._offset[name] + self._size[name] for name in names}
        least = max((end for name, end in ends.items() if name in self._there), default=len(head))
        if handle.read(len(head)) != head or not least <= os.fstat(handle.fileno()).st_size <= max(ends.values()):
            self.close()
            raise OutputError(
                f"The interrupted run cannot be resumed: what it left is damaged ({file}).",
                "Leave out --resume to start over.",
            )


class ModelWriter(ShardWriter):
    """Writes the shards of a model, whose tensors arrive by the names of its parameters and buffers.

    Args:
        model: The model, of which only names and shapes are read.
    """

    def __init__(
        self, folder: Path, model: Any, dtype: torch.dtype, max_shard_size: int, missing: Sequence[str] | None = None
    ) -> None:
        shapes = {
            stored: tuple(part.shape)
            for name, value in stored_values(model)
            for stored, part in checkpoint_tensors(model, name, value).items()
        }
        super().__init__(folder, shapes, dtype, max_shard_size, missing)
        self._model = model

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Write one of the model's tensors, as checkpoints of its family store it."""
        for stored, part in checkpoint_tensors(self._model, name, tensor).items():
            self.write(stored, part)


def write_tensors(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], count: int) -> None:
    """Write tensors into one safetensors file, one after the other, so that only one need be in memory.

    Args:
        tensors: Names and values, of any dtype of `DTYPE_CODES`, float64 or uint8.
    """
    codes = {**DTYPE_CODES, "float64": "F64", "uint8": "U8"}
    # the header comes first and is known last: spaces at its end are allowed
    room = ENTRY_BYTES * (count + 1)
    header: dict[str, object] = {}
    end = 0
    with path.open("wb") as file:
        file.seek(8 + room)
        for name, value in tensors:
            held = value.detach().cpu().contiguous()
            start, end = end, end + held.nbytes
            shape, code = list(held.shape), codes[str(held.dtype).removeprefix("torch.")]
            header[name] = {"dtype": code, "shape": shape, "data_offsets": [start, end]}
            file.write(content_of(held))
        file.seek(0)
        file.write(room.to_bytes(8, "little") + json.dumps(header).encode().ljust(room))


def _require_finite(name: str, tensor: torch.Tensor) -> None:
    """Refuse to write a tensor with NaN or infinity; a number may be finite until it gets its dtype in the slice."""
    import torch

    from slicecli.linalg.normal_equations import is_finite

    if is_finite(tensor):
        return
    dtype = str(tensor.dtype).removeprefix("torch.")
    if bool(torch.isnan(tensor).any()):
        raise WeightsError(
            f"{name} of the slice holds NaN.", "Try --dtype float32; if that does not help, the checkpoint is damaged."
        )
    raise WeightsError(
        f"{name} of the slice holds infinity: one of its numbers exceeds {torch.finfo(tensor.dtype).max:.4g}, the "
        f"largest that {dtype} can hold.",
        WIDER_DTYPE.get(dtype, "The checkpoint is damaged: trained models do not have numbers of that size."),
    )


def content_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    import torch

    content: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return content
