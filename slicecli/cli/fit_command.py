"""`slicecli fit`: prediction curves from measured slices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show

if TYPE_CHECKING:
    from slicecli.estimation.curves import Curve


@click.command("fit")
@click.argument("results", nargs=-1, required=True, type=shared.LocalPath(exists=True, dir_okay=False))
@click.option(
    "--relation", type=shared.TEXT, metavar="NAME", help="Relation to fit.  [default: the best by leave-one-out]"
)
@click.option(
    "-o",
    "--output",
    type=shared.LocalPath(dir_okay=False),
    metavar="FILE",
    help="Also write the curves to FILE.",
)
@click.option(
    "--plot",
    type=shared.LocalPath(dir_okay=False),
    metavar="FILE",
    help="Plot the curves with their points (.png, .svg, .pdf).",
)
@shared.format_option
def command(
    results: tuple[Path, ...], relation: str | None, output: Path | None, plot: Path | None, output_format: str
) -> None:
    """Fit prediction curves to measured slices, for `slicecli estimate --curve`.

    RESULTS are files written by `slicecli sweep` or `slicecli eval -o`, for slices and for the dense models they were
    made from. Measurements with the same model, method, calibration and text or task form one curve. By default it uses
    the relation that best predicts each point from the others.

    \b
    Example:
      slicecli fit dense.json dim3584.json dim3072.json -o curve.json --plot curve.png
    """
    from slicecli.checkpoint.folder import check_results_file
    from slicecli.errors import RequestError
    from slicecli.estimation.plot import check_plot_file, draw_quality, picture_of_curve
    from slicecli.estimation.results import curves_document, fit_results, fit_shared, read_documents, series_of

    if plot is not None:
        check_plot_file(plot)
    if output is not None:
        check_results_file(output, inputs=results)
    documents = read_documents(results)
    groups = series_of(documents)
    curves = fit_results(groups, relation)
    if not curves:
        raise RequestError(
            "These results hold no slice together with its dense model.",
            "Pass the results of the dense model and of at least one slice of it, measured on the same text or task.",
        )
    shared = fit_shared(groups)
    document = curves_document(curves, shared, documents)
    if output is not None:
        show.write_json(output, document)
    if plot is not None:
        draw_quality([picture_of_curve(curve) for curve in curves], plot)
    if output_format == "json":
        show.print_json(document)
        return
    print_curves(curves)
    if shared:
        show.result("One set of parameters for all groups:")
        show.print_table(
            ["relation", "of", "groups", "parameters", "leave-one-group-out error"],
            [
                [
                    one.relation,
                    one.quantity,
                    f"{one.groups}",
                    ", ".join(f"{value:.4g}" for value in one.parameters) or "-",
                    f"{one.loo_error:.4f}",
                ]
                for one in shared
            ],
        )


def print_curves(curves: Sequence[Curve]) -> None:
    """Print each curve with its points and what else was fitted."""
    for curve in curves:
        series = curve.series
        is_perplexity = series.quantity == "perplexity"
        figures: dict[str, Any] = curve.to_json()
        show.result(f"{series.model}, {series.method}, {series.quantity} on {series.evaluation}")
        show.print_table(
            ["s", "dim", "measured", "fitted", "error"],
            [
                [
                    f"{point['sparsity']:.3f}",
                    f"{point['dim'] or '-'}",
                    f"{point['value']:.3f}",
                    f"{point['fitted']:.3f}",
                    f"{point['fitted'] / point['value'] - 1:+.1%}"
                    if is_perplexity
                    else f"{100 * (point['fitted'] - point['value']):+.1f} points",
                ]
                for point in figures["points"]
            ],
        )
        show.print_table(
            ["relation", "parameters", "leave-one-out error" + (" in ln PPL" if is_perplexity else "")],
            [
                [
                    one["relation"],
                    ", ".join(f"{value:.4g}" for value in one["parameters"]) or "-",
                    "-" if one["loo_error"] is None else f"{one['loo_error']:.4f}",
                ]
                for one in figures["alternatives"]
            ],
        )
        fitted = ", ".join(f"{name} = {value:.4g}" for name, value in figures["parameters"].items())
        error = (
            ""
            if figures["loo_relative_error"] is None or not is_perplexity
            else (f" Its leave-one-out error is {figures['loo_relative_error']:.1%} of the perplexity.")
        )
        show.result(
            f"Taken: {curve.relation} ({figures['formula']}{', ' + fitted if fitted else ''}): {curve.reason}.{error}"
        )
