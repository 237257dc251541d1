"""What to expect of a slice: a value by a relation, and the interval that published measurements or anchors allow.

Two states of knowledge, one function each: no measured slice of the model (`predict_new`), or some (`predict_fitted`).
Every prediction carries its interval, and whether it lies outside what was measured.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass

from slicecli.estimation.measurements import OTHER_TEXT, Point, Series, published_series
from slicecli.estimation.relations import Dense, Quantity, Relation, relation_named
from slicecli.estimation.spectra import study_series
from slicecli.estimation.spread import (
    DomainShift,
    Spread,
    coordinate,
    deviation,
    interval,
    learn_domain_shift,
    learn_spread,
)

__all__ = [
    "DEFAULT_RELATION",
    "FARTHEST",
    "Prediction",
    "domain_shift_of",
    "known_range",
    "predict_fitted",
    "predict_new",
    "spread_of",
    "widened_for_refit",
]

# what does best on published models that it was not fitted to, of the same and of other families taken together; and
# with one slice of the model known: see docs/relations.md and the test that compares them
DEFAULT_RELATION: dict[Quantity, str] = {"perplexity": "odds", "accuracy": "linear"}
FARTHEST = 0.6
ROUNDING = 0.005  # what a fraction changes by when a dim is rounded
# what the refit lost against the published method at the same dim, at best, on the models of docs/published.md; its
# intervals reach down by as much, because what is published is measured with the published method
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
def spread_of(name: str, quantity: Quantity, method: str) -> Spread:
    """Return how a relation errs over all series there are: published ones, or of the study of spectra."""
    relation = relation_named(name, quantity)
    return learn_spread(relation, _known_series(relation, method))


def _known_series(relation: Relation, method: str) -> tuple[Series, ...]:
    if relation.is_by_weight:
        return study_series("refit" if relation.needs_probe else method)
    return published_series(relation.quantity)


@functools.cache
def domain_shift_of(name: str) -> DomainShift:
    """Return how much more slices lose on another text than they were calibrated on, over published series."""
    own, other = published_series("perplexity"), published_series("perplexity", OTHER_TEXT)
    return learn_domain_shift(spread_of(name, "perplexity", "slicegpt"), own, other)


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
    shift: DomainShift | None = None,
) -> Prediction:
    """Predict for a model of which no slice is measured."""
    relation = spread.relation
    typical = relation.predict(sparsity, dense, spread.typical_parameters(dense, family, size, shift))
    value = _possible(relation.quantity, dense, typical)
    expected = spread.of_new_model(family, size, coordinate(relation, dense, spread.parameters, sparsity), shift)
    low, high = interval(relation, dense, spread.parameters, sparsity, expected)
    if method == "refit" and not relation.is_by_weight:
        low, high = widened_for_refit(relation.quantity, dense, low, high)
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
    value = _possible(relation.quantity, dense, relation.predict(sparsity, dense, parameters))
    found = [deviation(relation, dense, parameters, point) for point in points]
    anchors = [anchor for anchor in found if anchor is not None]
    here = coordinate(relation, dense, parameters, sparsity)
    if anchors:
        expected = spread.near_anchors(family, anchors, here)
    else:  # the measured slices lost nothing: as little is known as without them
        expected = dataclasses.replace(spread.of_new_model(family, None, here), mean=0.0)
    low, high = interval(relation, dense, parameters, sparsity, expected)
    least, largest = min(point.sparsity for point in points), max(point.sparsity for point in points)
    return Prediction(
        value, min(low, value), max(high, value), relation.name, not least - ROUNDING <= sparsity <= largest + ROUNDING
    )


def widened_for_refit(quantity: Quantity, dense: Dense, low: float, high: float) -> tuple[float, float]:
    """Move the better end of an interval towards the dense figure, by what the refit is better at best."""
    if quantity == "perplexity":
        return dense.value + (low - dense.value) * (REFIT_SHARE if low > dense.value else 1.0), high
    return low, dense.value + (high - dense.value) * (REFIT_SHARE if high < dense.value else 1.0)


def _possible(quantity: Quantity, dense: Dense, value: float) -> float:
    """Return the nearest figure that can be: no perplexity beyond that of a uniform guess, no accuracy below chance."""
    if quantity == "perplexity":
        return value if dense.ceiling is None else min(value, dense.ceiling)
    return max(value, min(dense.chance or 0.0, dense.value))
