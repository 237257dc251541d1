"""What the passes work on: the dense model and its slices in the making, the calibration rows, and who watches.

Plain data. Weights come from a `WeightReader`, sliced tensors go to each target's `sink`; no files here.

Symbols: docs/notation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from slicecli.adapters import Adapter
from slicecli.family.dimensions import Dimensions
from slicecli.linalg.basis import Basis
from slicecli.linalg.normal_equations import normalise
from slicecli.linalg.ridge import RidgeMemory
from slicecli.runtime.distributed import ALONE, Processes
from slicecli.runtime.microbatch import MicroBatches
from slicecli.slicing.activations import ActivationStore, Stream
from slicecli.slicing.sliced_tensors import Cut, WeightReader

__all__ = [
    "Batches",
    "Content",
    "DenseModel",
    "DenseStatistics",
    "Journal",
    "NoJournal",
    "Snapshot",
    "Target",
    "activations_in",
]

HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Content:
    """What a run needs to go on from some block.

    Attributes:
        streams: Streams by name, read batch by batch.
    """

    streams: Mapping[str, Stream] = field(default_factory=dict)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tensors) + sum(len(stream) for stream in self.streams.values())

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield all tensors by name, those of streams by the names that `activations_in` knows."""
        yield from self.tensors.items()
        for name, stream in self.streams.items():
            for number, batch in enumerate(stream):
                yield f"{name}.{number}", batch


@dataclass(frozen=True)
class Snapshot:
    """What was saved.

    Attributes:
        position: Index of the block to go on with.
        tensors: As `Content` yields them, on the CPU; each is read when it is asked for.
    """

    position: int
    tensors: Mapping[str, torch.Tensor]
    about: Mapping[str, Any]


class Journal(Protocol):
    """Keeps what a run needs to go on after an interruption."""

    def resume(self, phase: str) -> Snapshot | None:
        """Return where to go on within a phase, if it had begun."""
        ...

    def result(self, phase: str) -> Snapshot | None:
        """Return what a finished phase left."""
        ...

    def offer(self, phase: str, position: int, content: Content) -> None:
        """Take what is needed to go on with the block at `position`, if it is time to."""
        ...

    def finish(self, phase: str, content: Content) -> None:
        """Take what a finished phase leaves."""
        ...


class NoJournal:
    """Keeps nothing."""

    def resume(self, phase: str) -> Snapshot | None:
        """Know of nothing to go on with."""

    def result(self, phase: str) -> Snapshot | None:
        """Know of nothing finished."""

    def offer(self, phase: str, position: int, content: Content) -> None:
        """Take nothing."""

    def finish(self, phase: str, content: Content) -> None:
        """Take nothing."""


def activations_in(name: str, snapshot: Snapshot, store: ActivationStore) -> Stream:
    """Return a stream from a snapshot, its batches in their order."""
    count = sum(key.startswith(f"{name}.") for key in snapshot.tensors)
    return store.filled(snapshot.tensors[f"{name}.{number}"] for number in range(count))


@dataclass(frozen=True)
class DenseModel:
    """The dense model as the passes see it: its meta model, its weights, and where to compute.

    Attributes:
        meta_model: The transformers model with all parameters on `meta`.
        dimensions: Its sizes, and with them the family's declaration.
        dtype: Dtype of blocks and activations.
        processes: Those that run it, each on its share of the rows.
        store: Keeps the activations; `None` keeps them on the device.
        micro_batches: How much of a batch runs at once.
    """

    meta_model: Any
    weights: WeightReader
    dimensions: Dimensions
    device: torch.device
    dtype: torch.dtype
    processes: Processes = ALONE
    store: ActivationStore | None = None
    micro_batches: MicroBatches = field(default_factory=MicroBatches)

    @property
    def adapter(self) -> Adapter:
        """The family's declaration."""
        return self.dimensions.adapter

    @property
    def activations(self) -> ActivationStore:
        """What keeps the activations."""
        return self.store or ActivationStore(self.device)

    @property
    def is_centred(self) -> bool:
        """Whether the norms that read the stream subtract its mean."""
        return self.adapter.norm.is_centred

    def normalise(self, stream: torch.Tensor) -> torch.Tensor:
        """Return n(x), what a norm passes on before its weight and bias."""
        return normalise(stream, self.dimensions.epsilon, self.is_centred)

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The empty blocks in order."""
        return list(self.meta_model.get_submodule(self.adapter.blocks))

    def block_name(self, index: int) -> str:
        """Return the path of a block in the model."""
        return f"{self.adapter.blocks}.{index}"


@dataclass(frozen=True)
class DenseStatistics:
    """What one pass over the dense model finds out for slices of every width.

    Attributes:
        final_moment: Second moment of what the final norm passes on before its weight, float64 of shape (d, d), to
            which the table of a tied slice is fitted; of several processes only the main one has it.
        channel_losses: What the MLPs of all blocks lose together with fewer channels, as
            `slicecli.slicing.channel_losses` has it, float64 of shape (m + 1,), where that was wanted; likewise.
    """

    basis: Basis
    final_moment: torch.Tensor | None
    channel_losses: torch.Tensor | None = None


@dataclass
class Target:
    """One slice in the making.

    Attributes:
        meta_model: The empty model of the sliced config, with the MLPs of the dense one.
        dtype: Dtype in which its tensors are written.
        sink: Takes each finished tensor: parameter name and value on the CPU.
        number: Its place among the slices of the job.
        ridges: The ridges found so far.
        mlp_dim: m, how many MLP channels of a block stay; `None` leaves them all.
        cuts: Of the block that is worked on, what is kept of a parameter when it is written, by its name. Until then it
            is whole, because that is what the modules of `meta_model` have.
        stream: y, batch by batch, as far as the pass has come.
    """

    dim: int
    meta_model: Any
    dtype: torch.dtype
    sink: Callable[[str, torch.Tensor], None]
    number: int = 0
    mlp_dim: int | None = None
    ridges: RidgeMemory = field(default_factory=RidgeMemory, repr=False)
    stream: Stream = field(default_factory=list, repr=False)
    cuts: dict[str, Cut] = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Batches:
    """Calibration rows in batches, with the tokens set apart to choose ridges.

    Attributes:
        rows: Token ids, int64 of shape (rows, sequence length).
        part: Those of the rows that are run here, where several processes share them.
    """

    rows: torch.Tensor
    size: int
    part: slice = field(default_factory=lambda: slice(None))

    def __len__(self) -> int:
        return len(self.split(self.rows))

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.split(self.rows))

    @property
    def tokens(self) -> int:
        """Number of tokens that are run here."""
        return sum(batch.numel() for batch in self)

    def split(self, values: torch.Tensor) -> list[torch.Tensor]:
        """Return what belongs to the rows that are run here, batch by batch."""
        own = values[self.part]
        # a process that has no rows runs the first along with the others, which adds nothing to their sums
        return list((own if len(own) else values[:1]).split(self.size))

    def held_out(self) -> list[torch.Tensor]:
        """Say for each batch which of its tokens are held out, bool of shape (rows * sequence length,).

        Every fifth row is; of fewer than five rows, the last fifth of each.
        """
        is_held_out = torch.zeros(self.rows.shape, dtype=torch.bool)
        if len(self.rows) >= HELD_OUT_EVERY:
            is_held_out[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] = True
        else:
            is_held_out[:, -(self.rows.shape[1] // HELD_OUT_EVERY) :] = True
        return [batch.flatten() for batch in self.split(is_held_out)]
