"""Reading a model's `config.json`, which anybody may have written."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slicecli.errors import SourceError, reason_of, shown
from slicecli.family.dimensions import MOST_BLOCKS
from slicecli.runtime.json import load_json

__all__ = ["CONFIG_FILE", "read_config"]

CONFIG_FILE = "config.json"

# of these a config class or a model makes a list, a dictionary, a module or a width for each
MOST_OF = {
    "num_hidden_layers": MOST_BLOCKS,
    "num_layers": MOST_BLOCKS,
    "n_layer": MOST_BLOCKS,
    "n_layers": MOST_BLOCKS,
    "num_labels": 100_000,
    "partial_rotary_factor": 1,
    "rotary_pct": 1,
}
MOST_LISTED = 10_000_000


def read_config(folder: Path, name: str) -> Mapping[str, Any]:
    """Return the content of a model's `config.json`."""
    try:
        fields = load_json(folder / CONFIG_FILE, allows_mark=False)
    except (OSError, ValueError) as error:
        raise SourceError(f"The config.json of {name} cannot be read: {reason_of(error)}.") from None
    if not isinstance(fields, dict):
        raise SourceError(f"The config.json of {name} is not a JSON object.", "Pass the folder of a model.")
    _check_counts(fields, name)
    return fields


def _check_counts(content: Any, name: str, field: str = "", is_listed: bool = False) -> None:
    """Refuse a config that would have its class make lists or modules without end."""
    if isinstance(content, dict):
        for inner, value in content.items():
            _check_counts(value, name, inner)
    elif isinstance(content, list):
        for value in content:
            _check_counts(value, name, field, is_listed=True)
    elif isinstance(content, (int, float)):
        most = MOST_LISTED if is_listed else MOST_OF.get(field)
        if most is not None and content > most:
            raise SourceError(
                f"The config.json of {name} gives {field} = {shown(content)}, above the limit of {most:,}.",
                "Check config.json.",
            )
