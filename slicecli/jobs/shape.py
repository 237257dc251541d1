"""How a target is met: the pair of widths that loses least, chosen once the statistics of the dense model are there.

The pass that collects them says what every hidden size and every width of the MLP would lose, so no slice is made to
find out. What the pass has found serves the refit of the chosen slices too.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.folder import folder_beside
from slicecli.estimation.shape import ShapeLosses
from slicecli.family.slice_plan import WidthPair
from slicecli.jobs.dense_model import read_rows, scratch_folder, share_work, with_weights
from slicecli.jobs.plan import Job, plan_slices
from slicecli.jobs.statistics import find_statistics, make_activation_cache
from slicecli.runtime.libraries import running

if TYPE_CHECKING:
    from slicecli.data.packing import Rows
    from slicecli.progress import Progress
    from slicecli.slicing.activation_cache import ActivationCache
    from slicecli.slicing.context import DenseStatistics
    from slicecli.slicing.journal import FileJournal

__all__ = ["Measured", "settle_shapes", "shape_losses"]


@dataclass(frozen=True)
class Measured:
    """What was found out about the dense model to choose widths.

    Attributes:
        warnings: What the user should know of the rows.
        is_from_cache: The statistics were in the cache.
        activations: The dense activations, where they were kept.
    """

    rows: Rows
    warnings: tuple[str, ...]
    statistics: DenseStatistics
    is_from_cache: bool
    activations: ActivationCache | None


def settle_shapes(job: Job, progress: Progress, journals: bool = False) -> tuple[Job, Measured | None]:
    """Choose the widths of the slices that were asked for by a target, and plan them; other jobs stay as they are.

    Args:
        journals: Keep beside the first output what an interrupted pass has found, for `SliceOptions.resume`.
    """
    if not any(one.pairs for one in job.slices):
        return job, None
    from slicecli.jobs.preparation import rehearse

    if job.processes.is_main:
        rehearse(job)
    rows, warnings = read_rows(job)
    ready = with_weights(job)
    dense, batches, identity = share_work(ready, rows)
    store = dataclasses.replace(dense.activations, folder=scratch_folder(ready))
    dense = dataclasses.replace(dense, store=store)
    activations = make_activation_cache(dense, batches)
    fingerprint = identity.of_run(job, batches.size)
    with running(job.source.name), _journal_of(job, fingerprint) if journals else nullcontext() as journal:
        statistics, is_from_cache = find_statistics(
            ready, rows, dense, batches, identity, progress, journal, activations, with_channels=True
        )

    def chosen() -> list[WidthPair]:
        losses = shape_losses(statistics, job.dimensions.hidden_size)
        return [
            min(one.pairs, key=lambda pair: losses.predict(*pair))
            if one.pairs
            else WidthPair(one.plan.dim, one.plan.mlp_dim)
            for one in job.slices
        ]

    pairs = job.processes.from_main(chosen)
    for one, pair in zip(job.slices, pairs, strict=True):
        if one.pairs:
            progress.note(f"chosen among {len(one.pairs)} pairs: {_describe(job, pair)}")
    options = dataclasses.replace(job.options, revision=job.source.commit or job.options.revision)
    settled = plan_slices(job.model, [pair.width for pair in pairs], [one.output for one in job.slices], options)
    return settled, Measured(rows, warnings, statistics, is_from_cache, activations)


@contextmanager
def _journal_of(job: Job, fingerprint: Mapping[str, Any]) -> Iterator[FileJournal | None]:
    """Give the journal of the pass that widths are chosen by: one of its own, because what is written is still open."""
    from slicecli.slicing.journal import FileJournal, has_state, read_state, seconds_between_snapshots

    if job.processes.count > 1:
        yield None
        return
    journal: FileJournal | None = None

    def is_worth_keeping(error: BaseException) -> bool:
        if journal is None:  # another run's, which does not fit
            return has_state(folder)
        return journal.has_something and isinstance(error, (KeyboardInterrupt, SystemExit))

    with folder_beside(job.slices[0].folder, job.options.resume, is_worth_keeping) as folder:
        state = read_state(folder, fingerprint) if job.options.resume else None
        journal = FileJournal(folder, fingerprint, [], state, seconds_between_snapshots())
        yield journal


def shape_losses(statistics: DenseStatistics, hidden_size: int) -> ShapeLosses:
    """Return what each width loses, from statistics with those of channels."""
    assert statistics.channel_losses is not None
    discarded = [1 - statistics.basis.energy_kept(dim) for dim in range(hidden_size + 1)]
    return ShapeLosses(discarded, statistics.channel_losses.tolist())


def _describe(job: Job, pair: WidthPair) -> str:
    sizes = job.dimensions
    return (
        f"hidden size {sizes.hidden_size} -> {pair.dim}, MLP width {sizes.mlp_size} -> {pair.mlp_dim or sizes.mlp_size}"
    )
