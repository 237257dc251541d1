"""What is in the folder or the repository of a slice, as far as checks look at it.

Weight files are looked at by their hash and by the table of tensors at their head. Of a repository the Hub states the
hash of every large file, and the head comes by a request for a range, so that nothing large is downloaded.
"""

from __future__ import annotations

import functools
import glob
import json
import math
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint import RECORD_FILE, file_digest
from slicecli.errors import SourceError
from slicecli.hub.client import patiently, quiet_client
from slicecli.hub.errors import describe_hub_error, remedy_of_hub_error
from slicecli.schema import schema_errors

if TYPE_CHECKING:
    from huggingface_hub import HfApi

    from slicecli.slicing.state import Progress

__all__ = ["WEIGHT_SUFFIXES", "Contents", "Tensor", "download_repository", "folder_contents", "repository_contents"]

WEIGHT_SUFFIXES = frozenset(
    {
        ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack",
        ".gguf", ".ggml", ".onnx", ".tflite",
    }
)  # fmt: skip
_PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf"})
MOST_TEXT_BYTES = 64_000_000
THREADS = 8


@dataclass(frozen=True)
class Tensor:
    """A tensor in a safetensors file.

    Attributes:
        dtype: Its dtype, as the format names it.
        shape: Its shape.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Contents:
    """What is there.

    Attributes:
        name: Hub id, or the folder's own name.
        is_published: Whether it is a repository.
        record: The parsed record; `None` where there is none, or it is no JSON.
        faults: What in the record is not as its schema has it; its fields can be relied on where there is nothing.
        sizes: Bytes of each file by name, those in hidden places aside.
        digests: SHA-256 of the files that the record names.
        texts: What small files hold, without weights and pictures.
        tensors: The tensors of each weight file that the record names, by name; `None` where the head of the file is
            not one of the format.
    """

    name: str
    is_published: bool
    record: Any
    faults: tuple[str, ...]
    sizes: Mapping[str, int]
    digests: Mapping[str, str]
    texts: Mapping[str, bytes]
    tensors: Mapping[str, Mapping[str, Tensor] | None]


def folder_contents(folder: Path, progress: Progress | None = None, name: str = "") -> Contents:
    """Look at a folder; the files that its record names are read whole.

    Args:
        folder: The folder.
        progress: Hears of each file.
        name: What to call it, where it is the copy of a repository.

    Raises:
        SourceError: A file cannot be read.
    """
    try:
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        sizes = {file: path.stat().st_size for file, path in sorted(paths.items()) if not _is_hidden(file)}
        record, faults = _read_record(paths[RECORD_FILE].read_bytes() if RECORD_FILE in sizes else b"")
        weights, files = (set(), set()) if faults else (record["weights"].keys(), record["files"].keys())
        known = [file for file in sizes if file in weights or file in files]
        if progress is not None:
            progress.start("files", len(known))
        digests = {}
        for file in known:
            digests[file] = file_digest(paths[file])
            if progress is not None:
                progress.advance(file)
        return Contents(
            name=name or folder.resolve().name,
            is_published=bool(name),
            record=record,
            faults=faults,
            sizes=sizes,
            digests=digests,
            texts={file: paths[file].read_bytes() for file, size in sizes.items() if _is_text(file, size)},
            tensors={file: _read_tensors(paths[file]) for file in known if file in weights},
        )
    except OSError as error:
        raise SourceError(
            f"A file of {folder.name!r} cannot be read: {error.strerror or type(error).__name__}.",
            "Check who may read it.",
        ) from error


def repository_contents(
    repository: str, revision: str | None = None, token: str | None = None, progress: Progress | None = None
) -> Contents:
    """Look at a repository; only small files are downloaded.

    Args:
        repository: Hub id.
        revision: Branch, tag or commit.
        token: Hub token; `None` takes the stored one.
        progress: Hears of each weight file.

    Raises:
        SourceError: It does not exist or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(token=token, library_name="slicecli")

    def look() -> Contents:
        commit = api.model_info(repository, revision=revision).sha
        assert commit is not None
        tree = api.list_repo_tree(repository, recursive=True, revision=commit)
        entries = {one.path: one for one in tree if isinstance(one, RepoFile) and not _is_hidden(one.path)}
        fetch = functools.partial(_fetch, api, repository, commit)
        # of large files the Hub states the hash; the others are small, and only fetching them tells theirs
        is_small = {file: entry.lfs is None for file, entry in entries.items()}
        content = fetch([RECORD_FILE]).get(RECORD_FILE) if is_small.get(RECORD_FILE) else None
        record, faults = _read_record(b"" if content is None else content.read_bytes())
        weights, files = (set(), set()) if faults else (record["weights"].keys(), record["files"].keys())
        known = [file for file in entries if file in weights or file in files]
        wanted = [
            file
            for file, entry in entries.items()
            if is_small[file] and (file in weights or file in files or _is_text(file, entry.size))
        ]
        paths = fetch(wanted)
        digests = {}
        for file in known:
            lfs = entries[file].lfs
            digests[file] = file_digest(paths[file]) if lfs is None else lfs.sha256
        return Contents(
            name=repository,
            is_published=True,
            record=record,
            faults=faults,
            sizes={file: entries[file].size for file in sorted(entries)},
            digests=digests,
            texts={file: paths[file].read_bytes() for file in paths if _is_text(file, entries[file].size)},
            tensors={
                **{file: _read_tensors(paths[file]) for file in known if file in weights and file in paths},
                **_fetch_tensors(
                    api, repository, commit, [file for file in known if file in weights and file not in paths], progress
                ),
            },
        )

    return _from_hub(repository, look)


