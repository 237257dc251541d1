"""Time and peak memory of this program beside any other that does the same work: whole commands, in turn.

The project's reference work, refit against the published method, which anyone has (two cores):

    python benchmarks/make_checkpoint.py /tmp/reference --hidden-size 768 --blocks 12 --heads 12 --key-value-heads 4 \\
        --intermediate-size 2048 --vocabulary 32000 --dtype float32
    python benchmarks/against_a_peer.py --model /tmp/reference --threads 2 --rounds 5 \\
        --ours '--dim 576 --calibration demo --samples 16 --seq-len 512 --device-map cpu' \\
        --peer 'slicegpt={python} -m slicecli slice {model} -o {output} --method slicegpt --dim 576
                --calibration demo --samples 16 --seq-len 512 --device-map cpu'

and against another program, here by way of a script that calls it with the same rows, dtype and width:

        --peer 'other=/path/to/its/venv/bin/python its_script.py --model {model} --out {output} --seed {round}'

`--ours OPTIONS` is `slicecli slice {model} -o {output} --no-cache OPTIONS` of this Python; without the cache, because
from the second round on it would spare this program the first pass. `--peer NAME=COMMAND` may be given several times.
A command is split into words as a shell does it, but no shell runs it. In each word {model} is replaced by the model,
{output} by a path that does not exist yet, {round} by 1, 2, ..., and {python} by this Python.

All commands run in every round, in reverse order in every other one, each as a process of its own that starts from
nothing; what it wrote is removed afterwards. `--make` takes sizes for `make_checkpoint.py`, which then makes the model:
at `--model` if nothing is there, else in a temporary folder.

    seconds              from the start of the process to its end
    cpu_seconds          user and system, of the process and the children that it waited for
    peak_memory_bytes    the larger of the largest resident memory of one process (the system's own count) and the
                         largest sum over the process and its descendants, polled every 50 ms; memory that several
                         share counts for each

Standard output gets JSON: every run, medians, least and largest, and ratios to the first command, by the medians and
as the median of the rounds' ratios. Standard error gets a table. A command that fails, writes nothing to {output} or
takes longer than `--timeout` ends the benchmark with an error.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

# the system's count of the largest resident memory includes this process's own, up to the start of the command: so
# nothing heavy is imported here
import psutil

OURS = "{python} -m slicecli --quiet slice {model} -o {output} --no-cache --format json"
MEASURED = ("seconds", "cpu_seconds", "peak_memory_bytes")
POLL_SECONDS = 0.05
TAIL_LINES = 20
READ_BYTES = 2**24


class CommandError(Exception):
    """A command did not do its work."""


@dataclass(frozen=True)
class Run:
    """One run of one command.

    Attributes:
        round: Number of the round, from 1.
        seconds: From start to end.
        cpu_seconds: User and system.
        peak_memory_bytes: Of the whole process tree.
        output_bytes: What it wrote to its output.
    """

    round: int
    seconds: float
    cpu_seconds: float
    peak_memory_bytes: int
    output_bytes: int


class TreeMemory:
    """Polls the resident memory of a process and its descendants in a thread of its own.

    Attributes:
        peak_bytes: The largest sum so far.
    """

    def __init__(self, pid: int) -> None:
        self.peak_bytes = 0
        self._root = psutil.Process(pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the polling."""
        self._ended.set()
        self._thread.join()

    def _poll(self) -> None:
        while not self._ended.wait(POLL_SECONDS):
            with suppress(psutil.NoSuchProcess):
                processes = [self._root, *self._root.children(recursive=True)]
                self.peak_bytes = max(self.peak_bytes, sum(map(_resident_bytes, processes)))


