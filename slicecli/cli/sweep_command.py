"""`slicecli sweep`: many dims of one model, measured, fitted and drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show
from slicecli.errors import RequestError
from slicecli.family.slice_plan import Width
from slicecli.jobs.options import SliceOptions
from slicecli.runtime.options import from_chosen


@click.command("sweep")
@click.argument("model", type=shared.MODEL)
@click.option(
    "--dims",
    type=shared.DimList(),
    metavar="N,N,...",
    help="Dims to slice to.  [default: those nearest to removing 0.1, 0.15, 0.2, 0.25, 0.3, 0.4 and 0.5]",
)
@click.option(
    "--target-params",
    "targets",
    type=shared.COUNTS,
    metavar="6B,5B,...",
    help="Instead: maximum numbers of parameters, each met as --shape says.",
)
@shared.add_options(Width, "shape", "mlp_dim", "mlp_sparsity")
@click.option(
    "-o",
    "--output",
    type=shared.LocalPath(file_okay=False),
    metavar="DIR",
    help="Folder for results, curve and plot.  [default: ./<name>-sweep]",
)
@click.option("--overwrite", is_flag=True, help="Start over if the folder holds another sweep.")
@click.option("--keep-slices", is_flag=True, help="Keep the slices in the folder.")
@shared.measure_options
@shared.method_options
@shared.calibration_options
@shared.cache_options
@click.option(
    "--relation", type=shared.TEXT, metavar="NAME", help="Relation to fit.  [default: the best by leave-one-out]"
)
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
    dims: tuple[int, ...] | None,
    targets: tuple[int, ...] | None,
    output: Path | None,
    overwrite: bool,
    keep_slices: bool,
    relation: str | None,
    output_format: str,
    **chosen: Any,
) -> None:
    """Slice MODEL to many widths, measure the dense model and each slice, and fit a prediction curve.

    The refit collects its statistics once for all of them. Results are saved as they are measured: repeat the command
    to continue an interrupted sweep or to add widths. The curve is of slices that keep all MLP channels.

    \b
    Examples:
      slicecli sweep ./my-model --dims 3584,3328,3072,2816,2560 --perplexity wikitext2 --tasks piqa
      slicecli estimate ./my-model --curve my-model-sweep/results.json --dim 3200
      slicecli sweep ./my-model --target-params 7B,6B,5B
    """
    from slicecli.checkpoint.source import name_of_folder
    from slicecli.cli.fit_command import print_curves
    from slicecli.estimation.estimate import USUAL_SPARSITIES
    from slicecli.jobs.sweep import PLOT_FILE, RESULTS_FILE, run_sweep, usual_dims
    from slicecli.runtime.memory import bound_memory_that_is_kept

    settings = from_chosen(SliceOptions, chosen)
    # the seed and the revision are of the slicing
    evaluation = shared.evaluation_request(chosen, leave_out=["seed", "revision"])
    bound_memory_that_is_kept()
    path = Path(model)
    name = name_of_folder(path) if path.is_dir() else model
    folder = output or Path(f"{name.rpartition('/')[2]}-sweep")
    with show.progress(context["quiet"]) as watcher:
        result = run_sweep(
            model,
            _widths(chosen, dims, targets, lambda: usual_dims(model, settings, USUAL_SPARSITIES)),
            folder,
            settings,
            evaluation,
            relation=relation,
            keeps_slices=keep_slices,
            overwrite=overwrite,
            progress=watcher,
        )
    for text in result.warnings:
        show.warn(text)
    document = result.document
    if output_format == "json":
        show.print_json(document)
    else:
        _print(document)
        print_curves(result.curves)
    if not context["quiet"]:
        show.note(f"{folder}: {RESULTS_FILE}" + (f" and {PLOT_FILE}" if result.curves else ""))
        if result.curves:
            show.note(f"Next: slicecli estimate {model} --curve {folder / RESULTS_FILE}")


def _widths(
    chosen: Mapping[str, Any],
    dims: Sequence[int] | None,
    targets: Sequence[int] | None,
    usual_dims: Callable[[], Sequence[int]],
) -> list[Width]:
    """Return the widths to slice to."""
    if dims is not None and targets is not None:
        raise RequestError("The widths were chosen twice.", "Use one of --dims and --target-params.")
    like = from_chosen(Width, {**chosen, "target_parameters": 1} if targets is not None else {**chosen, "dim": 1})
    if targets is not None:
        return [dataclasses.replace(like, target_parameters=target) for target in targets]
    return [dataclasses.replace(like, dim=dim) for dim in dims or usual_dims()]


def _print(document: Any) -> None:
    """Print what was measured, a line for each model."""
    measured = [document["dense"], *document["points"]]
    has_mlp = any(one["mlp_dim"] is not None for one in measured)
    texts, tasks = list(document["dense"]["perplexity"]), list(document["dense"]["tasks"])
    show.print_table(
        ["dim", *["MLP"] * has_mlp, "s", "parameters", *(f"perplexity on {text}" for text in texts), *tasks],
        [
            [
                f"{one['dim']}" if index else f"{one['dim']} dense",
                *[f"{one['mlp_dim'] or 'all'}"] * has_mlp,
                f"{one['sparsity']:.3f}",
                f"{one['parameters']:,}",
                *(
                    show.measured(one["perplexity"][text]["value"], one["perplexity"][text]["stderr"], 2)
                    for text in texts
                ),
                *(show.measured(one["tasks"][task]["value"], one["tasks"][task]["stderr"], 3) for task in tasks),
            ]
            for index, one in enumerate(measured)
        ],
    )


def _figure(figure: dict[str, Any], digits: int) -> str:
    return show.measured(figure["value"], figure["stderr"], digits)
