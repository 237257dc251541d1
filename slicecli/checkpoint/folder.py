"""An output folder that is either whole or not there, and files that are."""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from slicecli.errors import OutputError
from slicecli.runtime.json import read_json

__all__ = [
    "check_apart",
    "check_output",
    "check_results_file",
    "clear_folder",
    "file_digest",
    "folder_beside",
    "require_disk_space",
    "unfinished_folder",
    "whole_folder",
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
    """
    output = _real(output)  # of a link to a folder, that folder is replaced
    check_output(output, overwrite)
    partial = unfinished_folder(output)
    try:
        with _locked(partial, output, lambda error: not isinstance(error, OSError) and keeps(error)):
            _put_back(output)
            check_output(output, overwrite)
            if not resumes:
                clear_folder(partial)
            yield partial
            (partial / LOCK_FILE).unlink(missing_ok=True)
            _put_in_place(partial, output)
            shutil.rmtree(_folder_beside(output), ignore_errors=True)  # of a run that was killed before it had weights
    except OSError as error:
        raise _writing_error(output, error) from error


@contextmanager
def folder_beside(output: Path, resumes: bool, keeps: Callable[[BaseException], bool]) -> Iterator[Path]:
    """Give a folder beside the output for what comes before its weights; it is removed as an unfinished one is."""
    output = _real(output)
    folder = _folder_beside(output)
    with _locked(folder, output, keeps):
        if not resumes:
            clear_folder(folder)
        yield folder


def _folder_beside(output: Path) -> Path:
    return unfinished_folder(output).with_suffix(".statistics")


@contextmanager
def _locked(folder: Path, output: Path, keeps: Callable[[BaseException], bool]) -> Iterator[None]:
    """Make a folder for what is to become an output, hold its lock, and remove it unless an error is to leave it."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK_FILE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"Another process is writing {output.name!r}.", "Wait for it, or choose another with --output."
        ) from None
    except OSError as error:
        raise _writing_error(output, error) from error
    is_kept = False
    try:
        yield
    except BaseException as error:
        is_kept = keeps(error)
        raise
    finally:
        lock.release()
        if not is_kept:
            shutil.rmtree(folder, ignore_errors=True)


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
    """Remove everything in an unfinished folder but its lock."""
    for path in folder.iterdir():
        if path.name == LOCK_FILE or keeps(path):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_whole_file(path: Path, content: str | bytes) -> None:
    """Write a file, whole or not at all; text is encoded as UTF-8."""
    write_whole_files({path: content})


def write_whole_files(contents: Mapping[Path, str | bytes]) -> None:
    """Write some files that belong together, all of them whole or none; text is encoded as UTF-8."""
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
    """Refuse an output that is taken."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise OutputError(
            f"The output {output.name!r} already exists.",
            "Choose another with --output, or replace it with --overwrite.",
        )
    if not (output / RECORD_FILE).is_file():
        raise OutputError(
            f"The output {output.name!r} exists and is not a slice (no {RECORD_FILE}), so it will not be replaced.",
            "Choose another with --output, or remove it yourself.",
        )


def check_apart(output: Path, model: Path, inputs: Iterable[Path] = ()) -> None:
    """Refuse an output whose making would change or remove what it is made from."""
    files = (model, *(path for path in model.iterdir() if path.is_symlink()), *inputs)
    for place in (output, unfinished_folder(output), _replaced_folder(output)):
        found = next((file for file in files if _is_within(file, place)), None)
        if found is not None:
            raise OutputError(
                f"The output {output.name!r} would overwrite {found.name!r}, which it is made from.",
                "Choose another with --output.",
            )
    if _is_within(output, model):
        raise OutputError(f"The output {output.name!r} is inside the model's folder.", "Choose another with --output.")


def _is_within(path: Path, folder: Path) -> bool:
    """Say whether a path, by whatever name, is a folder that exists or lies inside it."""
    real = _real(path)
    return folder.exists() and any(one.exists() and one.samefile(folder) for one in (real, *real.parents))


def check_results_file(path: Path, models: Iterable[Path] = (), inputs: Iterable[Path] = ()) -> None:
    """Refuse a file for results that cannot be made, or in place of something that they come from."""
    if not path.parent.is_dir():
        raise OutputError(f"{str(path)!r} cannot be written: its folder does not exist.", "Create the folder first.")
    for file in inputs:
        if path.exists() and file.exists() and path.samefile(file):
            raise OutputError(
                f"{str(path)!r} is an input of this command and would be overwritten.", "Choose another file."
            )
    for model in models:
        is_beside = model.is_dir() and path.parent.samefile(model)
        if is_beside and (_is_named_like_a_models(path.name) or (path.exists() and not _is_of_results(path))):
            raise OutputError(f"{str(path)!r} belongs to the model and would be overwritten.", "Choose another file.")


def _is_named_like_a_models(name: str) -> bool:
    return any(fnmatch.fnmatch(name.lower(), pattern) for pattern in MODEL_FILES)


def _is_of_results(path: Path) -> bool:
    """Say whether a file has results in it, which may be replaced: those say the versions that they were made with."""
    content = read_json(path)
    return isinstance(content, dict) and ("versions" in content or "slicecli_version" in content)


def require_disk_space(output: Path, needed: int) -> None:
    """Refuse to start what will not fit."""
    existing = next(parent for parent in (output, *output.absolute().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise OutputError(
            f"The slice needs {needed / 1e9:.2f} GB of disk space, but only {free / 1e9:.2f} GB are free.",
            "Free some space, or choose an --output on another disk.",
        )


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


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
            f"The disk filled up while writing {output.name!r}; the partial output was removed.",
            "Free some space, or choose an --output on another disk.",
        )
    return OutputError(
        f"The output {output.name!r} cannot be written: {error.strerror or error}.", "Choose another with --output."
    )
