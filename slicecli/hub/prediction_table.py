"""The table of predictions on a card: a row for each usual dim and each measured one, and its plot.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from slicecli.hub.card import PLOT_FILE

if TYPE_CHECKING:
    from slicecli.estimation.forecasts import Forecast

__all__ = ["with_predictions"]

HALF = 0.5  # of a unit of hidden size: closer than that is the same dim


def with_predictions(
    record: dict[str, Any], forecasts: Sequence[Forecast]
) -> tuple[dict[str, Any], Mapping[str, bytes]]:
    """Return a record with forecasts in it, as tables for the usual dims, and their plots by file name.

    They are for slices that keep all MLP channels, so one that does not has none.
    """
    if not forecasts or record["mlp_dim"] is not None:
        return record, {}
    known = {one["dim"]: one["parameters"] for one in record["other_dims"]}
    known[record["dim"]] = record["parameters"]["sliced"]
    measured = {round((1 - s) * record["hidden_size"]) for forecast in forecasts for s, _, _ in forecast.points}
    rows = {dim: known.get(dim) or _parameters_at(dim, known) for dim in known.keys() | measured}
    predictions = [
        {
            **forecast.about_json(),
            "estimates": [
                _row(forecast, dim, count, record["hidden_size"]) for dim, count in sorted(rows.items(), reverse=True)
            ],
        }
        for forecast in forecasts
    ]
    record = {**record, "predictions": predictions}
    plot = _draw(record, forecasts)
    files = {**record["files"], PLOT_FILE: hashlib.sha256(plot).hexdigest()}
    return {**record, "files": files}, {PLOT_FILE: plot}


def _parameters_at(dim: int, known: Mapping[int, int]) -> int | None:
    """Return a slice's parameters from those of others: they are a polynomial in k of degree two at most."""
    if len(known) < 3:
        return None
    places = sorted(known)[:: max(1, (len(known) - 1) // 2)][:3]
    total = Fraction(0)
    for place in places:
        others = [other for other in places if other != place]
        total += known[place] * Fraction(
            math.prod(dim - other for other in others), math.prod(place - other for other in others)
        )
    return int(total) if total.denominator == 1 else None


def _row(forecast: Forecast, dim: int, parameters: int | None, hidden_size: int) -> dict[str, Any]:
    sparsity = 1 - dim / hidden_size
    found = forecast.to_json(sparsity)
    measured = (figure for s, figure, _ in forecast.points if abs(s - sparsity) * hidden_size < HALF)
    return {
        "dim": dim,
        "sparsity": sparsity,
        "parameters": parameters,
        **{name: found[name] for name in ("value", "low", "high", "is_outside", "paper")},
        "measured": next(measured, None),
    }


def _draw(record: Mapping[str, Any], forecasts: Sequence[Forecast]) -> bytes:
    """Return the plot of the perplexity, and of every task that was measured."""
    from slicecli.estimation.plot import picture_of_forecast, quality_picture

    shown = [one for one in forecasts if one.quantity == "perplexity" or one.points] or list(forecasts)
    title = f"{record['source']['model']}, sliced by {record['method']}"
    widest = max(1 - one["dim"] / record["hidden_size"] for one in record["predictions"][0]["estimates"])
    return quality_picture(
        [
            picture_of_forecast(title, forecast, record["hidden_size"], [record["sparsity"]], widest)
            for forecast in shown
        ]
    )
