"""How far a relation errs on models it was not fitted to, and near points it was: where intervals come from.

The deviation z of a measurement from a relation is taken on a scale where deviations of a series lie on a line. Of
perplexity z = ln D - ln D̂, a factor on what is lost, over x = ln(D̂(s)/D̂(1/4)). Of accuracy z is the error of acc in
units of 4s (acc0 - h), the share of what the dense model is better than chance per removed quarter, over x = ln 4s. A
series then has an intercept a and a slope b, and

    a = mean + family + trend · ln(parameters) + model + calibration,   b = mean + family + model,   z = a + b x + noise

with independent normal terms; the trend is each family's own. Their variances are learnt from published series by
moments: families weigh the same, models weigh the same within a family. A new model of a known family keeps what is
known of the family, the less the more its size differs from the sizes that are published. Measured points
of the model itself ("anchors") replace the prior of a; of b they leave a prior of mean zero and the second moment that
the published series show, so that an interval widens with the distance from the anchors.

Quantiles are those of Student's t, with the degrees of freedom of the variances that matter most.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from slicecli.estimation.exponents import learn_prior, loss_at_reference, with_loss
from slicecli.estimation.measurements import Point, Series, model_type_of
from slicecli.estimation.relations import LEAST_DAMAGE, REFERENCE, RELATIVE_NOISE, Dense, Prior, Quantity, Relation
from slicecli.estimation.spectra import STUDY_FAMILY

__all__ = [
    "CONFIDENCE",
    "FLOOR",
    "TRACE",
    "Deviation",
    "Shift",
    "Spread",
    "VarianceComponent",
    "coordinate",
    "deviation",
    "interval",
    "learn_domain_shift",
    "learn_spread",
    "little_text_excess",
    "shared_fit",
    "worst_accuracy",
    "worst_perplexity",
]

CONFIDENCE = 0.9
# what repeated measurements of one slice differ by: printed perplexities of reruns agree to half a percent, published
# accuracies have standard errors of about a point
FLOOR: dict[Quantity, float] = {"perplexity": LEAST_DAMAGE, "accuracy": 0.01}
DECADE = math.log(10)
SMALLEST_DAMAGE = 1e-6
LARGEST_DEVIATION = 50.0  # whose exp times any loss is still a number
LEAST_MARGIN = 0.02  # of a dense accuracy above chance
FEWEST_FOR_SLOPE = 3
ENOUGH_FAMILIES = 5
SHORTEST_RANGE = 0.3
# what the published noise is worth, in observations; that of accuracies is mostly of the finite number of questions
PRIOR_DEGREES: dict[Quantity, int] = {"perplexity": 4, "accuracy": 10}
TOKENS_FOR_DOUBLE = 9.0  # calibration tokens for each coordinate with which a slice loses twice as much
LEAST_NOISE = 1e-4
TRACE = 1e-9  # so that a variance of zero has an inverse
FEWEST_DEGREES = 2.0  # below, the quantiles of t say nothing any more


@dataclass(frozen=True)
class Usual:
    """What is assumed of variances before anything is known: each assumption is worth some observations.

    Attributes:
        model: Between models of one family and size.
        trend: Of a family's change for each unit of ln(parameters), about none.
        family: Between families.
    """

    model: float = 0.0
    model_degrees: int = 0
    trend: float = 0.0
    trend_degrees: int = 0
    family: float = 0.0
    family_degrees: int = 0


# of ln D. Few models may be alike by chance; with these, left-out models and families are predicted best, and their
# points lie in the intervals nine times in ten (tried: docs/relations.md)
USUAL_PUBLISHED = Usual(0.02, 6, 0.02, 4, 0.7, 4)
USUAL_STUDY = Usual(0.12, 4)  # of the small models, which are one family; their sizes are not told apart
# of the share of what is better than chance; the models with accuracies are too few to tell families and sizes apart
USUAL_ACCURACY = Usual(0.03, 4)
ALL_FAMILIES = "all models"
NOTHING_USUAL = Usual()


@dataclass(frozen=True)
class Deviation:
    """What is expected of z, at one x."""

    mean: float
    deviation: float
    degrees: float

    @property
    def half_width(self) -> float:
        """Half the width of the interval of z."""
        return _student_quantile((1 + CONFIDENCE) / 2, self.degrees) * self.deviation


@dataclass(frozen=True)
class GroupEffect:
    """One coefficient of one model.

    Attributes:
        size: ln of the model's parameters, where sizes are told apart.
    """

    family: str
    value: float
    size: float | None = None


@dataclass(frozen=True)
class VarianceComponent:
    """Means and variances of one coefficient over models and families, and its trend with the size of a model.

    Attributes:
        mean: Mean over the families, at the middle size.
        trend_variance: Of a family's trend over ln parameters, about none.
        middle: ln parameters at which means are taken.
    """

    mean: float
    family_variance: float
    family_degrees: int
    trend_variance: float
    model_variance: float
    degrees: int
    middle: float
    members: tuple[GroupEffect, ...]

    @classmethod
    def learn(cls, members: Sequence[GroupEffect], usual: Usual = NOTHING_USUAL) -> VarianceComponent:
        """Learn it from the coefficients of several models."""
        sizes = [one.size for one in members if one.size is not None]
        middle = float(np.mean(sizes)) if sizes else 0.0
        squares, degrees, levels, trends = 0.0, 0, [], []
        for family in dict.fromkeys(one.family for one in members):
            own = [one for one in members if one.family == family]
            values = np.array([one.value for one in own])
            places = np.array([0.0 if one.size is None else one.size - middle for one in own])
            trend = 0.0
            if np.ptp(places) > SHORTEST_RANGE:
                trend = float(np.polyfit(places, values, 1)[0])
                trends.append(trend)
            left = values - trend * places
            levels.append(float(left.mean()))
            squares += float(np.var(left)) * len(left)
            degrees += max(0, len(left) - (1 if trend == 0.0 else 2))
        model_degrees = max(1, degrees + usual.model_degrees)
        model_variance = (squares + usual.model_degrees * usual.model) / model_degrees
        family_degrees = max(1, len(levels) - 1 + usual.family_degrees)
        between = float(np.var(levels)) * len(levels) + usual.family_degrees * usual.family
        family_variance = between / family_degrees
        if len(levels) >= ENOUGH_FAMILIES:
            # what the means of families differ by anyway, because each is that of a few models
            family_variance = max(family_variance - model_variance * len(levels) / len(members), 0.0)
        else:  # so few families tell little: they never differ by less than their models do
            family_variance = max(family_variance, model_variance)
        known = float(np.sum(np.square(trends))) + usual.trend_degrees * usual.trend
        return cls(
            mean=float(np.mean(levels)),
            family_variance=family_variance,
            family_degrees=family_degrees,
            trend_variance=known / max(1, len(trends) + usual.trend_degrees),
            model_variance=model_variance,
            degrees=model_degrees,
            middle=middle,
            members=tuple(members),
        )

    def of_new_model(self, family: str, size: float | None = None) -> tuple[float, float, float]:
        """Return mean, variance and degrees of freedom of the coefficient for a model that is not among these."""
        if self.model_variance == 0:
            return self.mean, 0.0, float(self.degrees)
        here = np.array([1.0, self._place(size)])
        own = [one for one in self.members if one.family == family]
        prior = np.array([self.family_variance, self.trend_variance]) + TRACE
        if not own:
            count = len({one.family for one in self.members})
            level = self.family_variance * (1 + 1 / count)
            trend = self.trend_variance * float(here[1]) ** 2
            variance = level + trend + self.model_variance
            # Satterthwaite's degrees of freedom of the sum
            parts = (level**2 + trend**2) / self.family_degrees + self.model_variance**2 / self.degrees
            return self.mean, variance, max(variance**2 / parts, FEWEST_DEGREES)
        places = np.array([[1.0, 0.0 if one.size is None else one.size - self.middle] for one in own])
        values = np.array([one.value - self.mean for one in own])
        covariance = np.linalg.inv(places.T @ places / self.model_variance + np.diag(1 / prior))
        fitted = covariance @ (places.T @ values) / self.model_variance
        variance = float(here @ covariance @ here) + self.model_variance
        # beyond its sizes a family may change as any family does, whatever its own trend was
        beyond = max(places[:, 1].min() - here[1], here[1] - places[:, 1].max(), 0.0)
        variance += max(float(prior[1] - covariance[1, 1]), 0.0) * float(beyond) ** 2
        return self.mean + float(here @ fitted), variance, float(max(self.degrees, FEWEST_DEGREES))

    def _place(self, size: float | None) -> float:
        """Return where a size lies about the middle; a trend is not followed further than a decade beyond the known."""
        known = [one.size for one in self.members if one.size is not None]
        if size is None or not known:
            return 0.0
        return min(max(size, min(known) - DECADE), max(known) + DECADE) - self.middle


@dataclass(frozen=True)
class Shift:
    """What slices lose differently that differ from the published ones in text or method, as an addition to z.

    Attributes:
        slope: How the addition changes with x.
    """

    mean: float
    variance: float
    degrees: float
    slope: float = 0.0

    @classmethod
    def learn(cls, values: Sequence[float], slope: float = 0.0) -> Shift:
        """Learn it from the additions of several models."""
        variance = float(np.var(values, ddof=1)) * (1 + 1 / len(values))
        return cls(float(np.mean(values)), variance, max(float(len(values) - 1), FEWEST_DEGREES), slope)


@dataclass(frozen=True)
class Spread:
    """How a relation errs over published series.

    Attributes:
        parameters: What it is learnt against: fitted to all families alike.
        calibration_variance: Of a between the calibrations of a model.
        noise_variance: Of z about the line of its series.
        prior: Of the parameters of a relation that weighs its points against one.
    """

    relation: Relation
    parameters: tuple[float, ...]
    intercept: VarianceComponent
    slope: VarianceComponent | None
    calibration_variance: float
    noise_variance: float
    prior: Prior | None = None

    def _type(self, family: str) -> str:
        """Return the group that slopes and exponents are shared in."""
        return STUDY_FAMILY if self.relation.is_by_weight else model_type_of(family)

    def _group(self, family: str) -> str:
        """Return the group that levels are shared in."""
        if self.relation.quantity == "accuracy":
            return ALL_FAMILIES
        return STUDY_FAMILY if self.relation.is_by_weight else family

    def _slope(self, family: str, exponent: float) -> tuple[float, float, float]:
        """Return of the slope over x its mean, its variance, and how it goes with the intercept.

        Args:
            exponent: The p that x belongs to, where the relation has one with a prior.
        """
        if self.prior is not None:
            return 0.0, (self.prior.deviation / exponent) ** 2, self.prior.tilt / exponent
        assert self.slope is not None
        mean, variance, _ = self.slope.of_new_model(self._type(family))
        return mean, variance, 0.0

    def base(self, dense: Dense, family: str, size: float | None, shifts: Sequence[Shift] = ()) -> tuple[float, ...]:
        """Return the parameters that a new model is expected to deviate from, see `of_new_model`."""
        if self.prior is None:
            return self.parameters
        level, _, _ = self.intercept.of_new_model(self._group(family), size)
        return with_loss(self.relation, dense, level + sum(shift.mean for shift in shifts), self.prior)

    def of_new_model(
        self, family: str, size: float | None, coordinate: float, shifts: Sequence[Shift] = (), exponent: float = 1.0
    ) -> Deviation:
        """Return what to expect of a model without any measurement.

        Args:
            exponent: The p of its base, where the relation has one with a prior.
        """
        mean, variance, degrees = self.intercept.of_new_model(self._group(family), size)
        slope, slope_variance, tilt = self._slope(family, exponent)
        total = variance + self.calibration_variance
        for shift in shifts:
            mean += shift.mean
            slope += shift.slope
            total += shift.variance
            degrees = min(degrees, shift.degrees)
        total *= (1 + tilt * coordinate) ** 2
        total += slope_variance * coordinate**2 + self.noise_variance
        if self.prior is not None:  # the base is the mean
            mean, slope = 0.0, 0.0
        return Deviation(mean + slope * coordinate, math.sqrt(total), degrees)

    def typical_parameters(
        self, dense: Dense, family: str, size: float | None, shifts: Sequence[Shift] = ()
    ) -> tuple[float, ...]:
        """Return the parameters of the relation for a model without any measurement: those of the expected loss."""
        if self.relation.is_by_weight:
            factor = math.exp(sum(shift.mean for shift in shifts))
            return tuple(factor * value for value in self.parameters)
        if not self.relation.parameters or self.prior is not None:
            return self.base(dense, family, size, shifts)
        place = coordinate(self.relation, dense, self.parameters, REFERENCE)
        expected = self.of_new_model(family, size, place, shifts).mean
        level = displaced(self.relation, dense, self.parameters, REFERENCE, expected)
        return self.relation.fit([(REFERENCE, level)], dense, None)

    def near_anchors(
        self, family: str, anchors: Sequence[tuple[float, float, float]], coordinate: float, exponent: float = 1.0
    ) -> Deviation:
        """Return what to expect of a model with measured points, of which the relation may have been fitted to some.

        Args:
            exponent: The p that was fitted, where the relation has one with a prior.
        """
        mean, variance, _ = self._slope(family, exponent)
        slope_precision = 1 / (variance + mean**2 + 1e-6)
        prior_degrees = PRIOR_DEGREES[self.relation.quantity]
        noise, degrees = self.noise_variance, float(prior_degrees)
        line, covariance = _line(anchors, noise, slope_precision)
        # where there is a prior of the slope, one point is enough for the rest
        spare = len(anchors) - (1 if self.prior is not None else max(1, len(self.relation.parameters)))
        if spare > 0:
            # a point that is measured badly says less of the noise
            squares = sum((z - line[0] - line[1] * x) ** 2 * noise / (noise + measured) for x, z, measured in anchors)
            degrees += spare
            noise = (prior_degrees * noise + squares) / degrees
            line, covariance = _line(anchors, noise, slope_precision)
        here = np.array([1.0, coordinate])
        known = float(here @ covariance @ here)
        if self.prior is not None:  # most of that is of the exponent, which comes from many series
            degrees = (known + noise) ** 2 / (known**2 / max(degrees, self.prior.degrees) + noise**2 / degrees)
        return Deviation(float(here @ line), math.sqrt(known + noise), degrees)


def _line(
    anchors: Sequence[tuple[float, float, float]], noise: float, slope_precision: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return intercept and slope through anchors, and their covariance, where the slope has a prior about zero."""
    places = np.array([[1.0, x] for x, _, _ in anchors])
    weights = np.array([1 / (noise + measured) for _, _, measured in anchors])
    covariance = np.linalg.inv((places * weights[:, None]).T @ places + np.diag([1e-9, slope_precision]))
    return covariance @ (places.T @ (weights * np.array([z for _, z, _ in anchors]))), covariance


