"""How fast a loss grows with what is removed, learnt from published series: the prior of relations with an exponent.

Of a series, take the exponent p and the level, ln(D / ln PPL0) at a quarter of the hidden size. Over all published
models and texts the exponents lie near one line over the levels: what loses more grows more slowly. So one measured
slice tells much of the exponent.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from slicecli.estimation.measurements import Series
from slicecli.estimation.relations import REFERENCE, Dense, Prior, Relation

__all__ = ["learn_prior", "loss_at_reference", "with_loss"]

FEWEST_FOR_TILT = 4  # models and texts; with fewer, the exponent is taken to be the same for all
FEWEST_POINTS = 3
USUAL_DEVIATION = 0.3
LEVEL_DEVIATIONS = 3  # wide, so that the level is the points' own where they tell it


def loss_at_reference(relation: Relation, dense: Dense, parameters: Sequence[float]) -> float:
    """Return ln D at the reference."""
    return math.log(relation.predict(REFERENCE, dense, parameters) - dense.value)


def with_loss(relation: Relation, dense: Dense, loss: float, prior: Prior) -> tuple[float, float]:
    """Return the parameters that are expected of a model with a ln D at the reference."""
    exponent = prior.at(loss, dense)
    return math.exp(loss - loss_at_reference(relation, dense, (1.0, exponent))), exponent


def learn_prior(relation: Relation, series: Sequence[Series], is_for_other_text: bool = False) -> Prior:
    """Learn how exponents go with losses, from several models and texts.

    Args:
        is_for_other_text: It is for a text of another kind than the slices are calibrated on, as few series are.
    """
    grouped: dict[tuple[str, str], list[tuple[float, float]]] = defaultdict(list)
    for one in series:
        if len(one.points) >= FEWEST_POINTS:
            parameters = relation.fit([(point.sparsity, point.value) for point in one.points], one.dense, None)
            level = loss_at_reference(relation, one.dense, parameters) - math.log(one.dense.value)
            grouped[one.model, one.evaluation].append((level, parameters[1]))
    levels, exponents = np.array([np.mean(some, axis=0) for some in grouped.values()]).reshape(-1, 2).T
    count = len(levels)
    if count < FEWEST_FOR_TILT:
        return Prior(float(exponents.mean()) if count else 1.0, USUAL_DEVIATION)
    tilt = float(np.polyfit(levels, exponents, 1)[0])
    left = exponents - exponents.mean() - tilt * (levels - levels.mean())
    # the line itself is known from these few only
    variance = float(left @ left) / (count - 2) * (1 + 2 / count)
    if is_for_other_text:
        variance *= 2  # texts may differ as much as models do
    return Prior(
        exponent=float(exponents.mean()),
        deviation=math.sqrt(variance),
        tilt=tilt,
        level=float(levels.mean()),
        level_deviation=LEVEL_DEVIATIONS * float(levels.std(ddof=1)),
        degrees=count - 2,
    )
