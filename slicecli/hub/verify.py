"""Checking a slice: that its files, its config and its card are what its record says, and that nothing in it is secret.

A record vouches for nothing by itself: whoever changes weights can change the record with them. What is found here is
damage, and what was changed in one place and not in the others.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.companions import CODE_SUFFIXES, KNOWN_FILES, VOCABULARIES, WEIGHT_SUFFIXES
from slicecli.checkpoint.folder import RECORD_FILE
from slicecli.checkpoint.source import TOKENIZER_CONFIG, tokenizer_references
from slicecli.checkpoint.weight_headers import INDEX_FILE, entry_file
from slicecli.errors import SlicecliError, WeightsError
from slicecli.family.dimensions import Dimensions
from slicecli.family.schedule import Schedule
from slicecli.family.slice_plan import DTYPE_BYTES, DTYPE_CODES
from slicecli.hub.card import CARD_FILE, Card, merged_metadata, render_body
from slicecli.hub.inspection import Inspection, download_repository, inspect_folder, inspect_repository
from slicecli.hub.metadata import card_metadata
from slicecli.modeling import AUTO_MAP, CONFIG_TYPE
from slicecli.runtime.markdown import visible
from slicecli.runtime.secrets import find_paths, find_tokens
from slicecli.runtime.versions import __version__

if TYPE_CHECKING:
    from slicecli.adapters import Adapter
    from slicecli.progress import Progress

__all__ = [
    "CHECKS",
    "Finding",
    "check_card",
    "check_config",
    "check_counts",
    "check_files",
    "check_record",
    "check_secrets",
    "examine_repository",
    "verify_contents",
    "verify_folder",
    "verify_repository",
]

CONFIG_FILE = "config.json"
# what loading reads besides; an adapter's config can make it load another model
_LOADED_FILES = (*KNOWN_FILES, CONFIG_FILE, "adapter_config.json", "*.index.json", "*.jinja")
_LEGAL_FILES = ("LICENSE*", "LICENCE*", "NOTICE*", "COPYING*", "USE_POLICY*")
# what becomes neither a parameter nor a bias is called otherwise, in every family of transformers
_PARAMETER_NAMES = (".weight", ".bias")
_WIDTH_FIELDS = ("hidden_size", "n_embd", "d_model")
TOLERANCE = 1e-9
MOST_CHARACTERS = 120


@dataclass(frozen=True)
class Finding:
    """Something that was found.

    Attributes:
        check: Name of the check, one of `CHECKS`.
        is_error: Whether it is wrong; else it is good to know.
    """

    check: str
    is_error: bool
    text: str


def verify_folder(folder: Path, tokens: Sequence[str] = (), progress: Progress | None = None) -> list[Finding]:
    """Check the slice in a folder."""
    return verify_contents(inspect_folder(folder, progress), tokens)


def verify_repository(
    repository: str, revision: str | None = None, token: str | None = None, download: bool = False
) -> list[Finding]:
    """Check the slice in a repository."""
    return verify_contents(examine_repository(repository, revision, token, download), [token] if token else [])


def examine_repository(
    repository: str,
    revision: str | None = None,
    token: str | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> Inspection:
    """Look at what is in a repository, see `verify_repository`."""
    if download:
        return inspect_folder(download_repository(repository, revision, token), progress, repository)
    return inspect_repository(repository, revision, token, progress)


def verify_contents(inspection: Inspection, tokens: Sequence[str] = ()) -> list[Finding]:
    """Make all checks that can be made; without a sound record most cannot."""
    checks: list[Callable[[Inspection], Iterator[Finding]]] = [check_record]
    if not inspection.faults:
        checks += [check_files, check_counts, check_config, check_card]
    found = [finding for check in checks for finding in check(inspection)]
    return [*found, *check_secrets(inspection, tokens)]


def check_record(inspection: Inspection) -> Iterator[Finding]:
    """Check that there is a record and that it fits its schema."""
    if RECORD_FILE not in inspection.sizes:
        yield _error("record", f"{RECORD_FILE} is missing, so this is not a slice")
    elif inspection.record is None:
        yield _error("record", f"{RECORD_FILE} is not a JSON object")
    else:
        yield from (_error("record", f"{RECORD_FILE}: {fault}") for fault in inspection.faults)
    if (
        inspection.is_published
        and not inspection.faults
        and inspection.record["repository"] not in (None, inspection.name)
    ):
        yield _note("record", f"according to it the slice is published as {inspection.record['repository']}")


def check_files(inspection: Inspection) -> Iterator[Finding]:
    """Check that the recorded files are there as they were, and that there is no other that loading would read."""
    recorded = {**inspection.record["weights"], **inspection.record["files"]}
    for file, digest in recorded.items():
        if file not in inspection.sizes:
            yield _error("files", f"{file} is missing")
        elif inspection.digests[file] != digest:
            yield _error("files", f"{file} differs from the recorded file")
    for file in inspection.sizes:
        if file in recorded or file in (RECORD_FILE, CARD_FILE):
            continue
        if _is_loaded(file):
            yield _error("files", f"{_short(file)} is not in the record, and loading the slice may read or run it")
        else:
            yield _note("files", f"{_short(file)} is not in the record")


def _is_loaded(file: str) -> bool:
    path = PurePosixPath(file)
    if path.suffix.lower() in WEIGHT_SUFFIXES | CODE_SUFFIXES:
        return True
    is_legal = any(fnmatch(path.name, pattern) for pattern in _LEGAL_FILES)
    return not is_legal and any(fnmatch(path.name, pattern) for pattern in _LOADED_FILES)


def check_counts(inspection: Inspection) -> Iterator[Finding]:
    """Check that the numbers of the record follow from one another, and from the heads of the weight files."""
    record = inspection.record
    sliced, count_of_bytes = record["parameters"]["sliced"], record["bytes"]["sliced"]
    sparsity = 1 - record["dim"] / record["hidden_size"]
    if abs(record["sparsity"] - sparsity) > TOLERANCE:
        yield _error(
            "counts", f"sparsity is {record['sparsity']:g} in the record, but 1 - dim/hidden_size is {sparsity:g}"
        )
    if record["schedule"] is not None:
        dim = _schedule(record["schedule"]).dim
        if record["dim"] != dim:
            yield _error("counts", f"dim is {record['dim']} in the record, but the mean of its schedule is {dim}")
    if count_of_bytes != sliced * DTYPE_BYTES[record["dtype"]]:
        yield _error(
            "counts",
            f"{count_of_bytes:,} bytes in the record do not match {sliced:,} parameters in {record['dtype']}",
        )
    if record["bytes"]["dense"] not in {record["parameters"]["dense"] * size for size in DTYPE_BYTES.values()}:
        yield _error("counts", "the dense model's bytes in the record do not match its parameters in any dtype")
    rows = record["calibration"]
    if rows["tokens"] != rows["samples"] * rows["sequence_length"]:
        yield _error(
            "counts",
            f"{rows['samples']} rows of {rows['sequence_length']} tokens are not {rows['tokens']:,} calibration tokens",
        )
    for one in record.get("recovery", ()):
        yield from _check_recovery(one)
    yield from _check_tensors(inspection)


def _check_recovery(recovery: Mapping[str, Any]) -> Iterator[Finding]:
    for rows in (recovery["training"], recovery["held_out"]):
        if rows["tokens"] != rows["rows"] * recovery["sequence_length"]:
            yield _error(
                "counts",
                f"{rows['rows']} rows of {recovery['sequence_length']} tokens are not {rows['tokens']:,} tokens of the "
                "training text",
            )
    steps, tokens, per_step = recovery["steps"], recovery["tokens"], recovery["tokens_per_step"]
    if tokens != steps * per_step:
        yield _error("counts", f"{steps:,} steps of {per_step:,} tokens are not {tokens:,} tokens of training")
    epochs, rows = recovery["epochs"], recovery["training"]["tokens"]
    if epochs is not None and tokens != epochs * rows:
        yield _error("counts", f"{epochs} epochs of {rows:,} tokens are not {tokens:,} tokens of training")
    if recovery["best_step"] > steps:
        yield _error("counts", f"the best step is {recovery['best_step']:,} of {steps:,} in the record")
    if recovery["kl_after"] >= recovery["kl_before"]:
        yield _error(
            "counts",
            f"the divergence after training is {recovery['kl_after']:g} in the record, no less than before "
            f"({recovery['kl_before']:g})",
        )


def _check_tensors(inspection: Inspection) -> Iterator[Finding]:
    record = inspection.record
    for file, tensors in inspection.tensors.items():
        if tensors is None:
            yield _error("counts", f"{file} is damaged, or not a safetensors file")
        else:
            code = DTYPE_CODES[record["dtype"]]
            other = {one.dtype for one in tensors.values()} - {code}
            if other:
                yield _error(
                    "counts", f"{file} has tensors of dtype {', '.join(sorted(other))}, but the record says {code}"
                )
    known = {file: tensors for file, tensors in inspection.tensors.items() if tensors is not None}
    if known.keys() != record["weights"].keys():
        return  # without all of them nothing can be counted
    elements = sum(one.elements for tensors in known.values() for one in tensors.values())
    surplus = elements - record["parameters"]["sliced"]
    # persistent buffers lie in the files too, and are no parameters
    most = sum(
        one.elements
        for tensors in known.values()
        for name, one in tensors.items()
        if not name.endswith(_PARAMETER_NAMES)
    )
    if not 0 <= surplus <= most:
        yield _error(
            "counts",
            f"the weight files hold {elements:,} numbers, but the record says {record['parameters']['sliced']:,}",
        )
    elif surplus:
        yield _note("counts", f"the weight files hold {surplus:,} numbers besides the parameters: buffers of the model")
    yield from _check_index(inspection, {name: file for file, tensors in known.items() for name in tensors}, elements)


def _check_index(inspection: Inspection, file_of: Mapping[str, str], elements: int) -> Iterator[Finding]:
    """Check that the index leads to each tensor."""
    record = inspection.record
    try:
        entry = entry_file(inspection.sizes, _json_of(inspection, CONFIG_FILE))
    except WeightsError as error:
        yield _error("counts", error.cause)
        return
    if entry != INDEX_FILE:
        if entry is None:
            yield _error("counts", f"{INDEX_FILE} is missing, so the weight files cannot be found")
        elif list(record["weights"]) != [entry]:
            yield _error("counts", f"transformers reads {entry}, not the recorded weight files")
        return
    index = _json_of(inspection, INDEX_FILE)
    if index.get("weight_map") != file_of:
        yield _error("counts", f"{INDEX_FILE} does not match the tensors in the weight files")
    total = elements * DTYPE_BYTES[record["dtype"]]
    metadata = index.get("metadata")
    stated = metadata.get("total_size") if isinstance(metadata, dict) else None
    if stated != total:
        yield _error("counts", f"{INDEX_FILE} states {_short(stated)} bytes, but the weight files hold {total:,}")


def check_config(inspection: Inspection) -> Iterator[Finding]:
    """Check that the config is that of a slice as it is recorded."""
    record, config = inspection.record, _json_of(inspection, CONFIG_FILE)
    if not config:
        yield _error("config", f"{CONFIG_FILE} is missing, or not a JSON object")
        return
    expected = (
        _custom_code_fields(record, config) if record["layout"] == "custom-code" else _stock_fields(record, config)
    )
    for path, value in {**expected, ("dtype",): record["dtype"]}.items():
        found = _at(config, path)
        if found != value:
            yield _error(
                "config", f"{'.'.join(path)} is {_short(found)} in {CONFIG_FILE}, but {_short(value)} in the record"
            )
    yield from _check_code(inspection, config.get("auto_map"))


def _stock_fields(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Return what the config of a stock slice has, by path."""
    written = record["written_type"]
    adapter = _adapter_of(record, written)
    width = None if adapter is None else adapter.names.get("hidden_size", "hidden_size")
    if width is None:
        width = next((name for name in _WIDTH_FIELDS if name in config), _WIDTH_FIELDS[0])
    fields: dict[tuple[str, ...], Any] = {("model_type",): written, (width,): record["dim"]}
    return fields | {(name,): value for name, value in _mlp_fields(record, adapter, config).items()}


