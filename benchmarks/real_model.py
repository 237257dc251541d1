"""What slices of one real model are worth: both methods, several widths, amounts and draws of calibration text.

    python benchmarks/real_model.py MODEL --calibration TEXT --perplexity TEXT --perplexity OTHER_TEXT \
        --tasks FOLDER --output points.jsonl
    python benchmarks/real_model.py --report points.jsonl...

The first form measures the dense model and its slices one by one, the most telling first, and appends a JSON line for
each to the output. It continues where it stopped; `--steps` ends it after that many slice jobs and measurements, so
that a shared machine can be used in turns. The dims of one setting share the passes over the dense model, at most
`--together` of them. Each step is a process of its own, so that the peak memory is that of the step.

The second form prints one Markdown table of all lines. docs/evidence.md shows it and what follows from it.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

USUAL_SPARSITIES = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)


@dataclass(frozen=True)
class Setting:
    """How slices are made: all but their widths.

    Attributes:
        method: `refit` or `slicegpt`; `None` stands for the dense model.
        unties: The slice of a tied model gets a head of its own.
        samples: Calibration rows.
        length: Tokens in each.
        seed: Of the draw of rows.
        recovery_tokens: Tokens that the slice is trained on afterwards.
    """

    method: str | None = None
    unties: bool = False
    samples: int = 0
    length: int = 0
    seed: int = 0
    recovery_tokens: int = 0


@dataclass(frozen=True)
class Point:
    """One model to measure."""

    setting: Setting
    dim: int
    mlp_dim: int | None = None

    @property
    def key(self) -> str:
        """A name for the folder and to find its line."""
        words = [f"{name}{value}" for name, value in asdict(self.setting).items()]
        return "-".join([*words, f"dim{self.dim}", f"mlp{self.mlp_dim}"])


def numbers(text: str) -> list[int]:
    """Read numbers with commas between them."""
    return [int(part) for part in text.split(",") if part]


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="folder of the dense model")
    parser.add_argument("--calibration", help="text to calibrate on")
    parser.add_argument("--perplexity", action="append", default=[], metavar="TEXT", help="text to measure; repeatable")
    parser.add_argument("--rows", type=int, help="rows of each text  [default: all]")
    parser.add_argument("--tasks", type=Path, metavar="DIR", help="folder of .jsonl multiple-choice questions")
    parser.add_argument("--questions", type=int, default=100, help="of each task")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON lines, a line for each measured model")
    parser.add_argument("--work", type=Path, default=Path("real-model-slices"), help="folder for slices meanwhile")
    parser.add_argument("--dims", type=numbers, default=[], help="[default: six, s from 0.06 to 0.5]")
    parser.add_argument("--two-widths", default="", metavar="DIM:MLP,...", help="slices of both widths")
    parser.add_argument("--dim", type=int, help="of what is varied besides  [default: that at s = 0.25]")
    parser.add_argument("--samples", type=int, default=32, help="calibration rows")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--amounts", type=numbers, default=[], help="other numbers of rows, at --dim")
    parser.add_argument("--seeds", type=numbers, default=[], help="other seeds, at --dim")
    parser.add_argument("--recovery-tokens", type=int, default=0, help="train the slice at --dim on so many tokens")
    parser.add_argument("--together", type=int, default=3, help="dims of one slice job")
    parser.add_argument("--steps", type=int, help="end after so many slice jobs and measurements")
    parser.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="print the table of finished points")
    arguments = parser.parse_args()
    if not arguments.report and not (arguments.model and arguments.calibration and arguments.output):
        parser.error("give a model, --calibration and --output, or --report")
    return arguments


def planned(arguments: argparse.Namespace) -> Iterator[list[Point]]:
    """Yield the points in the order of their worth, those in a list sliced in one job."""
    from slicecli.checkpoint.source import Source
    from slicecli.jobs.options import SliceOptions
    from slicecli.jobs.sweep import usual_dims

    source = Source.find(arguments.model)
    size, is_tied = int(source.fields["hidden_size"]), bool(source.fields.get("tie_word_embeddings"))
    dims = arguments.dims or list(usual_dims(arguments.model, SliceOptions(), USUAL_SPARSITIES))
    chosen = arguments.dim or min(dims, key=lambda dim: abs(dim - 0.75 * size))
    both = [tuple(map(int, part.split(":"))) for part in arguments.two_widths.split(",") if part]
    first = Setting("refit", False, arguments.samples, arguments.seq_len, 42)
    published = Setting("slicegpt", False, arguments.samples, arguments.seq_len, 42)
    untied = Setting("refit", True, arguments.samples, arguments.seq_len, 42)

    def together(setting: Setting) -> Iterator[list[Point]]:
        for start in range(0, len(dims), arguments.together):
            yield [Point(setting, dim) for dim in dims[start : start + arguments.together]]

    yield [Point(Setting(), size)]
    yield from together(first)
    yield from together(published)
    if is_tied:
        yield from together(untied)
    for samples in arguments.amounts:
        for one in (first, published):
            yield [Point(Setting(one.method, one.unties, samples, one.length, one.seed), chosen)]
    if both:
        yield [Point(first, dim, mlp_dim) for dim, mlp_dim in both]
    for seed in arguments.seeds:
        yield [Point(Setting(one.method, one.unties, one.samples, one.length, seed), chosen) for one in (first,)]
    if arguments.recovery_tokens:
        yield [Point(Setting("refit", False, first.samples, first.length, 42, arguments.recovery_tokens), chosen)]


def steps(arguments: argparse.Namespace) -> Iterator[tuple[str, list[Point]]]:
    """Yield what is left to do: `slice` some points, or `measure` one."""
    for points in planned(arguments):
        done = finished(arguments.output)
        left = [point for point in points if point.key not in done]
        unsliced = [point for point in left if point.setting.method and not report_file(arguments, point).is_file()]
        if unsliced:
            yield "slice", unsliced
        for point in left:
            yield "measure", [point]


def finished(output: Path) -> set[str]:
    """Return the keys of the lines that are there."""
    return {line["key"] for line in read_lines([output])}


def read_lines(files: Sequence[Path]) -> list[dict[str, Any]]:
    """Return all finished points."""
    return [json.loads(line) for file in files if file.is_file() for line in file.read_text().splitlines() if line]


def report_file(arguments: argparse.Namespace, point: Point) -> Path:
    """Return where it is written what the slice of a point cost."""
    folder: Path = arguments.work / Path(arguments.model).name
    return folder / f"{point.key}.json"


def make_slices(arguments: argparse.Namespace, points: Sequence[Point]) -> None:
    """Slice to the widths of some points in one job."""
    from slicecli.api import recover
    from slicecli.family.slice_plan import Width
    from slicecli.jobs.options import SliceOptions
    from slicecli.jobs.plan import plan_slices
    from slicecli.jobs.run import run_slices
    from slicecli.runtime.libraries import quiet_libraries
    from slicecli.runtime.memory import bound_memory_that_is_kept, peak_memory_bytes

    bound_memory_that_is_kept()
    setting = points[0].setting
    assert setting.method in ("refit", "slicegpt")
    folders = [report_file(arguments, point).with_suffix("") for point in points]
    options = SliceOptions(
        method=setting.method,
        unties=setting.unties,
        calibration=arguments.calibration,
        samples=setting.samples,
        sequence_length=setting.length,
        seed=setting.seed,
        overwrite=True,
        cache=False,
    )
    widths = [Width(point.dim, mlp_dim=point.mlp_dim) for point in points]
    with quiet_libraries():
        reports = run_slices(plan_slices(arguments.model, widths, folders, options))
    for point, folder, report in zip(points, folders, reports, strict=True):
        seconds = report.seconds
        if setting.recovery_tokens:
            started = time.perf_counter()
            untrained = folder.rename(folder.with_name(f"{folder.name}-untrained"))
            recover(
                str(untrained),
                arguments.model,
                output=folder,
                data=arguments.calibration,
                tokens=setting.recovery_tokens,
                sequence_length=setting.length,
                overwrite=True,
            )
            shutil.rmtree(untrained)
            seconds += time.perf_counter() - started
        about = {"seconds": seconds, "slices_of_job": len(points), "peak_memory_bytes": peak_memory_bytes()}
        report_file(arguments, point).write_text(json.dumps(about))


def measure(arguments: argparse.Namespace, point: Point) -> None:
    """Measure the model of a point, append its line, and remove its slice."""
    from slicecli.evaluation.measure import evaluate
    from slicecli.evaluation.options import EvaluationOptions

    folder = Path(arguments.model)
    about: dict[str, Any] = {}
    if point.setting.method:
        file = report_file(arguments, point)
        folder, about = file.with_suffix(""), json.loads(file.read_text())
    length = arguments.seq_len
    texts = EvaluationOptions(
        texts=tuple(arguments.perplexity), sequence_length=length, limit=arguments.rows, dtype="float32"
    )
    found = evaluate(str(folder), texts)
    tasks: dict[str, float | None] = {}
    if arguments.tasks is not None:
        files = tuple(str(path) for path in sorted(arguments.tasks.glob("*.jsonl")))
        questions = EvaluationOptions(tasks=files, limit=arguments.questions, dtype="float32")
        tasks = {name: task.value for name, task in evaluate(str(folder), questions).tasks.items()} if files else {}
    line = {
        "key": point.key,
        "model": Path(arguments.model).name,
        **asdict(point.setting),
        "hidden_size": found.hidden_size,
        "dim": point.dim,
        "mlp_dim": point.mlp_dim,
        "parameters": found.parameters,
        "nll": {text: result.nll for text, result in found.perplexity.items()},
        "tokens": {text: result.tokens for text, result in found.perplexity.items()},
        "accuracy": tasks,
        **about,
    }
    with arguments.output.open("a") as file_of_lines:
        file_of_lines.write(json.dumps(line) + "\n")
    if point.setting.method:
        shutil.rmtree(folder)
        report_file(arguments, point).unlink()


def run(arguments: argparse.Namespace) -> None:
    """Do what is left to do, each step in a process of its own."""
    left = math.inf if arguments.steps is None else arguments.steps
    context = multiprocessing.get_context("spawn")
    for kind, points in steps(arguments):
        if left <= 0:
            return
        left -= 1
        report_file(arguments, points[0]).parent.mkdir(parents=True, exist_ok=True)
        print(kind, *(point.key for point in points), file=sys.stderr, flush=True)
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            if kind == "slice":
                pool.submit(make_slices, arguments, points).result()
            else:
                pool.submit(measure, arguments, points[0]).result()


def table(lines: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of finished points: per model the dense one first, then by setting and width."""
    models = list(dict.fromkeys(line["model"] for line in lines))
    rows = ["| model | method | calibration | dim / MLP | s | parameters | perplexity | D | accuracy | seconds | GB |"]
    rows.append("|" + "---|" * rows[0].count(" | ") + "---|")
    for model in models:
        own = [line for line in lines if line["model"] == model]
        dense = next(line for line in own if line["method"] is None)
        rows += [table_row(line, dense) for line in own]
    return "\n".join(rows)


