"""`slicecli inspect`: what the program sees in a model, from its config alone."""

from __future__ import annotations

from typing import Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show


@click.command("inspect")
@click.argument("model")
@click.option("--adapter", metavar="NAME", help="Use this adapter instead of the one for the model's type.")
@shared.model_options
@shared.format_option
def command(
    model: str,
    adapter: str | None,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Show the family of MODEL, its sizes, its legal dims, and who reads and writes its residual stream."""
    from slicecli.adapters import select_adapter
    from slicecli.plugins import plugins
    from slicecli.record import read_record
    from slicecli.source import Source

    source = Source.find(model, revision, token, trust_remote_code)
    source.check_is_decoder()
    chosen = select_adapter(source.fields, plugins().adapters, adapter)
    dimensions = chosen.dimensions(source.fields)
    legal = dimensions.legal_dims()
    record = read_record(source.folder)
    document: dict[str, Any] = {
        "model": source.name,
        "revision": source.commit,
        "model_type": source.fields.get("model_type"),
        "adapter": chosen.name,
        "layout": "stock",
        "hidden_size": dimensions.hidden_size,
        "blocks": dimensions.blocks,
        "heads": dimensions.heads,
        "key_value_heads": dimensions.key_value_heads,
        "head_dim": dimensions.head_dim,
        "vocabulary": dimensions.vocabulary,
        "is_tied": dimensions.is_tied,
        "parameters": dimensions.parameters(),
        "legal_dims": {
            "multiple_of": dimensions.dim_multiple,
            "smallest": legal[0] if legal else None,
            "largest": legal[-1] if legal else None,
        },
        "slice_of": record["source"]["model"] if record and "source" in record else None,
        "declaration": {
            "embeddings": list(chosen.embeddings),
            "blocks": chosen.blocks,
            "branches": [
                {
                    "norm": branch.norm,
                    "readers": [reader.path for reader in branch.readers],
                    "writer": branch.writer.path,
                }
                for branch in chosen.branches
            ],
            "final_norm": chosen.final_norm,
            "head": chosen.head,
        },
    }
    if output_format == "json":
        show.print_json(document)
        return
    show.print_table(
        ["", ""],
        [
            ["model", source.name],
            *([["slice of", document["slice_of"]]] if document["slice_of"] else []),
            ["type", f"{document['model_type']} (adapter {chosen.name}, stock layout)"],
            ["hidden size", f"{dimensions.hidden_size:,}"],
            ["blocks", f"{dimensions.blocks}"],
            ["heads", f"{dimensions.heads} x {dimensions.head_dim}, {dimensions.key_value_heads} key/value"],
            [
                "vocabulary",
                f"{dimensions.vocabulary:,}{' (head tied to the embeddings)' if dimensions.is_tied else ''}",
            ],
            ["parameters", f"{dimensions.parameters():,}"],
            ["legal dims", f"multiples of {dimensions.dim_multiple}, {legal[0]} to {legal[-1]}" if legal else "none"],
        ],
    )
    declaration = document["declaration"]
    show.print_table(
        ["norm", "read by", "written by"],
        [
            ["(embeddings)", "", ", ".join(declaration["embeddings"])],
            *(
                [f"{chosen.blocks}.*.{branch['norm']}", ", ".join(branch["readers"]), branch["writer"]]
                for branch in declaration["branches"]
            ),
            [chosen.final_norm, chosen.head, ""],
        ],
        is_numeric=False,
    )
