"""Results files: measured figures as `eval` and `sweep` write them, read back as series to fit.

An eval document is one measured model; a sweep's holds one of the dense model and one of each slice. Whatever the
files, documents are grouped by dense model, method, calibration, text or task, and the settings of the measurement:
what differs in any of these is not one series. Texts and tasks are the same where the digests of what was measured are;
their names are decided anew among all files.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slicecli.data.names import Named, distinct_names, most_telling
from slicecli.errors import RequestError
from slicecli.estimation.curves import Curve, fit_curve, restore_curve
from slicecli.estimation.measurements import Point, Series
from slicecli.estimation.relations import QUANTITIES, Dense, Quantity, Relation, relation_named, relations_of
from slicecli.estimation.spread import shared_fit
from slicecli.runtime.json import read_json

if TYPE_CHECKING:
    from slicecli.evaluation.document import EvaluationDocument

__all__ = [
    "Group",
    "Shared",
    "check_relation",
    "curves_document",
    "curves_json",
    "fit_results",
    "fit_shared",
    "read_curves",
    "read_documents",
    "series_of",
]

SETTINGS = ("sequence_length", "limit", "num_fewshot", "apply_chat_template", "system_instruction")


@dataclass(frozen=True)
class Group:
    """One series and the settings it was measured with."""

    series: Series
    settings: Mapping[str, Any]


def read_documents(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read results files; return their eval documents."""
    documents: list[dict[str, Any]] = []
    for path in paths:
        content = read_json(path)
        if content is None:
            raise RequestError(
                f"{path.name!r} cannot be read as JSON.", "Pass files written by slicecli eval or sweep."
            )
        found = list(_documents(content))
        if not found:
            raise RequestError(
                f"{path.name!r} contains no results.", "Pass files written by slicecli eval -o or sweep."
            )
        documents += found
    return documents


def _documents(content: Any) -> Iterator[dict[str, Any]]:
    """Yield the eval documents in a file's content."""
    if not isinstance(content, dict):
        return
    if isinstance(content.get("points"), list) and isinstance(content.get("dense"), dict):
        yield content["dense"]
        yield from (point for point in content["points"] if isinstance(point, dict))
        return
    if isinstance(content.get("baseline"), dict):
        yield content["baseline"]
    if isinstance(content.get("perplexity"), dict):
        yield content


@dataclass(frozen=True)
class _Figure:
    """A measured figure.

    Attributes:
        value: Perplexity, or what a task's metric is.
        measured: Digest of the rows or requests.
        digest: What identifies a text or questions from a file; `None` where the name does.
    """

    value: float
    stderr: float | None
    chance: float | None
    hidden_size: int
    measured: str
    digest: str | None


def _figures(document: EvaluationDocument) -> dict[tuple[Quantity, str], _Figure]:
    """Return what was measured, by quantity and text or task."""
    size = document.hidden_size
    found: dict[tuple[Quantity, str], _Figure] = {
        ("perplexity", text): _Figure(one.value, one.stderr, None, size, one.rows_sha256, one.text_sha256)
        for text, one in document.perplexity.items()
    }
    for task, one in document.tasks.items():
        if one.value is not None and one.value >= 0:
            digests = one.requests_sha256, one.questions_sha256
            found["accuracy", task] = _Figure(one.value, one.stderr, one.chance, size, *digests)
    return found


def _names(read: Sequence[EvaluationDocument], quantity: Quantity) -> dict[tuple[str, str | None], str]:
    """Decide what the texts, or tasks, of documents are called, by the names and digests that they have there."""
    used = {
        (name, one.digest) for document in read for (kind, name), one in _figures(document).items() if kind == quantity
    }
    by_digest: dict[str | None, list[str]] = defaultdict(list)
    for name, digest in used:
        by_digest[digest].append(name)
    # the same file may have got a longer name in one document than in another
    own = {(name, digest): name if digest is None else most_telling(by_digest[digest]) for name, digest in used}
    if quantity == "perplexity":
        calibrations = (one.calibration for one in read if one.calibration is not None)
        own |= {(one.text, one.text_sha256): one.text for one in calibrations} | own
    different = sorted({(name, digest) for (_, digest), name in own.items()}, key=str)
    chosen = dict(zip(different, distinct_names([Named(*one) for one in different]), strict=True))
    return {key: chosen[name, key[1]] for key, name in own.items()}


