"""`slicecli cache`: the statistics that are kept for other dims of the same models."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show

FOLDER = click.option(
    "--cache-dir",
    type=shared.LocalPath(file_okay=False),
    metavar="DIR",
    help="Folder of the cache.  [default: SLICECLI_CACHE, or the user's cache folder]",
)


@click.group("cache")
def command() -> None:
    """List or clear the cached statistics, which other dims of the same model reuse, and stored logits of teachers.

    Slicing needs the statistics of a model on its calibration text; they do not depend on the dim. When the cache
    exceeds SLICECLI_CACHE_SIZE (10 GB), the least recently used are removed. The logits that `recover --store-logits`
    keeps stay until the cache is cleared.
    """


@command.command("ls")
@FOLDER
@shared.format_option
def ls(cache_dir: Path | None, output_format: str) -> None:
    """List the cache, most recently used first."""
    from slicecli.slicing.statistics_cache import StatisticsCache

    cache = StatisticsCache(cache_dir)
    entries, logits = cache.entries(), [path.stat().st_size for path in cache.stored_logits()]
    if output_format == "json":
        show.print_json(
            [
                {
                    "model": entry.model,
                    "hidden_size": entry.hidden_size,
                    "calibration": entry.calibration,
                    "bytes": entry.size,
                    "used": _day(entry.used),
                }
                for entry in entries
            ]
        )
    elif entries:
        show.print_table(
            ["model", "hidden size", "calibration", "size", "used"],
            [
                [entry.model, f"{entry.hidden_size}", entry.calibration, show.size(entry.size), _day(entry.used)]
                for entry in entries
            ],
            is_numeric=False,
        )
    elif not logits:
        show.note("The cache is empty.")
    if logits and output_format != "json":
        show.note(f"Beside them: stored logits of teachers, {len(logits)} files, {show.size(sum(logits))}.")


@command.command("clear")
@FOLDER
@click.pass_obj
def clear(context: dict[str, Any], /, cache_dir: Path | None) -> None:
    """Empty the cache, and remove the answers of interrupted measurements."""
    from slicecli.evaluation.answers import clear_answers
    from slicecli.slicing.statistics_cache import StatisticsCache

    freed = StatisticsCache(cache_dir).clear() + clear_answers(cache_dir)
    if not context["quiet"]:
        show.note(f"Freed {show.size(freed)}.")


def _day(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(sep=" ", timespec="minutes")
