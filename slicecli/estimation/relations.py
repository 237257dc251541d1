"""The analytical relations: how perplexity and accuracy follow from the fraction of the hidden size removed.

A relation is plain data with two functions, predict and fit. Those on perplexity work on ln PPL, those on accuracy on
the accuracy itself, between 0 and 1; that is also the scale on which fits are least squares. How far a relation can be
trusted is not its own business but that of `slicecli.estimation.spread`.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from slicecli.errors import PluginError, RequestError, reason_of
from slicecli.family.plugins import plugins

if TYPE_CHECKING:
    import pluggy

__all__ = [
    "BUILT_IN",
    "LEAST_DAMAGE",
    "PAPER",
    "QUANTITIES",
    "REFERENCE",
    "Dense",
    "Points",
    "Prior",
    "Quantity",
    "Relation",
    "quoted_by",
    "quoted_error",
    "relation_named",
    "relations_of",
]

USUAL_EXPONENT = 1.5
USUAL_DEVIATION = 1.0
LEAST_EXPONENT = 0.1
REFERENCE = 0.25  # the s at which losses are compared: the middle of what is published
LARGEST_LOGARITHM = 700.0  # whose exp is still a float
TOLERANCE = 1e-12  # of searched parameters
RELATIVE_NOISE = 0.05  # of D about a power of s, in published series
LEAST_DAMAGE = 0.005  # what repeated measurements of ln PPL differ by
Quantity = Literal["perplexity", "accuracy"]
QUANTITIES: tuple[Quantity, ...] = get_args(Quantity)
PAPER = "arXiv:2503.04377"


@dataclass(frozen=True)
class Dense:
    """What a relation may know of the dense model.

    Attributes:
        value: ln PPL0, or the dense accuracy between 0 and 1.
        chance: Accuracy of a guess; of perplexity and of tasks without one, `None`.
        log_ratio: D at a fraction removed, measured or predicted, where a relation on accuracy asks for it.
        ceiling: ln PPL of a uniform guess over the vocabulary, where the vocabulary is known.
        spectrum: The Fisher weight of what a fraction removed discards, where a relation asks for it.
        probe: The mean of that weight and of what the projected dense model loses, likewise.
    """

    value: float
    chance: float | None = None
    log_ratio: Callable[[float], float] | None = None
    spectrum: Callable[[float], float] | None = None
    probe: Callable[[float], float] | None = None
    ceiling: float | None = None


@dataclass(frozen=True)
class Prior:
    """What published series say of the exponent of a new model: it lies on a line over what the model loses.

    Attributes:
        exponent: That of a model with the usual loss.
        deviation: Standard deviation about the line.
        tilt: Slope of the line over the level, ln(D / ln PPL0) at `REFERENCE`.
        level: The usual level.
        level_deviation: Standard deviation of levels about it.
        degrees: Degrees of freedom of the deviation.
    """

    exponent: float
    deviation: float
    tilt: float = 0.0
    level: float = 0.0
    level_deviation: float = math.inf
    degrees: int = 2

    def at(self, loss: float, dense: Dense) -> float:
        """Return the exponent that goes with ln D at the reference."""
        return max(self.line(loss, dense), LEAST_EXPONENT)

    def line(self, loss: float, dense: Dense) -> float:
        """Return the same as far as the line goes, beyond all exponents too."""
        return self.exponent + self.tilt * (loss - math.log(dense.value) - self.level)


Points = Sequence[tuple[float, float]]
Predict = Callable[[float, Dense, Sequence[float]], float]
Fit = Callable[[Points, Dense, "Prior | None"], tuple[float, ...]]


@dataclass(frozen=True)
class Relation:
    """One relation.

    Attributes:
        name: Its name on the command line; one for each quantity.
        parameters: Names of what is fitted; none for a relation that needs no measurement of a slice.
        predict: Takes s, the dense figure and the parameters; returns ln PPL or the accuracy.
        fit: Takes pairs of s and ln PPL or accuracy, the dense figure, and a prior, which most ignore; returns the
            parameters.
        needs_chance: It has no meaning without a chance level above 0.
        has_prior: Its fit weighs the points against the prior, so that fewer points than parameters are enough.
    """

    name: str
    quantity: Quantity
    formula: str
    source: str
    parameters: tuple[str, ...]
    predict: Predict
    fit: Fit
    needs_chance: bool = False
    needs_log_ratio: bool = False
    needs_spectrum: bool = False
    needs_probe: bool = False
    has_prior: bool = False

    @property
    def is_by_weight(self) -> bool:
        """Whether it rests on something measured on the dense model at each width."""
        return self.needs_spectrum or self.needs_probe

    def weight(self, dense: Dense, sparsity: float) -> float:
        """Return what was measured on the dense model at a width, of which the loss is a multiple."""
        measured = dense.probe if self.needs_probe else dense.spectrum
        assert measured is not None
        return measured(sparsity)

    def why_not(self, dense: Dense) -> str:
        """Say why the relation has no meaning for a dense figure; empty where it has."""
        if self.needs_chance and not dense.chance:
            return "it needs a chance level above 0"
        if self.needs_log_ratio and dense.log_ratio is None:
            return "it needs the perplexity"
        if self.needs_spectrum and dense.spectrum is None:
            return "it needs a spectrum"
        if self.needs_probe and dense.probe is None:
            return "it needs a spectrum with a probe, and is for the refit"
        return ""


def _nothing(_points: Points, _dense: Dense, _prior: Prior | None) -> tuple[float, ...]:
    """Fit no parameters."""
    return ()


def _odds(sparsity: float) -> float:
    return sparsity / (1 - sparsity)


def _additive(shape: Callable[[float], float]) -> tuple[Predict, Fit]:
    """Return predict and fit of ln PPL = ln PPL0 + c φ(s), whose least squares are closed."""

    def predict(sparsity: float, dense: Dense, parameters: Sequence[float]) -> float:
        return dense.value + parameters[0] * shape(sparsity)

    def fit(points: Points, dense: Dense, _prior: Prior | None) -> tuple[float, ...]:
        shapes = np.array([shape(sparsity) for sparsity, _ in points])
        damages = np.array([value - dense.value for _, value in points])
        return (float(shapes @ damages / (shapes @ shapes)),)

    return predict, fit


def _free_exponent(shape: Callable[[float], float]) -> tuple[Predict, Fit]:
    """Return predict and fit of ln PPL = ln PPL0 + c φ(s)^p, with a prior of p."""

    def predict(sparsity: float, dense: Dense, parameters: Sequence[float]) -> float:
        scale, exponent = parameters
        return float(dense.value + scale * shape(sparsity) ** exponent)

    def fit(points: Points, dense: Dense, prior: Prior | None) -> tuple[float, ...]:
        prior = prior or Prior(USUAL_EXPONENT, USUAL_DEVIATION)
        middle = math.log(shape(REFERENCE))
        damages = np.array([max(value - dense.value, LEAST_DAMAGE) for _, value in points])
        # a straight line through ln D against ln φ; a small D is known less well on this scale. The last rows are the
        # prior: of the slope, which is near another line over the level, and of the level
        rows = [(1.0, math.log(shape(sparsity)) - middle) for sparsity, _ in points]
        places = np.array([*rows, (-prior.tilt, 1.0), (1.0, 0.0)])
        values = np.array([*np.log(damages), prior.line(0.0, dense), prior.level + math.log(dense.value)])
        variances = RELATIVE_NOISE**2 + (LEAST_DAMAGE / damages) ** 2
        weights = 1 / np.array([*variances, max(prior.deviation, 1e-3) ** 2, prior.level_deviation**2])
        weighted = places * weights[:, None]
        _, exponent = np.linalg.solve(weighted.T @ places, weighted.T @ values)
        exponent, count = max(exponent, LEAST_EXPONENT), len(points)  # whatever is removed, more costs more
        # through the points, whatever the prior says of the level
        level = weights[:count] @ (values[:count] - exponent * places[:count, 1]) / weights[:count].sum()
        return (math.exp(level - exponent * middle), float(exponent))

    return predict, fit


def _exponent() -> tuple[Predict, Fit]:
    """Return predict and fit of ln PPL = ln PPL0 / (1 - s)^b."""

    def predict(sparsity: float, dense: Dense, parameters: Sequence[float]) -> float:
        return float(dense.value / (1 - sparsity) ** parameters[0])

    def fit(points: Points, dense: Dense, _prior: Prior | None) -> tuple[float, ...]:
        removed = np.array([-math.log1p(-sparsity) for sparsity, _ in points])
        values = np.array([value for _, value in points])
        ratios = np.log(np.maximum(values / dense.value, 1e-9))
        weights = values**2  # makes the errors of ln ln PPL those of ln PPL to first order
        return (float((weights * removed) @ ratios / ((weights * removed) @ removed)),)

    return predict, fit


def _by_weight(weight: Callable[[Dense], Callable[[float], float] | None]) -> tuple[Predict, Fit]:
    """Return predict and fit of ln PPL = ln PPL0 + c x(k), where x was measured on the dense model."""

    def predict(sparsity: float, dense: Dense, parameters: Sequence[float]) -> float:
        measured = weight(dense)
        assert measured is not None
        return dense.value + parameters[0] * measured(sparsity)

    def fit(points: Points, dense: Dense, _prior: Prior | None) -> tuple[float, ...]:
        measured = weight(dense)
        assert measured is not None
        weights = np.array([measured(sparsity) for sparsity, _ in points])
        damages = np.array([value - dense.value for _, value in points])
        return (float(weights @ damages / (weights @ weights)),)

    return predict, fit


def _decay() -> tuple[Predict, Fit]:
    """Return predict and fit of acc = h + (acc0 - h) exp(-r s^1.5)."""

    def predict(sparsity: float, dense: Dense, parameters: Sequence[float]) -> float:
        chance = dense.chance or 0.0
        return chance + (dense.value - chance) * math.exp(-parameters[0] * sparsity**1.5)

    return predict, _search(predict)


def _from_perplexity() -> tuple[Predict, Fit]:
    """Return predict and fit of acc = acc0 exp(-r D)."""

    def predict(sparsity: float, dense: Dense, parameters: Sequence[float]) -> float:
        assert dense.log_ratio is not None
        return dense.value * math.exp(-parameters[0] * dense.log_ratio(sparsity))

    return predict, _search(predict)


def _search(predict: Predict, start: float = 1.0) -> Fit:
    """Return a least-squares fit of the one parameter of a smooth relation."""

    def fit(points: Points, dense: Dense, _prior: Prior | None) -> tuple[float, ...]:
        from scipy.optimize import least_squares

        def residuals(parameters: np.ndarray) -> list[float]:
            return [predict(sparsity, dense, parameters.tolist()) - value for sparsity, value in points]

        found = least_squares(residuals, [start], jac="3-point", xtol=TOLERANCE, ftol=TOLERANCE, gtol=TOLERANCE)
        return (float(found.x[0]),)

    return fit


def _paper_perplexity(sparsity: float, dense: Dense, _parameters: Sequence[float]) -> float:
    return dense.value / (1 - sparsity)


def _paper_accuracy(sparsity: float, dense: Dense, _parameters: Sequence[float]) -> float:
    assert dense.chance
    return float(dense.value ** (1 - sparsity) * dense.chance**sparsity)


def _linear_accuracy(sparsity: float, dense: Dense, _parameters: Sequence[float]) -> float:
    chance = dense.chance or 0.0
    return chance + (dense.value - chance) * (1 - sparsity)


BUILT_IN: tuple[Relation, ...] = (
    Relation(
        "paper", "perplexity", "ln PPL0 / ln PPL = 1 - s", f"{PAPER}, the relation of perplexity", (),
        _paper_perplexity, _nothing,
    ),
    Relation(
        "power", "perplexity", "ln PPL = ln PPL0 + c s^1.5", "fitted to published measurements, docs/relations.md",
        ("c",), *_additive(lambda sparsity: sparsity**1.5),
    ),
    Relation(
        "odds", "perplexity", "ln PPL = ln PPL0 + c s/(1-s)",
        f"{PAPER} with its constant ln PPL0 set free, docs/relations.md", ("c",),
        *_additive(_odds),
    ),
    Relation(
        "exponent", "perplexity", "ln PPL = ln PPL0 / (1-s)^b",
        f"{PAPER} with its exponent set free, docs/relations.md", ("b",), *_exponent(),
    ),
    Relation(
        "free-power", "perplexity", "ln PPL = ln PPL0 + c s^p", "fitted to published measurements, docs/relations.md",
        ("c", "p"), *_free_exponent(lambda sparsity: sparsity), has_prior=True,
    ),
    Relation(
        "free-odds", "perplexity", "ln PPL = ln PPL0 + c (s/(1-s))^p",
        "fitted to published measurements, docs/relations.md",
        ("c", "p"), *_free_exponent(_odds), has_prior=True,
    ),
    Relation(
        "fisher", "perplexity", "ln PPL = ln PPL0 + c F(k)", "measured on small models, docs/energy.md",
        ("c",), *_by_weight(lambda dense: dense.spectrum), needs_spectrum=True,
    ),
    Relation(
        "probe", "perplexity", "D = c P^0.3 F^0.7 exp(-min(P, 5)/8)", "measured on small models, docs/energy.md",
        ("c",), *_by_weight(lambda dense: dense.probe), needs_probe=True,
    ),
    Relation(
        "paper", "accuracy", "ln(acc/h) = (1 - s) ln(acc0/h)",
        f"{PAPER}, a reading of its logarithmic form, docs/relations.md", (), _paper_accuracy, _nothing,
        needs_chance=True,
    ),
    Relation(
        "linear", "accuracy", "acc = h + (acc0 - h)(1 - s)", "docs/relations.md", (), _linear_accuracy, _nothing,
    ),
    Relation(
        "decay", "accuracy", "acc = h + (acc0 - h) exp(-r s^1.5)",
        "fitted to published measurements, docs/relations.md", ("r",), *_decay(),
    ),
    Relation(
        "from-perplexity", "accuracy", "acc = acc0 exp(-r D)", "fitted to published measurements, docs/relations.md",
        ("r",), *_from_perplexity(), needs_log_ratio=True,
    ),
)  # fmt: skip


def quoted_by(quantity: Quantity) -> Callable[[float], float]:
    """Return what turns a prediction into the figure people quote: of ln PPL the perplexity, the largest at most."""
    if quantity == "accuracy":
        return lambda value: value
    return lambda value: math.exp(min(value, LARGEST_LOGARITHM))


def quoted_error(value: float, stderr: float | None, quantity: Quantity) -> float | None:
    """Return the standard error of the figure people quote from that of ln PPL or of an accuracy."""
    if stderr is None or quantity == "accuracy":
        return stderr
    return stderr * quoted_by(quantity)(value)


def relations_of(quantity: Quantity) -> list[Relation]:
    """Return the relations of a quantity, the built-in ones first, then those of plugins."""
    return [one for one in (*BUILT_IN, *_relations_of_plugins(plugins().manager)) if one.quantity == quantity]


@functools.cache
def _relations_of_plugins(manager: pluggy.PluginManager) -> tuple[Relation, ...]:
    """Return the relations that plugins add."""
    relations: list[Relation] = []

    def register(relation: Relation) -> None:
        if any((one.name, one.quantity) == (relation.name, relation.quantity) for one in (*BUILT_IN, *relations)):
            raise ValueError(f"a relation {relation.name!r} for {relation.quantity} is registered already")
        relations.append(relation)

    try:
        manager.hook.slicecli_register_relations(register=register)
    except Exception as error:  # a plugin may raise anything
        raise PluginError(
            f"A plugin's relation cannot be registered: {reason_of(error)}.",
            "Fix the plugin, or exclude it with SLICECLI_PLUGINS.",
        ) from error
    return tuple(relations)


def relation_named(name: str, quantity: Quantity) -> Relation:
    """Find a relation."""
    found = relations_of(quantity)
    for relation in found:
        if relation.name == name:
            return relation
    names = ", ".join(one.name for one in found)
    raise RequestError(f"There is no relation {name!r} for {quantity}.", f"Available: {names}.")
