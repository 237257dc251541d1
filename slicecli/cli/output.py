"""How results and progress look: tables and JSON on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slicecli.checkpoint.folder import write_whole_file

if TYPE_CHECKING:
    from slicecli.progress import Progress

__all__ = [
    "count",
    "measured",
    "note",
    "number",
    "print_json",
    "print_table",
    "progress",
    "result",
    "size",
    "warn",
    "warn_of_broken_plugins",
    "write_json",
]


def print_json(document: Any) -> None:
    """Print one JSON document on standard output."""
    click.echo(json.dumps(document, indent=2))


def write_json(path: Path, document: Any) -> None:
    """Write one JSON document to a file, whole or not at all."""
    write_whole_file(path, json.dumps(document, indent=2) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], is_numeric: bool = True) -> None:
    """Print a table on standard output; of numbers, all columns but the first are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, show_header=any(columns))
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if is_numeric and index else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    # names of models, texts and tasks are shown as they are
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table)


def number(value: float | None, digits: int, sign: str = "") -> str:
    """Return a number for a table."""
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def measured(value: float | None, stderr: float | None, digits: int, sign: str = "") -> str:
    """Return a measured number with its standard error for a table."""
    return number(value, digits, sign) + ("" if stderr is None else f" ± {stderr:.{digits}f}")


def result(text: str) -> None:
    """Print a line of a result on standard output."""
    click.echo(text)


def note(text: str) -> None:
    """Say something on standard error."""
    click.echo(text, err=True)


def warn(text: str) -> None:
    """Warn on standard error."""
    click.echo(f"Warning: {text}", err=True)


def warn_of_broken_plugins() -> None:
    """Name the plugins that were skipped, and why."""
    from slicecli.family.plugins import plugins

    for plugin in plugins().broken:
        warn(f"plugin {plugin.name} of {plugin.distribution} was skipped: {plugin.error}")


def count(number: float) -> str:
    """Return a large number as a person reads it."""
    for letter in ("", "k", "M", "G", "T"):
        if number < 1000:
            return f"{number:.3g} {letter}".rstrip()
        number /= 1000
    return f"{number:.3g} P"


def size(count: int) -> str:
    """Return a number of bytes as a person reads it."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.2f} {unit}"
        value /= 1000
    return f"{value:.2f} TB"


@contextmanager
def progress(is_quiet: bool) -> Iterator[Progress]:
    """Show progress: bars in a terminal, plain lines elsewhere, nothing when quiet."""
    if is_quiet:
        from slicecli.progress import Silent

        yield Silent()
    elif sys.stderr.isatty():
        with _Bars() as bars:
            yield bars
    else:
        yield _Lines()


class _Bars:
    """Rich bars: one per phase, with counter, time left and the last remark."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._progress = Progress(
            TextColumn("{task.description:<12}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[detail]}", style="dim", markup=False),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def __enter__(self) -> _Bars:
        self._progress.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._progress.stop()

    def start(self, phase: str, total: int) -> None:
        """Begin a bar."""
        self._task = self._progress.add_task(phase, total=total, detail="")

    def advance(self, detail: str = "") -> None:
        """Move the bar by one."""
        fields: dict[str, Any] = {"detail": detail} if detail else {}
        self._progress.update(self._task, advance=1, **fields)

    def note(self, text: str) -> None:
        """Print a line above the bars."""
        self._progress.console.print(text, markup=False, highlight=False)


class _Lines:
    """Plain lines for logs: every step of a short phase, every tenth part of a long one."""

    def __init__(self) -> None:
        self._phase, self._total, self._done = "", 0, 0

    def start(self, phase: str, total: int) -> None:
        """Begin a phase."""
        self._phase, self._total, self._done = phase, total, 0

    def advance(self, detail: str = "") -> None:
        """Count a step."""
        self._done += 1
        every = 1 if self._total <= 100 and self._phase != "perplexity" else max(1, self._total // 10)
        if self._done % every == 0 or self._done == self._total:
            click.echo(f"{self._phase} {self._done}/{self._total} {detail}".rstrip(), err=True)

    def note(self, text: str) -> None:
        """Print a line."""
        note(text)
