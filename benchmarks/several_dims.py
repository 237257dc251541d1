"""What several dims of one model cost together: slices in one job against a slice alone.

    python benchmarks/several_dims.py CHECKPOINT [--dims 672,624,576,528,480] [--text demo] [--samples 16]

The refit collects its statistics once and runs the dense model once for all dims; each adds its own half.
Timed in turn, round after round: the middle dim alone, and all of them together, without evaluations. Medians of the
rounds, and the median of the ratios.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from slicecli.family.slice_plan import Width
from slicecli.jobs.options import SliceOptions
from slicecli.jobs.plan import plan_slices
from slicecli.jobs.run import run_slices
from slicecli.runtime.libraries import quiet_libraries


def seconds(model: str, dims: list[int], options: SliceOptions) -> float:
    """Slice to some dims in one job; return the wall-clock time without that of starting up."""
    with tempfile.TemporaryDirectory() as scratch, quiet_libraries():
        folders = [Path(scratch) / f"dim{dim}" for dim in dims]
        job = plan_slices(model, [Width(dim) for dim in dims], folders, options)
        started = time.perf_counter()
        run_slices(job)
        return time.perf_counter() - started


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--dims", default="672,624,576,528,480")
    parser.add_argument("--text", default="demo")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    dims = [int(dim) for dim in given.dims.split(",")]
    options = SliceOptions(
        calibration=given.text, samples=given.samples, sequence_length=given.seq_len, dtype=given.dtype
    )
    one = [dims[len(dims) // 2]]
    seconds(given.checkpoint, one, options)  # what only the first has to do: imports, caches
    alone, together = [], []
    for _ in range(given.rounds):
        alone.append(seconds(given.checkpoint, one, options))
        together.append(seconds(given.checkpoint, dims, options))
    ratios = [some / single for some, single in zip(together, alone, strict=True)]
    print(
        json.dumps(
            {
                "dims": dims,
                "one_seconds": statistics.median(alone),
                "all_seconds": statistics.median(together),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
