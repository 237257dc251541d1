"""What slices with fewer dimensions, fewer MLP channels, or fewer of both lose at as many parameters.

    python benchmarks/two_widths.py measure MODEL --name stories260K --calibration TEXT --evaluation TEXT \
        [--samples 128] [--seq-len 256] [--shares 0.88,0.75,0.62] [--pairs 7] --output benchmarks/two_widths.csv
    python benchmarks/two_widths.py table benchmarks/two_widths.csv
    python benchmarks/two_widths.py plot benchmarks/two_widths.csv docs/images/two-widths.png

For each share of the model's parameters some pairs of widths that use it up are sliced in one job and measured; beside
the perplexity stands what `slicecli slice --target-params` goes by: the share of energy that the hidden size discards,
and the sum of what the MLPs lose (slicecli/estimation/shape.py).
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import slicecli
from slicecli.estimation.shape import ShapeLosses
from slicecli.family.shapes import pairs_within
from slicecli.family.slice_plan import DTYPE_BYTES, Width, WidthPair
from slicecli.jobs.dense_model import read_rows, share_work, with_weights
from slicecli.jobs.options import SliceOptions
from slicecli.jobs.plan import plan_slices
from slicecli.jobs.run import run_slices
from slicecli.jobs.shape import shape_losses
from slicecli.progress import Silent
from slicecli.runtime.libraries import quiet_libraries
from slicecli.slicing.refit import collect_statistics

BLUE, ORANGE, GREEN = "#2166ac", "#d6604d", "#4d9221"


@dataclass(frozen=True)
class Row:
    """One measured slice; of the dense model both losses are zero.

    Attributes:
        share: Of the dense model's parameters, as the target was.
        discarded: δ(k).
        cut: Σ e(m) over blocks.
    """

    model: str
    hidden_size: int
    mlp_size: int
    share: float
    dim: int
    mlp_dim: int
    parameters: int
    perplexity: float
    discarded: float
    cut: float

    @property
    def kind(self) -> str:
        """Which widths are smaller."""
        if self.dim == self.hidden_size:
            return "mlp"
        return "hidden" if self.mlp_dim == self.mlp_size else "both"

    @property
    def loss(self) -> float:
        """What the choice goes by."""
        return ShapeLosses([self.discarded], [self.cut]).predict(0, 0)


def losses_of(model: str, options: SliceOptions) -> ShapeLosses:
    """Run the dense model for what each width would lose."""
    job = plan_slices(model, (), (), options)
    rows, _ = read_rows(job)
    dense, batches, _ = share_work(with_weights(job), rows)
    return shape_losses(collect_statistics(dense, batches, Silent(), with_channels=True), job.dimensions.hidden_size)


def some_of(pairs: Sequence[WidthPair], count: int) -> list[WidthPair]:
    """Return the outermost pairs and some between them."""
    last = len(pairs) - 1
    return list(dict.fromkeys(pairs[round(index * last / (count - 1))] for index in range(count)))


def measure(given: argparse.Namespace) -> None:
    """Slice and measure, and append to the table."""
    options = SliceOptions(calibration=given.calibration, samples=given.samples, sequence_length=given.seq_len)
    with quiet_libraries():
        job = plan_slices(given.model, (), (), options)
        losses = losses_of(given.model, options)
    sizes = job.dimensions
    dense = slicecli.perplexity(given.model, given.evaluation, sequence_length=given.window).value
    whole = (sizes.hidden_size, sizes.mlp_size)
    append(given.output, [Row(given.name, *whole, 1.0, *whole, sizes.parameters(), dense, 0.0, 0.0)])
    for share in map(float, given.shares.split(",")):
        target = Width(sparsity=1 - share, of="parameters")
        pairs = some_of(pairs_within(target, sizes, job.classes, DTYPE_BYTES[job.source.stored_dtype()]), given.pairs)
        with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
            folders = [Path(scratch) / str(number) for number in range(len(pairs))]
            reports = run_slices(plan_slices(given.model, [pair.width for pair in pairs], folders, options))
            for pair, report in zip(pairs, reports, strict=True):
                found = slicecli.perplexity(str(report.output), given.evaluation, sequence_length=given.window)
                mlp_dim = sizes.mlp_size if pair.mlp_dim is None else pair.mlp_dim
                row = Row(
                    *(given.name, *whole, share, pair.dim, mlp_dim),
                    parameters=report.plan.sliced_parameters,
                    perplexity=found.value,
                    discarded=losses.discarded[pair.dim],
                    cut=losses.cut[mlp_dim],
                )
                append(given.output, [row])


def append(path: Path, rows: Sequence[Row]) -> None:
    """Write rows to the end of the table."""
    is_new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        if is_new:
            writer.writerow([field.name for field in dataclasses.fields(Row)])
        for row in rows:
            numbers = (f"{value:.5g}" if isinstance(value, float) else value for value in dataclasses.astuple(row))
            writer.writerow(numbers)


def read(path: Path) -> dict[str, list[Row]]:
    """Read the table, by model."""
    readers = {"str": str, "int": int, "float": float}
    found: dict[str, list[Row]] = defaultdict(list)
    with path.open(newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            row = Row(**{field.name: readers[str(field.type)](line[field.name]) for field in dataclasses.fields(Row)})
            found[row.model].append(row)
    return found


def by_share(rows: Sequence[Row]) -> list[tuple[float, list[Row]]]:
    """Return the slices of a model by share of parameters, the largest first."""
    groups: dict[float, list[Row]] = defaultdict(list)
    for row in rows:
        if row.share < 1:
            groups[row.share].append(row)
    return sorted(groups.items(), reverse=True)


def table(given: argparse.Namespace) -> None:
    """Print for each size the best of each kind, and what the prediction would choose among those measured."""
    print("| model | parameters | hidden size alone | MLP alone | best pair | chosen |\n|---|---|---|---|---|---|")
    for model, rows in read(given.table).items():
        dense = next(row for row in rows if row.share == 1)
        print(
            f"| {model} | {dense.parameters:,} | | | {dense.hidden_size} × {dense.mlp_size}: {dense.perplexity:.2f} | |"
        )
        for share, group in by_share(rows):
            best = min(group, key=lambda row: row.perplexity)
            chosen = min(group, key=lambda row: row.loss)
            ends = [next((row for row in group if row.kind == kind), None) for kind in ("hidden", "mlp")]
            cells = ["" if row is None else f"{row.dim} × {row.mlp_dim}: {row.perplexity:.2f}" for row in ends]
            over = chosen.perplexity / best.perplexity - 1
            cells += [f"{row.dim} × {row.mlp_dim}: {row.perplexity:.2f}" for row in (best, chosen)]
            print(f"| | {share:.0%} | {' | '.join(cells)} (+{over:.1%}) |")


def plot(given: argparse.Namespace) -> None:
    """Draw perplexity against parameters, a picture for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import PercentFormatter, ScalarFormatter

    models = read(given.table)
    figure, axes = pyplot.subplots(1, len(models), figsize=(4.2 * len(models), 4.0), squeeze=False)
    kinds = {"hidden": ("hidden size alone", BLUE, "o"), "mlp": ("MLP alone", ORANGE, "s")}
    for axis, (model, rows) in zip(axes[0], models.items(), strict=True):
        dense = next(row for row in rows if row.share == 1)
        groups = by_share(rows)

        def point(row: Row, dense: Row = dense) -> tuple[float, float]:
            return row.parameters / dense.parameters, row.perplexity

        for kind, (name, colour, marker) in kinds.items():
            ends = [row for _, group in groups for row in group if row.kind == kind]
            line = zip(*map(point, [dense, *ends]), strict=True)
            axis.plot(*line, color=colour, marker=marker, label=name)
        best = [min(group, key=lambda row: row.perplexity) for _, group in groups]
        axis.plot(*zip(*map(point, [dense, *best]), strict=True), color=GREEN, marker="D", label="best pair measured")
        others = [row for _, group in groups for row in group if row.kind == "both"]
        if others:
            axis.scatter(*zip(*map(point, others), strict=True), s=12, color=GREEN, alpha=0.45, label="other pairs")
        axis.scatter(*point(dense), color="black", zorder=3, label="dense")
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(ScalarFormatter())
        axis.minorticks_off()
        highest = max(row.perplexity for row in rows)
        ticks = [dense.perplexity * (highest / dense.perplexity) ** (step / 4) for step in range(5)]
        axis.set_yticks([float(f"{tick:.2g}") for tick in ticks])
        axis.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axis.invert_xaxis()
        axis.set_title(f"{model} ({dense.parameters / 1e6:.3g} M)", fontsize=11)
        axis.set_xlabel("parameters, share of the dense model's")
        axis.grid(alpha=0.25)
    axes[0][0].set_ylabel("perplexity")
    axes[0][0].legend(frameon=False, fontsize=9, loc="upper left")
    figure.tight_layout()
    figure.savefig(given.picture, dpi=130)


def main() -> None:
    """Measure, print or draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("model")
    measuring.add_argument("--name", required=True)
    measuring.add_argument("--calibration", default="demo")
    measuring.add_argument("--evaluation", default="demo")
    measuring.add_argument("--samples", type=int, default=128)
    measuring.add_argument("--seq-len", type=int, default=256)
    measuring.add_argument("--window", type=int, default=256)
    measuring.add_argument("--shares", default="0.88,0.75,0.62")
    measuring.add_argument("--pairs", type=int, default=7)
    measuring.add_argument("--output", type=Path, required=True)
    measuring.set_defaults(run=measure)
    printing = commands.add_parser("table")
    printing.add_argument("table", type=Path)
    printing.set_defaults(run=table)
    drawing = commands.add_parser("plot")
    drawing.add_argument("table", type=Path)
    drawing.add_argument("picture", type=Path)
    drawing.set_defaults(run=plot)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
