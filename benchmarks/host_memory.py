"""Peak host memory of a slice against the size of the checkpoint.

    python benchmarks/host_memory.py

Makes a random Llama (by default 24 blocks, 1.2 billion parameters, bfloat16), slices it in a process of its own on
the CPU, and prints that process's peak resident memory beside the checkpoint's bytes and the streams' bytes. The bar
is 0.6 of the checkpoint plus the streams. Takes about 5 GB of disk and, on two cores, a quarter of an hour.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

BAR = 0.6


def main() -> None:
    """Make, slice, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=24)
    parser.add_argument("--intermediate-size", type=int, default=5632)
    parser.add_argument("--dim", type=int, default=1536)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        sizes = ["--hidden-size", arguments.hidden_size, "--blocks", arguments.blocks]
        sizes += ["--intermediate-size", arguments.intermediate_size]
        maker = Path(__file__).parent / "make_checkpoint.py"
        subprocess.run([sys.executable, str(maker), str(folder), *map(str, sizes)], check=True)
        checkpoint = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        words = [
            "slice",
            str(folder),
            "--dim",
            arguments.dim,
            "-o",
            str(Path(scratch) / "slice"),
            "--device-map",
            "cpu",
        ]
        words += ["--calibration", "demo", "--samples", arguments.samples, "--seq-len", arguments.seq_len]
        command = [sys.executable, "-m", "slicecli", *map(str, words), "--format", "json"]
        done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    report = json.loads(done.stdout)
    tokens = arguments.samples * arguments.seq_len
    # float32: the dense stream before and after a branch, the sliced stream, and what enters the attention's writer
    streams = tokens * 4 * (3 * arguments.hidden_size + arguments.dim)
    peak = report["peak_memory_bytes"]
    print(f"checkpoint {checkpoint / 1e9:.2f} GB, streams {streams / 1e6:.0f} MB, {report['seconds']:.0f} s")
    print(f"peak resident memory {peak / 1e9:.2f} GB = {(peak - streams) / checkpoint:.2f} x checkpoint + streams")
    print(f"bar {BAR}: {'met' if peak <= BAR * checkpoint + streams else 'MISSED'}")


if __name__ == "__main__":
    main()
