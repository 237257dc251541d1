"""`slicecli relations`: the relations there are, and how they fare on published measurements."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show


@click.command("relations")
@click.option(
    "--validate", is_flag=True, help="Predict each published measurement with each relation, leaving out its model."
)
@click.option(
    "--quantity",
    type=click.Choice(["perplexity", "accuracy"]),
    help="Only relations for this quantity.  [default: both]",
)
@click.option(
    "--max-sparsity",
    type=float,
    default=1.0,
    metavar="S",
    help="Validate only on slices that remove at most this fraction.",
)
@click.option(
    "--plot",
    type=shared.LocalPath(dir_okay=False),
    metavar="FILE",
    help="With --validate: also plot predicted against measured (.png, .svg, .pdf).",
)
@shared.format_option
def command(validate: bool, quantity: Any, max_sparsity: float, plot: Path | None, output_format: str) -> None:
    """List or validate the relations between width and quality.

    The bundled measurements are published SliceGPT results, each with its source. --validate predicts a model's slices
    from its dense figure alone (knowing other models of its family, or only models of other families), and from its
    dense figure and one measured slice with a fifth of the hidden size removed; the first and last also on a text of
    another kind than the slices were calibrated on.

    \b
    Example:
      slicecli relations --validate --quantity perplexity --max-sparsity 0.31 --plot validation.png
    """
    from slicecli.errors import RequestError
    from slicecli.estimation.relations import QUANTITIES, relations_of

    quantities = [quantity] if quantity else QUANTITIES
    if plot is not None and not validate:
        raise RequestError("--plot requires --validate.", "Add --validate.")
    if not validate:
        rows = [relation for one in quantities for relation in relations_of(one)]
        if output_format == "json":
            show.print_json(
                [
                    {
                        "name": one.name,
                        "quantity": one.quantity,
                        "formula": one.formula,
                        "parameters": list(one.parameters),
                        "source": one.source,
                    }
                    for one in rows
                ]
            )
            return
        show.print_table(
            ["relation", "of", "formula", "fitted"],
            [[one.name, one.quantity, one.formula, ", ".join(one.parameters) or "-"] for one in rows],
            is_numeric=False,
        )
        for one in rows:
            show.result(f"{one.name} of {one.quantity}: {one.source}")
        show.note("s = 1 - k/d: fraction of the hidden size removed; h: chance level; D = ln(PPL/PPL0).")
        return

    from slicecli.estimation.plot import check_plot_file, draw_validation
    from slicecli.estimation.validation import check_relations, summary

    if plot is not None:
        check_plot_file(plot)
    checks = [check for one in quantities for check in check_relations(one, max_sparsity)]
    lines = summary(checks)
    if plot is not None:
        drawn = ("other models", "one slice")
        draw_validation([check for check in checks if check.knows in drawn and check.rows], plot)
    if output_format == "json":
        show.print_json(lines)
        return
    show.print_table(
        [
            "relation",
            "of",
            "knows",
            "family",
            "models",
            "points",
            "mean error",
            "median error",
            "interval holds",
            "width",
        ],
        [
            [
                line["relation"] if line["family"] == "all" else "",
                line["quantity"] if line["family"] == "all" else "",
                line["knows"] if line["family"] == "all" else "",
                line["family"],
                f"{line['models']}",
                f"{line['points']}",
                _error(line["mean_error"], line["quantity"]),
                _error(line["median_error"], line["quantity"]),
                f"{line['coverage']:.1%}",
                _width(line),
            ]
            for line in lines
        ],
    )


def _error(value: float, quantity: str) -> str:
    return f"{value:.1%}" if quantity == "perplexity" else f"{100 * value:.1f} points"


def _width(line: dict[str, Any]) -> str:
    """Return the median width of the intervals: of perplexity the upper end over the lower one."""
    width = line["median_width"]
    if line["quantity"] == "accuracy":
        return f"{100 * width:.0f} points"
    return f"x {width:.2f}" if width < 100 else f"x {width:.0e}"
