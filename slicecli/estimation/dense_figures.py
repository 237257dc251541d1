"""Where a dense figure comes from when the user gives none: never silently.

In this order: what the user says, the model's card (its `model-index`), its `slicecli.json`, the bundled table of
published figures. Where the model is known by a slice of it, card and results are the slice's, and only what its record
says of the dense model counts. A card is another's text: only its metadata is read, and only numbers are taken from it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from slicecli.estimation.measurements import Figure, published_figure, published_rows
from slicecli.record.record import read_record
from slicecli.runtime.front_matter import read_front_matter

__all__ = ["accuracies", "dense_perplexity"]

MOST = 1e300
LONGEST_NAME = 100
RECORD = "slicecli.json"
TEXT_NAMES = {
    "wikitext": "wikitext2",
    "wikitext2": "wikitext2",
    "wikitext2rawv1": "wikitext2",
    "wikitext2v1": "wikitext2",
    "salesforcewikitext": "wikitext2",
    "c4": "c4",
    "allenaic4": "c4",
    "ptb": "ptb",
    "ptbtextonly": "ptb",
}
TASK_NAMES = {
    "arcc": "arc_challenge",
    "arcchallenge": "arc_challenge",
    "arce": "arc_easy",
    "arceasy": "arc_easy",
    "ai2arcarcchallenge": "arc_challenge",
    "ai2arcarceasy": "arc_easy",
}
ACCURACIES = ("acc_norm", "accuracy_norm", "acc", "accuracy")


def dense_perplexity(folder: Path, model: str, text: str, given: float | None) -> Figure | None:
    """Return the perplexity of a model on a text, or `None` where nobody says it."""
    if given is not None:
        return Figure(given, "given")
    for name, kind, value in _card_figures(folder):
        if kind == "perplexity" and _text_name(name) == text and value > 1:
            return Figure(value, "the model's card")
    measured = _recorded(folder, "perplexity").get(text)
    recorded = _number(measured.get("value")) if isinstance(measured, dict) else None
    if recorded is not None and recorded > 1:
        return Figure(recorded, RECORD)
    return published_figure(model, "perplexity", text)


def accuracies(folder: Path, model: str, given: Mapping[str, float]) -> dict[str, Figure]:
    """Return the accuracies of a model, between 0 and 1, by task."""
    found: dict[str, Figure] = {}
    tasks = dict.fromkeys(row.evaluation for row in published_rows() if row.metric == "accuracy")
    for task in tasks:
        figure = published_figure(model, "accuracy", task)
        if figure is not None:
            found[task] = figure
    for task, measured in _recorded(folder, "tasks").items():
        value = _number(measured.get("value")) if isinstance(measured, dict) else None
        if value is not None and 0 <= value <= 1 and task.isprintable() and len(task) <= LONGEST_NAME:
            found[task] = Figure(value, RECORD)
    on_card: dict[str, dict[str, float]] = {}
    for name, kind, value in _card_figures(folder):
        if kind in ACCURACIES:
            on_card.setdefault(_task_name(name), {})[kind] = value / 100 if value > 1 else value
    for task, by_kind in on_card.items():
        value = next(by_kind[kind] for kind in ACCURACIES if kind in by_kind)
        if 0 <= value <= 1:
            found[task] = Figure(value, "the model's card")
    return found | {task: Figure(value, "given") for task, value in given.items()}


def _recorded(folder: Path, kind: str) -> Mapping[str, Any]:
    """Return what the record of a folder says was measured of the dense model."""
    record = read_record(folder) or {}
    results = record.get("results")
    if isinstance(results, dict) and _is_of_slice(record):
        results = results.get("dense")
    found = results.get(kind) if isinstance(results, dict) else None
    return found if isinstance(found, dict) else {}


def _is_of_slice(record: Mapping[str, Any]) -> bool:
    return isinstance(record.get("source"), dict)


def _card_figures(folder: Path) -> Iterator[tuple[str, str, float]]:
    """Yield dataset, metric and value of every number in the card's `model-index`; of a slice's card, none."""
    if _is_of_slice(read_record(folder) or {}):
        return
    for entry in _list(read_front_matter(folder / "README.md").get("model-index")):
        for result in _list(entry.get("results")):
            dataset = result.get("dataset")
            dataset = dataset if isinstance(dataset, dict) else {}
            for metric in _list(result.get("metrics")):
                value, kind = _number(metric.get("value")), metric.get("type")
                if value is None or not isinstance(kind, str):
                    continue
                names = [dataset.get(key) for key in ("name", "config", "type")]
                for name in dict.fromkeys(name for name in names if name and isinstance(name, str)):
                    yield name, kind.lower(), value


def _number(value: Any) -> float | None:
    """Return a number that somebody has written, or `None` where it is none, or none that a figure can be."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < MOST
    return float(value) if is_number else None


def _list(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def _plain(name: str) -> str:
    """Return a name's letters and digits, small: what spellings have in common."""
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _text_name(name: str) -> str:
    return TEXT_NAMES.get(_plain(name), name)


def _task_name(name: str) -> str:
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
    return TASK_NAMES.get(_plain(name), plain)
