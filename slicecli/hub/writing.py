"""What a slice says of itself, kept in step: its record, the predictions of other dims, their plot, and the card.

Everything that is learnt of a slice after its weights are written is entered here: what was measured, curves that were
fitted, the repository it goes to. The record is changed first, and the card is written from it.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.folder import RECORD_FILE, file_digest, write_whole_files
from slicecli.data.names import Named, are_of_one_file, distinct_names, most_telling
from slicecli.errors import OutputError, RequestError, reason_of
from slicecli.hub.card import CARD_FILE, read_card, render_card
from slicecli.hub.prediction_table import with_predictions
from slicecli.record.record import ResultKind, digest_of, known_names, read_record, record_text
from slicecli.record.schema import schema_errors
from slicecli.runtime.front_matter import MOST_CARD_BYTES
from slicecli.runtime.versions import package_versions

if TYPE_CHECKING:
    from slicecli.estimation.forecasts import Forecast

__all__ = [
    "Description",
    "describe_slice",
    "enter_class",
    "enter_curves",
    "enter_repository",
    "enter_results",
    "own_files",
    "write_card",
]

QUANTITIES: dict[ResultKind, str] = {"perplexity": "perplexity", "tasks": "accuracy"}
# what was measured, to the token: its digest in a figure, and its name in a sentence
MEASURED: dict[ResultKind, tuple[str, str]] = {
    "perplexity": ("rows_sha256", "rows"),
    "tasks": ("requests_sha256", "questions"),
}


@dataclass(frozen=True)
class Description:
    """What is said of a slice as far as it is known before its weights are."""

    record: dict[str, Any]
    plots: Mapping[str, bytes]

    @classmethod
    def draft(cls, record: dict[str, Any], forecasts: Sequence[Forecast]) -> Description:
        """Draw predictions, and make sure that record and card can be written."""
        drafted = cls(*with_predictions(record, forecasts))
        errors = schema_errors(json.loads(json.dumps(drafted.record)))
        if errors:
            raise OutputError(
                f"The record of the slice cannot be written: {errors[0]}.",
                "If that is the name of a file or folder, rename it.",
            )
        render_card(drafted.record, None)
        return drafted


def describe_slice(
    folder: Path, description: Description, energy: Mapping[str, Any], weights: Mapping[str, str]
) -> None:
    """Write plot, record and card of a new slice, whose other files are there."""
    record = {**description.record, "energy": dict(energy), "weights": dict(weights)}
    found = {name: file_digest(folder / name) for name in own_files(folder) if name not in record["weights"]}
    files = dict(sorted({**found, **record["files"]}.items()))
    _write(folder, {**record, "files": files}, None, description.plots)


def own_files(folder: Path) -> list[str]:
    """Return the files of a slice that its record has hashes of: all but the record, the card and hidden ones."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        path.as_posix()
        for path in found
        if path.as_posix() not in {RECORD_FILE, CARD_FILE} and not any(part.startswith(".") for part in path.parts)
    )


def enter_results(
    folder: Path,
    perplexity: Mapping[str, Mapping[str, Any]],
    tasks: Mapping[str, Mapping[str, Any]],
    dense: Mapping[str, Any] | None = None,
    curves: Sequence[Mapping[str, Any]] = (),
) -> tuple[str, ...]:
    """Enter what was measured into the record and the card of a slice, beside what is there.

    A figure takes the place of one on the same text or task; one on another file of the same name stays beside it. A
    figure of the dense model stays only as long as the slice's is of the same rows or requests.

    Args:
        curves: What `Curve.to_json` returns of curves through these figures; one that is there already and rests on
            more slices stays.
    """
    record = _record_to_enter_in(folder)
    results, remarks = record["results"], []
    dense_results = results.setdefault("dense", {})
    measured: dict[ResultKind, Mapping[str, Mapping[str, Any]]] = {"perplexity": perplexity, "tasks": tasks}
    for kind, own in measured.items():
        of_dense = (dense or {}).get(kind) or {}
        names = _agree_on_names(record, kind, {**of_dense, **own}, curves)
        curves = [_renamed(one, kind, names) for one in curves]
        remarks += _enter_figures(results, kind, {names[name]: figure for name, figure in own.items()})
        _enter_figures(dense_results, kind, {names[name]: figure for name, figure in of_dense.items()})
        remarks += _drop_stale_figures(dense_results, kind, results.get(kind) or {})
    if not dense_results:
        del results["dense"]
    results["versions"] = package_versions()
    by_subject = {_subject(one): one for one in (record["curve"] or {}).get("curves", [])}
    for curve in curves:
        known = by_subject.get(_subject(curve))
        if known is None or len(known["points"]) <= len(curve["points"]):
            by_subject[_subject(curve)] = curve
    record, plots = _with_curves(record, list(by_subject.values()))
    _write(folder, record, folder, plots)
    return tuple(remarks)


