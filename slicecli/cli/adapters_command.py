"""`slicecli adapters`: which families can be sliced."""

from __future__ import annotations

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show


@click.command("adapters")
@shared.format_option
def command(output_format: str) -> None:
    """List the model families that can be sliced, and the plugin each comes from."""
    from slicecli.plugins import plugins

    found = plugins()
    origin = {name: plugin.distribution for plugin in found.loaded for name in plugin.adapters}
    rows = [
        {
            "name": adapter.name,
            "model_types": list(adapter.model_types),
            "layout": "stock",
            "dim_divisors": list(adapter.dim_divisors),
            "distribution": origin[adapter.name],
        }
        for _, adapter in sorted(found.adapters.items())
    ]
    if output_format == "json":
        show.print_json(rows)
    else:
        show.print_table(
            ["adapter", "model types", "layout", "dim must be a multiple of", "from"],
            [
                [
                    str(row["name"]),
                    ", ".join(row["model_types"]),
                    str(row["layout"]),
                    " and ".join(row["dim_divisors"]) or "1",
                    str(row["distribution"]),
                ]
                for row in rows
            ],
            is_numeric=False,
        )
    show.warn_of_broken_plugins()
