"""Checking a record against its JSON schema, `slicecli/record/record-1.schema.json`.

A record may come from anybody's repository. What passes here has every field of the kind and form that the rest of the
program relies on; that what it says is true is another matter, see `slicecli.hub.verify`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from slicecli.runtime.versions import __version__

__all__ = ["record_schema", "schema_errors"]

SCHEMA_FILE = "record/record-1.schema.json"
MOST_ERRORS = 20
MOST_CHARACTERS = 160
_KINDS = {
    "array": "a list",
    "boolean": "true or false",
    "integer": "a whole number",
    "null": "null",
    "number": "a number",
    "object": "an object",
    "string": "a text",
}


@functools.cache
def record_schema() -> dict[str, Any]:
    """Return the JSON schema of records."""
    schema: dict[str, Any] = json.loads((files("slicecli") / SCHEMA_FILE).read_text(encoding="utf-8"))
    return schema


def schema_errors(record: Any) -> list[str]:
    """Say what in a record is not as its schema has it."""
    known = record_schema()["properties"]["record_version"]["const"]
    version = record.get("record_version") if isinstance(record, dict) else None
    if _is_whole(version) and version != known:
        return [f"$.record_version is {version}, which slicecli {__version__} does not know"]
    errors = _validator().iter_errors(record)
    return sorted({f"{_place(error.absolute_path)} {_fault(error)}" for error in errors})[:MOST_ERRORS]


@functools.cache
def _validator() -> Any:
    """Return a validator for which 3.0 is no whole number and infinity no number, as the program takes them."""
    import jsonschema

    schema = record_schema()
    strict = jsonschema.Draft202012Validator.TYPE_CHECKER.redefine_many(
        {"integer": lambda _, value: _is_whole(value), "number": lambda _, value: _is_finite(value)}
    )
    return jsonschema.validators.extend(jsonschema.Draft202012Validator, type_checker=strict)(schema)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_finite(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _place(path: Iterable[str | int]) -> str:
    """Return a JSON path, such as `$.weights['model.safetensors']`."""
    parts = (
        f".{part}" if isinstance(part, str) and part.isidentifier() and part.isascii() else f"[{_quoted(part)}]"
        for part in path
    )
    return "$" + "".join(parts)


def _fault(error: Any) -> str:
    """Say in a clause what a validation error means."""
    value, rule = _quoted(error.instance), error.validator_value
    if error.validator == "required":
        return f"lacks {_quoted(_required(error))}"
    if error.validator == "additionalProperties":
        unknown = [name for name in error.instance if name not in error.schema["properties"]]
        return f"has {', '.join(map(_quoted, unknown[:3]))}, which no record has"
    if error.validator == "type":
        kinds = [rule] if isinstance(rule, str) else rule
        return f"is {value}, not {' or '.join(_KINDS[kind] for kind in kinds)}"
    if error.validator == "enum":
        return f"is {value}, not one of {', '.join(map(str, rule))}"
    if error.validator == "const":
        return f"is {value}, not {_quoted(rule)}"
    if error.validator == "pattern":
        return f"is {value}, which does not fit {rule}"
    if error.validator == "not":
        return f"is {value}, with control or direction characters"
    if error.validator == "maxLength":
        return f"is longer than {rule} characters"
    return f"is wrong: {_short(error.message)}"


def _required(error: Any) -> str:
    """Return the name that is missing: the library reports each in an error of its own, in the order of the schema."""
    names: list[str] = error.validator_value
    return next(name for name in names if error.message.startswith(repr(name)))


def _quoted(value: Any) -> str:
    return _short(json.dumps(value))


def _short(text: str) -> str:
    # what is quoted may be anything and is shown on a terminal
    line = "".join(letter if letter.isprintable() else "?" for letter in text)
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"
