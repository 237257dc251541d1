"""Prediction curves: a relation fitted to measured slices of one model, chosen by leave-one-out, saved and read.

A curve says what was fitted to what: relation, parameters with covariance, the points, the range they reach, what they
were evaluated on and calibrated with, and how well the relation predicts each point from the others. Predictions from
it carry intervals, see `slicecli.estimation.intervals`.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from slicecli.errors import RequestError
from slicecli.estimation.intervals import Prediction, possible, predict_fitted, spread_of
from slicecli.estimation.measurements import Point, Series
from slicecli.estimation.relations import (
    LARGEST_LOGARITHM,
    Dense,
    Quantity,
    Relation,
    quoted_by,
    quoted_error,
    relation_named,
    relations_of,
)

if TYPE_CHECKING:
    from slicecli.family.slice_plan import Method
    from slicecli.record import schema

ENOUGH_TO_COMPARE = 4  # points

__all__ = ["ONE_POINT_RELATION", "Alternative", "Curve", "fit_curve", "leave_one_out", "restore_curve"]

# what does best on published models with one slice known, and with two or three, see docs/relations.md
ONE_POINT_RELATION: dict[Quantity, str] = {"perplexity": "free-odds", "accuracy": "decay"}


@dataclass(frozen=True)
class Alternative:
    """A relation that was fitted to the same points.

    Attributes:
        loo_error: Mean absolute error of predicting each point from the others, in ln PPL or accuracy; NaN for one
            point, unless nothing is fitted.
    """

    relation: str
    parameters: tuple[float, ...]
    loo_error: float


@dataclass(frozen=True)
class Curve:
    """A relation fitted to the slices of one model.

    Attributes:
        covariance: Their covariance; `None` where there are no more points than parameters.
        loo_relative_error: The same of perplexity itself, as a fraction; of accuracy equal to it.
        alternatives: All relations that were fitted, the chosen one too, best first.
        settings: What else identifies the measurement: limits, row length, few-shot examples.
    """

    series: Series
    relation: str
    parameters: tuple[float, ...]
    covariance: tuple[tuple[float, ...], ...] | None
    loo_error: float
    loo_relative_error: float
    alternatives: tuple[Alternative, ...]
    reason: str
    settings: Mapping[str, Any]

    @property
    def valid_sparsity(self) -> tuple[float, float]:
        """The least and the largest s of the points."""
        values = [point.sparsity for point in self.series.points]
        return min(values), max(values)

    @property
    def hidden_size(self) -> int:
        """The dense model's hidden size, from a point's dim; 1 where no point has one."""
        known = (round(point.dim / (1 - point.sparsity)) for point in self.series.points if point.dim)
        return next(known, 1)

    def parameters_with_errors(self) -> list[tuple[str, float, float | None]]:
        """Return name, value and standard error of each parameter; no error where there are no points to spare."""
        names = relation_named(self.relation, self.series.quantity).parameters
        errors = [
            None if self.covariance is None else math.sqrt(max(0.0, self.covariance[index][index]))
            for index in range(len(names))
        ]
        return list(zip(names, self.parameters, errors, strict=True))

    def predict(self, sparsity: float) -> Prediction:
        """Predict at a fraction removed, with the interval that the points allow."""
        series = self.series
        spread = spread_of(self.relation, series.quantity, series.method, series.is_of_other_text)
        try:
            with np.errstate(all="ignore"):
                found = predict_fitted(spread, self.parameters, series.dense, series.family, series.points, sparsity)
            if all(map(math.isfinite, (found.value, found.low, found.high))):
                return found
        except (ArithmeticError, ValueError):
            pass
        raise RequestError(
            f"The curve of {series.model} on {series.evaluation} gives no finite prediction at s = {sparsity:.3g}.",
            "Check the measured figures, or use another --relation.",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the curve as plain data, of figures as people quote them: perplexities, not their logarithms."""
        from pydantic import ValidationError

        from slicecli.record import schema
        from slicecli.runtime.json_object import faults_of

        series = self.series
        relation = relation_named(self.relation, series.quantity)
        quoted = quoted_by(series.quantity)
        try:
            written = schema.Curve(
                relation=self.relation,
                formula=relation.formula,
                quantity=series.quantity,
                parameters=dict(zip(relation.parameters, self.parameters, strict=True)),
                covariance=None if self.covariance is None else [list(row) for row in self.covariance],
                loo_error=_finite(self.loo_error),
                loo_relative_error=_finite(self.loo_relative_error),
                valid_sparsity=list(self.valid_sparsity),
                reason=self.reason,
                alternatives=[
                    schema.Alternative(
                        relation=one.relation, parameters=list(one.parameters), loo_error=_finite(one.loo_error)
                    )
                    for one in self.alternatives
                ],
                model=series.model,
                model_type=series.family,
                method=cast("Method", series.method),
                calibration=series.calibration,
                evaluation=series.evaluation,
                evaluation_sha256=series.digest,
                settings=schema.CurveSettings(**self.settings),
                dense=quoted(series.dense.value),
                chance=series.dense.chance,
                points=[
                    schema.Point(
                        dim=point.dim,
                        sparsity=point.sparsity,
                        value=quoted(point.value),
                        stderr=quoted_error(point.value, point.stderr, series.quantity),
                        fitted=quoted(
                            possible(
                                series.quantity,
                                series.dense,
                                relation.predict(point.sparsity, series.dense, self.parameters),
                            )
                        ),
                    )
                    for point in series.points
                ],
            )
        except ValidationError as error:
            raise RequestError(
                f"The curve of {series.model} on {series.evaluation} cannot be written: {faults_of(error)[0]}.",
                "Check the measured figures.",
            ) from None
        return written.model_dump(exclude_unset=True)


