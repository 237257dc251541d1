"""The context length of a model: the most tokens that one row may have, whatever its config calls it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from slicecli.errors import RequestError, SourceError, shown

__all__ = [
    "DEFAULT_LENGTH",
    "context_length",
    "context_length_of_config",
    "default_length",
    "own_names",
    "pick_sequence_length",
    "row_length",
]

DEFAULT_LENGTH = 2048
FIELD = "max_position_embeddings"
# names that config classes use without mapping the usual one to them
OTHER_NAMES = (
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "max_seq_length",
    "seq_length",
    "model_max_length",
    "context_length",
    "n_ctx",
)


def context_length(fields: Mapping[str, Any], names: Mapping[str, str], default: int | None = None) -> int | None:
    """Return the most tokens that one row of a model may have, or `None` where its class sets no limit.

    Args:
        names: The class's own names of fields, by the usual name: the `attribute_map` of a config class of
            transformers, or the `names` of an adapter.
    """
    if fields.get("alibi") is True:  # attention is biased by distance, and no table of positions ends
        return None
    # of a config with both names the class takes the usual one
    name = FIELD if FIELD in fields else names.get(FIELD, FIELD)
    value = fields.get(name, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or value < 2:
        raise SourceError(
            f"config.json gives {name} = {shown(value)}, but an integer of 2 or more is required.", "Check config.json."
        )
    return value


def context_length_of_config(config: Any) -> int | None:
    """Return the same for a transformers config."""
    text = getattr(config, "dense_config", None) or config.get_text_config(decoder=True)
    if not hasattr(text, "to_dict"):  # some classes keep plain data there
        text = config
    return context_length(vars(text), own_names(text))


def own_names(config: Any) -> dict[str, str]:
    """Return a config class's own names of fields, by the usual name."""
    names = dict(getattr(config, "attribute_map", None) or {})
    declared = inspect.signature(type(config).__init__).parameters
    if names.get(FIELD, FIELD) not in vars(config):
        own = next((name for name in OTHER_NAMES if name in declared), None)
        names |= {} if own is None else {FIELD: own}
    return names


def default_length(longest: int | None) -> int:
    """Return the tokens of a row where nobody says: 2048, or what the model can do if that is less."""
    return DEFAULT_LENGTH if longest is None else min(DEFAULT_LENGTH, longest)


def pick_sequence_length(name: str, config: Any, wanted: int | None) -> int:
    """Return the tokens per row: as wanted, else 2048 or the model's longest."""
    return row_length(name, context_length_of_config(config), wanted)


def row_length(name: str, longest: int | None, wanted: int | None) -> int:
    """Return the same for a model of which the context length is known."""
    if wanted is None:
        return default_length(longest)
    if wanted < 2:
        raise RequestError(f"A sequence length of {wanted} is too short.", "Use --seq-len 2 or more.")
    if longest is not None and wanted > longest:
        raise RequestError(
            f"A sequence length of {wanted} exceeds the limit of {name}.", f"Use --seq-len {longest} or less."
        )
    return wanted
