"""`slicecli adapters`: which families can be sliced, and a start for one that cannot."""

from __future__ import annotations

from pathlib import Path

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show


@click.command("adapters")
@click.option(
    "--scaffold",
    "model",
    type=shared.MODEL,
    metavar="MODEL",
    help="Infer an adapter for MODEL and write it as a plugin package.",
)
@click.option(
    "-o",
    "--output",
    type=shared.LocalPath(file_okay=False),
    metavar="DIR",
    help="Folder for the package.  [default: ./slicecli-<type>]",
)
@shared.model_options
@shared.format_option
def command(
    model: str | None,
    output: Path | None,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """List the model families that can be sliced, and the plugin that provides each.

    \b
    Example:
      slicecli adapters --scaffold owner/model-of-a-new-type -o slicecli-new
    """
    if model is not None:
        _scaffold(model, output, revision, token, trust_remote_code, output_format)
        return
    from slicecli.family.plugins import plugins

    found = plugins()
    origin = {name: plugin.distribution for plugin in found.loaded for name in plugin.adapters}
    rows = [
        {
            "name": adapter.name,
            "model_types": list(adapter.model_types),
            "layout": adapter.layout({}),
            "dim_divisors": list(adapter.dim_divisors),
            "distribution": origin[adapter.name],
        }
        for _, adapter in sorted(found.adapters.items())
    ]
    refused = [{"model_types": list(refusal.model_types), "reason": refusal.reason} for refusal in found.refusals]
    if output_format == "json":
        show.print_json({"adapters": rows, "refused": refused})
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
        for refusal in found.refusals:
            show.result(f"  Not {', '.join(refusal.model_types)}: {refusal.reason}")
        show.note("For other types an adapter is inferred and proved; see `slicecli inspect MODEL`.")
    show.warn_of_broken_plugins()


def _scaffold(
    model: str,
    output: Path | None,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Write a plugin package for a model's family."""
    from slicecli.checkpoint.source import Source
    from slicecli.family.plugins import plugins
    from slicecli.infer.scaffold import write_package
    from slicecli.runtime.libraries import quiet_libraries

    source = Source.find(model, revision, token, trust_remote_code)
    source.check_is_decoder()
    with quiet_libraries():
        config = source.config()
        folder = output or Path(f"slicecli-{str(config.model_type).replace('_', '-')}")
        adapter = write_package(config, folder, trust_remote_code)
    taken = [other.name for other in plugins().adapters.values() if config.model_type in other.model_types]
    if taken:
        show.warn(f"adapter {taken[0]} already serves type {config.model_type}, so the new plugin would be skipped")
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    if output_format == "json":
        show.print_json({"output": str(folder), "adapter": adapter.name, "files": files})
        return
    for name in files:
        show.result(str(folder / name))
    where = folder if folder.is_absolute() else f"./{folder}"
    show.note(f'Next: pip install "{where}[test]" && pytest {where}')