def coordinate(relation: Relation, dense: Dense, parameters: Sequence[float], sparsity: float) -> float:
    """Return x of a fraction removed."""
    if relation.quantity == "accuracy":
        return math.log(sparsity / REFERENCE)
    return math.log(_damage(relation, dense, parameters, sparsity) / _damage(relation, dense, parameters, REFERENCE))


def deviation(
    relation: Relation, dense: Dense, parameters: Sequence[float], point: Point
) -> tuple[float, float, float] | None:
    """Return x, z and the variance of the measurement of z; `None` where the slice lost nothing measurable."""
    x = coordinate(relation, dense, parameters, point.sparsity)
    predicted = relation.predict(point.sparsity, dense, parameters)
    error = max(point.stderr or 0.0, FLOOR[relation.quantity])
    if relation.quantity == "accuracy":
        scale = _accuracy_scale(dense, point.sparsity)
        return x, (point.value - predicted) / scale, (error / scale) ** 2
    damage = point.value - dense.value
    if damage <= SMALLEST_DAMAGE:
        return None
    expected = _damage(relation, dense, parameters, point.sparsity)
    return x, math.log(damage / expected), (error / damage) ** 2


def displaced(relation: Relation, dense: Dense, parameters: Sequence[float], sparsity: float, z: float) -> float:
    """Return the ln PPL or accuracy that deviates by z from what a relation predicts."""
    predicted = relation.predict(sparsity, dense, parameters)
    if relation.quantity == "accuracy":
        return predicted + z * _accuracy_scale(dense, sparsity)
    return dense.value + _damage(relation, dense, parameters, sparsity) * math.exp(min(z, LARGEST_DEVIATION))


