"""The command line: one group, one module per command, imported when the command is used.

This package is the only place that prints. Nothing heavier than click and pluggy is imported before a command's
body runs.
"""

from __future__ import annotations

import importlib
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import click

from slicecli.cli.standard_output import guard_standard_output
from slicecli.errors import NotInferredError, OutputError, SlicecliError, SlicecliWarning, UnsupportedModelError
from slicecli.runtime.distributed import Processes
from slicecli.runtime.rendezvous import started_alone
from slicecli.runtime.versions import __version__

__all__ = ["group", "main", "say_error"]

COMMANDS = {
    "slice": "Slice the hidden size of a model.",
    "recover": "Train a slice to predict as its dense model does.",
    "estimate": "Estimate the cost and quality of slices, from the config alone.",
    "spectrum": "Measure what slicing a model would lose, without slicing it.",
    "eval": "Measure a model: perplexity and tasks.",
    "sweep": "Slice a model to many dims, measure each, and fit a prediction curve.",
    "fit": "Fit prediction curves to measured slices.",
    "relations": "List or validate the relations between width and quality.",
    "inspect": "Show how a model would be sliced, from its config alone.",
    "card": "Rewrite the model card of a slice, optionally with curves.",
    "convert": "Rewrite a slice in another class that computes the same.",
    "verify": "Check a slice against its record: files, counts, card.",
    "push": "Publish a slice on the Hugging Face Hub.",
    "search": "List slices on the Hugging Face Hub.",
    "cache": "List or clear the cached statistics.",
    "generate": "Generate text from a prompt.",
    "adapters": "List the model families that can be sliced.",
    "plugins": "List the installed plugins and whether they loaded.",
    "demo": "Slice the bundled demo model to several dims and measure it.",
}


class LazyGroup(click.Group):
    """A group whose commands live in modules of their own and are imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the built-in commands in their own order, then those of plugins."""
        return [*COMMANDS, *sorted(set(self._with_plugins()) - set(COMMANDS))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a command."""
        if cmd_name in COMMANDS:
            command: click.Command = importlib.import_module(f"slicecli.cli.{cmd_name}_command").command
            return command
        return self._with_plugins().get(cmd_name)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any of them."""
        rows = [
            (name, COMMANDS.get(name) or self.commands[name].get_short_help_str()) for name in self.list_commands(ctx)
        ]
        with formatter.section("Commands"):
            formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; an error or a warning of ours becomes a sentence, and an error an exit code."""
        try:
            with _warnings_as_sentences():
                return super().invoke(ctx)
        except SlicecliError as error:
            # of many processes one is chosen to say it
            if ctx.params.get("verbose") or Processes.find().count > 1:
                raise
            say_error(error)
            ctx.exit(error.exit_code)

    def _with_plugins(self) -> dict[str, click.Command]:
        """Let plugins add their commands, once; return all that were added."""
        from slicecli.family.plugins import plugins

        if not getattr(self, "_asked_plugins", False):
            self._asked_plugins = True
            plugins().manager.hook.slicecli_register_commands(group=self)
        return dict(self.commands)


@contextmanager
def _warnings_as_sentences() -> Iterator[None]:
    """Print each warning of ours once, as other messages; of many processes only the first says them."""
    from slicecli.cli.output import warn

    with warnings.catch_warnings():
        show_others = warnings.showwarning
        said: set[str] = set()

        def show(message: Warning | str, category: type[Warning], *place: Any, **more: Any) -> None:
            if issubclass(category, SlicecliWarning):
                if str(message) not in said:
                    warn(str(message))
                said.add(str(message))
            else:
                show_others(message, category, *place, **more)

        warnings.simplefilter("always" if Processes.find().is_main else "ignore", SlicecliWarning)
        warnings.showwarning = show
        yield


def say_error(error: SlicecliError) -> None:
    """Print an error as a sentence."""
    if isinstance(error, UnsupportedModelError):
        # the family that is missing may be that of a plugin that did not load
        from slicecli.cli.output import warn_of_broken_plugins

        warn_of_broken_plugins()
    if isinstance(error, NotInferredError):
        _say_what_was_found(error.found)
    click.echo(f"Error: {error}", err=True)


def _say_what_was_found(found: dict[str, Any]) -> None:
    """Print how far the inference of an adapter came, so that the author of a plugin has a start."""
    for name, value in found.items():
        lines = value if isinstance(value, list) else [value]
        for line in lines:
            click.echo(f"found {name}: {line}", err=True)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="slicecli")
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
@click.option("-q", "--quiet", is_flag=True, help="Show no progress, only results and errors.")
@click.pass_context
def group(ctx: click.Context, verbose: bool, quiet: bool) -> None:
    """Slice the hidden size of decoder language models.

    MODEL is a Hub id such as meta-llama/Meta-Llama-3-8B-Instruct, or a folder.
    """
    ctx.obj = {"quiet": quiet}


def main() -> None:
    """Run the command line."""
    signal.signal(signal.SIGTERM, _stop)
    guard_standard_output()
    try:
        processes = Processes.find()
    except SlicecliError as error:
        say_error(error)
        sys.exit(error.exit_code)
    words = sys.argv[1:]
    if processes.count > 1:
        from slicecli.cli.launched import is_done_together, run_together

        if is_done_together(words):
            sys.exit(run_together(group, processes, words))
        if not processes.is_main:
            sys.exit(0)
        processes.stay_alone()
    if started_alone():
        click.echo(
            "Warning: accelerate launch started only one process. To start several without GPUs, add --multi_gpu or "
            "use torchrun --nproc_per_node N.",
            err=True,
        )
    try:
        group(prog_name="slicecli")
    except OutputError as error:  # of what is printed before there is a command: help, version, completion
        if {"-v", "--verbose"} & set(words):
            raise
        say_error(error)
        sys.exit(error.exit_code)


def _stop(signal_number: int, _frame: Any) -> NoReturn:
    """End as an error would, so that nothing half-written is left."""
    sys.exit(128 + signal_number)
