"""Text for calibration and evaluation: where it comes from and what a document is.

A text is named by the user as one of a few field names (`wikitext2`), as a file (`stories.jsonl`, `book.txt`)
or as a Hub dataset (`owner/name`, `owner/name:config`). Whatever the origin, it ends as a list of documents.
Tokens, rows and sampling are the business of `slicecli.data.packing`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from slicecli.data.names import Named, distinct_names, without_repeats
from slicecli.errors import RequestError, SlicecliError, TextError
from slicecli.runtime.inputs import describe_shadow, local_path, parse_repository
from slicecli.runtime.text_files import numbered_lines, read_text_file

__all__ = ["NAMED_TEXTS", "Part", "Text", "read_text", "read_texts"]

Part = Literal["calibration", "evaluation"]
FILE_SUFFIXES = (".txt", ".jsonl")


@dataclass(frozen=True)
class Text:
    """A text as documents.

    Attributes:
        name: How reports and records name it: a field name, a dataset id, or a file's name, with as many of its folders
            as tell it from other texts.
        dataset: Id of the dataset on the Hub that it comes from, if it comes from there.
        path: The file that it comes from, if it comes from one.
    """

    name: str
    documents: tuple[str, ...]
    dataset: str | None = None
    path: Path | None = field(default=None, compare=False, repr=False)

    @functools.cached_property
    def digest(self) -> str | None:
        """SHA-256 of a file's documents, each after its length in bytes; `None` of a text that its name identifies."""
        if self.path is None:
            return None
        found = hashlib.sha256()
        for document in self.documents:
            content = document.encode()
            found.update(len(content).to_bytes(8, "little") + content)
        return found.hexdigest()

    def named(self) -> Named:
        """Return what its name is decided by."""
        return Named(self.name) if self.path is None or self.digest is None else Named.file(self.path, self.digest)


@dataclass(frozen=True)
class HubText:
    """Where a text lies on the Hub.

    Attributes:
        splits: Split for calibration and split for evaluation, in the notation of `datasets`.
        is_joined: The rows are lines of one text, joined by blank lines as the field does, not documents.
        data_files: Files to load instead of the whole, for calibration and evaluation.
    """

    dataset: str
    config: str | None = None
    column: str = "text"
    splits: tuple[str, str] = ("train", "test")
    is_joined: bool = False
    revision: str | None = None
    data_files: tuple[str, str] | None = None


NAMED_TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", is_joined=True),
    "ptb": HubText(
        "ptb-text-only/ptb_text_only",
        column="sentence",
        is_joined=True,
        # the dataset itself is a loading script, which current versions of datasets do not run
        revision="refs/convert/parquet",
    ),
    "c4": HubText(
        "allenai/c4",
        splits=("train", "validation"),
        data_files=("en/c4-train.00000-of-01024.json.gz", "en/c4-validation.00000-of-00008.json.gz"),
    ),
    "alpaca": HubText("tatsu-lab/alpaca", splits=("train[:90%]", "train[90%:]")),
}


def read_text(name: str, part: Part, token: str | None = None) -> Text:
    """Find a text and return its documents.

    Args:
        name: A name of `NAMED_TEXTS`, `demo` (prose of the Python installation), a `.txt` or `.jsonl` file, or a
            Hub dataset id, optionally with `:config`.

    Example:
        >>> read_text("book.txt", "calibration").name  # doctest: +SKIP
        'book.txt'
    """
    path = local_path(name)
    if name == "demo":
        from slicecli.data.demo import documents

        text = Text("demo", tuple(documents("train" if part == "calibration" else "heldout")))
    elif name in NAMED_TEXTS:
        text = _read_hub(name, NAMED_TEXTS[name], part, token)
    elif _is_file(name):
        text = _read_file(path)
    elif path.is_dir():
        raise TextError(
            f"{name!r} is a folder, not a text.",
            describe_shadow(name) or "Pass a .txt or .jsonl file from it.",
        )
    elif path.suffix.lower() in FILE_SUFFIXES or name.startswith((".", "/", "~")):
        raise TextError(f"There is no text file {name!r}.", "Check the path: a .txt or .jsonl file is expected.")
    else:
        dataset, config = _parse_dataset(name)
        text = _read_hub(name, HubText(dataset, config or None, column=""), part, token)
    if not any(document.strip() for document in text.documents):
        raise TextError(f"The text {text.name!r} is empty.", "Use another text.")
    return text


