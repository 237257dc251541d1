"""The metadata at the top of a model's card, which is another's text: read without trusting it.

YAML can be made to take time and memory without end: by aliases that stand for ever more of the same, and by length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["MOST_CARD_BYTES", "read_front_matter"]

MOST_CARD_BYTES = 1_000_000
MOST_METADATA_CHARACTERS = 100_000
MARK = "---"


def read_front_matter(path: Path) -> dict[str, Any]:
    """Return the YAML at the top of a card; nothing where it has none that can be read."""
    try:
        if not path.is_file() or path.stat().st_size > MOST_CARD_BYTES:
            return {}
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return {}
    # line by line: an expression over lines can take the square of a hostile text's length
    lines = text.split("\n")
    marks = [number for number, line in enumerate(lines) if line.rstrip() == MARK]
    if len(marks) < 2 or marks[0] != 0:
        return {}
    metadata = _parsed("\n".join(lines[1 : marks[1]]))
    return metadata if isinstance(metadata, dict) else {}


def _parsed(text: str) -> Any:
    """Return what a YAML text without aliases says, or `None`."""
    import yaml

    class PlainLoader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses aliases."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            """Compose the next node."""
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("an alias")
            return super().compose_node(parent, index)

    if len(text) > MOST_METADATA_CHARACTERS:
        return None
    try:
        return yaml.load(text, PlainLoader)
    except (yaml.YAMLError, ValueError, RecursionError, OverflowError, TypeError, AttributeError):
        return None
