"""The rows that a slice is trained on, and those that are held out to judge it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slicecli.data.packing import Rows, calibration_rows, rows_part
from slicecli.errors import TextError

if TYPE_CHECKING:
    from slicecli.data.text import Text

__all__ = ["HELD_OUT_SHARE", "TrainingRows", "draw_rows", "held_out_rows"]

HELD_OUT_SHARE = 0.05


@dataclass(frozen=True)
class TrainingRows:
    """Rows of one text, none of them in both parts.

    Attributes:
        training: A whole number of steps' rows.
        held_out: The rows that the divergence is measured on.
    """

    training: Rows
    held_out: Rows


def draw_rows(
    text: Text, tokenizer: Any, sequence_length: int, steps: int, rows_per_step: int, seed: int
) -> TrainingRows:
    """Draw rows for some steps, as rows of calibration text are drawn, and hold out a twentieth of them.

    A text that is too short for the steps gives fewer rows, which are then trained on more than once.
    """
    wanted = steps * rows_per_step
    drawn = calibration_rows(text, tokenizer, wanted + held_out_rows(wanted), sequence_length, seed)
    held_out = held_out_rows(min(wanted, len(drawn.ids)))
    count = min(steps, (len(drawn.ids) - held_out) // rows_per_step) * rows_per_step
    if count == 0:
        needed = (rows_per_step + held_out) * sequence_length
        raise TextError(
            f"The text {text.name!r} has {drawn.tokens:,} tokens in rows of {sequence_length}, but one step and the "
            f"held-out rows take {needed:,}.",
            "Use a longer text, or a smaller --batch-size or --seq-len.",
        )
    return TrainingRows(rows_part(drawn, held_out, held_out + count), rows_part(drawn, 0, held_out))


def held_out_rows(rows: int) -> int:
    """Return how many rows are held out beside so many to train on."""
    return max(1, round(HELD_OUT_SHARE * rows))
