"""Pictures: quality against the dim, the validation of the relations, and the divergence in a training.

matplotlib draws without a display; files are written whole or not at all.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slicecli.checkpoint.folder import write_whole_file
from slicecli.errors import RequestError
from slicecli.estimation.intervals import FARTHEST, Prediction
from slicecli.estimation.relations import Quantity, quoted_by, quoted_error, relation_named

if TYPE_CHECKING:
    from slicecli.estimation.curves import Curve
    from slicecli.estimation.forecasts import Forecast
    from slicecli.estimation.validation import Check

__all__ = [
    "Picture",
    "block_errors_picture",
    "check_plot_file",
    "divergence_picture",
    "draw_quality",
    "draw_validation",
    "picture_of_curve",
    "picture_of_forecast",
]

# distinct in grey and for colour-blind eyes
BLUE, ORANGE, GREEN, GREY = "#2166ac", "#d6604d", "#4d9221", "#777777"
FORMATS = (".png", ".svg", ".pdf")
STEPS = 120
HIGHEST = 1e9  # no axis shows more
# a scale of decades below this ratio would hide what happens
LOGARITHMIC_ABOVE = 4.0


@dataclass(frozen=True)
class Picture:
    """What a picture of one quantity shows.

    Attributes:
        dense: The dense figure, as people quote it.
        paper: The figure by the paper's relation at an s, as people quote it; `None` where it has no meaning.
        measured: Measured slices: s, figure and standard error, as people quote them.
        marked: Values of s to mark on the curve.
    """

    title: str
    subtitle: str
    quantity: Quantity
    evaluation: str
    hidden_size: int
    dense: float
    chance: float | None
    predict: Callable[[float], Prediction]
    paper: Callable[[float], float] | None
    measured: Sequence[tuple[float, float, float | None]]
    marked: Sequence[float]
    parameters: Callable[[int], int] | None
    range: tuple[float, float]


def picture_of_curve(curve: Curve, parameters: Callable[[int], int] | None = None) -> Picture:
    """Return the picture of a fitted curve with its points."""
    series = curve.series
    paper = relation_named("paper", series.quantity)
    quoted = quoted_by(series.quantity)
    error = (
        f"{curve.loo_relative_error:.1%}" if series.quantity == "perplexity" else f"{100 * curve.loo_error:.1f} points"
    )
    loo = f"leave-one-out error {error}" if math.isfinite(curve.loo_error) else "one point"
    formula = relation_named(curve.relation, series.quantity).formula
    return Picture(
        title=series.model,
        subtitle=f"{series.method}, calibrated on {series.calibration}\n{curve.relation}: {formula}, {loo}",
        quantity=series.quantity,
        evaluation=series.evaluation,
        hidden_size=curve.hidden_size,
        dense=quoted(series.dense.value),
        chance=series.dense.chance,
        predict=curve.predict,
        paper=None
        if paper.why_not(series.dense)
        else lambda sparsity: quoted(paper.predict(sparsity, series.dense, ())),
        measured=[
            (point.sparsity, quoted(point.value), quoted_error(point.value, point.stderr, series.quantity))
            for point in series.points
        ],
        marked=(),
        parameters=parameters,
        range=(0.0, max(min(FARTHEST, curve.valid_sparsity[1] + 0.08), curve.valid_sparsity[1] + 0.02)),
    )


def picture_of_forecast(
    title: str,
    forecast: Forecast,
    hidden_size: int,
    marked: Sequence[float],
    widest: float,
    parameters: Callable[[int], int] | None = None,
) -> Picture:
    """Return the picture of a forecast."""
    return Picture(
        title=title,
        subtitle=forecast.basis,
        quantity=forecast.quantity,
        evaluation=forecast.evaluation,
        hidden_size=hidden_size,
        dense=forecast.dense.value,
        chance=forecast.chance,
        predict=forecast.predict,
        paper=forecast.paper,
        measured=forecast.points,
        marked=marked,
        parameters=parameters,
        range=(0.0, min(0.9, widest + 0.05)),
    )


def draw_quality(pictures: Sequence[Picture], path: Path) -> None:
    """Draw one panel for each quantity, below each other."""
    check_plot_file(path)
    write_whole_file(path, quality_picture(pictures, path.suffix.lower()))


def quality_picture(pictures: Sequence[Picture], suffix: str = ".png") -> bytes:
    """Return the same as the content of a file."""
    figure, grid = _panels(len(pictures), 1, width=8.0, height=4.8)
    for axes, picture in zip(grid[:, 0], pictures, strict=True):
        _draw_one(axes, picture)
    return _drawn(figure, suffix)


def _draw_one(axes: Any, picture: Picture) -> None:
    quoted = quoted_by(picture.quantity)
    size = picture.hidden_size
    lowest, highest = picture.range
    grid = np.linspace(max(lowest, 0.002), highest, STEPS)
    dims = size * (1 - grid)
    predictions = [picture.predict(float(sparsity)) for sparsity in grid]
    values, lows, highs = (
        [min(quoted(figure), HIGHEST) for figure in figures]
        for figures in zip(*((one.value, one.low, one.high) for one in predictions), strict=True)
    )
    axes.fill_between(dims, lows, highs, color=BLUE, alpha=0.15, linewidth=0, label="90 % interval")
    inside = np.array([not one.is_outside for one in predictions])
    axes.plot(dims, values, color=BLUE, linewidth=1.2, linestyle=(0, (4, 2)))
    within = np.where(inside, values, np.nan)
    axes.plot(
        dims, within, color=BLUE, linewidth=2, label=f"{predictions[0].relation} (dashed where there are no data)"
    )
    if picture.paper is not None and predictions[0].relation != "paper":
        axes.plot(
            dims, [min(picture.paper(float(one)), HIGHEST) for one in grid],
            color=ORANGE, linewidth=1.3, linestyle="-.", label="the paper's relation",
        )  # fmt: skip
    if picture.measured:
        sparsities, figures, errors = zip(*picture.measured, strict=True)
        axes.errorbar(
            [size * (1 - one) for one in sparsities], figures, yerr=[error or 0.0 for error in errors],
            fmt="o", color="black", markersize=5, capsize=2, linewidth=1, label="measured", zorder=5,
        )  # fmt: skip
    if picture.marked:
        axes.plot(
            [size * (1 - one) for one in picture.marked],
            [quoted(picture.predict(one).value) for one in picture.marked],
            marker="D", color=BLUE, markerfacecolor="white", markersize=5, linestyle="none", label="predicted slices",
            zorder=4,
        )  # fmt: skip
    axes.plot(
        [size], [picture.dense], marker="*", color=GREEN, markersize=11, linestyle="none", label="dense", zorder=6
    )
    if picture.chance is not None:
        axes.axhline(picture.chance, color=GREY, linewidth=1, linestyle=":", label="chance")
    _scale(axes, picture, values + [figure for _, figure, _ in picture.measured], highs, lows)
    axes.set_xlim(size * (1 + 0.02), size * (1 - highest))
    axes.set_xlabel("dim kept")
    axes.set_ylabel(f"{picture.quantity} on {picture.evaluation}", parse_math=False)
    lines = [picture.title, *picture.subtitle.splitlines()]
    axes.set_title("\n".join(textwrap.fill(line, 120) for line in lines), fontsize=8, loc="left", parse_math=False)
    axes.grid(alpha=0.25)
    if picture.parameters is not None:
        second = axes.twinx()
        axes.set_zorder(second.get_zorder() + 1)
        axes.patch.set_visible(False)
        whole = sorted({max(1, round(dim)) for dim in dims})
        second.plot(whole, [picture.parameters(dim) for dim in whole], color=GREY, linewidth=1)
        axes.plot([], [], color=GREY, linewidth=1, label="parameters (right)")
        second.set_ylabel("parameters", color=GREY)
        second.tick_params(axis="y", colors=GREY)
        second.set_ylim(bottom=0)
        second.yaxis.set_major_formatter(_counts())
    axes.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncol=4, frameon=False)


def _scale(axes: Any, picture: Picture, values: list[float], highs: list[float], lows: list[float]) -> None:
    """Choose the y axis so that the curve fills it, whatever the interval does at its far end."""
    top = max(max(values), picture.dense)
    if picture.quantity == "accuracy":
        bottom = min(min(values), picture.chance or 1.0, picture.dense)
        margin = 0.15 * max(top - bottom, 0.05)
        axes.set_ylim(max(0.0, bottom - margin), min(1.0, max(top, picture.dense) + margin))
        return
    ceiling = min(max(highs), top**2 / min(values) if top / picture.dense > 2 else 3 * top)
    bottom = max(1.0, 0.9 * min(min(lows), picture.dense))
    if top / picture.dense > LOGARITHMIC_ABOVE or ceiling / bottom > LOGARITHMIC_ABOVE:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(_plain())
        axes.yaxis.set_minor_formatter(_plain_sparse())
    axes.set_ylim(bottom, 1.1 * max(ceiling, top))


def draw_validation(checks: Sequence[Check], path: Path) -> None:
    """Draw predicted against measured, a panel for each check, a colour for each family."""
    check_plot_file(path)
    columns = min(3, len(checks))
    rows = math.ceil(len(checks) / columns)
    figure, grid = _panels(rows, columns, width=4.3, height=4.0)
    for axes in grid.flat[len(checks) :]:
        axes.set_visible(False)
    for axes, check in zip(grid.flat, checks, strict=False):
        _draw_check(axes, check)
    write_whole_file(path, _drawn(figure, path.suffix.lower()))


def _draw_check(axes: Any, check: Check) -> None:
    quantity = check.relation.quantity
    quoted = quoted_by(quantity)
    families = sorted({row.series.family for row in check.rows})
    figures = [quoted(row.measured) for row in check.rows] + [quoted(row.prediction.value) for row in check.rows]
    ends = (0.9 * min(figures), 1.1 * max(figures))
    for family, colour in zip(families, (BLUE, ORANGE, GREEN, GREY), strict=False):
        rows = [row for row in check.rows if row.series.family == family]
        measured = [quoted(row.measured) for row in rows]
        values = [quoted(row.prediction.value) for row in rows]
        low = [value - quoted(row.prediction.low) for value, row in zip(values, rows, strict=True)]
        high = [min(quoted(row.prediction.high), 1e6) - value for value, row in zip(values, rows, strict=True)]
        axes.errorbar(
            measured,
            values,
            yerr=[low, high],
            fmt="o",
            markersize=3,
            linewidth=0.6,
            alpha=0.6,
            color=colour,
            label=family,
        )
    axes.plot(ends, ends, color="black", linewidth=0.8)
    if quantity == "perplexity":
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(_plain())
            axis.set_minor_formatter(_plain_sparse())
    axes.set_xlim(*ends)
    axes.set_ylim(*ends)
    covered = sum(row.is_covered for row in check.rows) / len(check.rows)
    axes.set_title(
        f"{check.relation.name}, knows {check.knows}\n{covered:.0%} of {len(check.rows)} in the interval", fontsize=9
    )
    axes.set_xlabel(f"measured {quantity}")
    axes.set_ylabel("predicted")
    axes.grid(alpha=0.25)
    axes.legend(fontsize=8, frameon=False, loc="upper left")


def divergence_picture(history: Sequence[tuple[int, float]]) -> bytes:
    """Return the picture of a training as the content of a file.

    Args:
        history: Tokens trained on, and the divergence on the held-out rows by then.
    """
    figure, grid = _panels(1, 1, width=8.0, height=4.0)
    axes = grid[0, 0]
    tokens, values = zip(*history, strict=True)
    axes.plot(tokens, values, color=BLUE, linewidth=2, marker="o", markersize=4)
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(_counts())
    axes.set_xlabel("tokens trained on")
    axes.set_ylabel("held-out KL, nats per token")
    axes.grid(alpha=0.25)
    return _drawn(figure, ".png")


def block_errors_picture(errors: Sequence[tuple[float, float]]) -> bytes:
    """Return the picture of a training block by block as the content of a file.

    Args:
        errors: The error of each block on the held-out rows before and after its training.
    """
    figure, grid = _panels(1, 1, width=8.0, height=4.0)
    axes = grid[0, 0]
    for values, label, color in zip(zip(*errors, strict=True), ("before", "after"), (GREY, BLUE), strict=True):
        axes.plot(range(1, len(values) + 1), values, color=color, linewidth=2, marker="o", markersize=4, label=label)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("block")
    axes.set_ylabel("held-out error")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
    return _drawn(figure, ".png")


def check_plot_file(path: Path) -> None:
    """Refuse a file that cannot be a picture, before anything is computed."""
    if path.suffix.lower() not in FORMATS:
        raise RequestError(f"{path.name!r} is not an image file name.", f"Supported endings: {', '.join(FORMATS)}.")


def _panels(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """Return a figure and its axes, shape (rows, columns), without pyplot and its global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="tight")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _drawn(figure: Any, suffix: str) -> bytes:
    import matplotlib

    drawn = io.BytesIO()
    # no date and no random ids inside: the same figures give the same bytes
    metadata: dict[str, Any] = {".png": {"Software": None}, ".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    with matplotlib.rc_context({"svg.hashsalt": "slicecli"}):
        figure.savefig(drawn, dpi=130, format=suffix[1:], metadata=metadata[suffix])
    return drawn.getvalue()


def _plain() -> Any:
    from matplotlib.ticker import FuncFormatter

    return FuncFormatter(lambda value, _: f"{value:g}")


def _plain_sparse() -> Any:
    """Label minor ticks at 2 and 5 only, where a decade has few major ones."""
    from matplotlib.ticker import FuncFormatter

    def label(value: float, _position: Any) -> str:
        digit = value / 10 ** math.floor(math.log10(value)) if value > 0 else 0
        return f"{value:g}" if round(digit, 6) in {2, 3, 5} else ""

    return FuncFormatter(label)


def _counts() -> Any:
    from matplotlib.ticker import FuncFormatter

    def label(value: float, _position: Any) -> str:
        for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
            if value >= unit:
                return f"{value / unit:g}{letter}"
        return f"{value:g}"

    return FuncFormatter(label)
