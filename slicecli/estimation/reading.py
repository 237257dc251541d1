"""Taking figures out of JSON that anybody may have written: each is of the kind it should be, or the file is refused.

All functions raise `ValueError` with a clause that says what is wrong with what.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from slicecli.errors import shown

__all__ = ["digest_in", "fields_of", "list_of", "name_of", "real_number", "whole_number"]

LONGEST_NAME = 255
_DIGEST = re.compile("[0-9a-f]{64}")
MOST = 1e306  # the largest perplexity that is written is exp(700)


def fields_of(value: Any, what: str) -> Mapping[str, Any]:
    """Return an object's fields; nothing of null."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {shown(value)}, not an object")
    return value


def list_of(value: Any, what: str, most: int) -> list[Mapping[str, Any]]:
    """Return a list of objects that is not too long."""
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise ValueError(f"{what} is {shown(value)}, not a list of objects")
    if len(value) > most:
        raise ValueError(f"there are {len(value):,} {what}, more than {most}")
    return value


def name_of(value: Any, what: str) -> str:
    """Return a name that can be shown on one line."""
    if not isinstance(value, str) or not value or len(value) > LONGEST_NAME or not value.isprintable():
        raise ValueError(f"{what} is {shown(value)}, not a name")
    return value


def digest_in(fields: Mapping[str, Any], what: str) -> str | None:
    """Return the SHA-256 in a field, `None` where there is none."""
    value = fields.get(what)
    if value is not None and (not isinstance(value, str) or not _DIGEST.fullmatch(value)):
        raise ValueError(f"{what} is {shown(value)}, not a SHA-256 in hexadecimal")
    return value


def real_number(value: Any, what: str, least: float = -MOST, most: float = MOST) -> float:
    """Return a finite number in a range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise ValueError(f"{what} is {shown(value)}, not a number{_between(least, most)}")
    return float(value)


def whole_number(value: Any, what: str, least: int, most: int) -> int:
    """Return a whole number in a range."""
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{what} is {shown(value)}, not a whole number{_between(least, most)}")
    return value


def _between(least: float, most: float) -> str:
    if most < MOST:
        return f" from {least:g} to {most:g}"
    return "" if least == -MOST else f" of {least:g} or more"
