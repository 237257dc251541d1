"""A sweep: one model sliced to many widths, each slice measured, and a curve fitted to the measurements.

The statistics are collected once and, where memory allows, the dense model runs once for all widths. A curve is of the
hidden size alone; slices with fewer MLP channels are measured only. Every measurement is
written down as soon as it is there, so that a sweep that was stopped goes on where it stopped; slices are removed when
they are measured, unless they are to be kept. What is already in the folder is taken over only if it belongs to the
same model, options and measurement.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.folder import check_apart, write_whole_file
from slicecli.checkpoint.source import Source
from slicecli.errors import OutputError
from slicecli.estimation.estimate import nearest_dims
from slicecli.estimation.results import check_relation, curves_json, fit_results, series_of
from slicecli.evaluation import measure as measuring
from slicecli.evaluation.measure import EvaluationSet
from slicecli.evaluation.options import EvaluationOptions
from slicecli.family.dimensions import Dimensions
from slicecli.family.slice_plan import SlicePlan, Width, WidthPair, slice_sizes, width_name
from slicecli.family.written_class import SliceClasses
from slicecli.hub.writing import enter_curves, enter_results
from slicecli.jobs.dense_model import with_weights
from slicecli.jobs.identity import sweep_digest
from slicecli.jobs.options import SliceOptions
from slicecli.jobs.plan import Job, PlannedSlice, find_adapter, plan_slices
from slicecli.jobs.run import run_slices
from slicecli.jobs.shape import settle_shapes
from slicecli.progress import Silent
from slicecli.record.record import read_record
from slicecli.runtime.json import read_json
from slicecli.runtime.libraries import quiet_libraries
from slicecli.runtime.versions import __version__, package_versions

if TYPE_CHECKING:
    from slicecli.estimation.curves import Curve
    from slicecli.progress import Progress

__all__ = ["PLOT_FILE", "RESULTS_FILE", "Sweep", "run_sweep", "usual_dims"]

RESULTS_FILE = "results.json"
PLOT_FILE = "curve.png"
SLICES_FOLDER = "slices"
MARK_FILE = ".sweep"


@dataclass(frozen=True)
class Sweep:
    """What came out of a sweep.

    Attributes:
        curves: The fitted curves, that of the first text first.
    """

    folder: Path
    document: Mapping[str, Any]
    curves: tuple[Curve, ...]
    warnings: tuple[str, ...]


def run_sweep(
    model: str,
    widths: Sequence[Width],
    folder: Path,
    options: SliceOptions,
    evaluation: EvaluationOptions,
    *,
    relation: str | None = None,
    keeps_slices: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Sweep:
    """Slice a model to many widths, measure the dense model and each slice, and fit curves.

    Args:
        model: Hub id or folder.
        widths: The widths; targets choose theirs after the one pass for statistics.
        folder: Where results, curves and plot go, and the slices meanwhile.
        options: How it is sliced.
        evaluation: How it is measured.
        relation: Name of the relation to fit; `None` chooses the best.
        keeps_slices: Leave the slices there, with results and curves in their records.
        overwrite: Begin anew if the folder has the results of another sweep.
        progress: Progress callback.

    Raises:
        SlicecliError: Something failed; what was measured until then is in the folder.
    """
    # a slice of an interrupted run may lie there: what becomes of it is decided below
    settings = dataclasses.replace(options, overwrite=True)
    unnamed = [folder / SLICES_FOLDER / str(number) for number in range(len(widths))]
    job = plan_slices(model, widths, unnamed, settings)
    if relation is not None:
        check_relation(relation)
    job, measured = settle_shapes(job, progress or Silent())
    job = dataclasses.replace(job, slices=_named(job.slices, folder / SLICES_FOLDER))
    places = {_pair_of(one.plan): one.folder for one in job.slices}
    measure = _Measure(job, evaluation, progress)
    job = with_weights(job)
    fingerprint = sweep_digest(job, evaluation, measure.prepared)
    processes = job.processes
    if processes.is_main:
        check_apart(folder / SLICES_FOLDER, job.source.folder)
    document = processes.from_main(lambda: _begin(folder, fingerprint, job, overwrite))
    warnings: list[str] = []
    done = {_pair_in(point) for point in document["points"]}
    left = [pair for pair in places if pair not in done]

    if document["dense"] is None:
        document["dense"] = measure.dense()
        if processes.is_main:
            _write(folder, document)
    unsliced = processes.from_main(lambda: [pair for pair in left if not _is_of_this_sweep(places[pair], fingerprint)])
    if unsliced:
        some = dataclasses.replace(job, slices=tuple(one for one in job.slices if _pair_of(one.plan) in unsliced))
        with quiet_libraries():
            reports = run_slices(some, progress, resumes_if_possible=True, measured=measured)
        for report in reports:
            if processes.is_main:
                _mark(report.output, fingerprint)
            warnings += [text for text in report.warnings if text not in warnings]
    for pair in left:
        document["points"].append(measure.slice(places[pair]))
        document["points"].sort(key=lambda point: _from_the_widest(_pair_in(point)))
        if processes.is_main:
            _write(folder, document)
        processes.barrier()  # none reads the slice any more
        if not keeps_slices and processes.is_main:
            shutil.rmtree(places[pair])
    if not keeps_slices and processes.is_main:
        shutil.rmtree(folder / SLICES_FOLDER, ignore_errors=True)

    curves = _fit(document, relation)
    document.update(curves_json(curves))
    if not processes.is_main:
        return Sweep(folder, document, tuple(curves), tuple(warnings))
    _write(folder, document)
    for point in document["points"]:
        place = places.get(_pair_in(point))
        if place is not None and read_record(place) is not None:
            _complete_slice(place, point, document)
    _draw(folder / PLOT_FILE, curves, job)
    return Sweep(folder, document, tuple(curves), tuple(warnings))


def _named(slices: Sequence[PlannedSlice], folder: Path) -> tuple[PlannedSlice, ...]:
    """Return the slices of a sweep, each pair of widths once, from the widest on, in folders named after the widths."""
    by_pair = {_pair_of(one.plan): one for one in slices}
    return tuple(
        dataclasses.replace(by_pair[pair], folder=folder / width_name(*pair))
        for pair in sorted(by_pair, key=_from_the_widest)
    )


def _pair_of(plan: SlicePlan) -> WidthPair:
    return WidthPair(plan.dim, plan.mlp_dim)


def _pair_in(point: Mapping[str, Any]) -> WidthPair:
    return WidthPair(point["dim"], point["mlp_dim"])


def _from_the_widest(pair: WidthPair) -> tuple[int, float]:
    return -pair.dim, -math.inf if pair.mlp_dim is None else -pair.mlp_dim


def usual_dims(model: str, options: SliceOptions, sparsities: Sequence[float]) -> tuple[int, ...]:
    """Return the legal dims of a model that are nearest to fractions removed."""
    source = Source.find(model, options.revision, options.token, options.trust_remote_code)
    source.check_is_decoder()
    chosen = find_adapter(source, options.adapter)
    dimensions = Dimensions(chosen.adapter, chosen.fields)
    model_type = str(source.fields.get("model_type"))
    has_code = source.has_own_model_code
    classes = SliceClasses.of_method(dimensions, options.method, model_type, options.write_as, has_code)
    sizes = classes.at() if classes else slice_sizes(dimensions, options.method, options.slice_head)
    return tuple(nearest_dims(sizes, sparsities))


def _begin(folder: Path, fingerprint: str, job: Job, overwrite: bool) -> dict[str, Any]:
    """Return the results to go on with: those in the folder if they are of this sweep, else empty ones."""
    path = folder / RESULTS_FILE
    if folder.exists() and (not folder.is_dir() or (any(folder.iterdir()) and not path.is_file())):
        raise OutputError(
            f"The output {folder.name!r} exists and is not a sweep, so it will not be changed.",
            "Choose another with --output.",
        )
    if path.is_file():
        found = read_json(path)
        if isinstance(found, dict) and found.get("fingerprint") == fingerprint:
            return {**found, "points": list(found["points"])}
        if not overwrite:
            raise OutputError(
                f"The output {folder.name!r} holds another sweep, with a different model, options or texts.",
                "Choose another with --output, or replace it with --overwrite.",
            )
        shutil.rmtree(folder / SLICES_FOLDER, ignore_errors=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"The output {folder.name!r} cannot be created: {error.strerror}.") from None
    plan = job.slices[0].plan
    document: dict[str, Any] = {
        "fingerprint": fingerprint,
        "model": plan.model,
        "revision": job.source.commit,
        "model_type": plan.model_type,
        "method": plan.method,
        "hidden_size": plan.hidden_size,
        "slicecli_version": __version__,
        "versions": package_versions(),
        "dense": None,
        "points": [],
    }
    _write(folder, document)
    return document


class _Measure:
    """Measures the dense model and its slices on the same rows."""

    def __init__(self, job: Job, evaluation: EvaluationOptions, progress: Progress | None) -> None:
        self._job = job
        self._options = evaluation
        self._progress = progress
        with quiet_libraries():
            self.prepared = EvaluationSet.prepare(
                evaluation, job.source, job.source.tokenizer(), progress, job.options.calibration
            )

    def dense(self) -> dict[str, Any]:
        """Return the eval document of the dense model."""
        return self._document(self._job.source)

    def slice(self, folder: Path) -> dict[str, Any]:
        """Return the eval document of a slice, with its bytes and how much of the stream's energy it kept."""
        source = Source.find(str(folder), trust_remote_code=self._options.trust_remote_code)
        record = read_record(folder) or {}
        about = {"bytes": record["bytes"]["sliced"], "energy_kept": record["energy"]["kept"]}
        return {**self._document(source), **about}

    def _document(self, source: Source) -> dict[str, Any]:
        measured = measuring.evaluate(source, self._options, self._progress, self.prepared).to_json()
        measured.pop("versions", None)
        return measured


