"""Which files a model's weights are read from, what their headers say, and a digest of what they hold.

One function decides on the files, as transformers does; everything that describes, identifies, checks or compares a
checkpoint goes through it. Only headers and samples are read here, without torch.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from slicecli.errors import WeightsError, reason_of, shown
from slicecli.runtime.json import load_json

__all__ = [
    "INDEX_FILE",
    "SINGLE_FILE",
    "StoredTensor",
    "content_digest",
    "entry_file",
    "have_same_values",
    "is_file_name",
    "stored_tensors",
    "weight_file_names",
]

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
ENTRY_SUFFIXES = (".safetensors", ".safetensors.index.json")
NAMED_ENTRY = "transformers_weights"  # field of the config that names another file to begin with
LONGEST_NAME = 255
MOST_HEADER_BYTES = 100_000_000  # what the format allows
MOST_HEADERS = 1024  # kept, so that the files of a model are parsed once
MOST_INDEX_BYTES = 48_000_000  # some hundred thousand tensors
# how much of the weights a digest reads
WHOLE_BYTES = 64_000_000
SAMPLE_BYTES = 4096
MOST_SAMPLES = 16
ALL_SAMPLES = 8192
CHUNK_BYTES = 1 << 20
# they change when a config is written again, and nothing with them
FREE_FIELDS = frozenset({"transformers_version", "_name_or_path", NAMED_ENTRY})


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as the header of a safetensors file describes it.

    Attributes:
        dtype: Its dtype, as the format names it.
        shape: Its shape.
        start: Offset of its first byte in the file.
    """

    file: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def entry_file(names: Collection[str], fields: Mapping[str, Any]) -> str | None:
    """Return the file by which transformers finds a model's weights: the weights themselves, or their index.

    A single file goes before an index, whatever else the index names; a config may name another file.
    """
    named = fields.get(NAMED_ENTRY)
    if named is not None:
        if not isinstance(named, str) or not is_file_name(named) or not named.endswith(ENTRY_SUFFIXES):
            raise WeightsError(
                f"config.json gives {NAMED_ENTRY} = {shown(named)}, but no such safetensors file or index exists.",
                "Remove the field, or set it to the file that holds the weights.",
            )
        return named
    return next((name for name in (SINGLE_FILE, INDEX_FILE) if name in names), None)


def weight_file_names(folder: Path, fields: Mapping[str, Any]) -> list[str]:
    """Return the names of the files that transformers reads a model's weights from, in the order in which it does."""
    present = [name for name in (SINGLE_FILE, INDEX_FILE) if (folder / name).is_file()]
    entry = entry_file(present, fields)
    if entry is None:
        return []
    if not entry.endswith(".json"):
        return [entry]
    return _indexed_files(folder / entry)


def stored_tensors(folder: Path, files: Iterable[str]) -> dict[str, StoredTensor]:
    """Read the headers of weight files."""
    found: dict[str, StoredTensor] = {}
    for file in files:
        try:
            state = (folder / file).stat()
            found.update(_read_header(folder / file, state.st_size, state.st_mtime_ns))
        except FileNotFoundError:
            raise WeightsError(f"The weight file {file} is missing.", "Download the checkpoint again.") from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise WeightsError(
                f"The weight file {file} is damaged: {reason_of(error)}.", "Download the checkpoint again."
            ) from None
    return found


def content_digest(folder: Path, fields: Mapping[str, Any], tensors: Mapping[str, StoredTensor]) -> str:
    """Return a digest of what a model is: the fields of its config, and its tensors' names, dtypes, shapes and values.

    Weights of up to 64 MB are read whole. Of larger ones it reads up to 16 samples of 4 KiB, evenly spaced, from every
    tensor, and about 8,192 in all: training changes nearly every value, and reading all of them would take as long as a
    slice. How tensors are divided among files makes no difference.
    """
    known = {name: value for name, value in fields.items() if name not in FREE_FIELDS}
    table = [[name, one.dtype, one.shape] for name, one in sorted(tensors.items())]
    digest = hashlib.sha256(json.dumps([known, table], sort_keys=True).encode())
    total = sum(one.end - one.start for one in tensors.values())
    count = 0 if total <= WHOLE_BYTES else max(1, min(MOST_SAMPLES, ALL_SAMPLES // len(tensors)))
    with ExitStack() as stack:
        files = {one.file: stack.enter_context(_open(folder / one.file)) for one in tensors.values()}
        for _, one in sorted(tensors.items()):
            for start, size in _samples(one.start, one.end, count):
                files[one.file].seek(start)
                digest.update(files[one.file].read(size))
    return digest.hexdigest()


def have_same_values(folder: Path, first: StoredTensor, second: StoredTensor) -> bool:
    """Say whether two tensors of a model are equal, byte for byte; the first difference ends the reading."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with _open(folder / first.file) as one, _open(folder / second.file) as other:
        one.seek(first.start)
        other.seek(second.start)
        left = first.end - first.start
        while left > 0:
            size = min(left, CHUNK_BYTES)
            if one.read(size) != other.read(size):
                return False
            left -= size
    return True


def is_file_name(text: str) -> bool:
    """Say whether a text can be the name of a file in a folder, on any system and in any message."""
    return text.isprintable() and 0 < len(text.encode()) <= LONGEST_NAME and not set(text) & set("/\\:")


def _indexed_files(path: Path) -> list[str]:
    """Return the shards an index names, refusing any that does not lie beside it."""
    try:
        weight_map = load_json(path, MOST_INDEX_BYTES, allows_mark=False)["weight_map"]
        files = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"The index {path.name} is damaged: {reason_of(error)}.", "Download it again.") from None
    for file in files:
        if not isinstance(file, str) or not is_file_name(file) or not file.endswith(".safetensors"):
            raise WeightsError(
                f"The index {path.name} points to {shown(file)}, which is not a safetensors file next to it.",
                "Do not use this checkpoint unless you know why.",
            )
    if not files:
        raise WeightsError(f"The index {path.name} lists no files.", "Download it again.")
    return files


@functools.lru_cache(maxsize=MOST_HEADERS)
def _read_header(path: Path, total: int, _changed: int) -> Mapping[str, StoredTensor]:
    """Return the tensors of a safetensors file by name; whatever the header lacks raises one of many errors.

    A file that changes, by its size or its time, is read again.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        if size > MOST_HEADER_BYTES:
            raise ValueError("its header is too large")
        header = json.loads(file.read(size))
        data = 8 + size
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (data + int(offset) for offset in entry["data_offsets"])
        if not data <= start <= end <= total:
            raise ValueError(f"{shown(name)} lies outside the file")
        found[name] = StoredTensor(path.name, str(entry["dtype"]), tuple(map(int, entry["shape"])), start, end)
    return found


def _samples(start: int, end: int, count: int) -> Iterator[tuple[int, int]]:
    """Yield offset and size of evenly spaced samples of a range of bytes, the first and the last among them."""
    if count == 0 or end - start <= count * SAMPLE_BYTES:
        yield from ((offset, min(CHUNK_BYTES, end - offset)) for offset in range(start, end, CHUNK_BYTES))
        return
    room = end - start - SAMPLE_BYTES
    for index in range(count):
        yield start + room * index // max(1, count - 1), SAMPLE_BYTES


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise WeightsError(
            f"The weight file {path.name} cannot be read: {error.strerror}.", "Check its permissions."
        ) from None
