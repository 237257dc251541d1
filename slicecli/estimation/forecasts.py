"""What can be predicted of a model's slices: dense figures, relations and measurements put together.

`ForecastInputs` is what a user says; the rest is looked for, see `slicecli.estimation.dense_figures`. Each text
or task of which a dense figure is known becomes a `Forecast`: by a curve fitted to measured slices where there is one,
else by a relation and the intervals of published measurements.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from slicecli.checkpoint.source import Source
from slicecli.errors import RequestError
from slicecli.estimation.curves import Curve, fit_curve
from slicecli.estimation.dense_figures import accuracies, dense_perplexity
from slicecli.estimation.intervals import (
    DEFAULT_RELATION,
    FARTHEST,
    Prediction,
    calibration_shift,
    domain_shift_of,
    known_range,
    predict_new,
    published_calibration_shift,
    refit_shift_of,
    refit_shift_with_text,
    shifted,
    spread_of,
)
from slicecli.estimation.measurements import Figure, Point, Series, family_of, published_series, published_slices_of
from slicecli.estimation.relations import Dense, Quantity, quoted_by, quoted_error, relation_named, relations_of
from slicecli.estimation.results import check_relation, read_curves
from slicecli.estimation.spectra import Weights, read_spectrum, study_models
from slicecli.evaluation.chance import chance_level
from slicecli.family.context_length import default_length
from slicecli.family.dimensions import Dimensions
from slicecli.family.slice_plan import Method
from slicecli.record.record import read_record
from slicecli.runtime.inputs import check_count, local_path
from slicecli.runtime.json import read_json

USUAL_SAMPLES = 128

__all__ = ["Forecast", "ForecastInputs", "find_forecasts", "forecast_by_curve", "forecast_new"]


@dataclass(frozen=True)
class Forecast:
    """One figure that can be predicted.

    Attributes:
        parameters: Name and value of each of its parameters, and the standard error where they were fitted to more
            points than they are.
        range: The least and the largest s of what they were fitted to, or of what the intervals are learnt from.
        basis: What the interval rests on, in words.
        paper: The value by the paper's relation at an s, as people quote it; `None` where that has no meaning.
        points: Measured slices it was fitted to: s, figure and standard error, as people quote them.
        notes: What the user should know of it.
    """

    quantity: Quantity
    evaluation: str
    dense: Figure
    chance: float | None
    relation: str
    parameters: tuple[tuple[str, float, float | None], ...]
    range: tuple[float, float]
    basis: str
    predict: Callable[[float], Prediction]
    paper: Callable[[float], float] | None
    points: tuple[tuple[float, float, float | None], ...] = ()
    notes: tuple[str, ...] = ()

    def to_json(self, sparsity: float) -> dict[str, Any]:
        """Return the prediction at an s as plain data, perplexities themselves and not their logarithms."""
        prediction = self.predict(sparsity)
        quoted = quoted_by(self.quantity)
        return {
            "value": quoted(prediction.value),
            "low": quoted(prediction.low),
            "high": quoted(prediction.high),
            "relation": prediction.relation,
            "source": self.basis,
            "is_outside": prediction.is_outside or sparsity > FARTHEST,
            "paper": None if self.paper is None else self.paper(sparsity),
        }

    def about_json(self) -> dict[str, Any]:
        """Return all but the predictions themselves as plain data."""
        return {
            "quantity": self.quantity,
            "evaluation": self.evaluation,
            "dense": {"value": self.dense.value, "source": self.dense.source},
            "chance": self.chance,
            "relation": self.relation,
            "formula": relation_named(self.relation, self.quantity).formula,
            "parameters": {name: {"value": value, "stderr": error} for name, value, error in self.parameters},
            "valid_sparsity": list(self.range),
            "basis": self.basis,
            "measured_slices": len(self.points),
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class ForecastInputs:
    """What a user knows of a model and its slices.

    Attributes:
        text: Name of the text whose perplexity is wanted.
        calibration: Name of the text it will be calibrated on.
        calibration_tokens: How many tokens of it; `None` takes what `slicecli slice` takes.
        dense_perplexity: Of the dense model on the text; `None` looks for it.
        dense_accuracies: Of the dense model by task, between 0 and 1; others are looked for.
        chances: Chance levels by task; others are looked up.
        measured: Perplexity of slices on the text, by dim.
        measured_accuracies: Accuracy of slices, between 0 and 1, by task and dim.
        relation: Name of the relation to predict by; `None` takes the default, or the best by leave-one-out.
        curve: File, or Hub id or folder of a slice, with fitted curves.
    """

    text: str = "wikitext2"
    calibration: str = "wikitext2"
    calibration_tokens: int | None = None
    dense_perplexity: float | None = None
    dense_accuracies: Mapping[str, float] = field(default_factory=dict)
    chances: Mapping[str, float] = field(default_factory=dict)
    measured: Mapping[int, float] = field(default_factory=dict)
    measured_accuracies: Mapping[str, Mapping[int, float]] = field(default_factory=dict)
    relation: str | None = None
    curve: str | None = None
    spectrum: Path | None = None

    def check(self, hidden_size: int) -> None:
        """Refuse figures that cannot be."""
        check_count(
            self.calibration_tokens, "{} calibration tokens are", "Use --samples", words=("too few", "too many")
        )
        if self.dense_perplexity is not None and not 1 < self.dense_perplexity < math.inf:
            raise RequestError(
                f"A perplexity of {self.dense_perplexity:g} is not above 1 and finite.", "Check the figure."
            )
        for what, values in (("dense accuracy", self.dense_accuracies), ("chance level", self.chances)):
            for task, value in values.items():
                if not 0 <= value <= 1:
                    raise RequestError(
                        f"A {what} of {value:g} on {task} is not between 0 and 1.", "Use a fraction, such as 0.79."
                    )
        for dim, value in self.measured.items():
            if not 0 < dim < hidden_size or not value > 1:
                raise RequestError(
                    f"This model cannot have a slice of dim {dim} with a perplexity of {value:g}.",
                    f"Use a dim below {hidden_size} and a perplexity above 1.",
                )
        for task, by_dim in self.measured_accuracies.items():
            for dim, value in by_dim.items():
                if not 0 < dim < hidden_size or not 0 <= value <= 1:
                    raise RequestError(
                        f"This model cannot have a slice of dim {dim} with an accuracy of {value:g} on {task}.",
                        f"Use a dim below {hidden_size} and an accuracy between 0 and 1.",
                    )
        if self.relation is not None:
            check_relation(self.relation)
        if self.curve is not None and (self.has_slices or self.relation is not None or self.spectrum is not None):
            raise RequestError(
                "A curve already has a relation and points.",
                "Leave out --relation, --measured, --measured-accuracy and --spectrum.",
            )

    @property
    def has_slices(self) -> bool:
        """Whether slices are measured."""
        return bool(self.measured or self.measured_accuracies)


def _names(quantity: Quantity) -> list[str]:
    return [one.name for one in relations_of(quantity)]


def find_forecasts(source: Source, dimensions: Dimensions, method: Method, knowledge: ForecastInputs) -> list[Forecast]:
    """Return what can be predicted of a model's slices, perplexity first."""
    parameters = dimensions.parameters()
    knowledge.check(dimensions.hidden_size)
    text = knowledge.text
    kind = str(source.fields.get("model_type"))
    family = family_of(kind, dimensions.vocabulary)
    forecasts: list[Forecast] = []
    published = _known_curves(source, method, knowledge)
    if published is not None:
        curves, origin = published
        forecasts = [forecast_by_curve(one, origin) for one in _fitting(curves, method, text)]
    known = {(one.quantity, one.evaluation) for one in forecasts}
    if not any(one.quantity == "perplexity" for one in forecasts):
        perplexity = _forecast_perplexity(source, dimensions, family, method, knowledge)
        forecasts = ([] if perplexity is None else [perplexity]) + forecasts
    first = forecasts[0] if forecasts and forecasts[0].quantity == "perplexity" else None
    if first is not None and knowledge.text != knowledge.calibration and not first.points:
        # what is lost on another text than the calibration's says nothing of tasks
        first = _forecast_perplexity(source, dimensions, family, method, replace(knowledge, calibration=text))
    name = knowledge.relation if knowledge.relation in _names("accuracy") else None
    dense_accuracies = accuracies(source.folder, source.name, knowledge.dense_accuracies)
    for task in knowledge.measured_accuracies:
        if task not in dense_accuracies:
            raise RequestError(
                f"Measured slices require the dense accuracy on {task}.", f"Pass --dense-accuracy {task}=A."
            )
    for task, figure in dense_accuracies.items():
        if task in knowledge.measured_accuracies:
            forecasts.append(_forecast_accuracy(source, dimensions, kind, method, knowledge, task, figure, name, first))
        elif ("accuracy", task) not in known:
            chance = knowledge.chances.get(task)
            found = forecast_new("accuracy", task, figure, kind, method, name, chance, first, parameters=parameters)
            forecasts.append(found)
    return forecasts


