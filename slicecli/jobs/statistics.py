"""The statistics of a job's dense model: from the cache, or collected."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slicecli.data.packing import Rows
    from slicecli.jobs.identity import Identity
    from slicecli.jobs.plan import Job
    from slicecli.progress import Progress
    from slicecli.slicing.activation_cache import ActivationCache
    from slicecli.slicing.context import Batches, DenseModel, DenseStatistics, Journal

__all__ = ["find_statistics", "make_activation_cache"]


def find_statistics(
    job: Job,
    rows: Rows,
    dense: DenseModel,
    batches: Batches,
    identity: Identity,
    progress: Progress,
    journal: Journal | None = None,
    activations: ActivationCache | None = None,
    with_channels: bool = False,
) -> tuple[DenseStatistics, bool]:
    """Return the statistics of the dense model, from the cache if they are there; say whether they were.

    Args:
        with_channels: They have to say what the MLPs lose with fewer channels.
    """
    from slicecli.slicing.reductions import give_statistics
    from slicecli.slicing.refit import STATISTICS, collect_statistics
    from slicecli.slicing.statistics_cache import StatisticsCache

    if not job.options.cache:
        return collect_statistics(dense, batches, progress, journal, activations, with_channels), False
    cache = StatisticsCache(job.options.cache_folder)
    key = identity.of_statistics(job, batches.size)
    found = cache.load(key, dense.device, with_channels) if dense.processes.is_main else None
    if dense.processes.from_main(lambda: found is not None):
        progress.start(STATISTICS, 1)
        progress.advance("from the cache")
        return give_statistics(dense, found), True
    statistics = collect_statistics(dense, batches, progress, journal, activations, with_channels)
    if dense.processes.is_main:
        cache.store(key, statistics, job.source.name, f"{rows.name}, {len(rows.ids)} x {rows.sequence_length} tokens")
    return statistics, False


def make_activation_cache(dense: DenseModel, batches: Batches) -> ActivationCache | None:
    """Return what keeps the dense stream of all steps between the passes, where that saves time.

    On a CPU that is so as long as free memory can hold what is written to disk.
    """
    from slicecli.slicing.activation_cache import ActivationCache

    if dense.device.type != "cpu":
        return None
    places = 1 + sum(len(block.sublayers) for block in dense.dimensions.declared_blocks)
    size = places * batches.tokens * dense.dimensions.hidden_size * dense.dtype.itemsize
    return ActivationCache(dense.activations, len(dense.blocks)) if 2 * size <= dense.activations.spare_bytes else None
