"""Results files: measured figures as `eval` and `sweep` write them, read back as series to fit.

An eval document is one measured model; a sweep's holds one of the dense model and one of each slice. Whatever the
files, documents are grouped by dense model, method, calibration, text or task, and the settings of the measurement:
what differs in any of these is not one series.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicecli.checkpoint import read_json
from slicecli.errors import RequestError
from slicecli.estimation.curves import Curve, curve_from_json, fit_curve
from slicecli.estimation.measurements import Point, Series
from slicecli.estimation.relations import QUANTITIES, Dense, Quantity, relation_named, relations_of
from slicecli.estimation.spread import shared_fit

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

SETTINGS = ("sequence_length", "limit", "num_fewshot")


@dataclass(frozen=True)
class Group:
    """One series and the settings it was measured with.

    Attributes:
        series: The series.
        settings: The settings.
    """

    series: Series
    settings: Mapping[str, Any]


def read_documents(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Read results files; return their eval documents.

    Raises:
        RequestError: A file cannot be read or is not a results file.
    """
    documents: list[dict[str, Any]] = []
    for path in paths:
        content = read_json(path)
        if content is None:
            raise RequestError(f"{path.name!r} cannot be read as JSON.", "Give files that eval or sweep wrote.")
        found = list(_documents(content))
        if not found:
            raise RequestError(f"{path.name!r} holds no results.", "Give files that eval -o or sweep wrote.")
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


def series_of(documents: Sequence[Mapping[str, Any]]) -> list[Group]:
    """Group eval documents into series; those of perplexity come first.

    Raises:
        RequestError: A slice's dense model is not among the documents, or a document is not complete.
    """
    try:
        dense: dict[tuple[str, ...], Mapping[str, Any]] = {}
        slices: dict[tuple[str, ...], dict[int, list[Mapping[str, Any]]]] = defaultdict(lambda: defaultdict(list))
        about: dict[tuple[str, ...], Mapping[str, Any]] = {}
        for document in documents:
            for quantity, evaluation, figure in _figures(document):
                settings = tuple(str((document.get("evaluation") or {}).get(name)) for name in SETTINGS)
                key = (_source(document), quantity, evaluation, *settings)
                if document["dim"] == document["hidden_size"]:
                    dense[key] = figure
                else:
                    own = (*key, str(document["method"]), _calibration(document))
                    slices[own][int(document["dim"])].append({**figure, "hidden_size": document["hidden_size"]})
                    about[own] = document
        groups = []
        for own, figures in slices.items():
            key = own[:-2]
            if key not in dense:
                raise RequestError(
                    f"The results have slices of {key[0]} measured on {key[2]}, and not the dense model.",
                    "Measure it with the same settings (slicecli eval, -o) and give that file too.",
                )
            groups.append(_group(own, dense[key], figures, about[own]))
    except (KeyError, TypeError, ValueError) as error:
        raise RequestError(
            f"A results file is not complete: {type(error).__name__}: {error}.", "Measure again with this version."
        ) from None
    return sorted(groups, key=lambda group: group.series.quantity != "perplexity")


def _figures(document: Mapping[str, Any]) -> Iterator[tuple[Quantity, str, Mapping[str, Any]]]:
    for text, figure in (document.get("perplexity") or {}).items():
        yield "perplexity", text, figure
    for task, figure in (document.get("tasks") or {}).items():
        if figure.get("value") is not None:
            yield "accuracy", task, figure


def _source(document: Mapping[str, Any]) -> str:
    return str((document.get("source") or {}).get("model") or document["model"])


def _calibration(document: Mapping[str, Any]) -> str:
    """Return what a slice was calibrated on, in words."""
    calibration = document.get("calibration") or {}
    return (
        f"{calibration.get('text', 'unknown')}, {calibration.get('samples', '?')} x "
        f"{calibration.get('sequence_length', '?')} tokens"
    )


