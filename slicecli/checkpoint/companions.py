"""Which files of a model go along with its slice, and why the others do not.

Everything small goes along that is not written anew for the slice (config, weights, card, record, plot): tokenizers and
vocabularies of any name, chat templates, licences, notes, code where code is trusted. The choice rests on names and
sizes alone, so that it is the same for a folder and for a repository of which nothing is downloaded yet; what the
chosen files are and hold is looked at where they lie, see `slicecli.checkpoint.source.Source.companions`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import Any

from slicecli.errors import SourceError

__all__ = [
    "CODE_SUFFIXES",
    "KNOWN_FILES",
    "MOST_KNOWN_BYTES",
    "VOCABULARIES",
    "WEIGHT_SUFFIXES",
    "Companions",
    "LeftOut",
    "choose_companions",
    "is_text",
    "list_folder",
    "may_be_private",
]

KNOWN_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "*.model",
    "chat_template*",
    "generation_config.json",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "COPYING*",
    "USE_POLICY*",
)
"""What goes along whatever its suffix and size, beside the config of a model."""

WEIGHT_SUFFIXES = frozenset(
    {
        ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".npy", ".npz", ".h5", ".msgpack",
        ".gguf", ".ggml", ".llamafile", ".onnx", ".onnx_data", ".tflite", ".mlmodel", ".ot", ".pdparams", ".distcp",
        ".nemo", ".engine",
    }
)  # fmt: skip
"""Suffixes of weights, and of what is unpickled when it is read."""

CODE_SUFFIXES = frozenset(
    {".py", ".pyc", ".pyd", ".so", ".dll", ".dylib", ".exe", ".sh", ".bat", ".cmd", ".ps1", ".jar"}
)
"""Suffixes of what is run by whoever loads a model, or by whoever opens it."""

VOCABULARIES = (
    "tokenizer.json",
    "vocab*",
    "merges*",
    "added_tokens.json",
    "*.model",
    "*.vocab",
    "*.bpe",
    "*.tiktoken",
)
"""What holds so many pieces of text that there may be paths among them."""

PICTURE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".gif", ".webp", ".pdf"})

MOST_KNOWN_BYTES = 200_000_000
MOST_FILE_BYTES = 100_000_000  # of a file of any other name
MOST_BYTES = 200_000_000  # of all of those together
MOST_FILES = 1000
MOST_TEXT_BYTES = 64_000_000
MOST_PRIVATE_BYTES = 100_000
LONGEST_PATH = 255  # that a record can hold
MOST_NAMED = 20

# written anew for the slice, or by the program that wrote the weights
_OWN_FILES = frozenset(
    {
        "config.json", "readme.md", "slicecli.json", "model.safetensors.index.json", "plots/prediction.png",
        "plots/recovery.png", "configuration_slicecli.py", "modeling_slicecli.py",
    }
)  # fmt: skip
# what transformers reads, and what it would read of another set of shards
_OWN_WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors")
_WEIGHTS = ("*.index.json", "*.onnx.data", "*.onnx_data*")
_DENSE_SIZES = ("params.json", "*quant*_config.json")
_TRAINING = (
    "optimizer*", "scheduler*", "scaler*", "rng_state*", "random_states*", "trainer_state.json", "training_args*",
    "events.out.tfevents*", "zero_to_fp32.py", "*.log",
)  # fmt: skip
_TRAINING_FOLDERS = ("checkpoint-*", "global_step*", "runs", "logs", "wandb", "lightning_logs")
_OTHER_FORMATS = frozenset({"original", "onnx", "openvino", "coreml", "gguf", "mlx", "tflite", "metal"})

WEIGHTS, OTHER_MODEL, SIZES_OF_SOURCE = "other weights", "another checkpoint", "sizes of the dense weights"
TRAINING, PROGRAMS, UNFIT_NAME = "training state", "programs", "a name that a record cannot hold"
UNTRUSTED_CODE = "code, copied only with --trust-remote-code"
LINKED_FOLDER, ABSENT = "links to folders", "missing from this copy of the model"
PRIVATE = "containing tokens or local paths"
TOO_LARGE = f"larger than {MOST_FILE_BYTES / 1e6:.0f} MB"
TOO_MUCH = f"beyond the first {MOST_FILES:,} files or {MOST_BYTES / 1e6:.0f} MB"


@dataclass(frozen=True)
class LeftOut:
    """Files of a model that do not go along with its slice.

    Attributes:
        files: Their names; a name that ends in `/` stands for all files in that folder.
    """

    reason: str
    files: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, with the first names only."""
        named = [_printable(file) for file in self.files[:MOST_NAMED]]
        return {"reason": self.reason, "count": len(self.files), "files": named}

    def describe(self) -> str:
        """Name the first few in a clause."""
        named, more = map(_printable, self.files[:3]), len(self.files) - 3
        return f"{', '.join(named)}{f' and {more:,} more' if more > 0 else ''} ({self.reason})"


