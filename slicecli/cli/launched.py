"""The command line as one of many processes, which a launcher has started with the same words.

What they do together is printed once, by the main process; what is not worth sharing is done by the main process alone.
An error of any of them ends all of them, and is said once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from slicecli.errors import ProcessError, SlicecliError

if TYPE_CHECKING:
    from slicecli.runtime.distributed import Processes

__all__ = ["TOGETHER", "is_done_together", "run_together"]

TOGETHER = ("slice", "recover", "spectrum", "eval", "sweep", "demo")
# seconds until a process ends even if a library still waits for another that has gone
LONGEST_END = 20


def is_done_together(words: Sequence[str]) -> bool:
    """Say whether a command is worth sharing; what is not is done by the main process alone."""
    return next((word for word in words if not word.startswith("-")), "") in TOGETHER


def run_together(group: click.Group, processes: Processes, words: Sequence[str]) -> int:
    """Run a command in this process, and return its exit code."""
    # that a connection broke off is said below, in a sentence
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    with contextlib.ExitStack() as stack:
        if not processes.is_main:
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        code, error = _run(group, processes, words)
    if error is not None and processes.is_to_report(error) and str(error):
        _say(error, is_verbose=bool({"-v", "--verbose"} & set(words)))
    if code:
        sys.stdout.flush()
        sys.stderr.flush()
        faulthandler.dump_traceback_later(LONGEST_END, exit=True, file=os.open(os.devnull, os.O_WRONLY))
    return code


def _run(
    group: click.Group, processes: Processes, words: Sequence[str]
) -> tuple[int, SlicecliError | click.ClickException | click.Abort | None]:
    """Run a command; return its exit code, and the error that is to be said."""
    try:
        _join(processes)
        return int(group.main(list(words), prog_name="slicecli", standalone_mode=False) or 0), None
    except (SlicecliError, click.ClickException) as error:
        return error.exit_code, error
    except click.Abort as error:
        processes.tell(KeyboardInterrupt())
        return 1, error
    except BaseException as error:
        processes.tell(error)
        raise


def _join(processes: Processes) -> None:
    try:
        processes.join(_notify)
    except KeyboardInterrupt:
        raise click.Abort from None


def _notify(text: str) -> None:
    """Say something of any process, also where what it prints is kept silent."""
    click.echo(text, file=sys.__stderr__)


def _say(error: SlicecliError | click.ClickException | click.Abort, is_verbose: bool) -> None:
    if isinstance(error, click.ClickException):
        error.show()
    elif isinstance(error, click.Abort):
        click.echo("Aborted!", err=True)
    elif is_verbose and not isinstance(error, ProcessError):
        traceback.print_exception(error)
    elif isinstance(error, SlicecliError):
        from slicecli.cli import say_error

        say_error(error)
