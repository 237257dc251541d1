"""Teachers of a slice: a model that runs beside it, or what a model predicted, kept on disk.

Of a stored prediction the likeliest tokens are kept with their probabilities, and the sum of all others. The divergence
over these is a lower bound of the full one, because no bucket diverges more than the tokens in it; with as many tokens
as the vocabulary has it is the full one.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy
import torch

from slicecli.errors import OutputError
from slicecli.recovery.loss import Likeliest, likeliest_divergence, likeliest_tokens, next_token_divergence
from slicecli.runtime.cache_folder import digest_of
from slicecli.slicing.statistics_cache import LOGITS_SUFFIX

if TYPE_CHECKING:
    from slicecli.progress import Progress
    from slicecli.recovery.data import TrainingRows

__all__ = ["ModelTeacher", "StoredTeacher", "Teacher", "bytes_per_token", "logits_path", "store_logits"]

PARTIAL = ".partial"


class Teacher(Protocol):
    """Knows what is to be predicted for rows of text."""

    def expect(self, ids: torch.Tensor, numbers: torch.Tensor) -> Any:
        """Return what the teacher predicts.

        Args:
            ids: The rows, int64 of shape (rows, tokens).
            numbers: Which of all rows they are, int64 of shape (rows,).
        """
        ...

    def divergences(self, logits: torch.Tensor, expected: Any) -> torch.Tensor:
        """Return each row's mean divergence from it, of a slice's logits of shape (rows, tokens, vocabulary)."""
        ...


class ModelTeacher:
    """A model that predicts beside the slice."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def expect(self, ids: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        """Return the model's logits."""
        place = self._model.get_input_embeddings().weight.device
        # of an offloaded model accelerate's hooks move the ids
        given = ids if place.type == "meta" else ids.to(place)
        logits: torch.Tensor = self._model(input_ids=given, use_cache=False).logits
        return logits

    def divergences(self, logits: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
        """Return each row's mean divergence."""
        return next_token_divergence(logits, expected)


class StoredTeacher:
    """Predictions that `store_logits` has stored."""

    def __init__(self, path: Path) -> None:
        self._stored = numpy.load(path, mmap_mode="r", allow_pickle=False)

    def expect(self, ids: torch.Tensor, numbers: torch.Tensor) -> list[Likeliest]:
        """Return what is stored of the rows."""
        found = []
        for number in numbers.tolist():
            row = self._stored[number]
            parts = (torch.from_numpy(numpy.ascontiguousarray(row[name])).to(ids.device) for name in row.dtype.names)
            tokens, probabilities, rest = parts
            found.append(Likeliest(tokens.long(), probabilities, rest))
        return found

    def divergences(self, logits: torch.Tensor, expected: list[Likeliest]) -> torch.Tensor:
        """Return each row's mean divergence."""
        parts = [likeliest_divergence(own[:-1], other) for own, other in zip(logits, expected, strict=True)]
        return torch.stack(parts) / (logits.shape[1] - 1)


def bytes_per_token(count: int) -> int:
    """Return what the prediction at one position takes on disk.

    Args:
        count: How many tokens are kept of it.
    """
    return int(_layout(count).itemsize)


def logits_path(folder: Path, identity: Mapping[str, Any]) -> Path:
    """Return where the predictions are that an identity describes."""
    return folder / f"{digest_of(identity)}{LOGITS_SUFFIX}"


@torch.no_grad()
def store_logits(
    model: Any, rows: TrainingRows, count: int, rows_per_pass: int, path: Path, progress: Progress
) -> None:
    """Store what a model predicts for all rows, those to train on before those held out; whole or not at all."""
    teacher, ids = ModelTeacher(model), torch.cat([rows.training.ids, rows.held_out.ids])
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}{PARTIAL}")
    starts = range(0, len(ids), rows_per_pass)
    progress.start("teacher", len(starts))
    try:
        shape = len(ids), ids.shape[1] - 1
        stored = numpy.lib.format.open_memmap(partial, mode="w+", dtype=_layout(count), shape=shape)
        _reserve(partial)
        for start in starts:
            some = ids[start : start + rows_per_pass]
            for number, logits in enumerate(teacher.expect(some, torch.arange(len(some))), start):
                found = likeliest_tokens(logits[:-1], count)
                stored[number]["tokens"] = found.tokens.cpu().numpy()
                stored[number]["log_probabilities"] = found.log_probabilities.cpu().numpy()
                stored[number]["log_rest"] = found.log_rest.cpu().numpy()
            progress.advance()
        stored.flush()
        partial.replace(path)
    except OSError as error:
        raise OutputError(
            f"The teacher's predictions cannot be stored in {path.parent}: {error.strerror}.",
            "Free some space, choose another --cache-dir, or use fewer --store-logits.",
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _reserve(path: Path) -> None:
    """Take the space of a file whose content is written through memory, where a full disk would end the process."""
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def _layout(count: int) -> numpy.dtype[Any]:
    return numpy.dtype([("tokens", "<i4", (count,)), ("log_probabilities", "<f4", (count,)), ("log_rest", "<f4")])
