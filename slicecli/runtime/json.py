"""Reads untrusted JSON with limits on size and depth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from slicecli.runtime.text_files import BYTE_ORDER_MARK, decode

__all__ = ["MOST_JSON_BYTES", "load_json", "read_json"]

MOST_JSON_BYTES = 16_000_000
MOST_LEVELS = 100


def load_json(path: Path, most_bytes: int = MOST_JSON_BYTES, allows_mark: bool = True) -> Any:
    """Return the content of a JSON file that anybody may have written."""
    size = path.stat().st_size
    if not path.is_file():
        raise ValueError("it is not a regular file")
    if size > most_bytes:
        raise ValueError(f"it has {size:,} bytes, too large for such a file")
    content = path.read_bytes()
    if content.startswith(BYTE_ORDER_MARK) and not allows_mark:
        raise ValueError(
            "it begins with a byte order mark (BOM), which transformers does not read; save it without the mark"
        )
    try:
        content = json.loads(decode(content))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(content)
    return content


def _check_depth(content: Any) -> None:
    """Refuse what is nested so deeply that reading or writing it again would exhaust the stack."""
    level = [content]
    for _ in range(MOST_LEVELS):
        containers = [value for value in level if isinstance(value, (dict, list))]
        if not containers:
            return
        level = [value for one in containers for value in (one.values() if isinstance(one, dict) else one)]
    raise ValueError("it is nested too deeply")


def read_json(path: Path, most_bytes: int = MOST_JSON_BYTES) -> Any:
    """Return the content of a JSON file, or `None` where it cannot be read as such, see `load_json`."""
    try:
        return load_json(path, most_bytes)
    except (OSError, ValueError):
        return None