def _group(
    own: tuple[str, ...],
    dense: Mapping[str, Any],
    figures: Mapping[int, Sequence[Mapping[str, Any]]],
    about: Mapping[str, Any],
) -> Group:
    model, kind, evaluation, *_, method, calibration = own
    quantity: Quantity = "perplexity" if kind == "perplexity" else "accuracy"
    points = []
    for dim, runs in figures.items():
        found = [pair for run in runs if (pair := _value_and_error(run, quantity)) is not None]
        if found:
            # several runs of one slice are one point: its twin would tell a left-out point
            value = sum(value for value, _ in found) / len(found)
            errors = [error for _, error in found if error is not None]
            stderr = math.hypot(*errors) / len(errors) if errors else None
            points.append(Point(1 - dim / runs[0]["hidden_size"], value, stderr, dim))
    value, chance = float(dense["value"]), dense.get("chance")
    context = Dense(math.log(value)) if quantity == "perplexity" else Dense(value, chance)
    ordered = tuple(sorted(points, key=lambda point: point.sparsity))
    series = Series(
        model, str(about.get("model_type") or "?"), method, calibration, quantity, evaluation, context, ordered
    )
    settings = {name: (about.get("evaluation") or {}).get(name) for name in SETTINGS}
    return Group(series, {name: value for name, value in settings.items() if value is not None})


def _value_and_error(figure: Mapping[str, Any], quantity: Quantity) -> tuple[float, float | None] | None:
    """Return ln PPL or accuracy and its standard error; `None` where the figure has no logarithm."""
    value, error = float(figure["value"]), figure.get("stderr")
    if not (math.isfinite(value) and value > 0):
        return None
    if quantity == "accuracy":
        return value, error
    return math.log(value), None if error is None else float(error) / value


@dataclass(frozen=True)
class Shared:
    """One set of parameters for several groups.

    Attributes:
        quantity: Of the groups.
        relation: Name of the relation.
        parameters: The mean of the groups' own fits.
        groups: Their number.
        loo_error: Mean absolute error of predicting each group from the others, in ln PPL or accuracy.
    """

    quantity: Quantity
    relation: str
    parameters: tuple[float, ...]
    groups: int
    loo_error: float


def fit_shared(groups: Sequence[Group]) -> list[Shared]:
    """Fit relations to several models or methods at once, and say how each group is predicted from the others.

    Args:
        groups: As `series_of` returns them; of a quantity with a single one nothing is said.
    """
    found = []
    for quantity in QUANTITIES:
        series = [group.series for group in groups if group.series.quantity == quantity and group.series.points]
        for relation in relations_of(quantity):
            usable = [one for one in series if not relation.why_not(one.dense)]
            if len(usable) < 2:
                continue
            errors = []
            for index, one in enumerate(usable):
                parameters = shared_fit(relation, usable[:index] + usable[index + 1 :])
                errors += [
                    abs(relation.predict(point.sparsity, one.dense, parameters) - point.value) for point in one.points
                ]
            shared = shared_fit(relation, usable)
            found.append(Shared(quantity, relation.name, shared, len(usable), sum(errors) / len(errors)))
    return sorted(found, key=lambda one: (one.quantity != "perplexity", one.loo_error))


def fit_results(groups: Sequence[Group], relation: str | None = None) -> list[Curve]:
    """Fit a curve to each series; those of tasks may lean on the perplexity of the same slices.

    Args:
        groups: As `series_of` returns them, perplexity first.
        relation: Name of a relation for the quantities that have one of that name; the others choose.

    Raises:
        RequestError: No quantity has a relation of that name, or it cannot be fitted.
    """
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
    """Refuse a name that is no relation's, of any quantity.

    Raises:
        RequestError: There is no such relation.
    """
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
                name: document.get(name)
                for name in ("source", "method", "dim", "sparsity", "hidden_size", "parameters", "perplexity", "tasks")
            }
            for document in sorted(documents, key=lambda one: (str(one.get("source")), -float(one.get("dim") or 0)))
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
    """Read the curves of a file that `fit` or `sweep` wrote, or of a record.

    Raises:
        RequestError: There are none.
    """
    found = content.get("curves") if isinstance(content, dict) else None
    if not isinstance(found, list) or not found or not all(isinstance(one, dict) for one in found):
        raise RequestError("There are no curves in it.", "Give a file that slicecli fit or sweep wrote.")
    curves: list[Curve] = []
    for fields in sorted(found, key=lambda one: one.get("quantity") != "perplexity"):
        about = (fields.get(name) for name in ("model", "method", "calibration"))
        curves.append(curve_from_json(fields, Dense(0.0, log_ratio=_log_ratio_among(curves, *about))))
    return curves