def _forecast_perplexity(
    source: Source, dimensions: Dimensions, family: str, method: Method, knowledge: ForecastInputs
) -> Forecast | None:
    """Return the forecast of the perplexity where nobody has a curve of it; `None` without a dense figure."""
    text, hidden_size = knowledge.text, dimensions.hidden_size
    figure = dense_perplexity(source.folder, source.name, text, knowledge.dense_perplexity)
    name = knowledge.relation if knowledge.relation in _names("perplexity") else None
    path = knowledge.spectrum
    spectrum = None if path is None else read_spectrum(path, method, hidden_size)
    if not knowledge.measured:
        if figure is None:
            return None
        is_other_text = text != knowledge.calibration
        tokens = _calibration_tokens(dimensions, knowledge)
        own = published_slices_of(source.name) if name is None and spectrum is None and not is_other_text else None
        if own is not None and own.evaluation == text:
            return _forecast_by_published(own, figure, method, dimensions, tokens)
        if spectrum is not None:
            name = name or ("fisher" if spectrum.probe is None else "probe")
        return forecast_new(
            "perplexity",
            text,
            figure,
            family,
            method,
            name,
            is_other_text=is_other_text,
            spectrum=spectrum,
            parameters=dimensions.parameters(),
            vocabulary=dimensions.vocabulary,
            is_centred=dimensions.adapter.norm.is_centred,
            tokens_per_unknown=tokens / dimensions.largest_regression(),
            tokens_per_coordinate=tokens / hidden_size,
        )
    if figure is None:
        raise RequestError("Measured slices require the dense perplexity.", "Pass --dense-perplexity.")
    points = _points({dim: math.log(value) for dim, value in knowledge.measured.items()}, hidden_size)
    dense = Dense(math.log(figure.value), **_measured_on_dense(spectrum), ceiling=math.log(dimensions.vocabulary))
    series = Series(source.name, family, method, knowledge.calibration, "perplexity", text, dense, points)
    found = forecast_by_curve(fit_curve(series, name), "given", figure.source)
    better = [point.dim for point in points if point.value < dense.value]
    return _with_warning(found, better, "The perplexity passed for dim {} is below", "of the same text")


