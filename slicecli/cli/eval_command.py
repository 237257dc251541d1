"""`slicecli eval`: measure a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show


@click.command("eval")
@click.argument("model")
@click.option(
    "--perplexity",
    "texts",
    multiple=True,
    default=("wikitext2",),
    show_default=True,
    metavar="NAME|FILE|HUB_ID",
    help="Text to measure perplexity on; may be given several times.",
)
@click.option("--limit", type=int, metavar="N", help="Only the first N rows of each text.  [default: all]")
@shared.run_options
@shared.device_map_option
@click.option(
    "-o", "--output", type=click.Path(path_type=Path, dir_okay=False), metavar="FILE", help="Also write the JSON here."
)
@click.option(
    "--record", "is_recorded", is_flag=True, help="Enter the result in the record of MODEL, a slice's folder."
)
@shared.model_options
@shared.format_option
@click.pass_obj
def command(
    context: dict[str, Any],
    model: str,
    texts: tuple[str, ...],
    limit: int | None,
    dtype: str,
    batch_size: int | None,
    seq_len: int | None,
    device_map: str,
    output: Path | None,
    is_recorded: bool,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Measure the perplexity of MODEL, dense or sliced, on one or more texts.

    \b
    Example:
      slicecli eval ./my-slice --perplexity wikitext2 --perplexity questions.jsonl
    """
    from slicecli.api import perplexities
    from slicecli.errors import RequestError
    from slicecli.record import enter_perplexities, package_versions, read_record

    if is_recorded and (not Path(model).is_dir() or read_record(Path(model)) is None):
        raise RequestError(
            f"{model!r} is not the folder of a slice.", "Only a slice has a record to enter a result in."
        )
    with show.progress(context["quiet"]) as watcher:
        results = perplexities(
            model,
            texts,
            samples=limit,
            sequence_length=seq_len,
            batch_size=batch_size,
            dtype=None if dtype == "auto" else dtype,
            device_map=device_map,
            revision=revision,
            token=token,
            trust_remote_code=trust_remote_code,
            progress=watcher,
        )
    document: dict[str, Any] = {
        "model": model,
        "perplexity": {result.text: result.to_json() for result in results},
        "tasks": {},
        "versions": package_versions(),
    }
    if output is not None:
        show.write_json(output, document)
    if is_recorded:
        enter_perplexities(Path(model), document["perplexity"])
    if output_format == "json":
        show.print_json(document)
        return
    show.print_table(
        ["text", "perplexity", "± stderr", "bits per byte", "tokens", "row length"],
        [
            [
                result.text,
                f"{result.value:.3f}",
                f"{result.stderr:.3f}",
                f"{result.bits_per_byte:.4f}",
                f"{result.tokens:,}",
                f"{result.sequence_length}",
            ]
            for result in results
        ],
    )