@dataclass(frozen=True)
class Companions:
    """The files of a model that are neither its config nor its weights.

    Attributes:
        files: Those that go along with a slice, by their paths in the model's folder, with slashes.
    """

    files: tuple[str, ...]
    left_out: tuple[LeftOut, ...]

    @classmethod
    def of(cls, files: Iterable[str], reasons: Mapping[str, str]) -> Companions:
        """Put together which files go along, and for each other the reason why not."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in sorted(reasons.items()):
            by_reason.setdefault(reason, []).append(name)
        left_out = tuple(LeftOut(reason, tuple(names)) for reason, names in sorted(by_reason.items()))
        return cls(tuple(sorted(files)), left_out)

    def needed(self) -> tuple[str, ...]:
        """Return those that loading the model may read, without which it would be another."""
        return tuple(file for file in self.files if _is_read(file))

    def without(self, reasons: Mapping[str, str]) -> Companions:
        """Return the same, without some files."""
        before = {name: one.reason for one in self.left_out for name in one.files}
        return Companions.of(set(self.files) - reasons.keys(), {**before, **reasons})


def choose_companions(sizes: Mapping[str, int], name: str, trusts_code: bool) -> Companions:
    """Decide which files of a model go along with a slice. Hidden files never do, and are not spoken of."""
    paths = {file: PurePosixPath(file) for file in sizes if not _is_hidden(file) and not _is_own(file)}
    other_models = {
        path.parts[0]
        for path in paths.values()
        if len(path.parts) > 1 and (_is_weights(path) or path.name == "config.json")
    }
    reasons: dict[str, str] = {}
    known: list[str] = []
    others: list[str] = []
    for file, path in paths.items():
        reason = _reason_against(path, other_models, trusts_code)
        if reason is not None:
            is_whole_folder = reason in (OTHER_MODEL, TRAINING) and len(path.parts) > 1
            reasons[f"{path.parts[0]}/" if is_whole_folder else file] = reason
        elif _is_known(path):
            if sizes[file] > MOST_KNOWN_BYTES:
                raise SourceError(
                    f"{file} of {name} has {sizes[file]:,} bytes, too large for such a file.", "Download it again."
                )
            known.append(file)
        elif sizes[file] > MOST_FILE_BYTES:
            reasons[file] = TOO_LARGE
        else:
            others.append(file)
    # what lies beside the config first, and the small before the large
    others.sort(key=lambda file: (len(paths[file].parts), sizes[file], file))
    room = MOST_BYTES
    taken: list[str] = []
    for file in others:
        if sizes[file] > room or len(taken) == MOST_FILES:
            reasons[file] = TOO_MUCH
        else:
            taken.append(file)
            room -= sizes[file]
    return Companions.of([*known, *taken], reasons)


def _reason_against(path: PurePosixPath, other_models: set[str], trusts_code: bool) -> str | None:
    """Say why a file does not go along whatever its size; `None` where nothing is against it."""
    suffix, top = path.suffix.lower(), path.parts[0]
    if not _is_recordable(path):
        return UNFIT_NAME
    if len(path.parts) > 1:
        if _fits(top, _TRAINING_FOLDERS):
            return TRAINING
        if top in other_models or top.lower() in _OTHER_FORMATS:
            return OTHER_MODEL
    if suffix == ".py" and not _fits(path.name, _TRAINING):
        return None if trusts_code else UNTRUSTED_CODE
    if suffix in CODE_SUFFIXES:
        return PROGRAMS
    if _is_known(path):
        return None
    if _fits(path.name, _TRAINING):
        return TRAINING
    if _is_weights(path):
        return WEIGHTS
    return SIZES_OF_SOURCE if _fits(path.name, _DENSE_SIZES) else None


def _is_hidden(file: str) -> bool:
    return any(part.startswith(".") for part in file.split("/"))


def _is_own(file: str) -> bool:
    # some file systems do not tell README.md from readme.md
    return file.lower() in _OWN_FILES or ("/" not in file and _fits(file, _OWN_WEIGHTS))


def _is_known(path: PurePosixPath) -> bool:
    return len(path.parts) == 1 and _fits(path.name, KNOWN_FILES)


def _is_weights(path: PurePosixPath) -> bool:
    return path.suffix.lower() in WEIGHT_SUFFIXES or _fits(path.name, _WEIGHTS)


def _is_recordable(path: PurePosixPath) -> bool:
    text = path.as_posix()
    return text.isprintable() and len(text) <= LONGEST_PATH and not set(text) & set("\\:") and not path.is_absolute()


def _printable(file: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in file)[:LONGEST_PATH]


def _fits(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def is_text(file: str, size: int) -> bool:
    """Say whether a file may be read whole, to see what it says."""
    suffix = PurePosixPath(file).suffix.lower()
    return size <= MOST_TEXT_BYTES and suffix not in WEIGHT_SUFFIXES | PICTURE_SUFFIXES


def may_be_private(file: str, size: int) -> bool:
    """Say whether a file is of the kind that people leave beside a model, not one that loading may read."""
    return size <= MOST_PRIVATE_BYTES and is_text(file, size) and not _is_read(file)


def _is_read(file: str) -> bool:
    path = PurePosixPath(file)
    return _is_known(path) or _fits(path.name, VOCABULARIES) or path.suffix.lower() in {".py", ".jinja"}


def list_folder(folder: Path) -> tuple[dict[str, int], list[str]]:
    """Return the bytes of each file below a folder by its path with slashes, and the links to folders among them.

    Links to folders are not followed; hidden folders are not entered.
    """

    def refuse(error: OSError) -> None:
        name = Path(error.filename).name
        raise SourceError(f"The folder {name!r} cannot be read: {error.strerror}.", "Check its permissions.") from error

    sizes: dict[str, int] = {}
    links: list[str] = []
    for place, folders, files in os.walk(folder, onerror=refuse):
        here = Path(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        links += [(here / name).relative_to(folder).as_posix() for name in folders if (here / name).is_symlink()]
        for name in files:
            path = here / name
            sizes[path.relative_to(folder).as_posix()] = _size(path)
    return sizes, links


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # a link that leads nowhere
        return 0
