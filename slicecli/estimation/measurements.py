"""Measured figures, as series: one model, sliced one way to several dims and measured on one text or task.

The published measurements are bundled (`published.csv`), each row with its source; `use` says what a row serves for:
`dense` figures, the `spread` of relations over models, the `reference` of slices that are measured on few rows, or why
it serves for none of these. Users' own series come from results files, see `slicecli.estimation.results`.
"""

from __future__ import annotations

import csv
import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources

from slicecli.estimation.relations import Dense, Quantity
from slicecli.evaluation.chance import chance_level

OTHER_TEXT = "other text than calibrated on"
# vocabularies of one generation of models, in tokens: below the first, from it to the second, and from there on
VOCABULARIES = (40_000, 100_000)
USUAL_SAMPLES = 128
_KINDS = ("", " with a medium vocabulary", " with a large vocabulary")
# what published models were calibrated and measured on, of which it is known that they differ in kind
TEXT_KINDS = frozenset({"wikitext2", "c4", "ptb", "alpaca"})

__all__ = [
    "OTHER_TEXT",
    "Figure",
    "Point",
    "Published",
    "Series",
    "family_of",
    "model_type_of",
    "published_figure",
    "published_rows",
    "published_series",
    "published_slices_of",
]


@dataclass(frozen=True)
class Figure:
    """A dense figure and where it comes from.

    Attributes:
        value: Perplexity, or accuracy between 0 and 1.
        source: Where it comes from, in words for a report.
    """

    value: float
    source: str


@dataclass(frozen=True)
class Point:
    """One measured slice.

    Attributes:
        sparsity: s, the real fraction of the hidden size removed.
        value: ln PPL, or accuracy between 0 and 1.
        stderr: Its standard error; `None` where it is not known.
    """

    sparsity: float
    value: float
    stderr: float | None = None
    dim: int | None = None


@dataclass(frozen=True)
class Series:
    """The slices of one model by one method and calibration, measured on one text or task.

    Attributes:
        calibration: Text and number of rows it was calibrated on, in words.
        parameters: Parameters of the dense model, roughly, where sizes are to be told apart.
        digest: What identifies a text or questions from a file; `None` where the name does.
        tokens_per_coordinate: Calibration tokens for each coordinate of the stream, where they are known.
    """

    model: str
    family: str
    method: str
    calibration: str
    quantity: Quantity
    evaluation: str
    dense: Dense
    points: tuple[Point, ...]
    parameters: float | None = None
    digest: str | None = None
    tokens_per_coordinate: float = math.inf

    @property
    def is_of_other_text(self) -> bool:
        """Whether its perplexity is of another kind of text than it was calibrated on, as far as names tell."""
        calibration = re.split("[ ,]", self.calibration)[0]
        return (
            self.quantity == "perplexity"
            and calibration != self.evaluation
            and {calibration, self.evaluation} <= TEXT_KINDS
        )


@dataclass(frozen=True)
class Published:
    """One published figure.

    Attributes:
        vocabulary: Rows of its embedding table.
        hidden_size: Its hidden size, d.
        parameters: Its number of parameters, by its name.
        samples: Rows of it, as printed; empty where that is not known.
        sparsity: s, the real one after rounding of the dim.
        value: Perplexity, or accuracy between 0 and 1.
        use: What the figure serves for, see above.
    """

    source: str
    model: str
    model_type: str
    vocabulary: float
    hidden_size: float
    parameters: float
    method: str
    calibration: str
    samples: str
    sequence_length: str
    sparsity: float
    metric: Quantity
    evaluation: str
    value: float
    use: str


@functools.cache
def published_rows() -> tuple[Published, ...]:
    """Return the bundled measurements."""
    text = resources.files("slicecli.estimation").joinpath("published.csv").read_text(encoding="utf-8")
    return tuple(_row(fields) for fields in csv.DictReader(text.splitlines()))


def _row(fields: dict[str, str]) -> Published:
    numbers = {name: float(fields[name]) for name in ("vocabulary", "hidden_size", "parameters", "sparsity", "value")}
    return Published(**{**fields, **numbers})  # type: ignore[arg-type]


def published_figure(model: str, quantity: Quantity, evaluation: str) -> Figure | None:
    """Return the published dense figure of a model by its Hub id, or `None`."""
    for row in published_rows():
        about = (row.use, row.metric, row.evaluation, row.model.lower())
        if about == ("dense", quantity, evaluation, model.lower()):
            return Figure(row.value, f"published: {row.source}")
    return None