def _forecast_accuracy(
    source: Source,
    dimensions: Dimensions,
    kind: str,
    method: Method,
    knowledge: ForecastInputs,
    task: str,
    figure: Figure,
    name: str | None,
    perplexity: Forecast | None,
) -> Forecast:
    """Return the forecast of an accuracy of which slices are measured."""
    chance = knowledge.chances.get(task)
    points = _points(knowledge.measured_accuracies[task], dimensions.hidden_size)
    dense = Dense(
        figure.value,
        chance_level(task) if chance is None else chance,
        None if perplexity is None else _log_ratio(perplexity),
    )
    series = Series(source.name, kind, method, knowledge.calibration, "accuracy", task, dense, points)
    found = forecast_by_curve(fit_curve(series, name), "given", figure.source)
    better = [point.dim for point in points if point.value > dense.value]
    warned = _with_warning(found, better, f"The accuracy on {task} passed for dim {{}} is above", "measured alike")
    guessing = [f"{point.dim}" for point in points if dense.chance is not None and point.value < dense.chance]
    below = f"The accuracy on {task} passed for dim {', '.join(guessing)} is below chance, {dense.chance}; check both."
    notes = [below] * bool(guessing) + _chance_note(task, dense.chance)
    return replace(warned, notes=(*warned.notes, *notes))


