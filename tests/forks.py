"""Programs in processes of their own that need not import the heavy packages again, see `fork_server.py`."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# half of the time of an import of transformers; none of them reads the environment, or knows of this program
QUIET_IMPORTS = ("torch", "torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "sklearn.metrics", "pandas")
ALL_IMPORTS = (
    *QUIET_IMPORTS,
    "accelerate",
    "datasets",
    "transformers.models.llama.modeling_llama",
    "slicecli.slicing.refit",
)


@dataclasses.dataclass(frozen=True)
class Done:
    """What a program did.

    Attributes:
        returncode: How it ended.
        stdout: What it wrote.
        stderr: What it wrote to its other stream.
        waits: The seconds that it wanted to wait each time, where they were not waited for.
    """

    returncode: int
    stdout: str
    stderr: str
    waits: list[float]


class Forks:
    """Runs programs one after the other, each in a fork of one process.

    Args:
        imports: What that process imports.
        environment: The environment of that process, for what packages read of it when they are imported, and of the
            programs; `None` takes the present one whenever something runs.
    """

    def __init__(self, imports: Sequence[str] = QUIET_IMPORTS, environment: Mapping[str, str] | None = None) -> None:
        self._imports = imports
        self._environment = environment
        self._server: subprocess.Popen[str] | None = None

    def run(
        self,
        *words: str | Path,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        circumstances: Sequence[str] = (),
        notes_waits: bool = False,
    ) -> Done:
        """Run a program.

        Args:
            *words: As after `python`: `-m`, a module and its arguments, or `-c`, code and its arguments.
            cwd: The folder in which it runs.
            env: Its environment, where it is another.
            circumstances: What is put on for it.
            notes_waits: Do not wait where it would, but note for how long.
        """
        environment = dict(os.environ if self._environment is None else self._environment)
        if self._server is None:
            self._server = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("fork_server.py")), *self._imports],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
        assert self._server.stdin is not None and self._server.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            files = {name: Path(folder) / name for name in ("out", "err", *["waits"] * notes_waits)}
            wish: dict[str, Any] = {
                **{name: str(path) for name, path in files.items()},
                "words": [str(word) for word in words],
                "environment": environment if env is None else dict(env),
                "folder": str(cwd or Path.cwd()),
                "circumstances": list(circumstances),
            }
            print(json.dumps(wish), file=self._server.stdin, flush=True)
            code = int(self._server.stdout.readline())
            out, err, *waits = (path.read_text(encoding="utf-8") for path in files.values())
        return Done(code, out, err, [float(line) for text in waits for line in text.split()])

    def close(self) -> None:
        """End what was begun."""
        if self._server is not None:
            self._server.communicate()
