"""How the time and the memory of a slice grow with width, blocks and tokens, beside the arithmetic there is to do.

    python benchmarks/slice_time.py --hidden 768,384,1536 --blocks 12,6,24 --samples 16,8,32 --plot slice_time.png
    python benchmarks/slice_time.py --config config.json --dim 3072 --dtype bfloat16 --samples 16,64 --seq-len 2048 \\
        --device-map cuda:0

The first value of each list is the base shape; the others change one axis of it at a time. A config gives the base
shape of families whose config names its sizes as Llama's does; with another hidden size its heads keep their width, and
their number, the MLP and the dim keep their proportions. Each shape is a checkpoint of random weights
(`make_checkpoint.py`, drawn on the GPU if that is what slices), sliced once by the refit in a process of its own,
without the cache. Checkpoint and slice lie in the folder for temporary files (TMPDIR), one shape at a time.

Standard output gets JSON, standard error a table. `seconds` is what the command reports, `process_seconds` has its
start in it too. The floor counts floating-point operations (a multiplication and an addition are two), p parameters of
the blocks' matrices, N tokens, d hidden size, k dim, m inputs of a writer:

    statistics   dense forward pass 2pN; second moments N d² per norm input; eigenproblem 9 d³
    refit        dense forward pass 2pN; sliced forward pass 2pN k/d; Gram matrix N m² and cross products 2N m k per
                 writer; Gram matrix N k² and cross products 2N k d per norm input; for each of these regressions
                 with n inputs and o outputs Cholesky n³/3 and triangular solves 2n² o

Left out: attention scores, the head, repeated solves to choose the ridge, and running a block's parts again. The slope
is the exponent of the power law that fits an axis best; a constant part, such as starting up, lowers it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy
from safetensors import safe_open

AXES = ("hidden_size", "blocks", "tokens")
TAIL_LINES = 20
# the project's reference work
REFERENCE: dict[str, Any] = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "intermediate_size": 2048,
    "vocab_size": 32000,
}


@dataclass(frozen=True)
class Shape:
    """A model and how many tokens it is sliced with.

    Attributes:
        hidden_size: d.
        dim: k.
        blocks: Number of blocks.
        heads: Attention heads.
        key_value_heads: Of these, with keys and values of their own.
        head_width: Numbers per head.
        intermediate_size: Width of the MLP.
        vocabulary: Number of tokens that the model knows.
        samples: Rows of calibration text.
        seq_len: Tokens per row.
    """

    hidden_size: int
    dim: int
    blocks: int
    heads: int
    key_value_heads: int
    head_width: int
    intermediate_size: int
    vocabulary: int
    samples: int
    seq_len: int

    @property
    def tokens(self) -> int:
        """N."""
        return self.samples * self.seq_len

    @property
    def model(self) -> Shape:
        """The shape without what it is sliced with: equal where one checkpoint serves."""
        return replace(self, dim=0, samples=0, seq_len=0)

    def at_width(self, hidden_size: int) -> Shape:
        """Return the shape at another hidden size, in the same proportions."""
        growth = hidden_size / self.hidden_size
        heads = max(1, round(self.heads * growth))
        wanted = max(1, round(self.key_value_heads * growth))
        return replace(
            self,
            hidden_size=hidden_size,
            # Llama's config demands a multiple of the number of heads
            dim=round(self.dim * growth / heads) * heads,
            heads=heads,
            key_value_heads=max(number for number in range(1, wanted + 1) if heads % number == 0),
            intermediate_size=round(self.intermediate_size * growth),
        )

    def floor(self, parameters: int) -> dict[str, dict[str, float]]:
        """Return the floating-point operations that each phase takes at least, by what they are for.

        Args:
            parameters: p.
        """
        tokens, d, k = self.tokens, self.hidden_size, self.dim
        norm_inputs = 2 * self.blocks + 1
        writers = [self.heads * self.head_width, self.intermediate_size]
        solves = norm_inputs * _solve(k, d) + self.blocks * sum(_solve(m, k) for m in writers)
        return {
            "statistics": {
                "dense pass": 2 * parameters * tokens,
                "second moments": norm_inputs * tokens * d**2,
                "eigenproblem": 9 * d**3,
            },
            "refit": {
                "dense pass": 2 * parameters * tokens,
                "sliced pass": 2 * parameters * tokens * k / d,
                "Gram matrices of writers": self.blocks * sum(tokens * m**2 for m in writers),
                "cross products of writers": self.blocks * sum(2 * tokens * m * k for m in writers),
                "Gram matrices of readers": norm_inputs * tokens * k**2,
                "cross products of readers": norm_inputs * 2 * tokens * k * d,
                "solves": solves,
            },
        }


def _solve(inputs: int, outputs: int) -> float:
    """Return the operations of one regression's Cholesky decomposition and triangular solves."""
    return inputs**3 / 3 + 2 * inputs**2 * outputs


