"""`slicecli card`: the model card of a slice, written again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show


@click.command("card")
@click.argument("folder", metavar="DIR", type=shared.LocalPath(exists=True, file_okay=False))
@click.option(
    "--curve",
    type=shared.LocalPath(exists=True, dir_okay=False),
    metavar="FILE",
    help="Add the curves in FILE, written by `fit` or `sweep`, as predictions for other dims.",
)
@click.option("--print", "is_printed", is_flag=True, help="Print the card to standard output.")
@click.pass_obj
def command(context: dict[str, Any], folder: Path, curve: Path | None, is_printed: bool) -> None:
    """Rewrite the model card of the slice in DIR from its record.

    Only the text between slicecli's two markers is replaced; text that you add outside them and metadata that you add
    are preserved.

    \b
    Examples:
      slicecli card ./my-slice
      slicecli card ./my-slice --curve my-model-sweep/results.json
    """
    from slicecli.checkpoint.source import check_may_change
    from slicecli.errors import RequestError
    from slicecli.hub.card import CARD_FILE
    from slicecli.hub.writing import enter_curves, write_card
    from slicecli.runtime.json import read_json

    check_may_change(folder)
    if curve is None:
        write_card(folder)
    else:
        content = read_json(curve)
        found = content.get("curves") if isinstance(content, dict) else None
        if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
            raise RequestError(f"{curve.name!r} contains no curves.", "Pass a file written by slicecli fit or sweep.")
        enter_curves(folder, found)
    if is_printed:
        show.result((folder / CARD_FILE).read_text(encoding="utf-8"))
    elif not context["quiet"]:
        show.note(f"Wrote {folder / CARD_FILE}.")
