"""`slicecli inspect`: what the program sees in a model, from its config alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show
from slicecli.family.friendly_dims import formats_of, friendly_multiple, legend, why_not_quantised
from slicecli.family.serving import SliceKind, Verdict, clients, describe_verdicts, verdicts_on

if TYPE_CHECKING:
    from slicecli.family.dimensions import Dimensions
    from slicecli.family.written_class import SliceClasses


@click.command("inspect")
@click.argument("model", type=shared.MODEL)
@click.option(
    "--dim",
    "dims",
    type=shared.DimList(),
    metavar="N,N,...",
    help="Say of slices to these hidden sizes in which class they are written, where they run, and which quantised "
    "formats take them.",
)
@click.option(
    "--adapter",
    type=shared.TEXT,
    metavar="NAME",
    help="Use this adapter instead of the one for the model's type; auto infers one.",
)
@shared.model_options
@shared.format_option
def command(
    model: str,
    dims: tuple[int, ...] | None,
    adapter: str | None,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Show the family, sizes and legal dims of MODEL, where its slices run, and what reads and writes its stream.

    Where slices run was measured with small models of each class, whose logits were compared with those of
    transformers 5: "correct" if they are the same, "wrong" if the program runs and they differ, "refused" if it stops.

    If no plugin serves the model's type, the declaration is inferred and proved; if that fails, the findings and the
    failed check are shown.
    """
    from slicecli.checkpoint.source import Source
    from slicecli.errors import NotInferredError
    from slicecli.family.written_class import SliceClasses
    from slicecli.jobs.plan import find_adapter
    from slicecli.record.record import read_sound_record

    source = Source.find(model, revision, token, trust_remote_code)
    source.check_is_decoder()
    try:
        found_adapter = find_adapter(source, adapter)
    except NotInferredError as error:
        if output_format == "json":
            kind = source.fields.get("model_type")
            found = {"check": error.check, "reason": error.cause, "found": error.found}
            show.print_json({"model": source.name, "model_type": kind, "adapter": None, "not_inferred": found})
        raise
    chosen, fields, inference = found_adapter.adapter, found_adapter.fields, found_adapter.inference
    dimensions, comparison = source.dimensions(chosen, fields)
    legal = dimensions.legal_dims()
    model_type = str(fields.get("model_type"))
    classes = SliceClasses.of_method(dimensions, "refit", model_type, has_own_code=source.has_own_model_code)
    record = read_sound_record(source.folder)
    layout = chosen.layout(fields)
    slices = [_slice_at(dim, dimensions, classes, model_type) for dim in dims or ()]
    document: dict[str, Any] = {
        "model": source.name,
        "revision": source.commit,
        "model_type": fields.get("model_type"),
        "adapter": chosen.name,
        "inferred": None if inference is None else {"checks": list(inference.checks), "error": inference.error},
        "layout": layout,
        "stock_obstacle": chosen.why_not_stock(fields),
        "shortcut_obstacle": dimensions.shortcut_obstacle,
        "hidden_size": dimensions.hidden_size,
        "blocks": dimensions.blocks,
        "heads": dimensions.heads,
        "key_value_heads": dimensions.key_value_heads,
        "head_dim": dimensions.head_dim,
        "vocabulary": dimensions.vocabulary,
        "is_tied": dimensions.is_tied,
        "keeps_tie": dimensions.keeps_tie,
        "tie_obstacle": dimensions.tie_obstacle,
        "parameters": dimensions.parameters(),
        "legal_dims": {
            "multiple_of": dimensions.dim_multiple,
            "smallest": legal[0] if legal else None,
            "largest": legal[-1] if legal else None,
        },
        "classes": [one.to_json() for one in classes.available] if classes else [],
        "slices": slices,
        "class_obstacles": dict(classes.obstacles) if classes else {},
        "mlp_size": None if dimensions.mlp_obstacle else dimensions.mlp_size,
        "mlp_widths": {}
        if dimensions.mlp_obstacle
        else {name: dimensions.number(name) for name in dimensions.mlp_widths},
        "mlp_obstacle": dimensions.mlp_obstacle,
        "unused_tensors": list(comparison.unused),
        "lacking_parameters": list(comparison.lacking),
        "slice_of": record["source"]["model"] if record else None,
        "declaration": dimensions.declaration(),
    }
    if output_format == "json":
        show.print_json(document)
        return
    how = f"adapter {chosen.name}" if inference is None else "adapter inferred"
    show.print_table(
        ["", ""],
        [
            ["model", source.name],
            *([["slice of", document["slice_of"]]] if document["slice_of"] else []),
            ["type", f"{document['model_type']} ({how}, {document['layout']} layout)"],
            ["hidden size", f"{dimensions.hidden_size:,}"],
            *([] if dimensions.mlp_obstacle else [["MLP width", _mlp_widths(document["mlp_widths"])]]),
            ["blocks", f"{dimensions.blocks}"],
            ["heads", f"{dimensions.heads} x {dimensions.head_dim}, {dimensions.key_value_heads} key/value"],
            [
                "vocabulary",
                f"{dimensions.vocabulary:,}{' (head tied to the embeddings)' if dimensions.is_tied else ''}",
            ],
            ["parameters", f"{dimensions.parameters():,}"],
            ["legal dims", _legal_dims(legal)],
        ],
    )
    _print_where_slices_run(document, dimensions, classes)
    _print_declaration(document["declaration"])
    if document["stock_obstacle"]:
        show.note(f"A slice needs custom code: {document['stock_obstacle']}")
    if document["tie_obstacle"]:
        show.note(f"A slice gets a head of its own: {document['tie_obstacle']}.")
    for name, reason in document["class_obstacles"].items():
        show.note(f"Slices cannot be written as {name}: {reason}.")
    if document["shortcut_obstacle"]:
        show.note(f"The slicegpt method cannot slice it: {document['shortcut_obstacle']}")
    if document["mlp_obstacle"]:
        show.note(f"Its MLPs cannot be sliced: {document['mlp_obstacle']}.")
    for text in comparison.remarks(source.name):
        show.note(text)
    if inference is not None:
        show.note(
            "No plugin serves this type. The declaration was inferred and proved: it accounts for every parameter, "
            f"and rotating the stream of a small model changes its logits by {inference.error:.0e}."
        )


