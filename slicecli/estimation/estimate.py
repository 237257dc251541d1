"""The estimate: what slices of a model would cost and how good they would be, from its config and dense figures.

Costs are exact (`slicecli.estimation.cost`); quality is predicted, by a relation and with an interval. Nothing is
loaded and nothing measured, and torch is not imported.

Legend: d hidden size, k dim kept, s = 1 - k/d, D = ln(PPL/PPL0).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from slicecli.dimensions import Dimensions
from slicecli.errors import RequestError
from slicecli.estimation.cost import Cost, CostModel, SpeedUp, Workload, speed_up
from slicecli.estimation.curves import Curve
from slicecli.estimation.devices import Device
from slicecli.estimation.measurements import Figure, published_series
from slicecli.estimation.predictions import (
    DEFAULT_RELATION,
    FARTHEST,
    Prediction,
    predict_new,
    shared_parameters,
    spread_of,
)
from slicecli.estimation.relations import Dense, Quantity, Relation, relation_named
from slicecli.evaluation.chance import chance_level
from slicecli.plan import DTYPE_BYTES, Method, SliceSizes, preferred_dims

__all__ = ["Estimate", "Forecast", "Slice", "estimate", "forecast_by_curve", "forecast_new", "nearest_dims"]

LARGEST_LOGARITHM = 700.0
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Forecast:
    """One figure that can be predicted.

    Attributes:
        quantity: Perplexity or accuracy.
        evaluation: On which text or task.
        dense: The dense figure.
        chance: Chance level of a task.
        relation: Name of the relation.
        basis: What the interval rests on, in words.
        predict: The prediction at an s.
        paper: The value by the paper's relation at an s, as people quote it; `None` where that has no meaning.
        points: Measured slices it was fitted to: s, figure and standard error, as people quote them.
        notes: What the user should know of it.
    """

    quantity: Quantity
    evaluation: str
    dense: Figure
    chance: float | None
    relation: str
    basis: str
    predict: Callable[[float], Prediction]
    paper: Callable[[float], float] | None
    points: tuple[tuple[float, float, float | None], ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self, sparsity: float) -> dict[str, Any]:
        """Return the prediction at an s as plain data, perplexities themselves and not their logarithms."""
        prediction = self.predict(sparsity)
        quoted = _quoted(self.quantity)
        return {
            "value": quoted(prediction.value),
            "low": quoted(prediction.low),
            "high": quoted(prediction.high),
            "relation": prediction.relation,
            "source": self.basis,
            "is_outside": prediction.is_outside or sparsity > FARTHEST,
            "paper": None if self.paper is None else self.paper(sparsity),
        }


@dataclass(frozen=True)
class Slice:
    """What one slice would be.

    Attributes:
        dim: k.
        sparsity: s.
        is_legal: Whether the program would make it.
        nearest_legal: The legal dims next to it, where it is not legal.
        cost: What it costs.
        speed_up: Against the dense model, on a device.
    """

    dim: int
    sparsity: float
    is_legal: bool
    nearest_legal: tuple[int, ...]
    cost: Cost
    speed_up: SpeedUp | None


@dataclass(frozen=True)
class Estimate:
    """The whole estimate.

    Attributes:
        model: Hub id or folder name.
        model_type: Its family.
        method: How it would be sliced.
        layout: How slices would be written.
        hidden_size: d.
        dtype: Of weights and cache.
        workload: What is served.
        device: The device of the speed-ups.
        dense: What the dense model costs.
        slices: The slices.
        forecasts: What is predicted of each.
        parameters: Parameters at a dim.
        notes: What the user should know.
    """

    model: str
    model_type: str
    method: Method
    layout: str
    hidden_size: int
    dtype: str
    workload: Workload
    device: Device | None
    dense: Cost
    slices: tuple[Slice, ...]
    forecasts: tuple[Forecast, ...]
    parameters: Callable[[int], int]
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as `estimate --format json` prints it."""
        perplexity = [one for one in self.forecasts if one.quantity == "perplexity"]
        tasks = [one for one in self.forecasts if one.quantity == "accuracy"]
        dense: dict[str, Any] = _cost_json(self.dense)
        if perplexity:
            dense["perplexity"] = {
                "value": perplexity[0].dense.value,
                "text": perplexity[0].evaluation,
                "source": perplexity[0].dense.source,
            }
        if tasks:
            dense["accuracy"] = {
                one.evaluation: {"value": one.dense.value, "source": one.dense.source, "chance": one.chance}
                for one in tasks
            }
        return {
            "model": self.model,
            "model_type": self.model_type,
            "method": self.method,
            "layout": self.layout,
            "hidden_size": self.hidden_size,
            "dtype": self.dtype,
            "workload": dataclasses.asdict(self.workload),
            "device": None if self.device is None else dataclasses.asdict(self.device),
            "dense": dense,
            "estimates": [self._slice_json(one, perplexity, tasks) for one in self.slices],
            "notes": list(self.notes),
        }

    def _slice_json(self, one: Slice, perplexity: Sequence[Forecast], tasks: Sequence[Forecast]) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "dim": one.dim,
            "sparsity": one.sparsity,
            "legal": one.is_legal,
            "nearest_legal": list(one.nearest_legal),
            **_cost_json(one.cost),
            "speed_up": None if one.speed_up is None else one.speed_up.to_json(),
        }
        if perplexity:
            fields["perplexity"] = perplexity[0].to_json(one.sparsity)
        if tasks:
            fields["accuracy"] = {forecast.evaluation: forecast.to_json(one.sparsity) for forecast in tasks}
        return fields


