"""Spectra: what a model would lose at every width, to second order, and how well that holds.

A spectrum comes from `slicecli spectrum`: one calibration pass and one backward pass over the dense model, and one with
its stream projected at a few widths. How the loss of slices compares to these was measured on small models
(docs/energy.md); the measurements are bundled (`study.csv`).

Symbols: docs/notation.md.
"""

from __future__ import annotations

import csv
import functools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from slicecli.errors import RequestError, reason_of
from slicecli.estimation.measurements import Point, Series
from slicecli.estimation.relations import Dense
from slicecli.estimation.shape import ShapeLosses
from slicecli.runtime.inputs import local_path
from slicecli.runtime.json import load_json

if TYPE_CHECKING:
    from slicecli.estimation.spectrum_document import SpectrumDocument

__all__ = [
    "STUDY_FAMILY",
    "Weights",
    "read_shape_losses",
    "read_spectrum",
    "study_models",
    "study_ratios",
    "study_series",
]

STUDY_FAMILY = "small models"
EARLY = "_early"  # in the names of models that were trained for a sixth of their time

LEAST_WEIGHT = 1e-9
# exponent of P in the mean, and the nats of P over which what the refit saves grows by e (docs/energy.md)
SHARE_OF_PROJECTED = 0.3
SAVING_NATS = 8.0
MOST_SAVED_AT = 5.0  # nats of P; what is saved beyond is not measured, and more removed must not seem to cost less
# the weight in the directions that a method slices with
STUDY_COLUMNS = {"refit": "fisher_shared", "slicegpt": "fisher_layer"}
# of slices that lose less, the loss is not known well enough to compare
LEAST_LOSS = 0.02


class Weights(NamedTuple):
    """What was measured of a dense model, as functions of s.

    Attributes:
        fisher: F(k), by the directions that a method slices with.
        probe: P(k)^0.3 F(k)^0.7 exp(-min(P(k), 5)/8), P what the projected dense model loses, F of each norm site's
            own directions; `None` where it was not measured, or for the published method.
    """

    fisher: Callable[[float], float]
    probe: Callable[[float], float] | None


def read_spectrum(path: Path, method: str, hidden_size: int) -> Weights:
    """Read the spectrum of a model."""
    read = _read(path, hidden_size)
    if not all(method in one.fisher for one in read.spectrum):
        raise _not_a_spectrum(path, f"it has no weights of method {method}")
    fisher = _between([(1 - one.dim / hidden_size, one.fisher[method]) for one in read.spectrum])
    sites = [
        (1 - one.dim / hidden_size, one.fisher_of_sites) for one in read.spectrum if one.fisher_of_sites is not None
    ]
    if method != "refit" or read.probe is None or not sites:
        return Weights(fisher, None)
    dense = read.probe.dense_nll
    projected = [(1 - one.dim / hidden_size, one.nll - dense) for one in read.probe.projected]
    return Weights(fisher, _probe(projected, _between(sites)))


def _probe(projected: Sequence[tuple[float, float]], fisher: Callable[[float], float]) -> Callable[[float], float]:
    """Return the weight of P and F over s, from P at a few: between them and beyond, P / F changes little."""
    ordered = sorted((sparsity, max(loss, LEAST_WEIGHT)) for sparsity, loss in projected if sparsity > 0)
    places = [math.log(sparsity) for sparsity, _ in ordered]
    ratios = [math.log(loss / fisher(sparsity)) for sparsity, loss in ordered]

    def weight(sparsity: float) -> float:
        own = fisher(sparsity)
        return _probe_weight(own * math.exp(float(np.interp(math.log(sparsity), places, ratios))), own)

    return weight


def _probe_weight(projected: float, fisher: float) -> float:
    """Return what the loss of a refit is proportional to, from P and F at one dim.

    The more the projected model has lost, the more of it the refit repairs.
    """
    projected = max(projected, LEAST_WEIGHT)
    mean = SHARE_OF_PROJECTED * math.log(projected) + (1 - SHARE_OF_PROJECTED) * math.log(fisher)
    return math.exp(mean - min(projected, MOST_SAVED_AT) / SAVING_NATS)


def read_shape_losses(path: Path, hidden_size: int, mlp_size: int) -> ShapeLosses | None:
    """Read what each width would lose; `None` where the spectrum does not say it of the MLPs' widths."""
    read = _read(path, hidden_size)
    discarded = {one.dim: max(0.0, 1 - one.kept) for one in read.spectrum if one.kept is not None}
    cut = {one.mlp_dim: one.lost for one in read.channels}
    if not discarded or mlp_size not in cut:
        return None
    return ShapeLosses(_at_all({0: 1.0, **discarded}, hidden_size), _at_all(cut, mlp_size))