def _mlp_widths(widths: Mapping[str, int]) -> str:
    """Return the width that `--mlp-dim` is of, and the others that follow it."""
    (_, first), *others = widths.items()
    more = ", ".join(f"{name} {width:,}" for name, width in others)
    return f"{first:,}" + (f" ({more})" if more else "")


def _legal_dims(legal: range) -> str:
    """Return the legal dims as a person reads them."""
    if not legal:
        return "none"
    return f"{'any' if legal.step == 1 else f'multiples of {legal.step}'}, {legal[0]} to {legal[-1]}"


def _slice_at(dim: int, dimensions: Dimensions, classes: SliceClasses | None, model_type: str) -> dict[str, Any]:
    """Return what is known of a slice before it is made."""
    from slicecli.modeling import CONFIG_TYPE

    if classes is None:
        dimensions.check_dim(dim)
        written_type, note = CONFIG_TYPE, ""
        verdicts = _verdicts_on_custom_code(model_type, dimensions)
    else:
        written = classes.at(dim)
        written.check_dim(dim)
        written_type, note, verdicts = written.model_type, classes.note(written, dim), written.verdicts
    legal = (classes or dimensions).legal_dims()
    cost = why_not_quantised(dim, legal) if dimensions.hidden_size % 32 == 0 else ""
    return {
        "dim": dim,
        "written_type": written_type,
        "formats": formats_of(dim),
        "clients": describe_verdicts(verdicts),
        "notes": [text for text in (note, cost) if text],
    }


def _verdicts_on_custom_code(model_type: str, dimensions: Dimensions) -> dict[str, Verdict]:
    return verdicts_on(SliceKind(model_type, "custom-code", "refit", dimensions.keeps_tie, ""))


def _print_where_slices_run(document: Mapping[str, Any], dimensions: Dimensions, classes: SliceClasses | None) -> None:
    """Print a line for each dim that was asked for, or else for each class that slices can be written in."""
    slices = document["slices"]
    rows: list[tuple[list[str], Mapping[str, Any]]]
    if slices:
        first = ["slice to", "written as", "÷"]
        rows = [
            ([str(one["dim"]), one["written_type"], str(friendly_multiple(one["dim"]) or "-")], one["clients"])
            for one in slices
        ]
    elif classes:
        first = ["slices written as", "dims"]
        rows = [
            ([one.model_type, _legal_dims(one.legal_dims())], describe_verdicts(one.verdicts))
            for one in classes.available
        ]
    else:
        first = ["slices written as", "dims"]
        verdicts = _verdicts_on_custom_code(document["model_type"], dimensions)
        rows = [(["custom code", _legal_dims(dimensions.legal_dims())], describe_verdicts(verdicts))]
    table = [[*cells, *(one["verdict"] for one in found.values())] for cells, found in rows]
    show.print_table([*first, *clients()], table, is_numeric=False)
    show.result(f"Measured with small slices of each class, in {', '.join(clients().values())}.")
    if slices:
        show.result(legend())
    for text in dict.fromkeys(text for one in slices for text in one["notes"]):
        show.note(text)


def _print_declaration(declaration: dict[str, Any]) -> None:
    """Print who reads and who writes the stream, a line for each norm."""
    rows = [["(embeddings)", "", ", ".join(table["path"] for table in declaration["embeddings"])]]
    for kind in declaration["block_kinds"]:
        which = "*" if len(declaration["block_kinds"]) == 1 else _ranges(kind["blocks"])
        for branch in kind["branches"]:
            readers = [reader["path"] for reader in branch["readers"]]
            writers = [branch["writer"]["path"]] if branch["writer"] else []
            if branch["experts"]:
                readers.append(branch["experts"]["reader"])
                writers.append(branch["experts"]["writer"])
            norm = f"{declaration['blocks']}.{which}.{branch['norm']}"
            rows.append([norm, ", ".join(readers), ", ".join(writers)])
    rows.append([declaration["final_norm"], declaration["head"]["path"], ""])
    show.print_table(["norm", "read by", "written by"], rows, is_numeric=False)


def _ranges(numbers: list[int]) -> str:
    """Return block numbers as a person writes them: 0-3, 5."""
    parts: list[str] = []
    for index, number in enumerate(numbers):
        if index and number == numbers[index - 1] + 1:
            parts[-1] = f"{parts[-1].partition('-')[0]}-{number}"
        else:
            parts.append(str(number))
    return f"[{','.join(parts)}]"