def series_of(documents: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Group eval documents into series; those of perplexity come first.

    What slicing loses is one thing, what training wins back another: slices that were trained are left out.
    """
    from pydantic import ValidationError

    from slicecli.evaluation.document import EvaluationDocument
    from slicecli.record.schema import MOST_POINTS
    from slicecli.runtime.json_object import faults_of

    try:
        read = [EvaluationDocument.model_validate(document) for document in documents]
    except ValidationError as error:
        raise RequestError(
            f"A results file is incomplete: {faults_of(error)[0]}.", "Measure again with this version of slicecli."
        ) from None
    read = [one for one in read if not one.is_recovered]
    names = {quantity: _names(read, quantity) for quantity in QUANTITIES}
    dense: dict[_Key, _Figure] = {}
    slices: dict[_Key, dict[int, list[_Figure]]] = defaultdict(lambda: defaultdict(list))
    about: dict[_Key, EvaluationDocument] = {}
    for one in read:
        if one.mlp_dim is not None:
            raise RequestError(
                f"{one.model} keeps {one.mlp_dim:,} of {one.mlp_size} MLP channels; a curve is for slices with all.",
                "Leave its results out.",
            )
        content = one.source.content or one.source.model
        settings = tuple(str(getattr(one.evaluation, setting)) for setting in SETTINGS)
        for (quantity, name), figure in _figures(one).items():
            named = names[quantity][name, figure.digest]
            key = _Key(content, quantity, named, figure.measured, settings, model=one.source.model)
            if one.dim == one.hidden_size or one.calibration is None or one.method is None:
                dense[key] = figure
            else:
                rows = one.calibration
                text = names["perplexity"][rows.text, rows.text_sha256]
                words = f"{text}, {rows.samples} x {rows.sequence_length} tokens"
                own = dataclasses.replace(key, method=one.method, calibration=words)
                slices[own][one.dim].append(figure)
                about[own] = one
    groups = []
    for own, figures in slices.items():
        key = own.of_dense()
        if key not in dense:
            raise RequestError(*_without_dense(own, dense))
        if len(figures) > MOST_POINTS:
            raise RequestError(f"There are {len(figures)} slices of {own.model}.", f"Use at most {MOST_POINTS}.")
        groups.append(_group(own, dense[key], figures, about[own]))
    return sorted(groups, key=lambda group: group.series.quantity != "perplexity")


@dataclass(frozen=True)
class _Key:
    """What the figures of one series have in common.

    Attributes:
        content: Digest of the dense model's content, or its name.
        method: How the slices were made; empty for the dense model.
        model: Name of the dense model, which may have several.
    """

    content: str
    quantity: Quantity
    evaluation: str
    measured: str
    settings: tuple[str, ...]
    method: str = ""
    calibration: str = ""
    model: str = dataclasses.field(default="", compare=False)

    def of_dense(self) -> _Key:
        """Return that of the dense model."""
        return dataclasses.replace(self, method="", calibration="")


def _without_dense(own: _Key, dense: Iterable[_Key]) -> tuple[str, str]:
    """Say why slices have no dense figure."""
    remedy = "Measure it with the same settings (slicecli eval -o FILE), and pass that file too."
    if any(key == dataclasses.replace(own.of_dense(), measured=key.measured) for key in dense):
        what = "rows" if own.quantity == "perplexity" else "questions"
        return (
            f"The dense model {own.model} was measured on different {what} of {own.evaluation} from its slices.",
            remedy,
        )
    return f"The results contain slices of {own.model} measured on {own.evaluation}, but not the dense model.", remedy


def _group(own: _Key, dense: _Figure, figures: Mapping[int, Sequence[_Figure]], about: EvaluationDocument) -> Group:
    quantity = own.quantity
    points = []
    for dim, runs in figures.items():
        found = [pair for run in runs if (pair := _value_and_error(run, quantity)) is not None]
        if found:
            # average reruns: as separate points they would leak into leave-one-out
            value = sum(value for value, _ in found) / len(found)
            errors = [error for _, error in found if error is not None]
            stderr = math.hypot(*errors) / len(errors) if errors else None
            points.append(Point(1 - dim / runs[0].hidden_size, value, stderr, dim))
    if quantity == "perplexity" and dense.value <= 1:
        raise RequestError(
            f"The dense perplexity of {own.model} on {own.evaluation} is {dense.value:g}.", "Measure it again."
        )
    context = Dense(math.log(dense.value)) if quantity == "perplexity" else Dense(dense.value, dense.chance)
    ordered = tuple(sorted(points, key=lambda point: point.sparsity))
    series = Series(
        own.model, about.model_type, own.method, own.calibration, quantity, own.evaluation, context, ordered,
        digest=dense.digest,
    )  # fmt: skip
    settings = {name: value for name in SETTINGS if (value := getattr(about.evaluation, name)) not in (None, False)}
    return Group(series, settings)


def _value_and_error(figure: _Figure, quantity: Quantity) -> tuple[float, float | None] | None:
    """Return ln PPL or accuracy and its standard error; `None` where the figure has no logarithm."""
    value, error = figure.value, figure.stderr
    if value <= 0:
        return None
    if quantity == "accuracy":
        return value, error
    return math.log(value), None if error is None else error / value


@dataclass(frozen=True)
class Shared:
    """One set of parameters for several groups.

    Attributes:
        parameters: The mean of the groups' own fits.
        loo_error: Mean absolute error of predicting each group from the others, in ln PPL or accuracy.
    """

    quantity: Quantity
    relation: str
    parameters: tuple[float, ...]
    groups: int
    loo_error: float


def fit_shared(groups: Sequence[Group]) -> list[Shared]:
    """Fit relations to several models or methods at once, and say how each group is predicted from the others."""
    found = []
    for quantity in QUANTITIES:
        series = [group.series for group in groups if group.series.quantity == quantity and group.series.points]
        for relation in relations_of(quantity):
            usable = [one for one in series if not relation.why_not(one.dense)]
            if len(usable) < 2:
                continue
            try:
                shared, error = _fit_together(relation, usable)
            except (ArithmeticError, ValueError):  # whatever a relation is not made for; numpy's is one of these too
                continue
            if all(map(math.isfinite, (*shared, error))):
                found.append(Shared(quantity, relation.name, shared, len(usable), error))
    return sorted(found, key=lambda one: (one.quantity != "perplexity", one.loo_error))


def _fit_together(relation: Relation, series: Sequence[Series]) -> tuple[tuple[float, ...], float]:
    """Return one set of parameters for several series, and the mean error of predicting each from the others."""
    errors = []
    with np.errstate(all="ignore"):
        for index, one in enumerate(series):
            parameters = shared_fit(relation, [*series[:index], *series[index + 1 :]])
            errors += [
                abs(relation.predict(point.sparsity, one.dense, parameters) - point.value) for point in one.points
            ]
        return shared_fit(relation, series), sum(errors) / len(errors)


def fit_results(groups: Sequence[Group], relation: str | None = None) -> list[Curve]:
    """Fit a curve to each series; those of tasks may lean on the perplexity of the same slices."""
    if relation is not None:
        check_relation(relation)
    curves: list[Curve] = []
    for group in groups:
        series = group.series
        if series.quantity == "accuracy":
            series = _with_log_ratio(series, curves)
        name = relation if any(one.name == relation for one in relations_of(series.quantity)) else None
        curves.append(fit_curve(series, name, group.settings))
    return curves


def check_relation(name: str) -> None:
    """Refuse a name that is no relation's, of any quantity."""
    if not any(one.name == name for quantity in QUANTITIES for one in relations_of(quantity)):
        relation_named(name, "perplexity")


def _with_log_ratio(series: Series, curves: Sequence[Curve]) -> Series:
    """Let relations on a task ask for the perplexity of the same slices, as their curve has it."""
    log_ratio = _log_ratio_among(curves, series.model, series.method, series.calibration)
    return dataclasses.replace(series, dense=dataclasses.replace(series.dense, log_ratio=log_ratio))


def _log_ratio_among(
    curves: Sequence[Curve], model: object, method: object, calibration: object
) -> Callable[[float], float] | None:
    """Return D of some slices as a function of s, by the curve of their perplexity, if there is one."""
    for curve in curves:
        series = curve.series
        if (series.quantity, series.model, series.method, series.calibration) == (
            "perplexity",
            model,
            method,
            calibration,
        ):
            return _log_ratio_of(curve)
    return None


def _log_ratio_of(curve: Curve) -> Callable[[float], float]:
    return lambda sparsity: max(0.0, curve.predict(sparsity).value - curve.series.dense.value)


def curves_document(
    curves: Sequence[Curve], shared: Sequence[Shared], documents: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what `fit` reports and writes: all curves, those shared by groups, and the measured points."""
    return {
        "points": [
            {
                name: document[name]
                for name in ("source", "method", "dim", "sparsity", "hidden_size", "parameters", "perplexity", "tasks")
            }
            | {"is_recovered": bool(document.get("is_recovered"))}
            for document in sorted(documents, key=lambda one: (str(one["source"]), -one["dim"]))
        ],
        **curves_json(curves),
        "shared": [
            {
                "quantity": one.quantity,
                "relation": one.relation,
                "parameters": list(one.parameters),
                "groups": one.groups,
                "leave_one_group_out_error": one.loo_error,
            }
            for one in shared
        ],
    }


def curves_json(curves: Sequence[Curve]) -> dict[str, Any]:
    """Return curves as plain data, the first one apart besides."""
    found = [curve.to_json() for curve in curves]
    return {"curve": found[0] if found else None, "curves": found}


def read_curves(content: Any) -> list[Curve]:
    """Read the curves of a file that `fit` or `sweep` wrote, or of a record."""
    from pydantic import ValidationError

    from slicecli.record.schema import Curves
    from slicecli.runtime.json_object import faults_of

    found = content.get("curves") if isinstance(content, dict) else None
    if not found:
        raise RequestError("The file contains no curves.", "Pass a file written by slicecli fit or sweep.")
    try:
        read = Curves.model_validate({"curves": found}).curves
    except ValidationError as error:
        raise RequestError(
            f"A curve is invalid: {faults_of(error)[0]}.", "Pass a file written by slicecli fit or sweep."
        ) from None
    curves: list[Curve] = []
    for one in sorted(read, key=lambda one: one.quantity != "perplexity"):
        log_ratio = _log_ratio_among(curves, one.model, one.method, one.calibration)
        curves.append(restore_curve(one, Dense(0.0, log_ratio=log_ratio)))
    return curves
