"""Progress of a long job: what a pass reports, and to whom."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["Clock", "Progress", "Silent"]


class Progress(Protocol):
    """Progress callback of a pass."""

    def start(self, phase: str, total: int) -> None:
        """A phase of `total` steps begins."""
        ...

    def advance(self, detail: str = "") -> None:
        """One step is done; `detail` is a short remark on it."""
        ...

    def note(self, text: str) -> None:
        """There is something to say, apart from any step."""
        ...


class Silent:
    """A progress that nobody watches."""

    def start(self, phase: str, total: int) -> None:
        """Ignore the beginning of a phase."""

    def advance(self, detail: str = "") -> None:
        """Ignore a step."""

    def note(self, text: str) -> None:
        """Ignore what is said."""


class Clock:
    """A progress that takes the time of each phase and passes everything on.

    Attributes:
        seconds: Wall-clock time by phase, as far as they are over; phases of the same name together.
    """

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._phase: str | None = None
        self._started = 0.0
        self.seconds: dict[str, float] = {}

    def start(self, phase: str, total: int) -> None:
        """Begin a phase, and end the one before."""
        self.stop()
        self._phase, self._started = phase, time.perf_counter()
        self._progress.start(phase, total)

    def advance(self, detail: str = "") -> None:
        """Pass a step on."""
        self._progress.advance(detail)

    def note(self, text: str) -> None:
        """Pass a remark on."""
        self._progress.note(text)

    def stop(self) -> None:
        """End the phase."""
        if self._phase is not None:
            passed = time.perf_counter() - self._started
            self.seconds[self._phase] = self.seconds.get(self._phase, 0.0) + passed
            self._phase = None