def _agree_on_names(
    record: dict[str, Any],
    kind: ResultKind,
    measured: Mapping[str, Mapping[str, Any]],
    curves: Sequence[Mapping[str, Any]],
) -> dict[str, str]:
    """Return what new figures and curves are called in a record; what is there already of the same file is renamed."""
    digests = {name: digest_of(figure, kind) for name, figure in measured.items()}
    for curve in curves:
        if curve.get("quantity") == QUANTITIES[kind]:
            digest = curve.get("evaluation_sha256")
            digests.setdefault(str(curve.get("evaluation")), digest if isinstance(digest, str) else None)
    known = known_names(record, kind)
    wanted = [Named(name, digest) for name, digest in digests.items()]
    names = dict(zip(digests, distinct_names(wanted, known), strict=True))
    for name, digest in digests.items():
        same = [other for other in known if digest and known[other] == digest and are_of_one_file(name, other)]
        if len(same) == 1 and list(digests.values()).count(digest) == 1:
            names[name] = most_telling([names[name], *same])
            _rename(record, kind, {same[0]: names[name]})
    return names


def _rename(record: dict[str, Any], kind: ResultKind, names: Mapping[str, str]) -> None:
    """Give texts, or tasks, of a record other names."""
    for results in (record["results"], record["results"].get("dense") or {}):
        if kind in results:
            results[kind] = {names.get(name, name): figure for name, figure in results[kind].items()}
    if record["curve"] is not None:
        record["curve"]["curves"] = [_renamed(one, kind, names) for one in record["curve"]["curves"]]


def _renamed(curve: Mapping[str, Any], kind: ResultKind, names: Mapping[str, str]) -> Mapping[str, Any]:
    """Return a curve with other names of texts, or of tasks."""
    name = str(curve.get("evaluation"))
    is_renamed = curve.get("quantity") == QUANTITIES[kind] and name in names
    return {**curve, "evaluation": names[name]} if is_renamed else curve


