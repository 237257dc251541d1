"""The main job from a model's name to finished folders: refuse early, prepare, pass over the blocks, write.

The command line and the Python API both call this module; it prints nothing and asks nothing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.folder import clear_folder, unfinished_folder, whole_folder
from slicecli.checkpoint.meta_model import build_runnable_meta_model
from slicecli.checkpoint.portable import converting_sink
from slicecli.checkpoint.weight_writer import ModelWriter
from slicecli.errors import OutputError
from slicecli.family.friendly_dims import why_not_quantised, why_writers_are_not_quantised
from slicecli.family.slice_plan import SlicePlan, slice_sizes
from slicecli.jobs.dense_model import read_rows, share_work, with_weights
from slicecli.jobs.identity import Identity
from slicecli.jobs.options import SliceOptions
from slicecli.jobs.plan import Job, PlannedSlice, width_of_dense_activations
from slicecli.jobs.shape import Measured, settle_shapes
from slicecli.jobs.statistics import find_statistics, make_activation_cache
from slicecli.record.record import Energy
from slicecli.runtime.libraries import running
from slicecli.runtime.memory import available_memory_bytes, peak_device_memory_bytes, peak_memory_bytes
from slicecli.runtime.placement import MEMORY_SHARE

if TYPE_CHECKING:
    from slicecli.checkpoint.companions import LeftOut
    from slicecli.data.packing import Rows
    from slicecli.progress import Progress
    from slicecli.slicing.context import Batches, DenseModel, Journal, Target

__all__ = ["SliceReport", "run_slices"]


@dataclass(frozen=True)
class SliceReport:
    """What came out of one slice.

    Attributes:
        plan: What was decided.
        output: The folder.
        revision: Commit hash of the source, where it has one.
        energy_kept: Share of the stream's energy in the basis (of the normalised stream, by the refit).
        seconds: Wall-clock time, all slices of the job together.
        peak_memory_bytes: Peak resident memory of the process.
        warnings: What the user should know.
        is_from_cache: The statistics were in the cache.
        phases: Wall-clock time by phase, in seconds.
        peak_device_memory_bytes: Peak memory on the GPU that computes, if one does.
        left_out: Files of the model that do not go along.
    """

    plan: SlicePlan
    output: Path
    revision: str | None
    energy_kept: float
    seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...] = ()
    is_from_cache: bool = False
    phases: Mapping[str, float] = field(default_factory=dict)
    peak_device_memory_bytes: int | None = None
    left_out: tuple[LeftOut, ...] = ()


def run_slices(
    job: Job,
    progress: Progress | None = None,
    resumes_if_possible: bool = False,
    measured: Measured | None = None,
) -> list[SliceReport]:
    """Do a job, and write a whole folder for each of its slices.

    The refit makes one pass for statistics and one for all the slices whose activations fit the memory together; the
    published method a pass for each.

    Args:
        resumes_if_possible: Go on where an interrupted run of the same job has left something, and start anew where
            another has; `SliceOptions.resume` refuses then.
        measured: What the job's widths were chosen by, where they were.
    """
    from slicecli.hub.writing import describe_slice
    from slicecli.jobs.description import draft_description, licence_warning
    from slicecli.jobs.preparation import prepare_folders
    from slicecli.progress import Clock, Silent
    from slicecli.slicing.journal import FileJournal, has_state, seconds_between_snapshots

    started = time.perf_counter()
    processes = job.processes
    clock = Clock(progress if progress is not None and processes.is_main else Silent())
    if measured is None:
        job, measured = settle_shapes(job, clock, journals=True)
    clock.note(job.describe_places())
    options = job.options
    reports: list[SliceReport] = []
    seconds_apart = seconds_between_snapshots()
    journal: FileJournal | None = None
    resumes = (options.resume or resumes_if_possible) and processes.count == 1

    def is_worth_keeping(error: BaseException) -> bool:
        if journal is None:  # failed before it could go on with what another run has left: that stays
            return resumes and has_state(unfinished_folder(job.slices[0].folder))
        return journal.has_something and isinstance(error, (KeyboardInterrupt, SystemExit))

    with ExitStack() as stack:
        folders = [
            stack.enter_context(whole_folder(one.folder, options.overwrite, resumes, is_worth_keeping))
            for one in job.slices
            if processes.is_main
        ]
        # what can fail without weights fails before anything large is read
        with running(job.source.name):
            meta_models = prepare_folders(job, folders) if folders else []
        rows, warnings = read_rows(job) if measured is None else (measured.rows, measured.warnings)
        job = with_weights(job)
        with running(job.source.name):
            drafts = [draft_description(job, one, rows) for one in job.slices] if folders else []
        dense, batches, identity = share_work(job, rows)
        warnings += _idle_warning(processes.count, batches)
        fingerprint = identity.of_run(job, batches.size)
        stack.enter_context(running(job.source.name))
        if folders:
            dense = dataclasses.replace(dense, store=dataclasses.replace(dense.activations, folder=folders[0]))
        state = _what_was_left(folders, fingerprint, resumes_if_possible) if resumes else None
        targets, writers = _open_targets(job, folders, meta_models, state, stack)
        if processes.count == 1:
            journal = FileJournal(folders[0], fingerprint, writers, state, seconds_apart)
        energies, is_from_cache = _slice_weights(job, rows, dense, batches, identity, targets, clock, journal, measured)
        if not processes.is_main:
            return processes.from_main(lambda: reports)
        if journal is not None:
            journal.remove()
        for folder, draft, writer, energy in zip(folders, drafts, writers, energies, strict=True):
            describe_slice(folder, draft, energy.fields, writer.finish())
        clock.stop()
        warnings += _memory_warning(dense, batches) + licence_warning(job.source)
        seconds = time.perf_counter() - started
        for one, energy in zip(job.slices, energies, strict=True):
            reports.append(
                SliceReport(
                    plan=one.plan,
                    output=one.folder,
                    revision=job.source.commit,
                    energy_kept=energy.kept,
                    seconds=seconds,
                    peak_memory_bytes=peak_memory_bytes(),
                    warnings=warnings + _growth_warning(one.plan) + _format_warning(job, one.plan),
                    is_from_cache=is_from_cache,
                    phases=clock.seconds,
                    peak_device_memory_bytes=peak_device_memory_bytes(dense.device),
                    left_out=job.source.companions.left_out,
                )
            )
    return processes.from_main(lambda: reports)


def _open_targets(
    job: Job,
    folders: Sequence[Path],
    meta_models: Sequence[Any],
    state: Mapping[str, Any] | None,
    stack: ExitStack,
) -> tuple[list[Target], list[ModelWriter]]:
    """Return the slices in the making, and in the main process the writers of their shards, which the stack closes."""
    targets, writers = [], []
    for number, one in enumerate(job.slices):
        missing = None if state is None else state["missing"][number]
        running = meta_models[number] if folders and one.runs_as_written else None
        if running is None:
            running = build_runnable_meta_model(one.running_config, job.options.trust_remote_code)
        target = _open_target(number, one.plan, running)
        if folders:
            writer = _open_writer(target, one, meta_models[number], folders[number], job.options, missing)
            stack.callback(writer.close)
            writers.append(writer)
        targets.append(target)
    return targets, writers


def _slice_weights(
    job: Job,
    rows: Rows,
    dense: DenseModel,
    batches: Batches,
    identity: Identity,
    targets: Sequence[Target],
    progress: Progress,
    journal: Journal | None,
    measured: Measured | None,
) -> tuple[list[Energy], bool]:
    """Compute the tensors of every slice, by the job's method."""
    from slicecli.slicing.refit import refit
    from slicecli.slicing.slicegpt import slice_published

    options = job.options
    if options.method == "refit":
        if measured is None:
            activations = make_activation_cache(dense, batches)
            statistics, is_from_cache = find_statistics(
                job, rows, dense, batches, identity, progress, journal, activations
            )
        else:
            statistics, is_from_cache, activations = measured.statistics, measured.is_from_cache, measured.activations
        for group in _groups_in_memory(job, dense, max(dense.processes.gather(batches.tokens))):
            refit(dense, statistics, [targets[index] for index in group], batches, progress, journal, activations)
        return [Energy.of_basis(statistics.basis, one.plan) for one in job.slices], is_from_cache
    energies = []
    for one, target in zip(job.slices, targets, strict=True):
        assert one.plan.schedule is not None
        spectrum = slice_published(
            dense, target, one.plan.schedule, options.orientation, options.seed, batches, progress, journal
        )
        energies.append(Energy.of_spectrum(spectrum, one.plan))
    return energies, False


