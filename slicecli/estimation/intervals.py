"""What to expect of a slice: a value by a relation, and the interval that published measurements or anchors allow.

Two states of knowledge, one function each: no measured slice of the model (`predict_new`), or some (`predict_fitted`).
Every prediction carries its interval, and whether it lies outside what was measured.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from slicecli.estimation.exponents import learn_prior
from slicecli.estimation.measurements import OTHER_TEXT, Point, Series, published_series
from slicecli.estimation.relations import LEAST_DAMAGE, Dense, Quantity, Relation, relation_named
from slicecli.estimation.spectra import study_ratios, study_series
from slicecli.estimation.spread import (
    TRACE,
    Deviation,
    Shift,
    Spread,
    coordinate,
    deviation,
    interval,
    learn_domain_shift,
    learn_spread,
    little_text_excess,
    worst_accuracy,
    worst_perplexity,
)

__all__ = [
    "DEFAULT_RELATION",
    "FARTHEST",
    "Prediction",
    "calibration_shift",
    "domain_shift_of",
    "known_range",
    "possible",
    "predict_fitted",
    "predict_new",
    "published_calibration_shift",
    "refit_shift_of",
    "refit_shift_with_text",
    "shifted",
    "spread_of",
]

# what does best on published models that it was not fitted to, of the same and of other families taken together; and
# with one slice of the model known: see docs/relations.md and the test that compares them
DEFAULT_RELATION: dict[Quantity, str] = {"perplexity": "free-odds", "accuracy": "linear"}
FARTHEST = 0.6
ROUNDING = 0.005  # what a fraction changes by when a dim is rounded
# most published series end here; of three that go on to a half, ln D there is off by 0.2 from the line before
WELL_KNOWN = 0.31
DEVIATION_BEYOND = 0.4  # of ln D, for each unit of ln s
STUDY_TOKENS = 100.0  # calibration tokens per unknown of the models of the study, about
STUDY_TOKENS_PER_COORDINATE = 300.0
ERROR_OF_FACTOR = 0.3  # of its logarithm
# accuracies of slices by the refit are not published: their intervals reach up to half of the loss
REFIT_SHARE = 0.5


@dataclass(frozen=True)
class Prediction:
    """A predicted figure.

    Attributes:
        value: ln PPL, or accuracy between 0 and 1.
        low: Lower end of the 90 % interval.
        is_outside: It lies outside the range of what the relation was fitted to or checked on.
    """

    value: float
    low: float
    high: float
    relation: str
    is_outside: bool


@functools.cache
def spread_of(name: str, quantity: Quantity, method: str, is_of_other_text: bool = False) -> Spread:
    """Return how a relation errs over all series there are: published ones, or of the study of spectra.

    Args:
        is_of_other_text: Take the published perplexities of other kinds of text than the slices were calibrated on.
    """
    relation = relation_named(name, quantity)
    if relation.is_by_weight or quantity == "accuracy":
        return learn_spread(relation, _known_series(relation, method))
    own, other = published_series(quantity), published_series(quantity, OTHER_TEXT)
    found = learn_spread(relation, other, own) if is_of_other_text else learn_spread(relation, own, other)
    if method != "refit" or not relation.has_prior:
        return found
    # the losses of the refit grow more slowly; how they do is known from the study only
    return dataclasses.replace(found, prior=learn_prior(relation, study_series("refit"), is_of_other_text))


def _known_series(relation: Relation, method: str) -> tuple[Series, ...]:
    if relation.is_by_weight:
        return study_series("refit" if relation.needs_probe else method)
    return published_series(relation.quantity)


@functools.cache
def domain_shift_of(name: str) -> Shift:
    """Return how much more slices lose on another text than they were calibrated on, over published series."""
    own, other = published_series("perplexity"), published_series("perplexity", OTHER_TEXT)
    return learn_domain_shift(spread_of(name, "perplexity", "slicegpt"), own, other)


@functools.cache
def refit_shift_of(is_centred: bool) -> Shift:
    """Return how much less the refit loses than the published method at the same dim, over the models of the study.

    Args:
        is_centred: The model has LayerNorms: a refit in a stock class then gives up a direction and more.
    """
    return Shift.learn(study_ratios(is_centred))


def calibration_shift(tokens_per_unknown: float) -> Shift:
    """Return how much more a refit loses with little calibration text than those of the study did.

    It loses 1 + 6/(u + 5) times as much as with endless text: fitted to small models, see docs/evidence.md.

    Args:
        tokens_per_unknown: u, calibration tokens for each unknown of the largest regression.
    """
    mean = math.log1p(6 / (tokens_per_unknown + 5)) - math.log1p(6 / (STUDY_TOKENS + 5))
    return Shift(mean, (ERROR_OF_FACTOR * mean) ** 2, math.inf)


def published_calibration_shift(tokens_per_coordinate: float) -> Shift:
    """Return how much more a slice by the published method loses with its calibration text than with endless text."""
    return Shift(little_text_excess(tokens_per_coordinate), 0.0, math.inf)


def refit_shift_with_text(is_centred: bool, tokens_per_unknown: float) -> Shift:
    """Return how a refit with some calibration text differs from a published slice with endless text."""
    ratio = refit_shift_of(is_centred)
    text = calibration_shift(tokens_per_unknown)
    mean = ratio.mean + little_text_excess(STUDY_TOKENS_PER_COORDINATE) + text.mean
    return dataclasses.replace(ratio, mean=mean, variance=ratio.variance + text.variance)


@functools.cache
def known_range(relation: Relation, method: str) -> tuple[float, float]:
    """Return the least and the largest s of the series that a relation's intervals are learnt from."""
    values = [point.sparsity for one in _known_series(relation, method) for point in one.points]
    return min(values), max(values)