def _enter_figures(results: dict[str, Any], kind: ResultKind, new: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Enter figures beside those that are there; say which of these had been measured on something else."""
    digest, what = MEASURED[kind]
    known = results.get(kind) or {}
    if new:
        results[kind] = {**known, **new}
    return [
        f"The recorded figure on {name} was measured on different {what}; it was replaced."
        for name, figure in new.items()
        if name in known and known[name][digest] != figure.get(digest)
    ]


def _drop_stale_figures(dense: dict[str, Any], kind: ResultKind, own: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Remove figures of the dense model that are of other rows or questions than the slice's; say which."""
    digest, what = MEASURED[kind]
    figures = dense.get(kind) or {}
    stale = [name for name, figure in figures.items() if own.get(name, figure).get(digest) != figure.get(digest)]
    for name in stale:
        del figures[name]
    return [
        f"The dense model's figure on {name} was measured on different {what} from the slice's; it was not recorded."
        for name in stale
    ]


def _subject(curve: Mapping[str, Any]) -> tuple[str, str]:
    return str(curve["quantity"]), str(curve["evaluation"])


def enter_curves(folder: Path, curves: Sequence[Mapping[str, Any]]) -> None:
    """Enter prediction curves into the record and the card of a slice, in place of those that are there.

    Args:
        curves: What `Curve.to_json` returns; those of other models and methods are left out. A curve on a text or task
            that was measured has its name, one on another file of that name a name of its own.
    """
    record = _record_to_enter_in(folder)
    if "recovery" in record:
        raise RequestError(
            f"{folder.name!r} was trained after slicing, which no curve of slices describes.",
            "Enter the curves into a slice that was not.",
        )
    own = [
        one for one in curves if (one.get("model"), one.get("method")) == (record["source"]["model"], record["method"])
    ]
    if not own:
        raise RequestError(
            f"The file has no curve of {record['source']['model']} sliced by {record['method']}.",
            "Pass a file that slicecli fit or sweep wrote for the model this slice was made from.",
        )
    record["curve"] = None
    for kind in QUANTITIES:
        names = _agree_on_names(record, kind, {}, own)
        own = [_renamed(one, kind, names) for one in own]
    record, plots = _with_curves(record, own)
    _write(folder, record, folder, plots)


def enter_repository(folder: Path, repository: str) -> None:
    """Enter where a slice is published, so that its card says how to load it from there."""
    _write(folder, {**_record_to_enter_in(folder), "repository": repository}, folder)


def enter_class(folder: Path, changes: Mapping[str, Any], weights: Mapping[str, str]) -> None:
    """Enter that a slice, whose files are there, is written in another class.

    Args:
        changes: Fields of the record with their new values.
    """
    record = {**_record_to_enter_in(folder), **changes, "weights": dict(weights)}
    files = {name: file_digest(folder / name) for name in own_files(folder) if name not in weights}
    _write(folder, {**record, "files": files}, folder)


def write_card(folder: Path) -> None:
    """Write the card of a slice again, from its record; what its owner wrote into the card stays."""
    _write(folder, _record_to_enter_in(folder), folder)


def _record_to_enter_in(folder: Path) -> dict[str, Any]:
    record = read_record(folder)
    if record is None:
        raise OutputError(f"{folder.name!r} has no readable {RECORD_FILE}.", "Pass the folder of a slice.")
    errors = schema_errors(record)
    if errors:
        raise OutputError(f"The {RECORD_FILE} of {folder.name!r} is damaged: {errors[0]}.", "Slice the model again.")
    return copy.deepcopy(record)


def _write(
    folder: Path, record: dict[str, Any], card_folder: Path | None, plots: Mapping[str, bytes] | None = None
) -> None:
    """Write record, card and plots together; text of the owner of a card that is there already stays."""
    record = json.loads(json.dumps(record))  # as a reader will find it
    errors = schema_errors(record)
    if errors:
        raise OutputError(f"The new content does not fit the record: {errors[0]}.", "Pass a file written by slicecli.")
    existing = None
    if card_folder is not None:
        card_file = card_folder / CARD_FILE
        if card_file.is_file() and card_file.stat().st_size > MOST_CARD_BYTES:
            raise OutputError(
                f"The card of {folder.name!r} has {card_file.stat().st_size:,} bytes, too large for a card.",
                f"Shorten {CARD_FILE}, or remove it.",
            )
        existing = read_card(card_folder)
    try:
        card = render_card(record, existing)
    except Exception as error:  # the metadata of an owner may be anything that YAML can say
        raise OutputError(
            f"The card of {folder.name!r} cannot be rewritten: {type(error).__name__}: {reason_of(error)}.",
            f"Fix the YAML at the top of {CARD_FILE}, or remove the file.",
        ) from error
    contents: dict[str, str | bytes] = {**(plots or {}), RECORD_FILE: record_text(record), CARD_FILE: card}
    try:
        for name in contents:
            (folder / name).parent.mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(f"{folder.name!r} cannot be written: {error.strerror}.", "Check its permissions.") from error
    write_whole_files({folder / name: content for name, content in contents.items()})


def _with_curves(record: dict[str, Any], curves: list[Mapping[str, Any]]) -> tuple[dict[str, Any], Mapping[str, bytes]]:
    """Return a record with curves and what they predict, and the plots of that by file name."""
    from slicecli.estimation.forecasts import forecast_by_curve
    from slicecli.estimation.results import read_curves

    if not curves:
        return record, {}
    record = {**record, "curve": {"curves": curves}}
    # read back, so that what is entered is what a reader will find
    forecasts = [forecast_by_curve(one, "of this model", "measured") for one in read_curves(record["curve"])]
    return with_predictions(record, forecasts)