def _at_all(known: Mapping[int, float], size: int) -> list[float]:
    """Return the values at all widths up to a size, by straight lines between those that are known."""
    widths = sorted(known)
    values: list[float] = np.interp(range(size + 1), widths, [known[width] for width in widths]).tolist()
    return values


def _read(path: Path, hidden_size: int) -> SpectrumDocument:
    from pydantic import ValidationError

    from slicecli.estimation.spectrum_document import SpectrumDocument
    from slicecli.runtime.json_object import faults_of

    try:
        read = SpectrumDocument.model_validate(load_json(local_path(path)))
    except (OSError, ValueError) as error:
        reason = faults_of(error)[0] if isinstance(error, ValidationError) else reason_of(error)
        raise _not_a_spectrum(path, reason) from None
    if read.hidden_size != hidden_size:
        raise RequestError(
            f"The spectrum {path.name!r} is of another model, with hidden size {read.hidden_size}.",
            "Pass the spectrum of this model.",
        )
    return read


def _not_a_spectrum(path: Path, reason: str) -> RequestError:
    return RequestError(f"{path.name!r} is not a spectrum: {reason}.", "Pass a file written by slicecli spectrum.")


def _between(points: Sequence[tuple[float, float]]) -> Callable[[float], float]:
    """Return the function through some points of F over s, by straight lines through ln F over ln s."""
    ordered = sorted((sparsity, max(value, LEAST_WEIGHT)) for sparsity, value in points if sparsity > 0)
    places = np.log([sparsity for sparsity, _ in ordered])
    logs = np.log([value for _, value in ordered])

    def weight(sparsity: float) -> float:
        place = math.log(sparsity)
        if place < places[0]:  # F falls about as s does where little is removed
            return float(math.exp(logs[0] + place - places[0]))
        return float(math.exp(np.interp(place, places, logs)))

    return weight


@functools.cache
def _study_rows() -> tuple[Mapping[str, str], ...]:
    """Return the measurements of the fully trained models."""
    text = resources.files("slicecli.estimation").joinpath("study.csv").read_text(encoding="utf-8")
    return tuple(row for row in csv.DictReader(text.splitlines()) if not row["model"].endswith(EARLY))


def study_ratios(is_centred: bool) -> list[float]:
    """Return of each model with one kind of norms the mean of ln(D of the refit / D of the published method)."""
    losses: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    for row in _study_rows():
        if row["norm"] == ("layer" if is_centred else "rms"):
            losses[row["model"], row["dim"]][row["method"]] = float(row["nll"]) - float(row["dense_nll"])
    by_model: dict[str, list[float]] = defaultdict(list)
    for (model, _), loss in losses.items():
        if min(loss.values()) > LEAST_LOSS:
            by_model[model].append(math.log(loss["refit"] / loss["slicegpt"]))
    return [sum(some) / len(some) for some in by_model.values()]


@functools.cache
def study_series(method: str) -> tuple[Series, ...]:
    """Return the measurements of the study by one method, a series for each fully trained model.

    They are one family: what was measured on the dense model says how they differ.
    """
    by_model: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in _study_rows():
        if row["method"] == method:
            by_model[row["model"]].append(row)
    found = []
    for model, rows in by_model.items():
        size, nll = int(rows[0]["hidden_size"]), float(rows[0]["dense_nll"])
        sparsities = [1 - int(row["dim"]) / size for row in rows]
        weights = [float(row[STUDY_COLUMNS[method]]) for row in rows]
        means = [_probe_weight(float(row["projected"]), float(row["fisher_layer"])) for row in rows]
        dense = Dense(
            nll,
            spectrum=_between(list(zip(sparsities, weights, strict=True))),
            probe=_between(list(zip(sparsities, means, strict=True))) if method == "refit" else None,
        )
        points = tuple(
            Point(sparsity, float(row["nll"]), float(row["stderr"]), int(row["dim"]))
            for sparsity, row in sorted(zip(sparsities, rows, strict=True), key=lambda pair: pair[0])
            if float(row["nll"]) - nll > LEAST_LOSS
        )
        if points:
            text_name = "its own kind of text"
            found.append(Series(model, STUDY_FAMILY, method, text_name, "perplexity", text_name, dense, points))
    return tuple(found)


def study_models() -> int:
    """Return how many models of the study the relations are fitted to."""
    return len({one.model for method in STUDY_COLUMNS for one in study_series(method)})
