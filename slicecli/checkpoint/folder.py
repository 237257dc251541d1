"""Writing a checkpoint: an output folder that is either whole or not there, and shards filled tensor by tensor.

The safetensors format puts a table of names, dtypes, shapes and offsets in front of the data. All of that is
known before the first tensor is computed, so each shard is laid out first and its tensors are written where they
belong as they come, in any order; memory holds one tensor.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from slicecli.errors import OutputError, WeightsError
from slicecli.family.slice_plan import DTYPE_CODES
from slicecli.runtime.json import read_json

if TYPE_CHECKING:
    import torch

__all__ = [
    "ShardWriter",
    "check_apart",
    "check_output",
    "check_results_file",
    "clear_folder",
    "content_of",
    "file_digest",
    "require_disk_space",
    "unfinished_folder",
    "whole_folder",
    "write_tensors",
    "write_whole_file",
    "write_whole_files",
]

RECORD_FILE = "slicecli.json"
LOCK_FILE = ".lock"
# what transformers, a tokenizer or this program would read as a part of a model
MODEL_FILES = (
    *("*config*.json", "tokenizer*", "*tokens*.json", "vocab*", "merges*", "chat_template*", RECORD_FILE),
    *("*.safetensors", "*.index.json", "*.bin", "*.pt", "*.pth", "*.model", "*.py", "*.jinja", "readme*", "license*"),
)
ENTRY_BYTES = 256  # most that a tensor takes in a header of ours
WIDER_DTYPE = {
    "float16": "Give --dtype bfloat16, which reaches as far as float32.",
    "bfloat16": "Give --dtype float32, which reaches a little further.",
}


@contextmanager
def whole_folder(
    output: Path,
    overwrite: bool = False,
    resumes: bool = False,
    keeps: Callable[[BaseException], bool] = lambda _error: False,
) -> Iterator[Path]:
    """Give an unfinished folder beside the output that takes its name once the body ends without an error.

    Whatever ends the body otherwise removes the unfinished folder. With `overwrite` an older slice of the output's name
    is replaced in the last step, not before. What a killed run left is removed at the beginning, unless it is to be
    gone on with.

    Args:
        output: The folder to make.
        overwrite: Replace an existing slice.
        resumes: Leave what a killed run left.
        keeps: Says whether the unfinished folder is worth keeping after an error or a signal.

    Raises:
        OutputError: The output exists and may not be replaced, is being written by another process, or cannot be
            written.
    """
    from filelock import FileLock, Timeout

    output = _real(output)  # of a link to a folder, that folder is replaced
    check_output(output, overwrite)
    partial = unfinished_folder(output)
    lock = FileLock(partial / LOCK_FILE)
    try:
        partial.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"Another process is writing {output.name!r}.", "Wait for it, or give another with --output."
        ) from None
    except OSError as error:
        raise _writing_error(output, error) from error
    is_kept = False
    try:
        _put_back(output)
        check_output(output, overwrite)
        if not resumes:
            clear_folder(partial)
        yield partial
        (partial / LOCK_FILE).unlink(missing_ok=True)
        _put_in_place(partial, output)
    except OSError as error:
        raise _writing_error(output, error) from error
    except BaseException as error:
        is_kept = keeps(error)
        raise
    finally:
        lock.release()
        if not is_kept:
            shutil.rmtree(partial, ignore_errors=True)


def unfinished_folder(output: Path) -> Path:
    """Return the folder that an output is until it is whole."""
    real = _real(output)
    return real.with_name(f".{real.name}.incomplete")


def _real(path: Path) -> Path:
    """Return the path without links; of a link in a circle, which `Path.resolve` refuses, whatever is left."""
    return Path(os.path.realpath(path))


def _replaced_folder(output: Path) -> Path:
    """Return the folder that an older slice is while a new one takes its name."""
    return unfinished_folder(output).with_suffix(".replaced")


def clear_folder(folder: Path, keeps: Callable[[Path], bool] = lambda _path: False) -> None:
    """Remove everything in an unfinished folder but its lock.

    Args:
        folder: The folder.
        keeps: Says of something in it whether it stays.
    """
    for path in folder.iterdir():
        if path.name == LOCK_FILE or keeps(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_whole_file(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; text is encoded as UTF-8.

    Raises:
        OutputError: It cannot be written.
    """
    write_whole_files({path: content})


def write_whole_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write some files that belong together, all of them whole or none; text is encoded as UTF-8.

    Raises:
        OutputError: One cannot be written.
    """
    partials = {path.with_name(f".{path.name}.incomplete"): path for path in contents}
    path = next(iter(contents))
    try:
        for partial, path in partials.items():
            content = contents[path]
            partial.write_bytes(content.encode() if isinstance(content, str) else content)
        for partial, path in partials.items():
            partial.replace(path)
    except OSError as error:
        raise _writing_error(path, error) from error
    finally:
        for partial in partials:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def check_output(output: Path, overwrite: bool) -> None:
    """Refuse an output that is taken.

    Raises:
        OutputError: It exists, and `overwrite` is off or it is something else than a slice.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise OutputError(f"The output {output.name!r} exists.", "Give another with --output, or --overwrite it.")
    if not (output / RECORD_FILE).is_file():
        raise OutputError(
            f"The output {output.name!r} exists and is not a slice (it has no {RECORD_FILE}), so it is left alone.",
            "Give another with --output, or remove it yourself.",
        )


