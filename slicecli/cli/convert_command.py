"""`slicecli convert`: a slice rewritten in another class that computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show


@click.command("convert")
@click.argument("folder", metavar="DIR", type=shared.LocalPath(exists=True, file_okay=False))
@click.option(
    "--write-as",
    type=shared.TEXT,
    required=True,
    metavar="NAME",
    help="Type of the class to write, such as llama; `slicecli inspect DIR` lists those that compute the same.",
)
@click.option(
    "-o", "--output", type=shared.LocalPath(), metavar="DIR", help="Output folder.  [default: DIR is replaced]"
)
@click.option("--overwrite", is_flag=True, help="Replace an existing slice at --output.")
@shared.format_option
@click.pass_obj
def command(
    context: dict[str, Any], folder: Path, write_as: str, output: Path | None, overwrite: bool, output_format: str
) -> None:
    """Rewrite the slice in DIR in another class of transformers that computes the same.

    Weights are converted one by one; config, record and card are updated. The result is loaded and its logits are
    compared with those of DIR before it takes its name.

    \b
    Examples:
      slicecli convert ./my-qwen2-slice --write-as llama
      slicecli convert ./my-llama-slice --write-as mistral -o ./my-mistral-slice
    """
    from slicecli.checkpoint.source import check_may_change
    from slicecli.jobs.convert import convert_slice

    if output is None:
        check_may_change(folder)
    done = convert_slice(folder, write_as, output, overwrite)
    if output_format == "json":
        show.print_json(
            {
                "output": str(done.output),
                "before": done.before,
                "written_type": done.after,
                "parameters": done.parameters,
                "difference": done.difference,
            }
        )
    elif not context["quiet"]:
        show.note(
            f"{done.output}: written as {done.after} instead of {done.before}, {done.parameters:,} parameters; the "
            f"logits differ by {done.difference:.0e}."
        )