def base_shape(arguments: argparse.Namespace) -> Shape:
    """Return the first value of each axis on the config, or on the reference work."""
    fields = REFERENCE if arguments.config is None else json.loads(arguments.config.read_text())
    hidden_size, heads = fields["hidden_size"], fields["num_attention_heads"]
    shape = Shape(
        hidden_size=hidden_size,
        dim=hidden_size * 3 // 4 // heads * heads,
        blocks=arguments.blocks[0] if arguments.blocks else fields["num_hidden_layers"],
        heads=heads,
        key_value_heads=fields.get("num_key_value_heads") or heads,
        head_width=fields.get("head_dim") or hidden_size // heads,
        intermediate_size=fields["intermediate_size"],
        vocabulary=arguments.vocabulary or fields["vocab_size"],
        samples=arguments.samples[0],
        seq_len=arguments.seq_len,
    )
    if arguments.hidden:
        shape = shape.at_width(arguments.hidden[0])
    return replace(shape, dim=arguments.dim or shape.dim)


def shapes_around(base: Shape, arguments: argparse.Namespace) -> list[Shape]:
    """Return the base and the shapes that differ from it along one axis, those of one checkpoint together."""
    shapes = [base]
    shapes += [replace(base, samples=samples) for samples in arguments.samples[1:]]
    shapes += [replace(base, blocks=blocks) for blocks in arguments.blocks[1:]]
    shapes += [base.at_width(hidden_size) for hidden_size in arguments.hidden[1:]]
    return list(dict.fromkeys(shapes))


def make_checkpoint(shape: Shape, folder: Path, arguments: argparse.Namespace) -> int:
    """Write a checkpoint of the shape; return the number of parameters in its blocks' matrices."""
    config = folder.with_suffix(".json")
    fields: dict[str, Any] = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    if arguments.config is not None:
        fields = json.loads(arguments.config.read_text())
    else:
        fields["max_position_embeddings"] = max(2048, shape.seq_len)
    sizes = {
        "hidden_size": shape.hidden_size,
        "num_hidden_layers": shape.blocks,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.key_value_heads,
        "head_dim": shape.head_width,
        "intermediate_size": shape.intermediate_size,
        "vocab_size": shape.vocabulary,
    }
    config.write_text(json.dumps(fields | sizes))
    maker = Path(__file__).parent / "make_checkpoint.py"
    device = arguments.device_map if arguments.device_map.startswith("cuda") else "cpu"
    words = [maker, folder, "--config", config, "--dtype", arguments.dtype, "--device", device]
    run([sys.executable, *map(str, words)])
    parameters = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "numpy") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - what is opened is no mapping
                size = tensors.get_slice(name).get_shape()
                # embeddings and head lie in no numbered module
                if len(size) > 1 and any(part.isdigit() for part in name.split(".")):
                    parameters += int(numpy.prod(size))
    return parameters


