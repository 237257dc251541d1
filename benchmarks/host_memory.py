"""Peak host memory of a slice against the size of the checkpoint.

    python benchmarks/host_memory.py

Makes a random Llama (by default 24 blocks, 1.2 billion parameters, bfloat16), slices it in a process of its own on
the CPU, and prints that process's peak resident memory beside the checkpoint's bytes and the streams' bytes. The bar
is 0.6 of the checkpoint plus the streams. Takes about 5 GB of disk and, on two cores, a quarter of an hour. With
`--recover` the slice is then trained block by block, which may take 1.3 times the memory of the slice.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

BAR, RECOVERY_BAR = 0.6, 1.3


def main() -> None:
    """Make, slice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--intermediate-size", type=int, default=5632)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--recover", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        sizes = ["--hidden-size", arguments.hidden_size, "--blocks", arguments.blocks]
        sizes += ["--intermediate-size", arguments.intermediate_size]
        maker = Path(__file__).parent / "make_checkpoint.py"
        subprocess.run([sys.executable, str(maker), str(folder), *map(str, sizes)], check=True)
        checkpoint = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        data = ["--seq-len", arguments.seq_len, "--device-map", "cpu"]
        output = Path(scratch) / "slice"
        sliced = ["slice", folder, "--dim", arguments.dim, "-o", output, "--calibration", "demo"]
        report = run([*sliced, "--samples", arguments.samples, *data])
        if arguments.recover:
            recovered = ["recover", output, "--teacher", folder, "--mode", "blocks", "--data", "demo", "--epochs", 1]
            recovered += ["-o", Path(scratch) / "recovered"]
            tokens = arguments.samples * arguments.seq_len
            # of a random model nothing is to be won, which the command says at the end
            recovery_peak = peak_of([*recovered, "--tokens", tokens, "--batch-size", arguments.seq_len, *data])
    tokens = arguments.samples * arguments.seq_len
    # float32: the dense stream before and after a branch, the sliced stream, and what enters the attention's writer
    streams = tokens * 4 * (3 * arguments.hidden_size + arguments.dim)
    peak = report["peak_memory_bytes"]
    print(f"checkpoint {checkpoint / 1e9:.2f} GB, streams {streams / 1e6:.0f} MB, {report['seconds']:.0f} s")
    print(f"peak resident memory {peak / 1e9:.2f} GB = {(peak - streams) / checkpoint:.2f} x checkpoint + streams")
    print(f"bar {BAR}: {'met' if peak <= BAR * checkpoint + streams else 'MISSED'}")
    if arguments.recover:
        ratio = recovery_peak / peak
        print(f"peak resident memory of mode blocks {recovery_peak / 1e9:.2f} GB = {ratio:.2f} x slice")
        print(f"bar {RECOVERY_BAR}: {'met' if ratio <= RECOVERY_BAR else 'MISSED'}")


def run(words: list[object]) -> dict[str, Any]:
    """Run a command in a process of its own, and return what it reports."""
    done = subprocess.run(command_of(words), stdout=subprocess.PIPE, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def peak_of(words: list[object]) -> int:
    """Run a command whose result does not matter in a process of its own; return its peak resident memory."""
    child = subprocess.Popen(command_of(words), stdout=subprocess.DEVNULL)
    _, _, usage = os.wait4(child.pid, 0)
    return usage.ru_maxrss * 1024


def command_of(words: list[object]) -> list[str]:
    """Return the command line of a command of slicecli."""
    return [sys.executable, "-m", "slicecli", *map(str, words), "--format", "json"]


if __name__ == "__main__":
    main()