def _complete_slice(folder: Path, point: Mapping[str, Any], document: Mapping[str, Any]) -> None:
    """Enter into a slice that is kept what the sweep found."""
    dense = {name: document["dense"][name] for name in ("perplexity", "tasks")}
    enter_results(folder, point["perplexity"], point["tasks"], dense)
    enter_curves(folder, document["curves"])
    (folder / MARK_FILE).unlink(missing_ok=True)


def _mark(folder: Path, fingerprint: str) -> None:
    """Leave a note in a slice that it is whole and of this sweep."""
    write_whole_file(folder / MARK_FILE, fingerprint)


def _is_of_this_sweep(folder: Path, fingerprint: str) -> bool:
    try:
        return (folder / MARK_FILE).read_text(encoding="utf-8") == fingerprint
    except (OSError, UnicodeDecodeError):
        return False


def _write(folder: Path, document: Mapping[str, Any]) -> None:
    write_whole_file(folder / RESULTS_FILE, json.dumps(document, indent=2) + "\n")


def _fit(document: Mapping[str, Any], relation: str | None) -> list[Curve]:
    whole = [point for point in document["points"] if point["mlp_dim"] is None]
    return fit_results(series_of([document["dense"], *whole]), relation)


def _draw(path: Path, curves: Sequence[Curve], job: Job) -> None:
    from slicecli.estimation.plot import draw_quality, picture_of_curve

    if not curves:
        return
    sizes = job.classes.at() if job.classes else slice_sizes(job.dimensions, job.options.method, job.options.slice_head)
    draw_quality([picture_of_curve(curve, sizes.parameters) for curve in curves], path)