def interval(
    relation: Relation, dense: Dense, parameters: Sequence[float], sparsity: float, expected: Deviation
) -> tuple[float, float]:
    """Return the interval of ln PPL or accuracy that belongs to what is expected of z."""
    floor = FLOOR[relation.quantity]
    low, high = (
        displaced(relation, dense, parameters, sparsity, expected.mean + sign * expected.half_width) for sign in (-1, 1)
    )
    if relation.quantity == "accuracy":
        middle, half = (low + high) / 2, math.hypot((high - low) / 2, floor)
        return max(middle - half, worst_accuracy(dense)), min(max(middle + half, worst_accuracy(dense)), 1.0)
    ceiling = worst_perplexity(dense)
    return min(max(low - floor, dense.value), ceiling), min(high + floor, ceiling)


def worst_perplexity(dense: Dense) -> float:
    """Return the largest ln PPL that is predicted: that of a uniform guess, unless the dense model is above it."""
    return math.inf if dense.ceiling is None else max(dense.ceiling, dense.value)


def worst_accuracy(dense: Dense) -> float:
    """Return the least accuracy that is predicted: that of a guess, unless the dense model is below it already."""
    return min(dense.chance or 0.0, dense.value)


def learn_spread(relation: Relation, series: Sequence[Series], others: Sequence[Series] = ()) -> Spread:
    """Learn how a relation errs from published series.

    Args:
        others: More series, which tell only how an exponent goes with the loss.
    """
    usable = [one for one in series if not relation.why_not(one.dense)]
    if relation.has_prior:
        is_of_other_text = any(one.is_of_other_text for one in usable)
        return _learn_with_prior(relation, usable, learn_prior(relation, [*usable, *others], is_of_other_text))
    parameters = shared_fit(relation, usable)
    intercepts: dict[tuple[str, str], list[float]] = defaultdict(list)
    slopes: dict[tuple[str, str], list[float]] = defaultdict(list)
    squares, degrees = 0.0, 0
    for one in usable:
        found = [deviation(relation, one.dense, parameters, point) for point in one.points]
        line = np.array([pair for pair in found if pair is not None])
        if len(line) == 0:
            continue
        key = (one.family, one.model)
        if len(line) >= FEWEST_FOR_SLOPE and np.ptp(line[:, 0]) > SHORTEST_RANGE:
            slope, intercept = np.polyfit(line[:, 0], line[:, 1], 1)
            slopes[key].append(float(slope))
            intercepts[key].append(float(intercept) - _excess(relation, one))
            residuals = line[:, 1] - intercept - slope * line[:, 0]
            squares += float(residuals @ residuals)
            degrees += len(line) - 2
        else:
            intercepts[key].append(float(line[:, 1].mean()) - _excess(relation, one))
    return Spread(
        relation=relation,
        parameters=parameters,
        intercept=_levels(relation, usable, intercepts),
        slope=VarianceComponent.learn(
            [GroupEffect(model_type_of(key[0]), float(np.mean(some))) for key, some in slopes.items()]
        ),
        calibration_variance=_variance_within(intercepts),
        noise_variance=max(squares / max(1, degrees), LEAST_NOISE),
    )


