"""The rows that a slice is trained on, and those that are held out to judge it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slicecli.data.packing import Rows, calibration_rows, rows_at, rows_unlike
from slicecli.errors import TextError

if TYPE_CHECKING:
    from slicecli.data.text import Text

__all__ = ["HELD_OUT_SHARE", "TrainingRows", "draw_rows", "fitted_rows", "held_out_rows"]

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class TrainingRows:
    """Rows of one text, none of them in both parts.

    Attributes:
        training: A whole number of steps' rows.
        held_out: The rows that the divergence is measured on.
        is_fitted_to: The slice was fitted to the held-out rows too, because the text has no others.
    """

    training: Rows
    held_out: Rows
    is_fitted_to: bool = False


def draw_rows(
    text: Text,
    tokenizer: Any,
    sequence_length: int,
    steps: int,
    rows_per_step: int,
    seed: int,
    fitted: Rows | None = None,
) -> TrainingRows:
    """Draw rows for some steps, as rows of calibration text are drawn, and hold out a twentieth of them.

    A text that is too short for the steps gives fewer rows, which are then trained on more than once.

    Args:
        fitted: Rows of the same text that the slice was fitted to. On them it diverges less from its teacher than on
            others, so none of them is held out if there are others.
    """
    wanted = steps * rows_per_step
    to_avoid = 0 if fitted is None else math.ceil(fitted.tokens / sequence_length)
    drawn = calibration_rows(text, tokenizer, wanted + held_out_rows(wanted) + to_avoid, sequence_length, seed)
    held_out = held_out_rows(min(wanted, len(drawn.ids)))
    everything = range(len(drawn.ids))
    new = list(everything) if fitted is None else rows_unlike(drawn, fitted)
    chosen = new[:held_out] or everything[:held_out]
    left = sorted(set(everything) - set(chosen))
    count = min(steps, len(left) // rows_per_step) * rows_per_step
    if count == 0:
        needed = (rows_per_step + held_out) * sequence_length
        raise TextError(
            f"The text {text.name!r} has {drawn.tokens:,} tokens in rows of {sequence_length}, but one step and the "
            f"held-out rows take {needed:,}.",
            "Use a longer text, or a smaller --batch-size or --seq-len.",
        )
    return TrainingRows(rows_at(drawn, left[:count]), rows_at(drawn, chosen), is_fitted_to=not new)


def fitted_rows(text: Text, tokenizer: Any, calibration: Mapping[str, Any]) -> Rows | None:
    """Return the rows that a slice was fitted to, if they are of this text.

    Args:
        calibration: As the slice's record has it.
    """
    if text.digest != calibration["text_sha256"] or text.dataset != calibration["dataset"]:
        return None
    samples, length = calibration["samples"], calibration["sequence_length"]
    try:
        found = calibration_rows(text, tokenizer, samples, length, calibration["seed"])
    except TextError:
        return None
    return found if found.digest == calibration["sha256"] else None


def held_out_rows(rows: int) -> int:
    """Return how many rows are held out beside so many to train on."""
    return max(1, round(HELD_OUT_SHARE * rows))