def _cost_json(cost: Cost) -> dict[str, Any]:
    fields = cost.to_json()
    by_dtype = {dtype: cost.parameters * DTYPE_BYTES[dtype] for dtype in DTYPES}
    return {
        "parameters": fields.pop("parameters"),
        "bytes": fields.pop("bytes"),
        "bytes_by_dtype": by_dtype,
        "flops_per_token": {
            "prefill": fields.pop("flops_per_token_prefill"),
            "decode": fields.pop("flops_per_token_decode"),
        },
        **fields,
    }


def estimate(
    model: str,
    dimensions: Dimensions,
    sizes: SliceSizes,
    dims: Sequence[int],
    *,
    method: Method,
    slice_head: bool | None,
    model_type: str,
    dtype: str,
    workload: Workload,
    device: Device | None,
    forecasts: Sequence[Forecast],
) -> Estimate:
    """Put an estimate together.

    Args:
        model: Hub id or folder name.
        dimensions: Its sizes.
        sizes: What a slice of it may be, by the method.
        dims: The slices asked for.
        method: How it would be sliced.
        slice_head: Whether the published method slices the input of the head.
        model_type: Its family.
        dtype: Of weights and cache.
        workload: What is served.
        device: For speed-ups.
        forecasts: What is predicted.

    Raises:
        RequestError: A dim is not between 1 and d - 1.
    """
    costs = CostModel(dimensions, method, slice_head)
    dense = costs.dense(dtype, workload)
    slices = []
    for dim in dims:
        if not 0 < dim < dimensions.hidden_size:
            sizes.check_dim(dim)
        cost = costs.sliced(dim, dtype, workload)
        is_legal = dim in sizes.legal_dims()
        slices.append(
            Slice(
                dim=dim,
                sparsity=1 - dim / dimensions.hidden_size,
                is_legal=is_legal,
                nearest_legal=() if is_legal else _around(sizes.legal_dims(), dim),
                cost=cost,
                speed_up=None if device is None else speed_up(dense, cost, workload, device),
            )
        )
    return Estimate(
        model=model,
        model_type=model_type,
        method=method,
        layout="custom-code" if method == "slicegpt" else dimensions.layout,
        hidden_size=dimensions.hidden_size,
        dtype=dtype,
        workload=workload,
        device=device,
        dense=dense,
        slices=tuple(slices),
        forecasts=tuple(forecasts),
        parameters=lambda dim: costs.sliced(dim, dtype, workload).parameters,
        notes=tuple(_notes(slices, forecasts)),
    )