def _learn_with_prior(relation: Relation, series: Sequence[Series], prior: Prior) -> Spread:
    """Learn it where every series has its own exponent, which its loss foretells: intercepts are ln D."""
    losses: dict[tuple[str, str], list[float]] = defaultdict(list)
    squares, degrees = 0.0, 0
    for one in series:
        own = relation.fit([(point.sparsity, point.value) for point in one.points], one.dense, prior)
        loss = loss_at_reference(relation, one.dense, own)
        losses[one.family, one.model].append(loss - _excess(relation, one))
        for point in one.points:
            found = deviation(relation, one.dense, own, point)
            if found is not None:
                _, z, measured = found
                squares += z**2 * RELATIVE_NOISE**2 / (RELATIVE_NOISE**2 + measured)
        degrees += len(one.points) - 1
    intercept = _levels(relation, series, losses)
    usual = Dense(math.exp(intercept.mean - prior.level))  # whose loss has the usual exponent
    return Spread(
        relation=relation,
        parameters=with_loss(relation, usual, intercept.mean, prior),
        intercept=intercept,
        slope=None,
        calibration_variance=_variance_within(losses),
        noise_variance=max(squares / max(1, degrees), LEAST_NOISE),
        prior=prior,
    )


def _excess(relation: Relation, series: Series) -> float:
    """Return how much of ln D is due to the amount of calibration text."""
    if relation.is_by_weight or relation.quantity == "accuracy":
        return 0.0
    return little_text_excess(series.tokens_per_coordinate)