def _mlp_fields(record: Mapping[str, Any], adapter: Adapter | None, config: Mapping[str, Any]) -> dict[str, int]:
    """Return the config fields that have widths of MLPs, with the values that a record gives them.

    Args:
        adapter: The one that serves the class of the config, where it is known.
    """
    if record["mlp_dim"] is None:
        return {}
    widths = {name: one["sliced"] for name, one in record.get("other_mlp_widths", {}).items()}
    if adapter is None:
        return {"intermediate_size": record["mlp_dim"], **widths}
    try:
        first = Dimensions(adapter, config).mlp_widths[0]
    except (SlicecliError, IndexError):  # of a damaged config, which other checks name
        first = adapter.mlp_widths[0]
    return {adapter.names.get(name, name): width for name, width in {first: record["mlp_dim"], **widths}.items()}


def _adapter_of(record: Mapping[str, Any], model_type: str) -> Adapter | None:
    """Return the adapter that serves a model type, or else the one that made the slice; `None` if none is installed."""
    from slicecli.family.plugins import plugins

    known = plugins().adapters
    return next((one for one in known.values() if model_type in one.model_types), known.get(record["adapter"]))


def _custom_code_fields(record: Mapping[str, Any], config: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Return what the config of a slice with code of its own has, by path."""
    fields: dict[tuple[str, ...], Any] = {
        ("model_type",): CONFIG_TYPE,
        ("auto_map",): AUTO_MAP,
        ("dense_config", "model_type"): record["source"]["model_type"],
        ("slicing", "hidden_size"): record["hidden_size"],
        ("slicing", "has_shortcuts"): record["schedule"] is not None,
        ("embedding_size",): record["dim"],
        ("slicing", "head_width"): record["dim"],
    }
    inner = config.get("dense_config")
    adapter = _adapter_of(record, record["source"]["model_type"])
    for name, width in _mlp_fields(record, adapter, inner if isinstance(inner, dict) else {}).items():
        fields["dense_config", name] = width
    if record["schedule"] is not None:
        schedule = _schedule(record["schedule"])
        fields |= {
            ("embedding_size",): schedule.site_widths[0],
            ("slicing", "widths"): [list(block) for block in schedule.blocks],
            ("slicing", "head_width"): schedule.head,
        }
    return fields


def _check_code(inspection: Inspection, auto_map: Any) -> Iterator[Finding]:
    """Check that the slice asks for code where the record does, and for none from elsewhere.

    A tokenizer may name code and do without it: its class may have come to transformers since.
    """
    record = inspection.record
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    of_model = [name for value in values for name in (value if isinstance(value, list) else [value]) if name]
    of_tokenizer = tokenizer_references(_json_of(inspection, TOKENIZER_CONFIG)) if record["needs_remote_code"] else []
    if bool(auto_map) != record["needs_remote_code"] and not of_tokenizer:
        says = "needs" if record["needs_remote_code"] else "does not need"
        names = "names custom code" if auto_map else "names no custom code"
        yield _error("config", f"{CONFIG_FILE} {names} (auto_map), but the record says that the slice {says} any")
    references = [(CONFIG_FILE, name) for name in of_model] + [(TOKENIZER_CONFIG, name) for name in of_tokenizer]
    for file, name in references:
        repository, _, reference = str(name).rpartition("--")
        if repository:
            yield _error("config", f"{file} loads code from another repository: {_short(name)}")
        elif f"{reference.partition('.')[0]}.py" not in record["files"]:
            yield _error("config", f"{file} loads code from an unrecorded file: {_short(name)}")


def check_card(inspection: Inspection) -> Iterator[Finding]:
    """Check that the card says what the record does; what its owner added may stand there."""
    content = inspection.texts.get(CARD_FILE)
    if content is None:
        yield _error("card", f"{CARD_FILE} is missing")
        return
    try:
        card = Card(content.decode("utf-8"))
    except Exception as error:  # YAML errors, and what the Hub's client raises for metadata that is none
        yield _error("card", f"{CARD_FILE} cannot be read as a card ({type(error).__name__})")
        return
    yield from _check_metadata(card.metadata, card_metadata(inspection.record))
    if card.body is None:
        yield _error("card", f"{CARD_FILE} has no text between slicecli's markers")
    elif card.version != __version__:
        yield _note(
            "card", f"slicecli {card.version} wrote the card, so version {__version__} does not compare its text"
        )
    else:
        expected = render_body(inspection.record)
        pairs = enumerate(zip_longest(card.body.split("\n"), expected.split("\n"), fillvalue=""), start=1)
        number, (line, wanted) = next(((number, pair) for number, pair in pairs if pair[0] != pair[1]), (0, ("", "")))
        if number:
            yield _error("card", f"line {number} of the text is {_short(line)}, but should be {_short(wanted)}")


def _check_metadata(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Finding]:
    expected = merged_metadata(theirs, ours)
    for field in ours:
        if field == "tags":
            missing = [tag for tag in ours["tags"] if tag not in (theirs.get("tags") or ())]
            if missing:
                yield _error("card", f"its metadata lacks the tag {', '.join(missing)}")
        elif field != "model-index" and theirs.get(field) != expected[field]:
            yield _error(
                "card",
                f"{field} is {_short(theirs.get(field))} in its metadata, but should be {_short(expected[field])}",
            )
    shown, recorded = _results(theirs.get("model-index")), _results(ours.get("model-index"))
    for name in dict.fromkeys([*recorded, *shown]):
        if name not in shown:
            yield _error("card", f"its model-index lacks {_short(name)}")
        elif name not in recorded:
            yield _error("card", f"its model-index has {_short(name)}, which is not in the record")
        elif shown[name] != recorded[name]:
            yield _error(
                "card",
                f"{_short(name)} is {_short(shown[name])} in its model-index, but should be {_short(recorded[name])}",
            )
    if shown == recorded and theirs.get("model-index") != ours.get("model-index"):
        yield _error("card", "its model-index describes another model, or names different texts from the record")


def _results(model_index: Any) -> dict[str, Any]:
    """Return the values of a model-index by text and metric; it was read by the Hub's client, and is of its form."""
    return {
        f"{result['dataset']['name']}, {metric.get('name') or metric['type']}": metric["value"]
        for model in model_index or ()
        for result in model["results"]
        for metric in result["metrics"]
    }


def check_secrets(inspection: Inspection, tokens: Sequence[str] = ()) -> Iterator[Finding]:
    """Check that no file holds a token, nor anything that tells of this machine and its user.

    Vocabularies are searched for tokens only: among a hundred thousand pieces of text there may be paths. What a slice
    took over from a model on the Hub was public before, so that a path in it is a note.
    """
    for file, content in inspection.texts.items():
        text = content.decode("utf-8", errors="replace")
        for kind in find_tokens(text, tokens):
            yield _error("secrets", f"{_short(file)} holds {kind}")
        if any(fnmatch(PurePosixPath(file).name, pattern) for pattern in VOCABULARIES):
            continue
        for kind in find_paths(text):
            yield Finding("secrets", not _is_from_hub(inspection, file), f"{_short(file)} holds {kind}")


def _is_from_hub(inspection: Inspection, file: str) -> bool:
    if inspection.faults or inspection.record["source"]["commit"] is None:
        return False
    return file in inspection.record["files"] and file != CONFIG_FILE


def _json_of(inspection: Inspection, file: str) -> dict[str, Any]:
    """Return a JSON object; empty where the file is missing or holds none."""
    try:
        found = json.loads(inspection.texts.get(file, b"null"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _at(fields: Mapping[str, Any], path: Sequence[str]) -> Any:
    value: Any = fields
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _schedule(fields: Mapping[str, Any]) -> Schedule:
    return Schedule(tuple(tuple(block) for block in fields["blocks"]), fields["head"])


def _short(value: Any) -> str:
    """Return a value of somebody's for a line on a terminal."""
    line = visible(value if isinstance(value, str) else json.dumps(value, default=str))
    return line if len(line) <= MOST_CHARACTERS else f"{line[: MOST_CHARACTERS - 1]}…"


def _error(check: str, text: str) -> Finding:
    return Finding(check, True, text)


def _note(check: str, text: str) -> Finding:
    return Finding(check, False, text)


CHECKS = ("record", "files", "counts", "config", "card", "secrets")
"""Names of the checks, in their order."""
