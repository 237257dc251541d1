"""`slicecli search`: slices on the Hub."""

from __future__ import annotations

import dataclasses

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show


@click.command("search")
@click.argument("text", type=shared.TEXT, required=False)
@click.option("--base-model", type=shared.TEXT, metavar="HUB_ID", help="Only slices of this model.")
@click.option("--limit", type=int, default=20, show_default=True, metavar="N", help="Maximum number to list.")
@shared.token_option
@shared.format_option
def command(text: str | None, base_model: str | None, limit: int, token: str | None, output_format: str) -> None:
    """List slices on the Hugging Face Hub, optionally only those with TEXT in their names.

    \b
    Example:
      slicecli search --base-model meta-llama/Meta-Llama-3-8B-Instruct
    """
    from slicecli.hub.search import find_slices

    found = find_slices(text, base_model, limit, token)
    if output_format == "json":
        show.print_json([dataclasses.asdict(one) for one in found])
    elif found:
        show.print_table(
            ["slice", "of", "downloads", "changed"],
            [[one.repository, one.base_model or "", f"{one.downloads:,}", one.modified] for one in found],
        )
    else:
        show.note("No slices found.")