def _what_was_left(folders: Sequence[Path], fingerprint: Mapping[str, Any], is_lenient: bool) -> dict[str, Any] | None:
    """Return the journal's state that an interrupted run has left, or clear the folders and return `None`."""
    from slicecli.slicing.journal import is_progress, read_state

    try:
        state = read_state(folders[0], fingerprint)
    except OutputError:
        if not is_lenient:
            raise
        state = None
    if state is None or not all(any(folder.glob("*.safetensors")) for folder in folders):
        for folder in folders:
            clear_folder(folder, lambda path: not is_progress(path))
        return None
    return state


def _groups_in_memory(job: Job, dense: DenseModel, tokens: int) -> list[list[int]]:
    """Divide the slices of a job into groups whose activations fit where they are kept, in order.

    A group shares the dense half of the refit; a slice that is alone too large for it is a group of its own.
    """
    import torch

    if job.activations.place == "disk":
        return [list(range(len(job.slices)))]
    per_number = tokens * dense.dtype.itemsize
    device = dense.device if job.activations.place == "device" else torch.device("cpu")
    room = MEMORY_SHARE * min(dense.processes.gather(available_memory_bytes(device)))
    room -= per_number * width_of_dense_activations(dense.dimensions)
    groups: list[list[int]] = []
    taken = 0.0
    for index, one in enumerate(job.slices):
        needed = float(per_number * one.plan.dim)
        if not groups or taken + needed > room:
            groups.append([])
            taken = 0.0
        groups[-1].append(index)
        taken += needed
    return groups


