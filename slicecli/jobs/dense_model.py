"""The dense model of a job, made ready: its weights fetched, its calibration rows drawn, its blocks open to be read."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from slicecli.checkpoint.dense_weights import DenseWeights, OffloadedWeights
from slicecli.data.packing import check_vocabulary
from slicecli.jobs.identity import Identity
from slicecli.jobs.plan import Job, full_fields
from slicecli.runtime.placement import MEMORY_SHARE, batch_rows, compute_dtype

if TYPE_CHECKING:
    from slicecli.data.packing import Rows
    from slicecli.slicing.context import Batches, DenseModel

__all__ = ["open_dense", "read_rows", "scratch_folder", "share_work", "with_weights"]

# with so many tokens per unknown the refit loses about 1.3 times as much as at its best (docs/evidence.md); fewer still
# work, the ridge sees to that
TOKENS_PER_UNKNOWN = 16


def with_weights(job: Job) -> Job:
    """Fetch the weights of a job's model, and return the job with the counts of what is loaded from them.

    Before they are at hand, a config is believed.
    """
    with job.processes.main_of_machine_first():
        job.source.fetch_weights()
    job.source.check_describes_weights()
    fields = full_fields(job.source, job.config)
    dimensions, _ = job.source.dimensions(job.adapter, fields, job.options.unties)
    parameters = dimensions.parameters()
    slices = tuple(
        dataclasses.replace(one, plan=dataclasses.replace(one.plan, dense_parameters=parameters)) for one in job.slices
    )
    return dataclasses.replace(job, dimensions=dimensions, slices=slices)


def read_rows(job: Job) -> tuple[Rows, tuple[str, ...]]:
    """Draw the calibration rows; say where they are fewer than asked or than the refit would like, or monotonous."""
    from slicecli.data.packing import calibration_rows, monotony
    from slicecli.data.text import read_text

    options = job.options
    tokenizer = job.source.tokenizer()
    text = read_text(options.calibration, "calibration", options.token)
    rows = calibration_rows(text, tokenizer, options.samples, job.sequence_length, options.seed)
    check_vocabulary(rows, job.source.name, job.dimensions.vocabulary)
    warnings = []
    if len(rows.ids) < options.samples:
        warnings.append(
            f"The calibration text fills only {len(rows.ids)} of {options.samples} rows (--seq-len "
            f"{job.sequence_length})."
        )
    if reason := monotony(rows):
        warnings.append(
            f"The calibration text is repetitive: {reason}. The slice may work badly on other text; choose another "
            "text with --calibration."
        )
    unknowns = job.dimensions.largest_regression()
    if job.slices and options.method == "refit" and rows.tokens < TOKENS_PER_UNKNOWN * unknowns:
        warnings.append(
            f"The refit has only {rows.tokens:,} calibration tokens for maps of up to {unknowns:,} inputs; quality "
            f"improves up to {TOKENS_PER_UNKNOWN * unknowns:,} tokens and more (--samples, --seq-len)."
        )
    return rows, tuple(warnings)


def share_work(job: Job, rows: Rows, dtype: str | None = None) -> tuple[DenseModel, Batches, Identity]:
    """Open a job's model, and divide the rows in batches, and among the processes where there are several.

    Args:
        dtype: As of `open_dense`.
    """
    from slicecli.slicing.reductions import share_rows

    dense = open_dense(job, dtype)
    identity = Identity.of(job, rows, dense)
    job.processes.require_same(identity.of_processes())
    batch_size = job.options.batch_size or batch_rows(dense.device, rows.sequence_length)
    return *share_rows(job.processes, dense, rows.ids, batch_size), identity


def open_dense(job: Job, dtype: str | None = None) -> DenseModel:
    """Make ready to read the weights of a job's model.

    Args:
        dtype: Name of the dtype to compute in, as if the checkpoint had it; `None` takes the checkpoint's.
    """
    import torch

    from slicecli.slicing.activations import ActivationStore
    from slicecli.slicing.context import DenseModel

    device = job.placement.device
    weights = DenseWeights(job.source, job.adapter.unused_tensors)
    stored = weights.dtype if dtype is None else getattr(torch, dtype)
    resting = weights if job.placement.is_plain else OffloadedWeights(weights, job.placement.rest_of)
    spare_bytes = job.activations.spare_bytes
    if device.type == "cpu":
        spare_bytes = min(spare_bytes, int(MEMORY_SHARE * shutil.disk_usage(scratch_folder(job)).free))
    store = ActivationStore(device, job.activations.place, spare_bytes=spare_bytes)
    return DenseModel(job.meta_model, resting, job.dimensions, device, compute_dtype(stored, device), store=store)


def scratch_folder(job: Job) -> Path:
    """Return a folder that exists, on the disk that activations would be cached on."""
    if not job.slices:
        return Path(tempfile.gettempdir())
    return next(folder for folder in job.slices[0].folder.absolute().parents if folder.is_dir())