def slice_once(shape: Shape, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Slice a checkpoint of the shape; return what the command reports, and the seconds that its process took."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as output:
        words = ["slice", folder, "--dim", shape.dim, "-o", Path(output) / "slice", "--no-cache", "--format", "json"]
        words += ["--calibration", arguments.calibration, "--samples", shape.samples, "--seq-len", shape.seq_len]
        words += ["--device-map", arguments.device_map, "--batch-size", arguments.batch_size]
        started = time.perf_counter()
        printed = run([sys.executable, "-m", "slicecli", "--quiet", *map(str, words)])
        process_seconds = time.perf_counter() - started
    return {**json.loads(printed), "process_seconds": round(process_seconds, 3)}


def run(command: list[str]) -> str:
    """Run a command and return its standard output.

    Raises:
        RuntimeError: It failed; the message has the end of its standard error.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        tail = "\n".join(done.stderr.splitlines()[-TAIL_LINES:])
        raise RuntimeError(f"{' '.join(command)}\nended with {done.returncode}:\n{tail}")
    return done.stdout


def measure(shapes: list[Shape], arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Slice each shape and yield a row about it."""
    for model in dict.fromkeys(shape.model for shape in shapes):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            parameters = make_checkpoint(model, folder, arguments)
            for shape in (shape for shape in shapes if shape.model == model):
                yield row_of(shape, parameters, slice_once(shape, folder, arguments))


def row_of(shape: Shape, parameters: int, report: Mapping[str, Any]) -> dict[str, Any]:
    """Return one run beside its floor; the speed of a phase is that at which its floor was done."""
    floor = shape.floor(parameters)
    totals = {phase: sum(items.values()) for phase, items in floor.items()}
    phases = report.get("phases") or {}
    speeds = {phase: total / phases[phase] for phase, total in totals.items() if phases.get(phase)}
    return {
        "shape": {**asdict(shape), "tokens": shape.tokens},
        "block_parameters": parameters,
        "seconds": report["seconds"],
        "process_seconds": report["process_seconds"],
        "phases": phases,
        "peak_memory_bytes": report["peak_memory_bytes"],
        "peak_device_memory_bytes": report.get("peak_device_memory_bytes"),
        "floor": floor,
        "floor_flop": totals,
        "flop_per_second": {"all": sum(totals.values()) / report["seconds"], **speeds},
    }


def axis_of(rows: list[dict[str, Any]], axis: str) -> list[dict[str, Any]]:
    """Return the rows that differ from the first along an axis, with the first, in order; none where it has no more."""
    fixed = [name for name in AXES if name != axis]
    base = rows[0]["shape"]
    along = [row for row in rows if all(row["shape"][name] == base[name] for name in fixed)]
    return sorted(along, key=lambda row: row["shape"][axis]) if len(along) > 1 else []


def seconds_along(along: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Return the seconds of the whole slice and of each phase that all rows know."""
    phases = [phase for phase in along[0]["phases"] if all(row["phases"].get(phase) for row in along)]
    return {"all": [row["seconds"] for row in along], **{p: [row["phases"][p] for row in along] for p in phases}}


def slope(sizes: list[float], values: list[float]) -> float:
    """Return the exponent of the power law that fits best, by least squares of the logarithms."""
    return float(numpy.polyfit(numpy.log(sizes), numpy.log(values), 1)[0])


def slopes_of(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the slopes of times, peak memory and floor along each axis that has more than one size."""
    slopes: dict[str, dict[str, float]] = {}
    for axis in AXES:
        along = axis_of(rows, axis)
        if not along:
            continue
        sizes = [row["shape"][axis] for row in along]
        columns = {f"seconds, {name}": values for name, values in seconds_along(along).items()}
        columns["peak memory"] = [row["peak_memory_bytes"] for row in along]
        if all(row["peak_device_memory_bytes"] for row in along):
            columns["peak device memory"] = [row["peak_device_memory_bytes"] for row in along]
        columns["floor"] = [sum(row["floor_flop"].values()) for row in along]
        slopes[axis] = {name: round(slope(sizes, values), 3) for name, values in columns.items()}
    return slopes


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the seconds against each axis that has more than one size, both logarithmic, with the fitted power laws."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogFormatter, NullLocator

    axes_drawn = [axis for axis in AXES if axis_of(rows, axis)]
    figure = Figure(figsize=(4.6 * len(axes_drawn), 4.2), layout="tight")
    panels = figure.subplots(1, len(axes_drawn), squeeze=False, sharey=True)[0]
    for panel, axis in zip(panels, axes_drawn, strict=True):
        along = axis_of(rows, axis)
        sizes = numpy.array([row["shape"][axis] for row in along], dtype=float)
        for number, (name, values) in enumerate(seconds_along(along).items()):
            exponent, constant = numpy.polyfit(numpy.log(sizes), numpy.log(values), 1)
            colour = f"C{number}"
            panel.plot(sizes, values, "o", color=colour, label=f"{name}: slope {exponent:.2f}")
            panel.plot(sizes, numpy.exp(constant) * sizes**exponent, "-", color=colour, linewidth=1)
        panel.set_xscale("log")
        panel.set_yscale("log")
        panel.set_xticks(sizes)
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        panel.xaxis.set_minor_locator(NullLocator())
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_formatter(LogFormatter())  # labels some where there is less than a decade
        panel.set_xlabel(axis.replace("_", " "))
        panel.grid(alpha=0.25, which="both")
        panel.legend(fontsize=8, frameon=False)
    panels[0].set_ylabel("seconds")
    figure.savefig(path, dpi=130)


def print_row(row: Mapping[str, Any] | None) -> None:
    """Print a line of the table to standard error, or its head."""
    if row is None:
        print(
            f"{'hidden':>7} {'dim':>6} {'blocks':>6} {'tokens':>9} {'seconds':>9} {'statistics':>10} {'refit':>9} "
            f"{'host GB':>8} {'device GB':>9} {'floor TFLOP':>11} {'GFLOP/s':>9}",
            file=sys.stderr,
        )
        return
    shape, phases, device = row["shape"], row["phases"], row["peak_device_memory_bytes"]
    times = [f"{phases[name]:.2f}" if name in phases else "-" for name in ("statistics", "refit")]
    print(
        f"{shape['hidden_size']:7} {shape['dim']:6} {shape['blocks']:6} {shape['tokens']:9,} {row['seconds']:9.2f} "
        f"{times[0]:>10} {times[1]:>9} {row['peak_memory_bytes'] / 1e9:8.2f} "
        f"{'-' if device is None else f'{device / 1e9:.2f}':>9} {sum(row['floor_flop'].values()) / 1e12:11.4g} "
        f"{row['flop_per_second']['all'] / 1e9:9.4g}",
        file=sys.stderr,
    )


def _sizes(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    """Measure, print, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="config.json of the base shape; default the reference work")
    parser.add_argument("--hidden", type=_sizes, default=[], metavar="N,N", help="default that of the config")
    parser.add_argument("--blocks", type=_sizes, default=[], metavar="N,N", help="default those of the config")
    parser.add_argument("--samples", type=_sizes, default=[16], metavar="N,N", help="rows of text; default 16")
    parser.add_argument("--seq-len", type=int, default=512, help="default %(default)s")
    parser.add_argument("--dim", type=int, help="of the base shape; default three quarters of its hidden size")
    parser.add_argument("--vocabulary", type=int, help="default that of the config")
    parser.add_argument("--dtype", default="float32", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--calibration", default="demo", help="default %(default)s")
    parser.add_argument("--batch-size", default="auto", help="default %(default)s")
    parser.add_argument("--device-map", default="cpu", help="default %(default)s")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    error = None
    print_row(None)
    try:
        for row in measure(shapes_around(base_shape(arguments), arguments), arguments):
            rows.append(row)
            print_row(row)
    except RuntimeError as failure:
        # what was measured before it took long and is worth having
        error = str(failure)
    slopes = slopes_of(rows) if rows else {}
    for axis, columns in slopes.items():
        print(f"slope along {axis}: {', '.join(f'{name} {value}' for name, value in columns.items())}", file=sys.stderr)
    if arguments.plot and slopes:
        draw(rows, arguments.plot)
    given = {name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()}
    print(json.dumps({"options": given, "rows": rows, "slopes": slopes, "error": error}, indent=2))
    if error:
        sys.exit(error)


if __name__ == "__main__":
    main()