def download_repository(repository: str, revision: str | None = None, token: str | None = None) -> Path:
    """Download a whole repository, and return the folder it is in.

    Raises:
        SourceError: It does not exist or cannot be fetched.
    """
    import huggingface_hub

    return _from_hub(
        repository, lambda: Path(huggingface_hub.snapshot_download(repository, revision=revision, token=token))
    )


def _from_hub(repository: str, call: Callable[[], Any]) -> Any:
    try:
        with quiet_client():
            return patiently(call)
    except Exception as error:
        raise SourceError(
            f"The repository {repository!r} cannot be checked: {describe_hub_error(error)}.", remedy_of_hub_error(error)
        ) from error


def _fetch(api: HfApi, repository: str, commit: str, files: Collection[str]) -> dict[str, Path]:
    """Download some files of a repository; return where each is."""
    if not files:
        return {}
    patterns = [glob.escape(file) for file in files]
    folder = Path(api.snapshot_download(repository, revision=commit, allow_patterns=patterns))
    return {file: folder / file for file in files}


def _fetch_tensors(
    api: HfApi, repository: str, commit: str, files: Collection[str], progress: Progress | None
) -> dict[str, Mapping[str, Tensor] | None]:
    """Fetch the heads of safetensors files."""
    from huggingface_hub.errors import SafetensorsParsingError

    def fetch(file: str) -> Mapping[str, Tensor] | None:
        try:
            head = api.parse_safetensors_file_metadata(repository, file, revision=commit)
            return {name: Tensor(one.dtype, tuple(one.shape)) for name, one in head.tensors.items()}
        except (SafetensorsParsingError, TypeError, ValueError):
            return None
        finally:
            if progress is not None:
                progress.advance(file)

    if progress is not None:
        progress.start("weight files", len(files))
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(files, pool.map(fetch, files), strict=True))


def _read_record(content: bytes) -> tuple[Any, tuple[str, ...]]:
    """Return a record, and what is wrong with it."""
    try:
        record = json.loads(content) if content else None
    except (ValueError, RecursionError):
        record = None
    return record, tuple(schema_errors(record))


def _read_tensors(path: Path) -> dict[str, Tensor] | None:
    """Read the head of a safetensors file; `None` where it is damaged."""
    import safetensors

    try:
        # the head is all that is read, so that the framework does not matter
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
            return {name: Tensor(one.get_dtype(), tuple(one.get_shape())) for name, one in slices.items()}
    except (safetensors.SafetensorError, ValueError):
        return None


def _is_hidden(file: str) -> bool:
    return any(part.startswith(".") for part in PurePosixPath(file).parts)


def _is_text(file: str, size: int) -> bool:
    suffix = PurePosixPath(file).suffix.lower()
    return size <= MOST_TEXT_BYTES and suffix not in WEIGHT_SUFFIXES and suffix not in _PICTURE_SUFFIXES
