"""Checking a record against its JSON schema, `slicecli/schemas/record-1.schema.json`.

A record may come from anybody's repository. What passes here has every field of the kind and form that the rest of the
program relies on; what it says need not be true, which `slicecli.hub.verify` looks into.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

__all__ = ["record_schema", "schema_errors"]

SCHEMA_FILE = "record-1.schema.json"
MOST_ERRORS = 20
MOST_CHARACTERS = 160


@functools.cache
def record_schema() -> dict[str, Any]:
    """Return the JSON schema of records, as its file has it."""
    schema: dict[str, Any] = json.loads((files("slicecli") / "schemas" / SCHEMA_FILE).read_text(encoding="utf-8"))
    return schema


def schema_errors(record: Any) -> list[str]:
    """Say what in a record is not as its schema has it.

    Args:
        record: A record, as parsed JSON.

    Returns:
        A clause for each fault, in the order of their places, at most `MOST_ERRORS`; none where the record fits.
    """
    errors = _validator().iter_errors(record)
    return sorted({f"{_place(error.absolute_path)} {_fault(error)}" for error in errors})[:MOST_ERRORS]


@functools.cache
def _validator() -> Any:
    import jsonschema

    schema = record_schema()
    validator = jsonschema.validators.validator_for(schema)
    validator.check_schema(schema)
    return validator(schema)


def _place(path: Iterable[str | int]) -> str:
    """Return a JSON path, `$.weights['model.safetensors']`."""
    place = "$"
    for part in path:
        if isinstance(part, int):
            place += f"[{part}]"
        elif part.isidentifier():
            place += f".{part}"
        else:
            place += f"[{_short(part)}]"
    return place


def _fault(error: Any) -> str:
    """Say in a clause what a validation error means; the value is quoted without what could act on a terminal."""
    if error.validator == "required":
        lacking = next(name for name in error.validator_value if name not in error.instance and name in error.message)
        return f"lacks {lacking!r}"
    if error.validator == "pattern":
        return f"is {_short(error.instance)}, not of the form {error.validator_value}"
    if error.validator in {"anyOf", "oneOf"}:
        return f"is {_short(error.instance)}, which is none of what it may be"
    return _visible(error.message)


def _short(value: Any) -> str:
    return _visible(repr(value))


def _visible(text: str) -> str:
    line = "".join(letter if letter.isprintable() else "?" for letter in text)
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"
