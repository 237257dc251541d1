"""Decodes text files: UTF-8, where a byte order mark at the beginning, which some editors write, does no harm."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path

from slicecli.errors import TextError

__all__ = ["BYTE_ORDER_MARK", "decode", "numbered_lines", "read_text_file"]

BYTE_ORDER_MARK = codecs.BOM_UTF8
OTHER_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def decode(content: bytes) -> str:
    """Return the text of a file, without its byte order mark."""
    if content.startswith(OTHER_MARKS):
        raise ValueError("it is UTF-16 text, not UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason})") from None


def read_text_file(path: Path) -> str:
    """Return the text of a file that a user names."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise TextError(f"The file {path.name!r} cannot be read: {error.strerror}.", "Check the path.") from None
    except ValueError as error:
        raise TextError(f"The file {path.name!r} cannot be read: {error}.", "Save it as UTF-8.") from None


def numbered_lines(content: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty, with their numbers from 1."""
    # not splitlines: it also breaks at characters that JSON allows inside a string
    for number, line in enumerate(content.split("\n"), start=1):
        if line.strip():
            yield number, line
