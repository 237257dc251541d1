"""`slicecli spectrum`: what slices of a model would lose, without slicing it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show
from slicecli.jobs.options import SliceOptions
from slicecli.runtime.options import from_chosen

SHOWN_SPARSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)


# the Fisher weight needs less text than a slice does
@click.command("spectrum", context_settings={"default_map": {"samples": 32}})
@click.argument("model", type=shared.MODEL)
@click.option(
    "-o",
    "--output",
    type=shared.LocalPath(dir_okay=False),
    metavar="FILE",
    help="Write the JSON to FILE; required without --format json.",
)
@click.option(
    "--probe/--no-probe",
    "probes",
    default=True,
    help="Also run the model with its stream projected at six dims, which predicts refits better.  [default: probe]",
)
@shared.calibration_options
@shared.run_options
@shared.device_options
@shared.activations_option
@shared.adapter_option
@shared.model_options
@shared.format_option
@click.pass_obj
def command(
    context: dict[str, Any],
    /,
    model: str,
    output: Path | None,
    probes: bool,
    output_format: str,
    **chosen: Any,
) -> None:
    """Measure what slicing MODEL would lose at any dim, without slicing it.

    The model runs forwards and backwards over a text, block by block, so it need not fit in memory. For each dim and
    method, the result gives the share of the stream that is kept and the Fisher weight F of what is removed, in nats
    per token. The loss of a slice is roughly proportional to F.

    \b
    Example:
      slicecli spectrum meta-llama/Meta-Llama-3-8B-Instruct -o spectrum.json
    """
    from slicecli.checkpoint.folder import check_results_file
    from slicecli.errors import RequestError

    if output is None and output_format != "json":
        raise RequestError("There is no output for the spectrum.", "Use --output FILE, or --format json.")
    from slicecli.runtime.distributed import Processes

    is_main = Processes.find().is_main
    if is_main and output is not None:
        # said now, not after the measuring
        check_results_file(output, [Path(model).expanduser()], [Path(chosen["calibration"]).expanduser()])

    from slicecli.jobs.spectrum import run_spectrum
    from slicecli.runtime.memory import bound_memory_that_is_kept

    settings = from_chosen(SliceOptions, chosen)
    bound_memory_that_is_kept()
    with show.progress(context["quiet"]) as watcher:
        document = run_spectrum(model, settings, watcher, show.warn, probes)
    if not is_main:
        return
    try:
        if output is not None:
            show.write_json(output, document)
    finally:  # if one of the places cannot be written, the other has the result
        if output_format == "json":
            show.print_json(document)
        else:
            _print(document)


def _print(document: dict[str, Any]) -> None:
    size = document["hidden_size"]
    wanted = [(1 - sparsity) * size for sparsity in SHOWN_SPARSITIES]
    shown = {
        min(range(len(document["spectrum"])), key=lambda i: abs(document["spectrum"][i]["dim"] - w)) for w in wanted
    }
    points = [document["spectrum"][index] for index in sorted(shown, reverse=True)]
    show.print_table(
        ["dim", "removed", "kept", "importance kept", "F refit", "F slicegpt"],
        [
            [
                f"{point['dim']:,}",
                f"{1 - point['dim'] / size:.1%}",
                f"{point['kept']:.2%}",
                f"{point['importance_kept']:.2%}",
                *(f"{point['fisher'][method]:.4g}" for method in ("refit", "slicegpt")),
            ]
            for point in points
        ],
    )