def fit_curve(series: Series, name: str | None = None, settings: Mapping[str, Any] | None = None) -> Curve:
    """Fit a curve."""
    if not series.points:
        raise RequestError(f"There is no measured slice of {series.model}.", "Measure at least one slice.")
    if name is not None:
        wanted = [relation_named(name, series.quantity)]
        reason = wanted[0].why_not(series.dense)
        if not reason and not _has_points_for(wanted[0], len(series.points)):
            reason = f"it has {len(wanted[0].parameters)} parameters, but there are only {len(series.points)} points"
        if reason:
            raise RequestError(f"The relation {name!r} cannot be fitted to {series.evaluation}: {reason}.")
    else:
        wanted = [
            one
            for one in relations_of(series.quantity)
            if not one.why_not(series.dense) and _has_points_for(one, len(series.points))
        ]
    fitted = [found for one in wanted if (found := _alternative(one, series)) is not None]
    if not fitted:
        raise RequestError(
            f"No relation can be fitted to the slices of {series.model} measured on {series.evaluation}: the numbers "
            "are too far apart.",
            "Check the measured figures.",
        )
    fitted.sort(key=lambda one: one.loo_error if math.isfinite(one.loo_error) else math.inf)
    chosen, reason = _choose(fitted, series, name)
    relation = relation_named(chosen.relation, series.quantity)
    return Curve(
        series=series,
        relation=chosen.relation,
        parameters=chosen.parameters,
        covariance=_covariance(relation, series, chosen.parameters),
        loo_error=chosen.loo_error,
        loo_relative_error=leave_one_out(relation, series, is_relative=True),
        alternatives=tuple(fitted),
        reason=reason,
        settings=dict(settings or {}),
    )


def leave_one_out(relation: Relation, series: Series, is_relative: bool = False) -> float:
    """Return the mean absolute error of predicting each point from a fit to the others."""
    errors = []
    for index, point in enumerate(series.points):
        others = series.points[:index] + series.points[index + 1 :]
        if relation.parameters and not _has_points_for(relation, len(others)):
            return math.nan
        parameters = _fit(relation, series, others)
        error = relation.predict(point.sparsity, series.dense, parameters) - point.value
        is_of_perplexity = is_relative and series.quantity == "perplexity"
        errors.append(abs(math.expm1(min(error, LARGEST_LOGARITHM))) if is_of_perplexity else abs(error))
    return math.fsum(error / len(errors) for error in errors)


def restore_curve(written: schema.Curve, known: Dense | None = None) -> Curve:
    """Return the curve that `Curve.to_json` wrote; it is fitted again, to the same points by the same relation."""
    dense = Dense(
        _unquoted(written.dense, written.quantity),
        written.chance,
        None if known is None else known.log_ratio,
        None if known is None else known.spectrum,
        None if known is None else known.probe,
    )
    points = [
        Point(one.sparsity, _unquoted(one.value, written.quantity), _unquoted_error(one, written.quantity), one.dim)
        for one in written.points
    ]
    series = Series(
        model=written.model,
        family=written.model_type,
        method=written.method,
        calibration=written.calibration,
        quantity=written.quantity,
        evaluation=written.evaluation,
        dense=dense,
        points=tuple(sorted(points, key=lambda one: one.sparsity)),
        digest=written.evaluation_sha256,
    )
    settings = written.settings.model_dump(exclude_unset=True)
    return dataclasses.replace(fit_curve(series, written.relation, settings), reason=written.reason)