def little_text_excess(tokens_per_coordinate: float) -> float:
    """Return by how much ln D of the published method is larger than with endless calibration text.

    Six models with 16 to 1024 rows: D is 1 + 9/u times as large, to within 2.5 %, whatever the model.

    Args:
        tokens_per_coordinate: u, calibration tokens for each coordinate of the stream.
    """
    return math.log1p(TOKENS_FOR_DOUBLE / tokens_per_coordinate)


def _levels(
    relation: Relation, series: Sequence[Series], intercepts: Mapping[tuple[str, str], Sequence[float]]
) -> VarianceComponent:
    levels = {key: float(np.mean(some)) for key, some in intercepts.items()}
    if relation.quantity == "accuracy":
        return VarianceComponent.learn([GroupEffect(ALL_FAMILIES, level) for level in levels.values()], USUAL_ACCURACY)
    sizes = {(one.family, one.model): None if one.parameters is None else math.log(one.parameters) for one in series}
    return VarianceComponent.learn(
        [GroupEffect(family, level, sizes[family, model]) for (family, model), level in levels.items()],
        USUAL_STUDY if relation.is_by_weight else USUAL_PUBLISHED,
    )


def _variance_within(groups: Mapping[tuple[str, str], Sequence[float]]) -> float:
    """Return the variance within groups, of those that have several values."""
    squares = sum(float(np.var(some)) * len(some) for some in groups.values())
    return squares / max(1, sum(len(some) - 1 for some in groups.values()))