def _points(measured: Mapping[int, float], hidden_size: int) -> tuple[Point, ...]:
    """Return measured slices from the widest on, of figures on the scale of fits."""
    return tuple(
        Point(1 - dim / hidden_size, value, None, dim) for dim, value in sorted(measured.items(), reverse=True)
    )


def _with_warning(forecast: Forecast, dims: Sequence[int | None], what: str, alike: str) -> Forecast:
    """Return a forecast with a note where measured slices are better than the dense model."""
    if not dims:
        return forecast
    note = f"{what.format(', '.join(map(str, dims)))} the dense one; check that both are {alike}."
    return replace(forecast, notes=(*forecast.notes, note))


def _calibration_tokens(dimensions: Dimensions, knowledge: ForecastInputs) -> int:
    if knowledge.calibration_tokens is not None:
        return knowledge.calibration_tokens
    return USUAL_SAMPLES * default_length(dimensions.context_length)


def _forecast_by_published(
    own: Series, figure: Figure, method: Method, dimensions: Dimensions, tokens: int
) -> Forecast:
    """Return the forecast of a model whose slices are published, about the dense figure that is known.

    Args:
        tokens: Calibration tokens of the slices that are wanted.
    """
    level = math.log(figure.value)
    points = tuple(replace(one, value=level + one.value - own.dense.value) for one in own.points)
    series = replace(own, dense=replace(own.dense, value=level, ceiling=math.log(dimensions.vocabulary)), points=points)
    found = forecast_by_curve(fit_curve(series), "published for this model", figure.source)
    is_refit, is_centred = method == "refit", dimensions.adapter.norm.is_centred
    if is_refit:
        shift = refit_shift_with_text(is_centred, tokens / dimensions.largest_regression())
    else:
        shift = published_calibration_shift(tokens / dimensions.hidden_size)
    from_own = replace(shift, mean=shift.mean - published_calibration_shift(own.tokens_per_coordinate).mean)
    return replace(
        found,
        predict=lambda sparsity: shifted(found.predict(sparsity), series.dense, from_own),
        notes=(_refit_note(is_centred),) if is_refit else (),
    )


def forecast_new(
    quantity: Quantity,
    evaluation: str,
    figure: Figure,
    family: str,
    method: Method,
    relation: str | None = None,
    chance: float | None = None,
    perplexity: Forecast | None = None,
    is_other_text: bool = False,
    spectrum: Weights | None = None,
    parameters: int | None = None,
    vocabulary: int | None = None,
    is_centred: bool = False,
    tokens_per_unknown: float = math.inf,
    tokens_per_coordinate: float = math.inf,
) -> Forecast:
    """Return the forecast for a model of which no slice is measured."""
    chosen = relation_named(relation or DEFAULT_RELATION[quantity], quantity)
    level = (chance_level(evaluation) if chance is None else chance) if quantity == "accuracy" else None
    dense = Dense(
        math.log(figure.value) if quantity == "perplexity" else figure.value,
        level,
        None if perplexity is None else _log_ratio(perplexity),
        **_measured_on_dense(spectrum),
        ceiling=None if vocabulary is None or quantity == "accuracy" else math.log(vocabulary),
    )
    obstacle = chosen.why_not(dense)
    if obstacle:
        raise RequestError(
            f"The relation {chosen.name!r} cannot predict {evaluation}: {obstacle}.",
            "Pass --chance TASK=H, --dense-perplexity or --spectrum, or use another relation.",
        )
    spread = spread_of(chosen.name, quantity, method, is_other_text)
    size = None if parameters is None else math.log(parameters)
    shifts = []
    if is_other_text and chosen.is_by_weight:
        shifts.append(domain_shift_of(DEFAULT_RELATION["perplexity"]))
    if method == "refit" and chosen.is_by_weight:
        shifts.append(calibration_shift(tokens_per_unknown))
    is_refit_of_published = method == "refit" and not chosen.is_by_weight and quantity == "perplexity"
    if is_refit_of_published and chosen.parameters:
        # of other texts only slices with one amount of calibration text are published
        shifts.append(
            refit_shift_of(is_centred) if is_other_text else refit_shift_with_text(is_centred, tokens_per_unknown)
        )
    elif quantity == "perplexity" and not chosen.is_by_weight and not is_other_text:
        shifts.append(published_calibration_shift(tokens_per_coordinate))
    return Forecast(
        quantity=quantity,
        evaluation=evaluation,
        dense=figure,
        chance=level,
        relation=chosen.name,
        parameters=tuple(
            (parameter, value, None)
            for parameter, value in zip(
                chosen.parameters, spread.typical_parameters(dense, family, size, shifts), strict=True
            )
        ),
        range=known_range(chosen, method),
        basis=_basis(quantity, family, chosen.is_by_weight),
        predict=lambda sparsity: predict_new(spread, dense, family, size, method, sparsity, shifts),
        paper=_paper(quantity, dense),
        notes=tuple(_new_notes(quantity, evaluation, family, level, is_other_text, chosen.is_by_weight, parameters))
        + ((_refit_note(is_centred),) if is_refit_of_published else ()),
    )


