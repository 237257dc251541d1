"""Every error a user can meet, in one tree, so that a program can catch as much or as little as it wants.

    SlicecliError
    ├── RequestError             the command or call asks for something impossible (exit code 2)
    ├── SourceError              the model cannot be found, reached or read
    │   ├── UnsupportedModelError    it was read, and this program does not slice such a model
    │   │   ├── NoAdapterError           because no adapter serves its type
    │   │   └── NotInferredError         and none could be inferred and proved
    │   └── WeightsError             its weights are missing, damaged, unsafe or not finite
    ├── TextError                a calibration or evaluation text cannot be found or is too short
    ├── OutputError              the result cannot be written
    ├── TrainingError            training did not make the slice better
    ├── PublishError             the result is there, and could not be sent to the Hub
    ├── ProcessError             another of the processes that do the job together has failed, or is gone
    └── PluginError              a plugin declares something that does not hold

A message is one sentence with the cause and one with the remedy. The command line prints it without a
traceback and exits with `exit_code`.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

__all__ = [
    "NoAdapterError",
    "NotInferredError",
    "OutputError",
    "PluginError",
    "ProcessError",
    "PublishError",
    "RequestError",
    "SlicecliError",
    "SlicecliWarning",
    "SourceError",
    "TextError",
    "TrainingError",
    "UnsupportedModelError",
    "WeightsError",
    "reason_of",
    "shown",
]

MOST_CHARACTERS = 1000  # of a cause; a remedy may list what there is
MOST_REASON_CHARACTERS = 300
MOST_VALUE_CHARACTERS = 80


class SlicecliError(Exception):
    """Base of all errors that are reported to the user as a sentence, not as a traceback.

    Args:
        cause: What is wrong, with the offending value.
        remedy: What to do about it.
    """

    exit_code = 1

    def __init__(self, cause: str, remedy: str = "") -> None:
        self.cause = _one_line(cause, MOST_CHARACTERS)
        self.remedy = _one_line(remedy)
        super().__init__(f"{self.cause} {self.remedy}".strip())


class SlicecliWarning(UserWarning):
    """Something about a model that does not stop the work, and that the user should know."""


class RequestError(SlicecliError):
    """The request itself cannot be met, whatever the state of disk and network."""

    exit_code = 2


class SourceError(SlicecliError):
    """The model cannot be found, reached or read."""


class UnsupportedModelError(SourceError):
    """The model was read, and it is of a kind that cannot be sliced."""


class NoAdapterError(UnsupportedModelError):
    """No adapter serves the model's type; one may be inferred."""


class NotInferredError(UnsupportedModelError):
    """No adapter serves the model's type, and none could be inferred and proved.

    Attributes:
        check: The check that failed.
        found: What had been found until then, by name.
    """

    def __init__(self, cause: str, check: str, found: Mapping[str, Any]) -> None:
        super().__init__(cause, "Describe the family in a plugin, see docs/plugins.md.")
        self.check = check
        self.found = dict(found)


class WeightsError(SourceError):
    """The weights are missing, damaged, unsafe to read or not finite."""


class TextError(SlicecliError):
    """A calibration or evaluation text cannot be found, read, or is too short."""


class OutputError(SlicecliError):
    """The result cannot be written."""


class TrainingError(SlicecliError):
    """Training did not make the slice better, so that there is nothing to write."""


class PublishError(SlicecliError):
    """A slice could not be published; it is whole on this machine."""


class ProcessError(SlicecliError):
    """Another of the processes that do the job together has failed, or is gone.

    Args:
        cause: What is wrong there; empty where nothing need be said.
        remedy: What to do about it.
        exit_code: The other's exit code.
    """

    def __init__(self, cause: str, remedy: str = "", exit_code: int = 1) -> None:
        super().__init__(cause, remedy)
        self.exit_code = exit_code


class PluginError(SlicecliError):
    """A plugin declares something that does not hold for the model at hand."""


def reason_of(error: BaseException) -> str:
    """Return the telling line of another library's error, without its closing full stop.

    That is its first line; where that only announces the next ("...:"), the next. It is cut where it is long: it may
    quote what somebody has written.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    while len(lines) > 1 and lines[0].endswith(":"):
        lines.pop(0)
    return _one_line(lines[0] if lines else type(error).__name__, MOST_REASON_CHARACTERS).rstrip(".: ")


def shown(value: object) -> str:
    """Return a value that somebody has written, for a message: as Python writes it, cut where it is long."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = MOST_VALUE_CHARACTERS
    short.maxlevel = 3
    return _one_line(short.repr(value), MOST_VALUE_CHARACTERS)


def _one_line(text: str, most: int | None = None) -> str:
    """Return a text without what could move a terminal's cursor or change its colours, cut where it is long."""
    line = "".join(letter if letter.isprintable() else " " if letter.isspace() else "?" for letter in text)
    return line if most is None or len(line) <= most else f"{line[: most - 1]}…"
