"""The command line in this process, and programs in processes of their own, in an environment and a folder."""

from __future__ import annotations

import contextlib
import importlib
import io
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from multiprocessing import forkserver
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any, Literal
from unittest.mock import patch

import pytest
from click.testing import CliRunner

# Processes that are forked from one that has imported the heavy packages, and has no threads that a fork would lack.
# The first does without what reads the environment at its import, or knows of this program.
PACKAGES = ["torch", "torch._dynamo", "torch.distributed.tensor", "scipy.optimize", "sklearn.metrics", "pandas"]
PROGRAM = ["accelerate", "datasets", "transformers.models.llama.modeling_llama", "slicecli.slicing.refit"]
SERVERS = {"fresh": forkserver.ForkServer(), "warm": forkserver.ForkServer()}
SERVERS["fresh"].set_forkserver_preload(PACKAGES)
SERVERS["warm"].set_forkserver_preload(PACKAGES + PROGRAM)
# the command line as a program
SLICECLI = ("-m", "slicecli")
PATH = list(sys.path)  # without what packages add to it later


@contextlib.contextmanager
def surroundings(environment: Mapping[str, str], folder: Path) -> Iterator[None]:
    """Be in an environment and a folder, as the Hub's client of this process is too, which reads it at its import."""
    from huggingface_hub import close_session, constants, hf_api

    def read_environment() -> None:
        importlib.reload(constants)
        hf_api.api.endpoint = constants.ENDPOINT
        close_session()

    with pytest.MonkeyPatch.context() as changes:
        changes.chdir(folder)
        for name in set(os.environ) - set(environment):
            changes.delenv(name)
        for name, value in environment.items():
            changes.setenv(name, value)
        read_environment()
        try:
            yield
        finally:
            changes.undo()
            read_environment()


def run_command(
    *words: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """Run `slicecli` in this process, with the Hub and the cache that an environment names."""
    with surroundings(dict(os.environ) if env is None else env, cwd or Path.cwd()):
        return call_command(*words)


def call_command(*words: str | Path) -> CompletedProcess[str]:
    """Run `slicecli` in this process as it is."""
    from slicecli.cli import group

    given = [str(word) for word in words]
    done = CliRunner().invoke(group, given, prog_name="slicecli")
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return CompletedProcess(given, done.exit_code, done.stdout, done.stderr)


def start_program(
    words: tuple[str | Path, ...],
    output: Path,
    errors: Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    kind: Literal["fresh", "warm"] = "fresh",
) -> Any:
    """Start a program in a process of its own: a fresh one, or a warm one that need not import this program either.

    Args:
        words: As after `python`: `-m`, a module and its arguments, or `-c`, code and its arguments.
        output: The file for what it writes.
        errors: The file for what it writes to its other stream.
        cwd: The folder in which it runs.
        env: Its environment, where it is another.
    """
    environment = dict(os.environ) if env is None else dict(env)
    folder = str(cwd or Path.cwd())
    arguments = ([str(word) for word in words], str(output), str(errors), folder, environment, [folder, *PATH])
    process = multiprocessing.get_context("forkserver").Process(target=_be_program, args=arguments)
    with patch.object(forkserver, "connect_to_new_process", SERVERS[kind].connect_to_new_process):
        process.start()
    return process


def run_program(
    *words: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    kind: Literal["fresh", "warm"] = "fresh",
) -> CompletedProcess[str]:
    """Run a program to its end, see `start_program`."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "out", Path(folder) / "err"
        process = start_program(words, output, errors, cwd, env, kind)
        process.join()
        return CompletedProcess(words, process.exitcode, output.read_text("utf-8"), errors.read_text("utf-8"))


def run_python(*words: str | Path, **options: Any) -> CompletedProcess[str]:
    """Run a Python that has imported nothing."""
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


def _be_program(
    words: list[str], output: str, errors: str, folder: str, environment: dict[str, str], path: list[str]
) -> None:
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), os.fdopen(1, "w"), os.fdopen(2, "w")
    # a test run in the background of a shell has it ignored
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.path[:] = path
    kind, what, *more = words
    sys.argv = [kind if kind == "-c" else what, *more]
    code: Any = 1
    try:
        if kind == "-c":
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
        else:
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    # without taking apart the packages, which takes a second
    os._exit(code if isinstance(code, int) else int(code is not None))
