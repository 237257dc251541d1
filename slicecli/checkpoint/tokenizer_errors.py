"""Says why a tokenizer cannot be had: there is none, its files are damaged, or they hold no vocabulary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slicecli.errors import SourceError, reason_of
from slicecli.runtime.text_files import BYTE_ORDER_MARK

__all__ = ["has_vocabulary", "tokenizer_error", "why_not_loaded"]

# what tokenizers call their vocabulary; code of their own may call it otherwise
VOCABULARY_FILES = (
    "tokenizer.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*.vocab",
    "tokenization_*.py",
)
REMEDY = "Copy the tokenizer files of its base model next to config.json."


def has_vocabulary(tokenizer: Any) -> bool:
    """Say whether a tokenizer knows more than special tokens.

    Of some families transformers makes an empty one where there are no files.
    """
    try:
        known = set(tokenizer.get_vocab())
    except NotImplementedError:  # code of its own
        return True
    return not known <= set(tokenizer.all_special_tokens)


def why_not_loaded(error: Exception) -> str:
    """Say in a clause what transformers found wrong with a tokenizer's files."""
    if "instantiate the backend tokenizer" in str(error):  # followed by all the ways that it tried
        return "its files are incomplete"
    reason = reason_of(error)
    return reason if isinstance(error, (ValueError, OSError, ImportError)) else f"{type(error).__name__}: {reason}"


def tokenizer_error(name: str, folder: Path, reason: str) -> SourceError:
    """Return the error for a tokenizer that could not be loaded, or is empty."""
    if not any(path.is_file() for pattern in VOCABULARY_FILES for path in folder.glob(pattern)):
        return SourceError(f"{name} has no tokenizer, such as tokenizer.json or tokenizer.model.", REMEDY)
    for path in sorted(folder.glob("*.json")):
        if path.is_file() and _begins_with_mark(path):
            return SourceError(
                f"The tokenizer of {name} cannot be loaded: {path.name} begins with a byte order mark (BOM).",
                "Save that file without the mark.",
            )
    return SourceError(f"The tokenizer of {name} cannot be loaded: {reason}.", REMEDY)


def _begins_with_mark(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(len(BYTE_ORDER_MARK)) == BYTE_ORDER_MARK
    except OSError:
        return False
