"""What is in the folder or the repository of a slice, as far as checks look at it.

Weight files are looked at by their hash and by the table of tensors at their head. Of a repository the Hub states the
hash of every large file, and the head comes by a request for a range, so that nothing large is downloaded.
"""

from __future__ import annotations

import functools
import glob
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from slicecli.checkpoint.companions import is_text
from slicecli.checkpoint.folder import RECORD_FILE, file_digest
from slicecli.checkpoint.source import DESCRIPTION_FILES, name_of_folder
from slicecli.checkpoint.weight_headers import INDEX_FILE
from slicecli.errors import SourceError
from slicecli.record.schema import schema_errors
from slicecli.runtime.hub_client import patiently, quiet_client
from slicecli.runtime.hub_errors import describe_hub_error, remedy_of_hub_error

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    from slicecli.progress import Progress

__all__ = ["Inspection", "Tensor", "download_repository", "inspect_folder", "inspect_repository"]

THREADS = 8
Result = TypeVar("Result")


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
class Inspection:
    """What is there.

    Attributes:
        name: Hub id, or the folder's own name.
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


def inspect_folder(folder: Path, progress: Progress | None = None, name: str = "") -> Inspection:
    """Look at a folder; the files that its record names are read whole."""
    if not (folder / RECORD_FILE).is_file():
        return _nothing(name or name_of_folder(folder), bool(name))
    try:
        paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        sizes = {file: path.stat().st_size for file, path in sorted(paths.items()) if not _is_hidden(file)}
        named = _Named.of(paths[RECORD_FILE].read_bytes())
        weights = [file for file in sizes if file in named.weights]
        digests = {file: file_digest(paths[file]) for file in sizes if file in named.files}
        for file in _with_progress(weights, progress):
            digests[file] = file_digest(paths[file])
        return Inspection(
            name=name or name_of_folder(folder),
            is_published=bool(name),
            record=named.record,
            faults=named.faults,
            sizes=sizes,
            digests=digests,
            texts={file: paths[file].read_bytes() for file, size in sizes.items() if is_text(file, size)},
            tensors={file: _read_tensors(paths[file]) for file in weights},
        )
    except OSError as error:
        raise SourceError(
            f"A file of {folder.name!r} cannot be read: {error.strerror or type(error).__name__}.",
            "Check its permissions.",
        ) from error


def inspect_repository(
    repository: str, revision: str | None = None, token: str | None = None, progress: Progress | None = None
) -> Inspection:
    """Look at a repository; only small files are downloaded."""
    return _from_hub(repository, lambda: _look_at(repository, revision, token, progress))


def _look_at(repository: str, revision: str | None, token: str | None, progress: Progress | None) -> Inspection:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    api = HfApi(token=token, library_name="slicecli")
    commit = str(api.model_info(repository, revision=revision).sha)
    tree = api.list_repo_tree(repository, recursive=True, revision=commit)
    entries = {one.path: one for one in tree if isinstance(one, RepoFile) and not _is_hidden(one.path)}
    if RECORD_FILE not in entries:
        return _nothing(repository, is_published=True)
    named = _Named.of(_fetch(api, repository, commit, [RECORD_FILE])[RECORD_FILE].read_bytes())
    known = named.weights | named.files

    def is_wanted(file: str, entry: RepoFile) -> bool:
        # of large files the Hub states the hash; the others are small, and only fetching them tells theirs
        if entry.lfs is None:
            return file in known or is_text(file, entry.size)
        return file in (*DESCRIPTION_FILES, INDEX_FILE) and is_text(file, entry.size)

    paths = _fetch(api, repository, commit, [file for file, entry in entries.items() if is_wanted(file, entry)])
    weights = [file for file in entries if file in named.weights]
    tensors: dict[str, Mapping[str, Tensor] | None] = {
        file: _read_tensors(paths[file]) for file in weights if file in paths
    }
    far = [file for file in weights if file not in paths]
    with ThreadPoolExecutor(THREADS) as pool:
        heads = pool.map(functools.partial(_fetch_tensors, api, repository, commit), far)
        tensors |= {file: next(heads) for file in _with_progress(far, progress)}
    return Inspection(
        name=repository,
        is_published=True,
        record=named.record,
        faults=named.faults,
        sizes={file: entries[file].size for file in sorted(entries)},
        digests={file: _digest(entry, paths.get(file)) for file, entry in entries.items() if file in known},
        texts={file: path.read_bytes() for file, path in paths.items() if is_text(file, entries[file].size)},
        tensors=tensors,
    )


def download_repository(repository: str, revision: str | None = None, token: str | None = None) -> Path:
    """Download a whole repository, and return the folder it is in."""
    import huggingface_hub

    return _from_hub(
        repository, lambda: Path(huggingface_hub.snapshot_download(repository, revision=revision, token=token))
    )


def _nothing(name: str, is_published: bool) -> Inspection:
    """Return what is looked at where there is no record: nothing, since that may be any folder."""
    return Inspection(name, is_published, None, tuple(schema_errors(None)), {}, {}, {}, {})


def _from_hub(repository: str, call: Callable[[], Result]) -> Result:
    try:
        with quiet_client():
            return patiently(call)
    except Exception as error:
        raise SourceError(
            f"The repository {repository!r} cannot be checked: {describe_hub_error(error)}.", remedy_of_hub_error(error)
        ) from error


def _fetch(api: HfApi, repository: str, commit: str, files: Collection[str]) -> dict[str, Path]:
    """Download some files of a repository; return where each is."""
    patterns = [glob.escape(file) for file in files]
    folder = Path(api.snapshot_download(repository, revision=commit, allow_patterns=patterns))
    return {file: folder / file for file in files}


def _fetch_tensors(api: HfApi, repository: str, commit: str, file: str) -> Mapping[str, Tensor] | None:
    """Fetch the head of a safetensors file; `None` where it is damaged."""
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        head = api.parse_safetensors_file_metadata(repository, file, revision=commit)
    except (SafetensorsParsingError, AttributeError, TypeError, ValueError, RecursionError):
        return None  # the client takes the form of the head for granted
    if not all(isinstance(size, int) and size >= 0 for one in head.tensors.values() for size in one.shape):
        return None
    return {name: Tensor(str(one.dtype), tuple(one.shape)) for name, one in head.tensors.items()}


def _digest(entry: RepoFile, path: Path | None) -> str:
    if entry.lfs is not None:
        return str(entry.lfs.sha256)
    assert path is not None
    return file_digest(path)


@dataclass(frozen=True)
class _Named:
    """A record, and the files that it names; none where it is damaged."""

    record: Any
    faults: tuple[str, ...]
    weights: frozenset[str]
    files: frozenset[str]

    @classmethod
    def of(cls, content: bytes) -> _Named:
        try:
            record = json.loads(content)
        except (ValueError, RecursionError):
            record = None
        faults = tuple(schema_errors(record))
        weights, files = ((), ()) if faults or record is None else (record["weights"], record["files"])
        return cls(record, faults, frozenset(weights), frozenset(files))


def _with_progress(files: Collection[str], progress: Progress | None) -> Iterator[str]:
    if progress is not None:
        progress.start("weight files", len(files))
    for file in files:
        yield file
        if progress is not None:
            progress.advance(file)


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