def _resident_bytes(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0  # it has just ended


def run_once(
    name: str, words: list[str], output: Path, number: int, environment: Mapping[str, str], timeout: float | None
) -> Run:
    """Run a command and measure it.

    Args:
        name: What it is called.
        words: The command.
        output: Where it is to write.
        number: Number of the round.
        environment: Its environment variables.
        timeout: The most seconds that it may take.

    Raises:
        CommandError: It failed or took too long; the message has the end of what it printed as errors.
    """
    with tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        try:
            # in a session of its own, so that all it starts can be ended together
            process = subprocess.Popen(
                words,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise CommandError(f"{name} cannot be started: {error}") from error
        memory = TreeMemory(process.pid)
        alarm = threading.Timer(timeout or threading.TIMEOUT_MAX, _end_session, [process.pid])
        alarm.daemon = True
        alarm.start()
        try:
            _, status, usage = os.wait4(process.pid, 0)
            seconds = time.perf_counter() - started
        finally:
            alarm.cancel()
            memory.stop()
            _end_session(process.pid)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            errors.seek(0)
            tail = "\n".join(errors.read().decode(errors="replace").splitlines()[-TAIL_LINES:])
            is_late = timeout is not None and seconds >= timeout
            end = f"took more than {timeout:g} s" if is_late else f"ended with {process.returncode}"
            raise CommandError(f"{name} {end} in round {number}: {shlex.join(words)}\n{tail}")
    largest = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Run(
        number,
        seconds,
        usage.ru_utime + usage.ru_stime,
        max(largest, memory.peak_bytes),
        sum(path.stat().st_size for path in (output, *output.rglob("*")) if path.is_file()),
    )


def _end_session(leader: int) -> None:
    """End whatever a command has left running."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, signal.SIGKILL)


def run_rounds(commands: Mapping[str, str], model: str, arguments: argparse.Namespace) -> dict[str, list[Run]]:
    """Run all commands round after round.

    Raises:
        CommandError: One of them failed.
    """
    environment = dict(os.environ)
    if arguments.threads:
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(arguments.threads))
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(1, arguments.rounds + 1):
        order = list(commands) if number % 2 else list(commands)[::-1]
        for name in order:
            with tempfile.TemporaryDirectory() as scratch:
                output = Path(scratch) / "output"
                places = {"{model}": model, "{output}": str(output), "{round}": str(number), "{python}": sys.executable}
                words = [_filled(word, places) for word in shlex.split(commands[name])]
                run = run_once(name, words, output, number, environment, arguments.timeout)
            if "{output}" in commands[name] and not run.output_bytes:
                raise CommandError(f"{name} wrote nothing to its output in round {number}: {shlex.join(words)}")
            runs[name].append(run)
            print(
                f"round {number}: {name} {run.seconds:.2f} s, {run.peak_memory_bytes / 1e9:.2f} GB",
                file=sys.stderr,
            )
    return runs


def _filled(word: str, places: Mapping[str, str]) -> str:
    for place, value in places.items():
        word = word.replace(place, value)
    return word


def summary_of(runs: Mapping[str, list[Run]]) -> dict[str, dict[str, dict[str, float]]]:
    """Return for each command and each quantity its median, its spread and its ratios to the first command."""
    first = next(iter(runs.values()))
    summary: dict[str, dict[str, dict[str, float]]] = {}
    for name, own in runs.items():
        summary[name] = {}
        for quantity in MEASURED:
            values = [getattr(run, quantity) for run in own]
            reference = [getattr(run, quantity) for run in first]
            ratios = [value / other for value, other in zip(values, reference, strict=True)]
            summary[name][quantity] = {
                "median": statistics.median(values),
                "min": min(values),
                "max": max(values),
                "ratio_of_medians": statistics.median(values) / statistics.median(reference),
                "median_ratio": statistics.median(ratios),
                "min_ratio": min(ratios),
                "max_ratio": max(ratios),
            }
    return summary


def print_table(summary: Mapping[str, Mapping[str, Mapping[str, float]]]) -> None:
    """Print medians, spreads and ratios to standard error."""
    width = max(map(len, summary))
    heads = [("seconds", 24), ("x first", 8), ("CPU seconds", 24), ("x first", 8), ("peak GB", 18), ("x first", 8)]
    print(" " * width + "".join(f"{head:>{size}}" for head, size in heads), file=sys.stderr)
    for name, quantities in summary.items():
        cells = []
        for quantity, size, unit in zip(MEASURED, (24, 24, 18), (1, 1, 1e9), strict=True):
            one = quantities[quantity]
            values = [one[part] / unit for part in ("median", "min", "max")]
            cells.append(f"{'{:.2f} ({:.2f}-{:.2f})'.format(*values):>{size}}{one['median_ratio']:8.2f}")
        print(f"{name:{width}}{''.join(cells)}", file=sys.stderr)


def read_once(model: str) -> None:
    """Read the files of a model, so that the first command does not find them on disk and the others in memory."""
    for path in Path(model).glob("*"):
        if path.is_file():
            with path.open("rb") as file:
                while file.read(READ_BYTES):
                    pass


def commands_of(arguments: argparse.Namespace) -> dict[str, str]:
    """Return the commands by name, ours first.

    Raises:
        CommandError: There are fewer than two, or two of one name.
    """
    pairs = [] if arguments.ours is None else [("slicecli", f"{OURS} {arguments.ours}")]
    for peer in arguments.peer:
        name, _, command = peer.partition("=")
        if not name.strip() or not command.strip():
            raise CommandError(f"{peer!r} is not NAME=COMMAND.")
        pairs.append((name.strip(), command))
    commands = dict(pairs)
    if len(pairs) < 2 or len(commands) < len(pairs):
        raise CommandError("Give at least two commands (--ours, --peer) with names of their own.")
    return commands


def surroundings(threads: int | None) -> dict[str, object]:
    """Return what the times depend on besides the commands."""
    libraries = ("slicecli", "torch", "transformers", "numpy")
    return {
        "platform": platform.platform(),
        "cores": len(psutil.Process().cpu_affinity()) if hasattr(psutil.Process, "cpu_affinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "threads": threads,
        "python": platform.python_version(),
        "libraries": {name: importlib.metadata.version(name) for name in libraries},
    }


def main() -> None:
    """Make the model if asked to, run the rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or Hub id")
    parser.add_argument("--make", metavar="SIZES", help="options of make_checkpoint.py, to make the model")
    parser.add_argument("--ours", metavar="OPTIONS", help="options of slicecli slice")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument("--rounds", type=int, default=5, help="default %(default)s")
    parser.add_argument("--threads", type=int, help="OMP_NUM_THREADS and MKL_NUM_THREADS of all; default as they are")
    parser.add_argument("--timeout", type=float, metavar="SECONDS", help="of one run; default none")
    arguments = parser.parse_args()
    if arguments.model is None and arguments.make is None:
        parser.error("give --model, or --make to make one")
    scratch = Path(tempfile.mkdtemp())
    try:
        commands = commands_of(arguments)
        model = arguments.model or str(scratch / "model")
        if arguments.make is not None and not Path(model).exists():
            maker = Path(__file__).parent / "make_checkpoint.py"
            command = [sys.executable, str(maker), model, *shlex.split(arguments.make)]
            subprocess.run(command, stdout=sys.stderr, check=True)
        read_once(model)
        runs = run_rounds(commands, model, arguments)
    except CommandError as error:
        sys.exit(str(error))
    finally:
        shutil.rmtree(scratch)
    summary = summary_of(runs)
    print_table(summary)
    report = {
        "surroundings": surroundings(arguments.threads),
        "model": arguments.model,
        "made": arguments.make,
        "rounds": arguments.rounds,
        "commands": commands,
        "summary": summary,
        "runs": {name: [asdict(run) for run in own] for name, own in runs.items()},
    }
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