def read_texts(
    names: Sequence[str],
    part: Part,
    token: str | None = None,
    taken: Mapping[str, str | None] | None = None,
    calibration: str | None = None,
) -> tuple[Text, ...]:
    """Find several texts, each once by however many paths it is given, and name them so that they are told apart."""
    texts = [read_text(name, part, token) for name in without_repeats(names, _is_file)]
    taken = dict(taken or {})
    if calibration is not None and _is_file(calibration):
        other = read_text(calibration, "calibration", token)
        taken[other.name] = other.digest
    names = distinct_names([text.named() for text in texts], taken)
    # two of one name have the same content
    return tuple({name: replace(text, name=name) for name, text in zip(names, texts, strict=True)}.values())


def _is_file(name: str) -> bool:
    return name != "demo" and name not in NAMED_TEXTS and local_path(name).is_file()


def _parse_dataset(name: str) -> tuple[str, str]:
    """Return the id of a dataset and the name of its configuration, which may be empty."""
    dataset, _, config = name.partition(":")
    if config.startswith("//"):  # an address
        dataset, config = name, ""
    try:
        return parse_repository(dataset, needs_owner=False), config
    except RequestError as error:
        raise TextError(f"{name!r} is neither an existing text file nor a valid Hub id.", error.remedy) from None


def _read_file(path: Path) -> Text:
    """Read a `.txt` file as one document, a `.jsonl` file as one document per line."""
    kind = path.suffix.lower()
    if kind not in FILE_SUFFIXES:
        raise TextError(
            f"The file {path.name!r} is neither .txt nor .jsonl.",
            "Use plain text as .txt, or documents as .jsonl with a field `text` on each line.",
        )
    content = read_text_file(path)
    if kind == ".txt":
        return _of_file(path, [content])
    documents = []
    for number, line in numbered_lines(content):
        try:
            document = json.loads(line)["text"]
            document.encode()  # JSON can hold half a character, which is no text
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            document = None
        if not isinstance(document, str):
            raise TextError(
                f"Line {number} of {path.name!r} is not a JSON object with a string field `text`.",
                'Write one object per line, for example {"text": "Once upon a time ..."}.',
            )
        documents.append(document)
    return _of_file(path, documents)


def _of_file(path: Path, documents: Sequence[str]) -> Text:
    text = Text(path.name, tuple(documents), path=path)
    return replace(text, name=distinct_names([text.named()])[0])


def _read_hub(name: str, where: HubText, part: Part, token: str | None) -> Text:
    """Load a dataset of the Hub through `datasets` and take its text column."""
    import datasets

    from slicecli.runtime.hub_errors import describe_hub_error, is_of_settings, remedy_of_hub_error

    index = 0 if part == "calibration" else 1
    options: dict[str, Any] = {"token": token, "revision": where.revision}
    if where.data_files is not None:
        split = where.splits[index].partition("[")[0]
        options["data_files"] = {split: where.data_files[index]}
    try:
        if where.column:
            rows = datasets.load_dataset(where.dataset, where.config, split=where.splits[index], **options)
        else:
            rows = _any_split(datasets.load_dataset(where.dataset, where.config, **options), part)
    except SlicecliError:
        raise
    except Exception as error:
        remedy = (
            f"Use a .txt or .jsonl file, a dataset id, or one of {', '.join(sorted(NAMED_TEXTS))}; gated or private "
            "datasets need a token (hf auth login)."
        )
        if is_of_settings(error):
            remedy = f"{remedy_of_hub_error(error)} A .txt or .jsonl file works without the Hub."
        raise TextError(
            f"The dataset {where.dataset!r} cannot be loaded: {describe_hub_error(error)}.", remedy
        ) from error
    column = where.column or _text_column(rows, name)
    documents: Iterable[str] = (str(document) for document in rows[column])
    if where.is_joined:
        return Text(name, ("\n\n".join(documents),), where.dataset)
    return Text(name, tuple(document for document in documents if document.strip()), where.dataset)


def _any_split(splits: Any, part: Part) -> Any:
    """Choose the split of an unknown dataset that fits the purpose."""
    wanted = ("train",) if part == "calibration" else ("test", "validation")
    for split in wanted:
        if split in splits:
            return splits[split]
    raise TextError(
        f"The dataset has no split {' or '.join(wanted)}; it has {', '.join(splits)}.",
        "Save the part you want as .jsonl and pass that file.",
    )


def _text_column(rows: Any, name: str) -> str:
    """Return the column `text`, or the only column of strings."""
    strings = [column for column, kind in rows.features.items() if getattr(kind, "dtype", None) == "string"]
    if "text" in strings:
        return "text"
    if len(strings) == 1:
        return str(strings[0])
    raise TextError(
        f"The dataset {name!r} has no column `text`; its columns are {', '.join(rows.features)}.",
        "Save the column you want as .jsonl with the field `text` and pass that file.",
    )


def shuffled(documents: tuple[str, ...], seed: int) -> list[str]:
    """Return the documents in a seeded random order (the same on every machine and Python)."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    return [documents[index] for index in order]