def _notes(slices: Sequence[Slice], forecasts: Sequence[Forecast]) -> list[str]:
    notes = [note for forecast in forecasts for note in forecast.notes]
    far = [one.dim for one in slices if one.sparsity > FARTHEST]
    if far and forecasts:
        notes.append(
            f"Nothing is published beyond s = {FARTHEST}; what is said of dim {', '.join(map(str, far))} is a guess."
        )
    illegal = [one for one in slices if not one.is_legal]
    for one in illegal:
        nearest = " and ".join(map(str, one.nearest_legal)) or "none"
        notes.append(f"A dim of {one.dim} is not legal here; the nearest legal: {nearest}.")
    return list(dict.fromkeys(notes))


def _around(legal: range, dim: int) -> tuple[int, ...]:
    below = [value for value in legal if value < dim][-1:]
    above = [value for value in legal if value > dim][:1]
    return tuple(below + above)


def nearest_dims(sizes: SliceSizes, sparsities: Sequence[float]) -> list[int]:
    """Return the legal dims nearest to fractions removed, each once, from wide to narrow.

    Raises:
        RequestError: The model has no legal dim.
    """
    legal = preferred_dims(sizes)
    if not legal:
        raise RequestError("This model has no legal dim below its hidden size.")
    wishes = [(1 - sparsity) * sizes.hidden_size for sparsity in sparsities]
    found = {min(legal, key=lambda dim: (abs(dim - wish), dim)) for wish in wishes}
    return sorted(found, reverse=True)


def smallest_dim_within(sizes: SliceSizes, forecast: Forecast, most: float) -> int:
    """Return the smallest legal dim whose predicted perplexity is within a limit.

    Args:
        sizes: What a slice may be.
        forecast: Of the perplexity.
        most: The limit.

    Raises:
        RequestError: There is none.
    """
    legal = preferred_dims(sizes)
    fitting = [dim for dim in legal if forecast.predict(1 - dim / sizes.hidden_size).value <= math.log(max(most, 1e-9))]
    if not fitting:
        raise RequestError(
            f"No slice is predicted to have a perplexity of {most:g} or less; the dense model has "
            f"{forecast.dense.value:.4g}.",
            "Allow more.",
        )
    # from the wide end down to the first that is over, so that a relation that turns back fools nobody
    best = legal[-1]
    for dim in reversed(legal):
        if dim not in set(fitting):
            break
        best = dim
    return best


def forecast_new(
    quantity: Quantity,
    evaluation: str,
    figure: Figure,
    family: str,
    method: Method,
    relation: str | None = None,
    chance: float | None = None,
    perplexity: Forecast | None = None,
) -> Forecast:
    """Return the forecast for a model of which no slice is measured.

    Args:
        quantity: Perplexity or accuracy.
        evaluation: On which text or task.
        figure: The dense figure.
        family: The model's `model_type`.
        method: How it would be sliced.
        relation: Name of the relation; `None` takes the default.
        chance: Chance level of a task; `None` looks it up.
        perplexity: The forecast of the perplexity, for relations that predict accuracy from it.

    Raises:
        RequestError: There is no such relation, or it has no meaning here.
    """
    chosen = relation_named(relation or DEFAULT_RELATION[quantity], quantity)
    level = (chance_level(evaluation) if chance is None else chance) if quantity == "accuracy" else None
    dense = Dense(
        math.log(figure.value) if quantity == "perplexity" else figure.value,
        level,
        None if perplexity is None else _log_ratio(perplexity),
    )
    obstacle = chosen.why_not(dense)
    if obstacle:
        raise RequestError(
            f"The relation {chosen.name!r} says nothing of {evaluation}: {obstacle}.",
            "Give --chance TASK=H or --dense-perplexity, or another relation.",
        )
    spread = spread_of(chosen.name, quantity)
    parameters = shared_parameters(chosen, family)
    return Forecast(
        quantity=quantity,
        evaluation=evaluation,
        dense=figure,
        chance=level,
        relation=chosen.name,
        basis=_basis(quantity, family),
        predict=lambda sparsity: predict_new(spread, parameters, dense, family, method, sparsity),
        paper=_paper(quantity, dense),
        notes=tuple(_new_notes(quantity, evaluation, family, method, level)),
    )


