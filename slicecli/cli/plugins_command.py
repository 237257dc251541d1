"""`slicecli plugins`: what was found, what works, what does not and why."""

from __future__ import annotations

import dataclasses

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show


@click.command("plugins")
@shared.format_option
def command(output_format: str) -> None:
    """List the installed plugins and whether they loaded.

    SLICECLI_PLUGINS selects plugins to load: a,b loads only those two, an empty value none.
    """
    from slicecli.family.plugins import plugins

    loaded = plugins().loaded
    if output_format == "json":
        show.print_json([dataclasses.asdict(plugin) for plugin in loaded])
        return
    show.print_table(
        ["plugin", "from", "version", "hooks", "adapters", "state"],
        [
            [
                plugin.name,
                plugin.distribution,
                plugin.version,
                ", ".join(plugin.hooks),
                ", ".join(plugin.adapters),
                f"skipped: {plugin.error}" if plugin.error else "loaded",
            ]
            for plugin in loaded
        ],
        is_numeric=False,
    )
