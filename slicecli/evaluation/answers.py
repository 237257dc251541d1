"""The answers of a model so far, on disk, so that an interrupted measurement goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from slicecli.runtime.cache_folder import cache_folder, digest_of, remove_cached

__all__ = ["NO_ANSWERS", "Answers", "clear_answers"]

FOLDER = "evaluations"
FORMAT = 1  # raised when an answer to the same question may change


class Answers:
    """Numbers and texts by the question they answer; each is on disk as soon as it is known.

    A file that cannot be written costs the answers after an interruption, not the measurement.
    """

    def __init__(self, identity: Mapping[str, Any] | None = None) -> None:
        """Find the answers of a model.

        Args:
            identity: What the answers depend on besides the questions; `None` keeps none.
        """
        self._known: dict[str, Any] = {}
        self._path: Path | None = None
        self._file: IO[str] | None = None
        if identity is not None:
            self._path = cache_folder() / FOLDER / f"{digest_of({'format': FORMAT, **identity})}.jsonl"
            self._known = _read(self._path)

    def __len__(self) -> int:
        return len(self._known)

    def get(self, question: Any) -> Any:
        """Return an answer, or `None`."""
        return self._known.get(_key(question))

    def add(self, question: Any, answer: Any) -> None:
        """Store an answer."""
        if self._path is None:
            return
        try:
            if self._file is None:
                self._path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._path.open("a", encoding="utf-8")
                self._file.write("\n")  # the last line may have been cut off
            self._file.write(json.dumps([_key(question), answer]) + "\n")
            self._file.flush()
        except OSError:
            self._path = None

    def close(self) -> None:
        """Leave the answers for the next run."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def forget(self) -> None:
        """Remove the answers: what they were for is measured."""
        self.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)


NO_ANSWERS = Answers()


def clear_answers(cache: Path | None = None) -> int:
    """Remove the answers of all interrupted measurements; return their bytes."""
    return remove_cached(((cache or cache_folder()) / FOLDER).glob("*.jsonl"))


def _key(question: Any) -> str:
    return hashlib.sha256(repr(question).encode("utf-8", "backslashreplace")).hexdigest()


def _read(path: Path) -> dict[str, Any]:
    """Return the answers of a file but those that were being written when it was left."""
    known: dict[str, Any] = {}
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return known
    for line in lines:
        try:
            key, answer = json.loads(line)
        except (ValueError, TypeError):
            continue
        known[key] = answer
    return known