def _measured_on_dense(spectrum: Weights | None) -> dict[str, Any]:
    return {} if spectrum is None else {"spectrum": spectrum.fisher, "probe": spectrum.probe}


def _basis(quantity: Quantity, family: str, is_by_spectrum: bool) -> str:
    if is_by_spectrum:
        return f"the model's own spectrum, and slices of {study_models()} small models (docs/energy.md)"
    series = published_series(quantity)
    models = dict.fromkeys((one.model, one.family) for one in series)
    own = sum(1 for _, other in models if other == family)
    return f"published SliceGPT measurements of {len(models)} models, {own} of them of type {family}"


def _new_notes(
    quantity: Quantity,
    evaluation: str,
    family: str,
    chance: float | None,
    is_other_text: bool,
    is_by_spectrum: bool,
    parameters: int | None,
) -> list[str]:
    notes = []
    if is_by_spectrum:
        notes.append("The constant of this relation was measured on models of up to 1.3 million parameters only.")
    elif not any(one.family == family for one in published_series(quantity)):
        notes.append(f"No measurement of type {family} is published; the intervals are those of an unknown family.")
    known = [one for one in published_series(quantity) if one.parameters is not None]
    # of an unknown family no size is better known than another
    alike = [one for one in known if one.family == family] or known
    sizes = [one.parameters for one in alike if one.parameters is not None]
    if parameters is not None and not is_by_spectrum and not min(sizes) / 2 <= parameters <= 2 * max(sizes):
        of_family = f" of type {family}" if alike is not known else ""
        least, most = min(sizes) / 1e9, max(sizes) / 1e9
        range_of_sizes = f"{least:.3g}" if least == most else f"{least:.3g} to {most:.3g}"
        notes.append(
            f"The measured models{of_family} have {range_of_sizes} billion parameters; they say little about one with "
            f"{parameters / 1e9:.3g} billion."
        )
    if is_other_text:
        notes.append(
            "Slices lose far more on other kinds of text than the one they were calibrated on; these intervals come "
            "from four models calibrated on wikitext2 and measured on c4."
        )
    if quantity == "accuracy":
        notes += _chance_note(evaluation, chance)
    return notes


def _chance_note(task: str, chance: float | None) -> list[str]:
    if chance is not None:
        return []
    return [f"The chance level of {task} is unknown and taken as 0; pass --chance {task}=H."]


def _refit_note(is_centred: bool) -> str:
    factor = math.exp(refit_shift_of(is_centred).mean)
    norms = "LayerNorms" if is_centred else "RMSNorms"
    return (
        f"The published measurements are of SliceGPT. On the small models with {norms} in docs/energy.md the refit "
        f"lost {factor:.2g} times as much in ln PPL at the same dim; the predictions assume the same here."
    )