def table_row(line: dict[str, Any], dense: dict[str, Any]) -> str:
    """Return the row of one point."""
    method = line["method"] or "dense"
    method += ", untied" * line["unties"] + f", {line['recovery_tokens']:,} tokens of recovery" * bool(
        line["recovery_tokens"]
    )
    calibration = f"{line['samples']} x {line['length']}, seed {line['seed']}" if line["method"] else ""
    width = f"{line['dim']}" + (f" / {line['mlp_dim']}" if line["mlp_dim"] else "")
    nll = line["nll"]
    accuracy = [value for value in line["accuracy"].values() if value is not None]
    cells = [
        line["model"],
        method,
        calibration,
        width,
        f"{1 - line['dim'] / line['hidden_size']:.3f}",
        f"{line['parameters'] / dense['parameters']:.3f}",
        ", ".join(f"{math.exp(value):.2f}" for value in nll.values()),
        ", ".join(f"{value - dense['nll'][text]:.3f}" for text, value in nll.items()) if line["method"] else "",
        f"{100 * sum(accuracy) / len(accuracy):.1f}" if accuracy else "",
        f"{line['seconds']:.0f} ({line['slices_of_job']})" if "seconds" in line else "",
        f"{line['peak_memory_bytes'] / 1e9:.2f}" if "peak_memory_bytes" in line else "",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    """Measure, or print the table."""
    arguments = parse()
    if arguments.report:
        print(table(read_lines(arguments.report)))
    else:
        run(arguments)


if __name__ == "__main__":
    main()