def predict_new(
    spread: Spread,
    dense: Dense,
    family: str,
    size: float | None,
    method: str,
    sparsity: float,
    shifts: Sequence[Shift] = (),
) -> Prediction:
    """Predict for a model of which no slice is measured.

    Args:
        shifts: How its slices differ from those that the spread was learnt from.
    """
    relation = spread.relation
    typical = relation.predict(sparsity, dense, spread.typical_parameters(dense, family, size, shifts))
    value = possible(relation.quantity, dense, typical)
    base = spread.base(dense, family, size, shifts)
    place = coordinate(relation, dense, base, sparsity)
    expected = spread.of_new_model(family, size, place, shifts, _exponent(relation, base))
    low, high = interval(relation, dense, base, sparsity, _far_out(relation, expected, sparsity))
    if method == "refit" and relation.quantity == "accuracy":
        high = _nearer(dense, high)
    least, largest = known_range(relation, method)
    is_outside = not least - ROUNDING <= sparsity <= largest + ROUNDING
    # the interval says what published models did; the relation's own value belongs to it even where that disagrees
    return Prediction(value, min(low, value), max(high, value), relation.name, is_outside)


def predict_fitted(
    spread: Spread,
    parameters: Sequence[float],
    dense: Dense,
    family: str,
    points: Sequence[Point],
    sparsity: float,
) -> Prediction:
    """Predict for a model with measured slices, to which the relation was fitted."""
    relation = spread.relation
    value = possible(relation.quantity, dense, relation.predict(sparsity, dense, parameters))
    found = [deviation(relation, dense, parameters, point) for point in points]
    anchors = [anchor for anchor in found if anchor is not None]
    here = coordinate(relation, dense, parameters, sparsity)
    if anchors:
        expected = spread.near_anchors(family, anchors, here, _exponent(relation, parameters))
    else:  # the measured slices lost nothing: as little is known as without them
        expected = dataclasses.replace(spread.of_new_model(family, None, here), mean=0.0)
    low, high = interval(relation, dense, parameters, sparsity, _far_out(relation, expected, sparsity))
    least, largest = min(point.sparsity for point in points), max(point.sparsity for point in points)
    return Prediction(
        value, min(low, value), max(high, value), relation.name, not least - ROUNDING <= sparsity <= largest + ROUNDING
    )


def shifted(prediction: Prediction, dense: Dense, shift: Shift) -> Prediction:
    """Return a prediction of a perplexity for slices that differ from those it was learnt from."""
    width = Deviation(0.0, math.sqrt(shift.variance), shift.degrees).half_width
    loss = max(prediction.value - dense.value, LEAST_DAMAGE)

    def end(value: float, sign: int) -> float:
        half = abs(math.log(max(value - dense.value, TRACE) / loss))
        return dense.value + loss * math.exp(shift.mean + sign * math.hypot(half, width))

    low = prediction.low if prediction.low <= dense.value else end(prediction.low, -1)
    high = end(prediction.high, 1)
    value = possible("perplexity", dense, dense.value + (prediction.value - dense.value) * math.exp(shift.mean))
    high = possible("perplexity", dense, high)
    return dataclasses.replace(prediction, value=value, low=min(low, value), high=max(high, value))


def _exponent(relation: Relation, parameters: Sequence[float]) -> float:
    return parameters[-1] if relation.has_prior else 1.0


def _far_out(relation: Relation, expected: Deviation, sparsity: float) -> Deviation:
    """Return what to expect beyond the well-known range, where the losses of models go apart."""
    if relation.quantity != "perplexity" or relation.has_prior or sparsity <= WELL_KNOWN:
        return expected
    beyond = DEVIATION_BEYOND * math.log(sparsity / WELL_KNOWN)
    return dataclasses.replace(expected, deviation=math.hypot(expected.deviation, beyond))


def _nearer(dense: Dense, high: float) -> float:
    """Move the upper end of an accuracy towards the dense one, by what the refit is better at best."""
    return dense.value + (high - dense.value) * (REFIT_SHARE if high < dense.value else 1.0)


def possible(quantity: Quantity, dense: Dense, value: float) -> float:
    """Return the nearest figure that can be: no perplexity beyond that of a uniform guess, no accuracy below chance."""
    if quantity == "perplexity":
        return min(value, worst_perplexity(dense))
    return max(value, worst_accuracy(dense))