def forecast_by_curve(curve: Curve, source: str, dense_source: str | None = None) -> Forecast:
    """Return the forecast of a fitted curve."""
    series = curve.series
    quoted = quoted_by(series.quantity)
    count = len(series.points)
    error = (
        ""
        if not math.isfinite(curve.loo_error)
        else f", leave-one-out error {curve.loo_error:.2g}" + (" in ln PPL" if series.quantity == "perplexity" else "")
    )
    return Forecast(
        quantity=series.quantity,
        evaluation=series.evaluation,
        dense=Figure(quoted(series.dense.value), dense_source or source),
        chance=series.dense.chance,
        relation=curve.relation,
        parameters=tuple(curve.parameters_with_errors()),
        range=curve.valid_sparsity,
        basis=f"{count} measured slice{'s' * (count != 1)} ({source}){error}; {curve.reason}",
        predict=curve.predict,
        paper=_paper(series.quantity, series.dense),
        points=tuple(
            (point.sparsity, quoted(point.value), quoted_error(point.value, point.stderr, series.quantity))
            for point in series.points
        ),
    )


def _paper(quantity: Quantity, dense: Dense) -> Callable[[float], float] | None:
    paper = relation_named("paper", quantity)
    if paper.why_not(dense):
        return None
    quoted = quoted_by(quantity)
    return lambda sparsity: quoted(paper.predict(sparsity, dense, ()))


def _log_ratio(forecast: Forecast) -> Callable[[float], float]:
    level = math.log(forecast.dense.value)
    return lambda sparsity: max(0.0, forecast.predict(sparsity).value - level)


def _known_curves(source: Source, method: str, knowledge: ForecastInputs) -> tuple[list[Curve], str] | None:
    """Return the curves to predict by and where they are from: those asked for, else those of a slice that was."""
    if knowledge.curve is not None:
        return _read_curve(knowledge.curve, source)
    if knowledge.relation is not None or knowledge.has_slices or knowledge.spectrum is not None:
        return None
    content = (read_record(source.folder) or {}).get("curve")
    own = [] if content is None else [one for one in read_curves(content) if one.series.method == method]
    return (own, "published with the slice") if own else None


def _read_curve(name: str, source: Source) -> tuple[list[Curve], str]:
    """Read the curves of a file, or of the record of a slice on the Hub or in a folder; say where they are from."""
    path = local_path(name)
    if path.is_file():
        content = read_json(path)
        if content is None:
            raise RequestError(f"{path.name!r} cannot be read as JSON.", "Pass a file written by slicecli fit.")
        return read_curves(content), path.name
    if path.suffix.lower() == ".json":
        raise RequestError(f"There is no file {name!r}.", "Pass a file written by slicecli fit, or a slice.")
    holder = Source.find(name, token=source.token, with_companions=False)
    curve = (read_record(holder.folder) or {}).get("curve")
    if curve is None:
        raise RequestError(f"{holder.name} has no curve in its slicecli.json.", "Pass a file written by slicecli fit.")
    return read_curves(curve), holder.name


def _fitting(curves: Sequence[Curve], method: str, text: str) -> list[Curve]:
    """Return the curves that belong to the method: one for each text or task, that of the asked text first."""
    own = [one for one in curves if one.series.method == method]
    if not own:
        methods = ", ".join(sorted({one.series.method for one in curves}))
        raise RequestError(f"The curves are of slices made by {methods}, not by {method}.", f"Use --method {methods}.")
    found = {(one.series.quantity, one.series.evaluation): one for one in reversed(own)}
    texts = [key for key in found if key[0] == "perplexity" and key[1] != text]
    if ("perplexity", text) in found:
        for key in texts:
            del found[key]
    elif texts:  # the curve's own text is what can be said
        for key in texts[1:]:
            del found[key]
    return sorted(found.values(), key=lambda one: one.series.quantity != "perplexity")