def _open_target(number: int, plan: SlicePlan, meta_model: Any) -> Target:
    """Return a slice in the making, of which nothing is written."""
    import torch

    from slicecli.slicing.context import Target

    dtype = getattr(torch, plan.dtype)
    return Target(plan.dim, meta_model, dtype, lambda _name, _tensor: None, number, plan.mlp_dim)


def _open_writer(
    target: Target,
    planned: PlannedSlice,
    meta_model: Any,
    folder: Path,
    options: SliceOptions,
    missing: Sequence[str] | None,
) -> ModelWriter:
    """Lay out the weight files of a slice for the tensors of its target, or open those of an interrupted run.

    A slice is computed in its family's own class; its tensors are converted to the class that is written as they come.

    Args:
        meta_model: The empty model of the config that is written.
    """
    writer = ModelWriter(folder, meta_model, target.dtype, options.max_shard_size, missing)
    target.sink = writer.take
    if planned.written is not None and planned.is_portable:
        target.sink = converting_sink(planned.written, meta_model, target.dtype, writer.take)
    return writer


def _idle_warning(processes: int, batches: Batches) -> tuple[str, ...]:
    rows, size = len(batches.rows), batches.size
    busy = -(-rows // size)
    if busy >= processes:
        return ()
    more = f"--batch-size {max(1, rows // processes)}" if size > 1 else "--samples"
    return (
        f"{rows} rows in batches of {size} keep only {busy} of {processes} processes busy; use {more} to use more.",
    )


def _memory_warning(dense: DenseModel, batches: Batches) -> tuple[str, ...]:
    most = dense.micro_batches.most
    if most is None:
        return ()
    return (
        f"The memory ran out with {batches.size} rows per batch; the run continued with {most}. "
        f"Use --batch-size {most} next time.",
    )


def _format_warning(job: Job, plan: SlicePlan) -> tuple[str, ...]:
    dimensions = job.dimensions
    legal = (job.classes or slice_sizes(dimensions, plan.method, job.options.slice_head)).legal_dims()
    of_dim = why_not_quantised(plan.dim, legal) if dimensions.hidden_size % 32 == 0 else ""
    of_mlp = ""
    if plan.mlp_dim is not None and dimensions.mlp_size % 32 == 0:
        of_mlp = why_writers_are_not_quantised(plan.mlp_dim, dimensions.legal_mlp_dims())
    return tuple(text for text in (of_dim, of_mlp) if text)


def _growth_warning(plan: SlicePlan) -> tuple[str, ...]:
    if plan.sliced_parameters < plan.dense_parameters:
        return ()
    return (
        f"This slice has more parameters than the dense model ({plan.sliced_parameters:,} against "
        f"{plan.dense_parameters:,}): "
        + (
            "its head no longer shares the embedding table."
            if plan.method == "refit"
            else "its shortcut matrices and its separate head add more than the slicing removes."
        ),
    )
