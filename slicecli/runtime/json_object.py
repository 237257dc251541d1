"""Objects of JSON that anybody may have written, as pydantic models: nothing in them is taken for anything else.

A model says once what its fields are called and what they may hold; it checks what is read, and the JSON schema is
generated from it. Importing this takes a tenth of a second: do it where such an object is read or written.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["LINE", "Count", "Digest", "Figure", "JsonObject", "Name", "NotNegative", "Share", "Size", "faults_of"]

CONTROL = r"\u0000-\u001f\u007f-\u009f\u2028-\u202e\u2066-\u2069"
LINE = f"^[^{CONTROL}]*$"
"""Pattern of a text without control and direction characters."""
MOST_CHARACTERS = 160
MOST_FAULTS = 20
QUOTES = "'"
_NAME = re.compile(r"[A-Za-z_]\w{,63}", re.ASCII)

Name = Annotated[str, Field(min_length=1, max_length=255, pattern=LINE)]
"""A name that others gave: of a model, a text, a task. Free text of one line."""
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
"""A SHA-256 in hexadecimal."""
Count = Annotated[int, Field(ge=0, le=2**53 - 1)]
Size = Annotated[int, Field(ge=1, le=2**53 - 1)]
NotNegative = Annotated[float, Field(ge=0)]
Figure = Annotated[float, Field(ge=0, le=1e306)]
"""A perplexity or a task's figure; the largest perplexity that is written is exp(700)."""
Share = Annotated[float, Field(ge=0, le=1)]

_KINDS = {
    "bool_type": "true or false",
    "dict_type": "an object",
    "finite_number": "a number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "mapping_type": "an object",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "none_required": "null",
    "string_type": "a text",
    "string_unicode": "a text",
}


class JsonObject(BaseModel):
    """An object with exactly these fields: 3.0 is no whole number, 1 is not true, and infinity is no number."""

    model_config = ConfigDict(
        strict=True,
        defer_build=True,
        extra="forbid",
        allow_inf_nan=False,
        frozen=True,
        protected_namespaces=(),
        hide_input_in_errors=True,
    )


def faults_of(error: ValidationError, skips: int = 0) -> list[str]:
    """Say in a clause each what is wrong, the first twenty faults, with their places as JSON paths.

    Args:
        skips: Steps at the beginning of each place that are not in the JSON: one for a union of models.
    """
    found: dict[str, None] = {}
    for one in error.errors(include_url=False):
        found[_fault(one, one["loc"][skips:])] = None
        if len(found) == MOST_FAULTS:
            break
    return list(found)


def _fault(error: Any, path: tuple[str | int, ...]) -> str:
    kind, value, context = error["type"], _quoted(error["input"]), error.get("ctx", {})
    if path and kind == "missing":
        return f"{_place(path[:-1])} lacks {_quoted(path[-1])}"
    if path and kind == "extra_forbidden":
        return f"{_place(path[:-1])} has {_quoted(path[-1])}, which does not belong there"
    if kind == "union_tag_not_found":
        return f"{_place(path)} lacks {_quoted(context['discriminator'].strip(QUOTES))}"
    if kind == "union_tag_invalid":
        name = context["discriminator"].strip(QUOTES)
        return f"{_place((*path, name))} is {_quoted(error['input'][name])}, not one of {context['expected_tags']}"
    place = _place(path)
    if path and path[-1] == "[key]":
        place = f"{_place(path[:-2])} has a name that"
    if kind in _KINDS:
        return f"{place} is {value}, not {_KINDS[kind]}"
    if kind == "literal_error":
        return f"{place} is {value}, not {context['expected']}"
    if kind == "string_pattern_mismatch":
        if re.search(f"[{CONTROL}]", error["input"]):
            return f"{place} is {value}, with control or direction characters"
        return f"{place} is {value}, which does not fit {context['pattern'].replace(CONTROL, '')}"
    rule = re.sub("^[A-Z][a-z]+ should", "it should", error["msg"]).replace(" after validation", "")
    return f"{place} is {value}; {_one_line(rule)}"


def _place(path: tuple[str | int, ...]) -> str:
    """Return a JSON path, such as `$.weights["model.safetensors"]`."""
    parts = (f".{part}" if isinstance(part, str) and _NAME.fullmatch(part) else f"[{_quoted(part)}]" for part in path)
    return "$" + "".join(parts)


def _quoted(value: Any) -> str:
    """Return a value as JSON has it; of an object or a list only what it is."""
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return "a list"
    return _one_line(json.dumps(value[: MOST_CHARACTERS + 1] if isinstance(value, str) else value, default=repr))


def _one_line(text: str) -> str:
    # what is quoted may be anything and is shown on a terminal
    line = "".join(letter if letter.isprintable() else "?" for letter in text)
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"
