"""What the pytest plugin costs a run that does not use it.

Runs pytest on a project of one empty test with and without the plugin, in turn, and prints the medians.

Usage: python benchmarks/pytest_start.py [--runs 15]
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path


def seconds(folder: Path, *words: str) -> float:
    """Return the wall-clock time of one run of pytest."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *words]
    started = time.perf_counter()
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - started


def main() -> None:
    """Time the runs and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15)
    runs = parser.parse_args().runs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "test_nothing.py").write_text("def test_nothing(): pass\n")
        seconds(folder)
        pairs = [(seconds(folder), seconds(folder, "-p", "no:slicecli")) for _ in range(runs)]
    with_plugin, without = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"with the plugin {with_plugin * 1e3:.0f} ms, without {without * 1e3:.0f} ms (medians of {runs})")


if __name__ == "__main__":
    main()