def family_of(model_type: str, vocabulary: float) -> str:
    """Return the group of models that a model is compared with: of one type, and of the same kind of vocabulary.

    Llama 3 loses two to three times as much as Llama 2 of the same size and type; the vocabulary tells generations
    apart. Of types that are published with one kind of vocabulary all models are one group.
    """
    return model_type + _kind(vocabulary) if len(_published_kinds(model_type)) > 1 else model_type


@functools.cache
def _published_kinds(model_type: str) -> frozenset[str]:
    return frozenset(_kind(row.vocabulary) for row in published_rows() if row.model_type == model_type)


def _kind(vocabulary: float) -> str:
    return _KINDS[sum(vocabulary >= bound for bound in VOCABULARIES)]


def model_type_of(family: str) -> str:
    """Return the type of a group of models: how a loss grows with s is much the same for all of one type."""
    for kind in _KINDS:
        family = family.removesuffix(kind)
    return family


@functools.cache
def published_series(quantity: Quantity, use: str = "spread") -> tuple[Series, ...]:
    """Return the bundled measurements that serve for the spread of relations, as series.

    A series of accuracies knows the published perplexity ratios of the same slices, where there are some.
    """
    dense = _dense_values()
    ratios = _log_ratios(dense)
    grouped: dict[tuple[str, ...], list[Published]] = defaultdict(list)
    for row in published_rows():
        if row.use == use and row.metric == quantity:
            # accuracies are relative to the dense ones, and the models too few to be told apart
            is_grouped = quantity == "perplexity"
            family = family_of(row.model_type, row.vocabulary) if is_grouped else row.model_type
            grouped[row.model, family, row.method, row.calibration, row.samples, row.evaluation].append(row)
    found = []
    for (model, family, method, text, samples, evaluation), rows in grouped.items():
        known = ratios.get((model, samples), {})
        figure = dense[model, quantity, evaluation]
        has_ratios = all(round(row.sparsity, 3) in known for row in rows)
        context = Dense(
            math.log(figure) if quantity == "perplexity" else figure,
            chance_level(evaluation) if quantity == "accuracy" else None,
            _lookup(known) if has_ratios else None,
            ceiling=math.log(rows[0].vocabulary) if quantity == "perplexity" else None,
        )
        by_sparsity: dict[float, list[float]] = defaultdict(list)
        for row in rows:
            by_sparsity[row.sparsity].append(math.log(row.value) if quantity == "perplexity" else row.value)
        # reruns of one slice count once
        points = tuple(Point(sparsity, sum(some) / len(some)) for sparsity, some in sorted(by_sparsity.items()))
        calibration = f"{text or 'unknown'} x {samples or 'unknown'}"
        size = rows[0].parameters
        found.append(
            Series(
                model, family, method, calibration, quantity, evaluation, context, points, size,
                tokens_per_coordinate=_tokens_per_coordinate(rows[0]),
            )
        )  # fmt: skip
    return tuple(found)


def published_slices_of(model: str) -> Series | None:
    """Return the published perplexities of a model's slices by its Hub id, those of 128 calibration rows first."""
    own = [one for one in published_series("perplexity") if one.model.lower() == model.lower()]
    return min(own, key=lambda one: not one.calibration.endswith(f" x {USUAL_SAMPLES}"), default=None)


def _tokens_per_coordinate(row: Published) -> float:
    if not (row.samples and row.sequence_length):
        return math.inf
    return int(row.samples) * int(row.sequence_length) / row.hidden_size


def _lookup(known: dict[float, float]) -> Callable[[float], float]:
    return lambda sparsity: known[round(sparsity, 3)]


def _dense_values() -> dict[tuple[str, str, str], float]:
    values: dict[tuple[str, str, str], float] = {}
    for row in published_rows():
        if row.use in ("dense", "reference"):
            values.setdefault((row.model, row.metric, row.evaluation), row.value)
    return values


def _log_ratios(dense: dict[tuple[str, str, str], float]) -> dict[tuple[str, str], dict[float, float]]:
    """Return D of published slices by model, rows of calibration, and s to three digits."""
    ratios: dict[tuple[str, str], dict[float, float]] = defaultdict(dict)
    for row in published_rows():
        if row.use == "spread" and row.metric == "perplexity" and row.evaluation == "wikitext2":
            ratio = row.value / dense[row.model, "perplexity", "wikitext2"]
            ratios[row.model, row.samples].setdefault(round(row.sparsity, 3), math.log(ratio))
    return ratios