def learn_domain_shift(spread: Spread, own_text: Sequence[Series], other_text: Sequence[Series]) -> Shift:
    """Learn how much more is lost on other texts, from models that were measured on both."""
    own, other = (_lines(spread, series) for series in (own_text, other_text))
    both = [model for model in other if model in own]
    slope = float(np.mean([other[model][1] - own[model][1] for model in both]))
    return Shift.learn([other[model][0] - own[model][0] for model in both], slope)


def _lines(spread: Spread, series: Sequence[Series]) -> dict[str, tuple[float, float]]:
    """Return of each model the z at the reference and its slope over x."""
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for one in series:
        for point in one.points:
            pair = deviation(spread.relation, one.dense, spread.parameters, point)
            if pair is not None:
                found[one.model].append(pair[:2])
    lines = {}
    for model, pairs in found.items():
        places, values = np.array(pairs).T
        slope, intercept = np.polyfit(places, values, 1)
        lines[model] = float(intercept), float(slope)
    return lines


def own_fits(relation: Relation, series: Sequence[Series]) -> dict[tuple[str, str], np.ndarray]:
    """Return the parameters of each model, the mean over its series, by family and model."""
    by_model: dict[tuple[str, str], list[tuple[float, ...]]] = defaultdict(list)
    for one in series:
        pairs = [(point.sparsity, point.value) for point in one.points]
        by_model[one.family, one.model].append(relation.fit(pairs, one.dense, None))
    return {key: np.mean(np.array(fits), axis=0) for key, fits in by_model.items()}


def shared_fit(relation: Relation, series: Sequence[Series]) -> tuple[float, ...]:
    """Fit one set of parameters to several models: the mean of their own fits, all families weighing the same."""
    if not relation.parameters:
        return ()
    if relation.is_by_weight:
        return (_steady_constant(relation, series),)
    by_family: dict[str, list[np.ndarray]] = defaultdict(list)
    for (own_family, _), values in own_fits(relation, series).items():
        by_family[own_family].append(values)
    means = [np.mean(np.array(fits), axis=0) for fits in by_family.values()]
    chosen = np.mean(np.array(means), axis=0)
    return tuple(float(value) for value in chosen)


def _steady_constant(relation: Relation, series: Sequence[Series]) -> float:
    """Return the c of D = c x(k) with the least mean absolute error over series, each model weighing the same.

    That is the median of D/x, weighted by x: least squares would let the most fragile model decide.
    """
    pairs = []
    for one in series:
        for point in one.points:
            weight = relation.weight(one.dense, point.sparsity)
            pairs.append(((point.value - one.dense.value) / weight, weight / len(one.points)))
    pairs.sort()
    half, seen = sum(weight for _, weight in pairs) / 2, 0.0
    for ratio, weight in pairs:
        seen += weight
        if seen >= half:
            return ratio
    return 1.0


def _accuracy_scale(dense: Dense, sparsity: float) -> float:
    """Return what z counts: what the model is better than a guess, for each quarter of the hidden size."""
    return max(dense.value - (dense.chance or 0.0), LEAST_MARGIN) * sparsity / REFERENCE


def _student_quantile(probability: float, degrees: float) -> float:
    """Return a quantile of Student's t, by its expansion about the normal one (Abramowitz & Stegun, 26.7.5).

    At 95 % it errs by half a percent with 2 degrees of freedom and by less with more. To import `scipy.special` would
    make an estimate half as long again.
    """
    z = NormalDist().inv_cdf(probability)
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * degrees**4)
    )


def _damage(relation: Relation, dense: Dense, parameters: Sequence[float], sparsity: float) -> float:
    """Return D̂, at least a trace."""
    return max(relation.predict(sparsity, dense, parameters) - dense.value, SMALLEST_DAMAGE)
