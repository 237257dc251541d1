"""How the relations fare on published measurements: each model predicted from the others, or from one of its slices.

Two questions, each answered for models that were left out of everything that was learnt: how far off is the value,
and how often does the 90 % interval hold the measurement. Three states of knowledge: other models, among them some of
the family; only models of other families; or, besides other models, one slice of the model itself. The first and the
last are also checked on another kind of text than the slices were calibrated on.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from slicecli.errors import RequestError
from slicecli.estimation.intervals import Prediction, predict_fitted, predict_new, published_calibration_shift
from slicecli.estimation.measurements import OTHER_TEXT, Series, published_series
from slicecli.estimation.relations import Quantity, Relation, relations_of
from slicecli.estimation.spread import learn_spread

__all__ = ["ANCHOR", "KNOWLEDGE", "Check", "ForecastInputs", "Row", "check_relations", "summary"]

ForecastInputs = Literal["other models", "other families", "one slice", "other text", "other text, one slice"]
KNOWLEDGE: tuple[ForecastInputs, ...] = get_args(ForecastInputs)
ANCHOR = 0.2  # s of the slice that is known
ANCHOR_RANGE = 0.02
MOST_WIDTH = 700.0  # whose exp is a number


@dataclass(frozen=True)
class Row:
    """One published point, predicted without its model."""

    series: Series
    sparsity: float
    measured: float
    prediction: Prediction

    @property
    def error(self) -> float:
        """The absolute error: of perplexity as a fraction of it, of accuracy as it is."""
        if self.series.quantity == "accuracy":
            return abs(self.prediction.value - self.measured)
        return abs(math.expm1(self.prediction.value - self.measured))

    @property
    def is_covered(self) -> bool:
        """Whether the interval holds the measurement."""
        return self.prediction.low <= self.measured <= self.prediction.high

    @property
    def width(self) -> float:
        """The width of the interval: of perplexity the ratio of its ends, of accuracy their difference."""
        width = self.prediction.high - self.prediction.low
        return width if self.series.quantity == "accuracy" else math.exp(min(width, MOST_WIDTH))


@dataclass(frozen=True)
class Check:
    """A relation checked in one state of knowledge."""

    relation: Relation
    knows: ForecastInputs
    rows: tuple[Row, ...]


def check_relations(quantity: Quantity, largest: float = 1.0) -> list[Check]:
    """Predict every published point of a quantity by every relation, leaving its model out."""
    if not 0 < largest <= 1:
        raise RequestError(f"A sparsity of {largest} is not a fraction of the hidden size.", "Use 0 < S <= 1.")
    checks = []
    for relation in relations_of(quantity):
        if relation.is_by_weight:  # no spectrum is published: see docs/energy.md
            continue
        for knows in KNOWLEDGE:
            series, *more = [published_series(quantity, use) for use in _uses(quantity, knows)]
            usable = [one for one in series if not relation.why_not(one.dense)]
            if usable and (not knows.endswith("one slice") or relation.parameters):
                others = [one for some in more for one in some]
                rows = [row for row in _rows(relation, usable, others, knows) if row.sparsity <= largest]
                checks.append(Check(relation, knows, tuple(rows)))
    return checks


def _uses(quantity: Quantity, knows: ForecastInputs) -> tuple[str, ...]:
    """Return which published measurements are predicted, and which others may be learnt from."""
    if quantity == "accuracy":
        return (OTHER_TEXT,) if knows.startswith("other text") else ("spread",)
    return (OTHER_TEXT, "spread") if knows.startswith("other text") else ("spread", OTHER_TEXT)


def _rows(relation: Relation, usable: Sequence[Series], more: Sequence[Series], knows: ForecastInputs) -> Iterator[Row]:
    """Yield the predictions of all points.

    Args:
        more: Series on other texts.
    """
    for model in dict.fromkeys(one.model for one in usable):
        own = [one for one in usable if one.model == model]
        family = own[0].family
        size = None if own[0].parameters is None else math.log(own[0].parameters)
        known, known_more = (
            [one for one in some if one.model != model and (knows != "other families" or one.family != family)]
            for some in (usable, more)
        )
        spread = learn_spread(relation, known, known_more)
        for one in own:
            if not knows.endswith("one slice"):
                shifts = (
                    () if relation.quantity == "accuracy" else (published_calibration_shift(one.tokens_per_coordinate),)
                )
                for point in one.points:
                    expected = predict_new(spread, one.dense, family, size, one.method, point.sparsity, shifts)
                    yield Row(one, point.sparsity, point.value, expected)
                continue
            anchor = next((point for point in one.points if abs(point.sparsity - ANCHOR) <= ANCHOR_RANGE), None)
            if anchor is None:
                continue
            fitted = relation.fit([(anchor.sparsity, anchor.value)], one.dense, spread.prior)
            for point in one.points:
                if point is not anchor:
                    expected = predict_fitted(spread, fitted, one.dense, family, [anchor], point.sparsity)
                    yield Row(one, point.sparsity, point.value, expected)


def summary(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Return lines for each check, of all points and of each family: errors and coverage.

    The error over all is the mean of the families', so that a family with many published points does not decide.
    """
    lines = []
    for check in checks:
        groups: dict[str, list[Row]] = defaultdict(list)
        for row in check.rows:
            groups[row.series.family].append(row)
        found = {group: _line(check, group, rows) for group, rows in groups.items()}
        if not found:
            continue
        whole = _line(check, "all", list(check.rows))
        for name in ("mean_error", "median_error"):
            whole[name] = float(np.mean([line[name] for line in found.values()]))
        lines += [whole, *found.values()]
    return lines


def _line(check: Check, group: str, rows: list[Row]) -> dict[str, Any]:
    errors = [row.error for row in rows]
    return {
        "relation": check.relation.name,
        "quantity": check.relation.quantity,
        "knows": check.knows,
        "family": group,
        "points": len(rows),
        "models": len({row.series.model for row in rows}),
        "mean_error": float(np.mean(errors)),
        "median_error": float(np.median(errors)),
        "coverage": sum(row.is_covered for row in rows) / len(rows),
        "median_width": float(np.median([row.width for row in rows])),
    }
