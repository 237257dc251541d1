"""The spectrum of a model: what slices of any width would lose, measured on the dense model without slicing it.

One document holds for many widths how much of the stream's energy they keep and their Fisher weight with each method
(`slicecli.slicing.fisher`), what MLPs of fewer channels would lose, and for a few what the dense model loses when
its stream is projected on as many directions (`slicecli.slicing.projection`), so that whoever has it can predict slices
without the weights. It holds no token and no local path, and the same model, text and seed give the same document.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from slicecli.jobs.dense_model import read_rows, share_work, with_weights
from slicecli.jobs.options import SliceOptions
from slicecli.jobs.plan import Job, plan_slices
from slicecli.record.record import calibration_fields
from slicecli.runtime.libraries import quiet_libraries, running
from slicecli.runtime.versions import __version__, package_versions

if TYPE_CHECKING:
    import torch

    from slicecli.data.packing import Rows
    from slicecli.linalg.basis import Basis
    from slicecli.progress import Progress
    from slicecli.slicing.context import DenseModel
    from slicecli.slicing.projection import ProjectedLoss

__all__ = ["SPECTRUM_POINTS", "run_spectrum"]

SPECTRUM_POINTS = 256
PROBED_SPARSITIES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)
PROBE_TOKENS = 8192  # whole rows of the text, one at least


def run_spectrum(
    model: str,
    options: SliceOptions,
    progress: Progress | None = None,
    warn: Callable[[str], object] = warnings.warn,
    probes: bool = True,
) -> dict[str, Any]:
    """Measure what slices of a model would lose.

    Args:
        options: Text, rows, device and the like, as for a slice; `dtype` is the one to compute in, and what says how
            or where a slice is written is of no effect.
        probes: Also run the dense model with its stream projected.
    """
    from slicecli.progress import Silent
    from slicecli.slicing.fisher import collect_fisher
    from slicecli.slicing.refit import collect_statistics

    progress = progress or Silent()
    job = plan_slices(model, (), (), options)
    with quiet_libraries():
        rows, found = read_rows(job)
        for text in found:
            warn(text)
        job = with_weights(job)
        dense, batches, _ = share_work(job, rows, options.dtype)
        with running(job.source.name):
            has_channels = not job.dimensions.mlp_obstacle
            statistics = collect_statistics(dense, batches, progress, with_channels=has_channels)
            basis = statistics.basis
            fisher = collect_fisher(dense, basis, batches, options.seed, progress)
            probe = _probe(job, dense, basis, rows, batches.size, progress) if probes else None
    size = job.dimensions.hidden_size
    step = max(1, size // SPECTRUM_POINTS)
    return {
        "slicecli_version": __version__,
        "model": job.source.name,
        "revision": job.source.commit,
        "model_type": str(job.source.fields.get("model_type")),
        "hidden_size": size,
        "calibration": calibration_fields(rows, options.seed),
        "seed": options.seed,
        "dtype": str(dense.dtype).removeprefix("torch."),
        "dense": {"nll": fisher.nll},
        "spectrum": [
            {
                "dim": dim,
                "kept": basis.energy_kept(dim),
                "importance_kept": basis.importance_kept(dim),
                "fisher": {"refit": float(fisher.shared[dim]), "slicegpt": float(fisher.layer[dim])},
                "fisher_of_sites": float(fisher.sites[dim]),
            }
            for dim in sorted({*range(step, size + 1, step), size})
        ],
        "probe": None if probe is None else _probe_fields(probe),
        "channels": _channels(statistics.channel_losses),
        "versions": package_versions(),
    }


def _probe(job: Job, dense: DenseModel, basis: Basis, rows: Rows, batch: int, progress: Progress) -> ProjectedLoss:
    """Run the dense model with its stream projected, over the first rows of the text."""
    from slicecli.slicing.projection import collect_projected_loss
    from slicecli.slicing.reductions import share_rows

    size = job.dimensions.hidden_size
    dims = sorted({max(2, round((1 - sparsity) * size)) for sparsity in PROBED_SPARSITIES} - {size}, reverse=True)
    some = rows.ids[: max(1, PROBE_TOKENS // rows.sequence_length)]
    dense, batches = share_rows(job.processes, dense, some, batch)
    return collect_projected_loss(dense, basis, batches, dims, progress)


def _probe_fields(probe: ProjectedLoss) -> dict[str, Any]:
    return {
        "tokens": probe.tokens,
        "dense_nll": probe.dense,
        "projected": [{"dim": dim, "nll": nll} for dim, nll in probe.projected.items()],
    }


def _channels(losses: torch.Tensor | None) -> list[dict[str, Any]]:
    """Return what the MLPs lose at some widths."""
    if losses is None:
        return []
    size = len(losses) - 1
    widths = sorted({*range(0, size + 1, max(1, size // SPECTRUM_POINTS)), size})
    return [{"mlp_dim": width, "lost": float(losses[width])} for width in widths]