def _has_points_for(relation: Relation, points: int) -> bool:
    return points >= (1 if relation.has_prior else len(relation.parameters))


def _fit(relation: Relation, series: Series, points: Sequence[Point]) -> tuple[float, ...]:
    """Return the parameters fitted to some points."""
    prior = None
    if relation.has_prior:
        spread = spread_of(relation.name, relation.quantity, series.method, series.is_of_other_text)
        prior = spread.prior
    with np.errstate(all="ignore"):
        parameters = relation.fit([(point.sparsity, point.value) for point in points], series.dense, prior)
    if not all(map(math.isfinite, parameters)):
        raise ArithmeticError(f"{relation.name} has no finite parameters")
    return parameters


def _alternative(relation: Relation, series: Series) -> Alternative | None:
    """Fit a relation to a series, or return `None` where what it predicts of the points is beyond all numbers."""
    try:
        parameters = _fit(relation, series, series.points)
        predicted = [relation.predict(point.sparsity, series.dense, parameters) for point in series.points]
        if not all(map(math.isfinite, predicted)):
            return None
        return Alternative(relation.name, parameters, leave_one_out(relation, series))
    except (ArithmeticError, ValueError):  # whatever a relation is not made for; numpy's is one of these too
        return None


def _choose(fitted: Sequence[Alternative], series: Series, name: str | None) -> tuple[Alternative, str]:
    """Return the relation to take, and why."""
    if name is not None:
        return fitted[0], "asked for"
    # what is best on published slices is not made for slices that are better than the dense model
    loses = series.quantity != "perplexity" or all(point.value > series.dense.value for point in series.points)
    if len(series.points) == 1 or (loses and len(series.points) < ENOUGH_TO_COMPARE):
        usual = ONE_POINT_RELATION[series.quantity]
        chosen = next((one for one in fitted if one.relation == usual), fitted[0])
        count = len(series.points)
        points = "one point" if count == 1 else f"{count} points"
        return (
            chosen,
            f"relations cannot be compared on {points}; this one is best with so few on published measurements",
        )
    return fitted[0], (f"the smallest leave-one-out error of {len(fitted)} relations on {len(series.points)} points")


def _covariance(
    relation: Relation, series: Series, parameters: Sequence[float]
) -> tuple[tuple[float, ...], ...] | None:
    """Return the covariance of fitted parameters: σ² (JᵀJ)⁻¹ with σ² from the residuals and J by differences.

    There is none without points to spare, or where it is beyond all numbers.
    """
    spare = len(series.points) - len(parameters)
    if not parameters or spare <= 0:
        return None

    def predicted(values: Sequence[float]) -> np.ndarray:
        return np.array([relation.predict(point.sparsity, series.dense, values) for point in series.points])

    columns = []
    try:
        with np.errstate(all="ignore"):
            for index, value in enumerate(parameters):
                size = 1e-5 * max(1.0, abs(value))
                up, down = list(parameters), list(parameters)
                up[index], down[index] = value + size, value - size
                columns.append((predicted(up) - predicted(down)) / (2 * size))
            slopes = np.array(columns).T
            residuals = np.array([point.value for point in series.points]) - predicted(parameters)
            variance = float(residuals @ residuals) / spare
            covariance = variance * np.linalg.pinv(slopes.T @ slopes)
    except (ArithmeticError, ValueError):
        return None
    if not np.isfinite(covariance).all():
        return None
    return tuple(tuple(float(value) for value in row) for row in covariance)


def _unquoted(value: float, quantity: Quantity) -> float:
    """Return ln PPL or the accuracy from the figure that people quote."""
    if quantity == "accuracy":
        return value
    if value < 1:
        raise RequestError(f"A perplexity of {value:g} in the curve is less than 1.", "Check the file.")
    return math.log(value)


def _unquoted_error(point: schema.Point, quantity: Quantity) -> float | None:
    """Return a standard error on the scale of fits."""
    return point.stderr / point.value if quantity == "perplexity" and point.stderr is not None else point.stderr


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