def check_apart(output: Path, model: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output whose making would change or remove what it is made from.

    Args:
        output: The folder to be made.
        model: The folder of the model.
        inputs: Other files that are read.

    Raises:
        OutputError: It is the model's folder by whatever name, holds it or a file that is read, or lies inside it.
    """
    files = (model, *(path for path in model.iterdir() if path.is_symlink()), *inputs)
    for place in (output, unfinished_folder(output), _replaced_folder(output)):
        found = next((file for file in files if _is_within(file, place)), None)
        if found is not None:
            raise OutputError(
                f"The output {output.name!r} would take the place of {found.name!r}, from which it is made.",
                "Give another with --output.",
            )
    if _is_within(output, model):
        raise OutputError(
            f"The output {output.name!r} lies inside the folder of the model.", "Give another with --output."
        )


def _is_within(path: Path, folder: Path) -> bool:
    """Say whether a path, by whatever name, is a folder that exists or lies inside it."""
    real = _real(path)
    return folder.exists() and any(one.exists() and one.samefile(folder) for one in (real, *real.parents))


def check_results_file(path: Path, models: Iterable[Path] = (), inputs: Iterable[Path] = ()) -> None:
    """Refuse a file for results that cannot be made, or in place of something that they come from.

    Args:
        path: The file to be made.
        models: Folders of models, in which results may lie beside the model's own files.
        inputs: Files that are read.

    Raises:
        OutputError: There is no such folder, or it is a model's file or one of those read.
    """
    if not path.parent.is_dir():
        raise OutputError(f"{str(path)!r} cannot be written: there is no such folder.", "Make it first.")
    for file in inputs:
        if path.exists() and file.exists() and path.samefile(file):
            raise OutputError(f"{str(path)!r} is read to make what would be written there.", "Give another file.")
    for model in models:
        is_beside = model.is_dir() and path.parent.samefile(model)
        if is_beside and (_is_named_like_a_models(path.name) or (path.exists() and not _is_of_results(path))):
            raise OutputError(f"{str(path)!r} is a file of the model.", "Give another file.")


def _is_named_like_a_models(name: str) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in MODEL_FILES)


def _is_of_results(path: Path) -> bool:
    """Say whether a file has results in it, which may be replaced: those say the versions that they were made with."""
    content = read_json(path)
    return isinstance(content, dict) and ("versions" in content or "slicecli_version" in content)


def require_disk_space(output: Path, needed: int) -> None:
    """Refuse to start what will not fit.

    Args:
        output: The folder to be made.
        needed: Bytes that will be written.

    Raises:
        OutputError: The file system has less.
    """
    existing = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"The slice needs {needed / 1e9:.2f} GB on disk, and {free / 1e9:.2f} GB are free.",
            "Free some, or give an --output on another disk.",
        )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


class ShardWriter:
    """Writes the safetensors shards of a checkpoint whose tensors arrive one by one.

    Args:
        folder: Where the shards go.
        shapes: Shape of every tensor by name, in the order in which they shall lie.
        dtype: Dtype of all of them.
        max_shard_size: Most bytes of one shard.
        missing: The tensors that are not yet in the shards, where an interrupted run has laid them out already.
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
            name: Its name; each must be written exactly once, but for those that were there at the beginning.
            tensor: Its value on the CPU, of the shape and dtype announced.

        Raises:
            WeightsError: It holds NaN or infinity.
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
            (self._folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
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
        """Write a shard's header, or check what is there, and note where each of its tensors goes.

        Raises:
            OutputError: What is there is not what was laid out and written.
        """
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
                f"What an interrupted run left of this output is damaged ({file}), so it cannot go on.",
                "Leave out --resume to start anew.",
            )


def write_tensors(path: Path, tensors: Iterable[tuple[str, torch.Tensor]], count: int) -> None:
    """Write tensors into one safetensors file, one after the other, so that only one need be in memory.

    Args:
        path: The file.
        tensors: Names and values, of any dtype of `DTYPE_CODES`, float64 or uint8.
        count: How many there are.
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
    """Refuse to write a tensor with NaN or infinity; a number may be finite until it gets its dtype in the slice.

    Raises:
        WeightsError: It holds one.
    """
    import torch

    from slicecli.linalg.normal_equations import is_finite

    if is_finite(tensor):
        return
    dtype = str(tensor.dtype).removeprefix("torch.")
    if bool(torch.isnan(tensor).any()):
        raise WeightsError(
            f"{name} of the slice holds NaN.", "Try --dtype float32; if it stays, the checkpoint is damaged."
        )
    raise WeightsError(
        f"{name} of the slice holds infinity: {dtype} reaches to {torch.finfo(tensor.dtype).max:.4g}, and one of its "
        "numbers is larger.",
        WIDER_DTYPE.get(dtype, "The checkpoint is damaged: no trained model has numbers of that size."),
    )


def content_of(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    import torch

    content: memoryview = tensor.reshape(-1).view(torch.uint8).numpy().data
    return content


def _put_in_place(partial: Path, output: Path) -> None:
    """Rename the finished folder; an older slice is moved aside first and removed last."""
    if not output.exists():
        partial.rename(output)
        return
    aside = _replaced_folder(output)
    output.rename(aside)
    try:
        partial.rename(output)
    except OSError:
        aside.rename(output)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _put_back(output: Path) -> None:
    """Undo what a run left that was killed while it replaced an older slice: that has its name again, or is gone."""
    aside = _replaced_folder(output)
    if aside.is_dir() and output.exists():
        shutil.rmtree(aside)
    elif aside.is_dir():
        aside.rename(output)


def _writing_error(output: Path, error: OSError) -> OutputError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT}:
        return OutputError(
            f"The disk became full while {output.name!r} was written; nothing is left of it.",
            "Free some space, or give an --output on another disk.",
        )
    return OutputError(
        f"The output {output.name!r} cannot be written: {error.strerror or error}.", "Give another with --output."
    )