def _basis(quantity: Quantity, family: str) -> str:
    series = published_series(quantity)
    models = dict.fromkeys((one.model, one.family) for one in series)
    own = sum(1 for _, other in models if other == family)
    return f"published SliceGPT measurements of {len(models)} models, {own} of them of type {family}"


def _new_notes(quantity: Quantity, evaluation: str, family: str, method: Method, chance: float | None) -> list[str]:
    notes = []
    if not any(one.family == family for one in published_series(quantity)):
        notes.append(f"No measurement of type {family} is published: the intervals are those of any family.")
    if method == "refit":
        notes.append(
            "What is published is measured with SliceGPT; on the models of docs/published.md the refit lost 0.5 to "
            "0.75 times as much in ln PPL, and intervals reach down accordingly."
        )
    if quantity == "perplexity" and evaluation != "wikitext2":
        notes.append(
            "Published perplexities are on wikitext2 after calibration on it; on another text than that of the "
            "calibration slices lose far more (on c4 two to nine times as much in ln PPL)."
        )
    if quantity == "accuracy" and chance is None:
        notes.append(f"The chance level of {evaluation} is not known and taken as 0: give --chance {evaluation}=H.")
    return notes


def forecast_by_curve(curve: Curve, source: str) -> Forecast:
    """Return the forecast of a fitted curve.

    Args:
        curve: The curve.
        source: Where it comes from, in words.
    """
    series = curve.series
    quoted = _quoted(series.quantity)
    count = len(series.points)
    error = (
        ""
        if not math.isfinite(curve.loo_error)
        else f", leave-one-out error {curve.loo_error:.2g}" + (" in ln PPL" if series.quantity == "perplexity" else "")
    )
    return Forecast(
        quantity=series.quantity,
        evaluation=series.evaluation,
        dense=Figure(quoted(series.dense.value), source),
        chance=series.dense.chance,
        relation=curve.relation,
        basis=f"{count} measured slice{'s' * (count != 1)} ({source}){error}; {curve.reason}",
        predict=curve.predict,
        paper=_paper(series.quantity, series.dense),
        points=tuple(
            (
                point.sparsity,
                quoted(point.value),
                None
                if point.stderr is None
                else point.stderr * (quoted(point.value) if series.quantity == "perplexity" else 1.0),
            )
            for point in series.points
        ),
    )


def _paper(quantity: Quantity, dense: Dense) -> Callable[[float], float] | None:
    paper: Relation = relation_named("paper", quantity)
    if paper.why_not(dense):
        return None
    quoted = _quoted(quantity)
    return lambda sparsity: quoted(paper.predict(sparsity, dense, ()))


def _log_ratio(forecast: Forecast) -> Callable[[float], float]:
    level = math.log(forecast.dense.value)
    return lambda sparsity: max(0.0, forecast.predict(sparsity).value - level)


def _quoted(quantity: Quantity) -> Callable[[float], float]:
    """Return what turns a prediction into the figure people quote; one that has no float becomes the largest."""
    if quantity == "accuracy":
        return lambda value: value
    return lambda value: math.exp(min(value, LARGEST_LOGARITHM))


def checked_accuracies(values: Mapping[str, float], what: str) -> dict[str, float]:
    """Return accuracies by task, refusing what is no fraction.

    Raises:
        RequestError: One is not between 0 and 1.
    """
    for task, value in values.items():
        if not 0 <= value <= 1:
            raise RequestError(f"{what} {task}={value:g} is not between 0 and 1.", "Give a fraction, such as 0.79.")
    return dict(values)
