"""Going on after an interruption: how far a run had come, kept beside its unfinished weight files.

Now and then, after a block, the streams and sums that the next block needs are saved; what was written since then is
written again. A snapshot is complete before the state names it, so a run can be killed at any moment. A journal belongs
to one run: its fingerprint says of which model, plan, calibration and versions, and another one does not go on with it.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.weight_writer import ShardWriter, write_tensors
from slicecli.errors import OutputError, RequestError
from slicecli.runtime.json import read_json
from slicecli.slicing.context import Content, Snapshot

if TYPE_CHECKING:
    import torch

__all__ = ["FileJournal", "has_state", "is_progress", "read_state", "seconds_between_snapshots"]

FOLDER = ".journal"
STATE_FILE = "state.json"
SECONDS_VARIABLE = "SLICECLI_JOURNAL_SECONDS"
USUAL_SECONDS = 60.0
MOST_STATE_BYTES = 1_000_000_000  # it names tensors of all slices
MOST_SHARE = 0.1  # of the time may go into snapshots


def seconds_between_snapshots() -> float:
    """Return the least seconds between two snapshots; 0 makes one after every block."""
    text = os.environ.get(SECONDS_VARIABLE)
    if text is None:
        return USUAL_SECONDS
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise RequestError(f"{SECONDS_VARIABLE} is {text!r}, which is not a number of seconds.", "Unset it.")
    return seconds


def is_progress(path: Path) -> bool:
    """Say whether something in an unfinished folder is what a run has computed: weight files, or their journal."""
    return path.name == FOLDER or path.suffix == ".safetensors"


def has_state(folder: Path) -> bool:
    """Say whether an unfinished folder has something to go on with."""
    return (folder / FOLDER / STATE_FILE).is_file()


def read_state(folder: Path, fingerprint: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return how far an unfinished run in a folder had come; `None` where it left nothing to go on with."""
    state = read_json(folder / FOLDER / STATE_FILE, MOST_STATE_BYTES)
    if not isinstance(state, dict):
        return None
    found = state.get("fingerprint")
    differing = [name for name in fingerprint if not isinstance(found, dict) or found.get(name) != fingerprint[name]]
    if differing:
        raise OutputError(
            f"The interrupted run cannot be resumed: its {', '.join(differing)} differed.",
            "Use the options of that run, or leave out --resume to start over.",
        )
    if not _is_sound(state):
        raise _damaged(STATE_FILE)
    return state


def _is_sound(state: Mapping[str, Any]) -> bool:
    """Say whether a state has all that going on needs."""
    results, current, missing = state.get("results"), state.get("current"), state.get("missing")
    return (
        isinstance(results, dict)
        and all(_is_entry(entry) for entry in results.values())
        and (current is None or _is_entry(current))
        and type(state.get("number")) is int
        and isinstance(missing, list)
        and all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in missing)
    )


def _is_entry(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("phase"), str)
        and type(entry.get("position")) is int
        and (entry.get("file", 0) is None or re.fullmatch(r"\d+\.safetensors", str(entry.get("file"))) is not None)
        and isinstance(entry.get("about"), dict)
    )


def _damaged(name: str) -> OutputError:
    return OutputError(
        f"The interrupted run cannot be resumed: what it left is damaged ({name}).",
        "Leave out --resume to start over.",
    )


class FileJournal:
    """A journal in files.

    Args:
        seconds: The least seconds between two snapshots.
    """

    def __init__(
        self,
        folder: Path,
        fingerprint: Mapping[str, Any],
        writers: Sequence[ShardWriter],
        state: Mapping[str, Any] | None = None,
        seconds: float = USUAL_SECONDS,
    ) -> None:
        self._folder = folder / FOLDER
        self._fingerprint = dict(fingerprint)
        self._writers = writers
        self._seconds = seconds
        self._results: dict[str, Any] = dict(state["results"]) if state else {}
        self._current: dict[str, Any] | None = state["current"] if state else None
        self._number = int(state["number"]) if state else 0
        self._saved_at = time.monotonic()
        self._pause = seconds
        self.has_something = state is not None

    def resume(self, phase: str) -> Snapshot | None:
        """Return where to go on within a phase, if it had begun."""
        if self._current is None or self._current["phase"] != phase:
            return None
        return self._read(self._current)

    def result(self, phase: str) -> Snapshot | None:
        """Return what a finished phase left."""
        return self._read(self._results[phase]) if phase in self._results else None

    def offer(self, phase: str, position: int, content: Content) -> None:
        """Save a snapshot if it is time for one."""
        started = time.monotonic()
        if started - self._saved_at < self._pause:
            return
        self._current = self._save(phase, position, content)
        self._write_state()
        self._saved_at = time.monotonic()
        # a stream can take longer to save than a block takes to fit
        self._pause = max(self._seconds, (self._saved_at - started) / MOST_SHARE) if self._seconds else 0.0

    def finish(self, phase: str, content: Content) -> None:
        """Save what a finished phase leaves."""
        self._results[phase] = self._save(phase, 0, content)
        self._current = None
        self._write_state()

    def remove(self) -> None:
        """Remove the journal: the run is complete."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def _save(self, phase: str, position: int, content: Content) -> dict[str, Any]:
        self._folder.mkdir(exist_ok=True)
        self._number += 1
        file = f"{self._number}.safetensors" if len(content) else None
        if file is not None:
            write_tensors(self._folder / file, content, len(content))
            _synchronise(self._folder / file)
        return {"phase": phase, "position": position, "file": file, "about": dict(content.about)}

    def _read(self, entry: Mapping[str, Any]) -> Snapshot:
        tensors = {} if entry["file"] is None else _StoredTensors(self._folder / entry["file"])
        return Snapshot(int(entry["position"]), tensors, entry["about"])

    def _write_state(self) -> None:
        """Write what is saved and which tensors are in the weight files, then remove what is not named any more."""
        state = {
            "fingerprint": self._fingerprint,
            "results": self._results,
            "current": self._current,
            "number": self._number,
            "missing": [writer.synchronise() for writer in self._writers],
        }
        partial = self._folder / f"{STATE_FILE}.partial"
        partial.write_text(json.dumps(state), encoding="utf-8")
        _synchronise(partial)
        partial.replace(self._folder / STATE_FILE)
        self.has_something = True
        named = {entry["file"] for entry in (*self._results.values(), self._current) if entry is not None}
        for path in self._folder.glob("*.safetensors"):
            if path.name not in named:
                path.unlink()


class _StoredTensors(Mapping[str, "torch.Tensor"]):
    """The tensors of a file, each read when it is asked for: together they may be more than the memory takes."""

    def __init__(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            self._file: Any = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as error:
            raise _damaged(path.name) from error

    def __getitem__(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._file.get_tensor(name)
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._file.keys())

    def __len__(self) -> int:
        return len(self._file.keys())


def _synchronise(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
