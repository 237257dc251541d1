"""The statistics of models that were sliced, on disk, so that another dim of one need not collect them again.

An entry is of one model and calibration: a basis and a second moment, some 2 d² numbers. Entries that were not used
for longest go when the cache becomes larger than its bound.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.errors import RequestError
from slicecli.runtime.cache_folder import cache_folder, digest_of, remove_cached
from slicecli.runtime.inputs import local_path, parse_bytes

if TYPE_CHECKING:
    from slicecli.slicing.context import DenseStatistics

__all__ = ["LOGITS_SUFFIX", "Entry", "StatisticsCache", "most_bytes"]

SIZE_VARIABLE = "SLICECLI_CACHE_SIZE"
USUAL_BYTES = 10_000_000_000
LOGITS_SUFFIX = ".npy"
FORMAT = 2  # raised when what is cached, or how it is computed, changes
TENSORS = ("vectors", "energies", "importances")
CHANNELS = "channel_losses"


def most_bytes() -> int:
    """Return the bound of the cache: `SLICECLI_CACHE_SIZE`, or 10 GB."""
    given = os.environ.get(SIZE_VARIABLE)
    try:
        return parse_bytes(given) if given else USUAL_BYTES
    except RequestError as error:
        raise RequestError(f"{SIZE_VARIABLE}: {error.cause}", "Set it to a size such as 10GB, or unset it.") from None


@dataclass(frozen=True)
class Entry:
    """One model's statistics.

    Attributes:
        calibration: Of what it was collected, in words.
        used: When it was last used, seconds since 1970.
    """

    path: Path
    model: str
    hidden_size: int
    calibration: str
    size: int
    used: float


class StatisticsCache:
    """A folder of statistics."""

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = (cache_folder() if folder is None else local_path(folder)) / "statistics"

    def load(self, key: Mapping[str, Any], device: Any, with_channels: bool = False) -> DenseStatistics | None:
        """Return the statistics of a key, and count it as used; `None` where there are none that can be read.

        Args:
            with_channels: Only such are of use that say what the MLPs lose with fewer channels.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        from slicecli.linalg.basis import Basis
        from slicecli.slicing.context import DenseStatistics

        path = self._path(key)
        if not path.is_file():
            return None
        try:
            tensors = load_file(path, device=str(device))
            os.utime(path)
            if with_channels and CHANNELS not in tensors:
                return None
            vectors, energies, importances = (tensors[name] for name in TENSORS)
            basis = Basis(vectors, energies, importances, bool(tensors["is_centred"].item()))
            losses = tensors[CHANNELS].cpu() if CHANNELS in tensors else None
            return DenseStatistics(basis, tensors["final_moment"], losses)
        except (SafetensorError, OSError, KeyError):  # damaged: as if it were not there
            path.unlink(missing_ok=True)
            return None

    def store(self, key: Mapping[str, Any], statistics: DenseStatistics, model: str, calibration: str) -> None:
        """Store the statistics of a model, and remove old entries beyond the bound; what does not fit is not stored."""
        import torch
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        bound, basis = most_bytes(), statistics.basis
        tensors = {name: getattr(basis, name).contiguous().cpu() for name in TENSORS}
        tensors["is_centred"] = torch.tensor(basis.is_centred)
        if statistics.final_moment is not None:
            tensors["final_moment"] = statistics.final_moment.contiguous().cpu()
        if statistics.channel_losses is not None:
            tensors[CHANNELS] = statistics.channel_losses
        size = sum(tensor.nbytes for tensor in tensors.values())
        if size > bound:
            return
        path = self._path(key)
        about = {"model": model, "calibration": calibration, "hidden_size": str(len(basis.vectors))}
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._shrink(bound - size)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            try:
                save_file(tensors, partial, metadata=about)
                partial.replace(path)
            finally:
                partial.unlink(missing_ok=True)
        except (OSError, SafetensorError):  # its writer reports a full disk as its own error
            # a cache that cannot be written costs time, not the slice
            return

    def entries(self) -> list[Entry]:
        """Return all entries, the one used last first."""
        from safetensors import SafetensorError, safe_open

        found = []
        for path in self._folder.glob("*.safetensors"):
            try:
                state = path.stat()
                with safe_open(path, framework="numpy") as file:
                    about = file.metadata() or {}
            except (OSError, SafetensorError):
                continue
            found.append(
                Entry(
                    path=path,
                    model=about.get("model", "?"),
                    hidden_size=int(about.get("hidden_size", 0)),
                    calibration=about.get("calibration", "?"),
                    size=state.st_size,
                    used=state.st_mtime,
                )
            )
        return sorted(found, key=lambda entry: -entry.used)

    def clear(self) -> int:
        """Remove all entries, and the stored logits of teachers; return their bytes."""
        return remove_cached(
            [*self._folder.glob("*.safetensors"), *self._folder.glob("*.partial"), *self.stored_logits()]
        )

    def stored_logits(self) -> list[Path]:
        """Return the files that `slicecli recover --store-logits` has put beside the statistics."""
        return list(self._folder.glob(f"*{LOGITS_SUFFIX}"))

    def _path(self, key: Mapping[str, Any]) -> Path:
        return self._folder / f"{digest_of({'format': FORMAT, **key})}.safetensors"

    def _shrink(self, bound: int) -> None:
        """Remove what was not used for longest until the rest fits."""
        kept = 0
        for entry in self.entries():
            kept += entry.size
            if kept > bound:
                entry.path.unlink(missing_ok=True)
