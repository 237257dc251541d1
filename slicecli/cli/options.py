"""Options that several commands share, each defined once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from slicecli.errors import RequestError
from slicecli.runtime.inputs import (
    local_path,
    parse_bytes,
    parse_count,
    parse_prompt,
    parse_repository,
    parse_text,
    parse_token,
)

if TYPE_CHECKING:
    from slicecli.evaluation.measure import EvaluationOptions
    from slicecli.hub.push import PushOptions
    from slicecli.jobs.plan import SliceOptions
    from slicecli.runtime.placement import DeviceMap, MaxMemory

__all__ = [
    "BYTES",
    "COUNT",
    "DTYPE",
    "MODEL",
    "PROMPT",
    "REPOSITORY",
    "TEXT",
    "Auto",
    "DimList",
    "LocalPath",
    "Named",
    "Names",
    "Sweep",
    "adapter_option",
    "auto_as_none",
    "cache_options",
    "calibration_options",
    "device_options",
    "evaluation_request",
    "format_option",
    "measure_options",
    "method_options",
    "model_options",
    "publication_options",
    "push_options",
    "run_options",
    "slice_request",
    "streams_option",
    "token_option",
]

DTYPE = click.Choice(["auto", "bfloat16", "float16", "float32"])
# fields of SliceOptions by the names of the options that give them
SLICE_FIELDS = {
    "method": "method",
    "final_orientation": "orientation",
    "slice_head": "slice_head",
    "calibration": "calibration",
    "samples": "samples",
    "seed": "seed",
    "seq_len": "sequence_length",
    "batch_size": "batch_size",
    "dtype": "dtype",
    "device_map": "device_map",
    "max_memory": "max_memory",
    "streams": "streams",
    "adapter": "adapter",
    "revision": "revision",
    "token": "token",
    "trust_remote_code": "trust_remote_code",
    "resume": "resume",
    "cache": "cache",
    "cache_dir": "cache_folder",
}
# fields of EvaluationOptions, but for the seed and the revision, which a slice may have too and are not the same
EVALUATION_FIELDS = {
    "tasks": "tasks",
    "limit": "limit",
    "num_fewshot": "num_fewshot",
    "include_path": "include_path",
    "seq_len": "sequence_length",
    "batch_size": "batch_size",
    "dtype": "dtype",
    "device_map": "device_map",
    "max_memory": "max_memory",
    "token": "token",
    "trust_remote_code": "trust_remote_code",
}
DEFAULT_TEXT = "wikitext2"
MOST_STEPS = 1000
Function = TypeVar("Function", bound=Callable[..., Any])


@contextmanager
def _naming(param: click.Parameter | None) -> Iterator[None]:
    """Name the option in the error of the function that reads its value."""
    try:
        yield
    except RequestError as error:
        if param is None:
            raise
        name = param.opts[-1] if isinstance(param, click.Option) else param.human_readable_name
        raise RequestError(f"{name}: {error.cause}", error.remedy) from None


class Parsed(click.ParamType):  # type: ignore[type-arg]
    """What a function makes of the text of an option; whatever the function refuses is said of that option."""

    def __init__(self, name: str, parse: Callable[[str], Any]) -> None:
        self.name = name
        self._parse = parse

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the text of an option."""
        if not isinstance(value, str):
            return value
        with _naming(param):
            return self._parse(value)


class LocalPath(click.Path):
    """A file or folder of this machine; `~` stands for the user's home."""

    def __init__(self, **options: Any) -> None:
        super().__init__(path_type=Path, **options)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Read the text of an option."""
        with _naming(param):
            path = local_path(value)
        return super().convert(str(path), param, ctx)


class Auto(click.ParamType):  # type: ignore[type-arg]
    """A whole number, or `auto`, which becomes `None`."""

    name = "integer"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Read the text of an option."""
        if value is None or value == "auto":
            return None
        converted: int = click.INT.convert(value, param, ctx)
        return converted


class DimList(click.ParamType):  # type: ignore[type-arg]
    """Dims such as 84,72,60; one that is given twice counts once."""

    name = "dims"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read the text of an option."""
        if isinstance(value, tuple):
            return value
        return tuple(dict.fromkeys(click.INT.convert(part, param, ctx) for part in value.split(",")))


class Names(click.ParamType):  # type: ignore[type-arg]
    """Names with commas between them."""

    name = "names"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Read the text of an option."""
        if isinstance(value, tuple):
            return value
        names = tuple(name.strip() for name in value.split(",") if name.strip())
        if not names:
            self.fail(f"{value!r} names nothing. Give a name, or leave the option out.", param, ctx)
        return names


class Named(click.ParamType):  # type: ignore[type-arg]
    """A number with a name, such as piqa=0.79; either side of the sign is free of spaces."""

    name = "name=number"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, float]:
        """Read the text of an option."""
        if isinstance(value, tuple):
            return value
        name, sign, number = value.rpartition("=")
        if not sign or not name.strip():
            self.fail(f"{value!r} is not a name, an equals sign and a number.", param, ctx)
        converted: float = click.FLOAT.convert(number, param, ctx)
        if not math.isfinite(converted):
            self.fail(f"{number!r} is not a number.", param, ctx)
        return name.strip(), converted


class Sweep(click.ParamType):  # type: ignore[type-arg]
    """Fractions such as 0.05:0.5:0.05: from, to and step, both ends included."""

    name = "sweep"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """Read the text of an option."""
        if isinstance(value, tuple):
            return value
        parts = value.split(":")
        if len(parts) != 3:
            self.fail(f"{value!r} is not LO:HI:STEP, such as 0.05:0.5:0.05.", param, ctx)
        low, high, step = (click.FLOAT.convert(part, param, ctx) for part in parts)
        if not (0 < low <= high < 1 and 0 < step < math.inf) or (high - low) / step > MOST_STEPS:
            self.fail(f"{value!r} does not go from one fraction to a larger one in some steps.", param, ctx)
        count = math.floor((high - low) / step + 1e-9)
        return tuple(low + step * index for index in range(count + 1))


def _parse_model(text: str) -> str:
    """Return a Hub id as it is, and a path with the user's home in the place of `~`."""
    return str(local_path(text)) if text.startswith("~") else parse_text(text)


def _parse_device_map(text: str) -> DeviceMap:
    from slicecli.runtime.placement import read_device_map

    return read_device_map(parse_text(text))


def _parse_max_memory(text: str) -> MaxMemory:
    from slicecli.runtime.placement import parse_max_memory

    return parse_max_memory(text)


TEXT = Parsed("text", parse_text)
PROMPT = Parsed("prompt", parse_prompt)
TOKEN = Parsed("token", parse_token)
MODEL = Parsed("model", _parse_model)
REPOSITORY = Parsed("repository", parse_repository)
COUNT = Parsed("count", parse_count)
BYTES = Parsed("size", parse_bytes)
DEVICE_MAP = Parsed("map", _parse_device_map)
MEMORY_BY_DEVICE = Parsed("sizes", _parse_max_memory)


def format_option(function: Function) -> Function:
    """Add `--format`."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(["human", "json"]),
        default="human",
        show_default=True,
        help="How to print the result on standard output.",
    )(function)


def token_option(function: Function) -> Function:
    """Add `--token`."""
    return click.option(
        "--token", type=TOKEN, metavar="T", help="Hub token; by default the one that `hf auth login` stored."
    )(function)


def model_options(function: Function) -> Function:
    """Add the options that say which model is meant."""
    for option in (
        click.option("--trust-remote-code", is_flag=True, help="Run code from the model's repository."),
        token_option,
        click.option("--revision", type=TEXT, metavar="REV", help="Branch, tag or commit on the Hub."),
    ):
        function = option(function)
    return function


def push_options(function: Function) -> Function:
    """Add the options that say how a slice is published."""
    for option in (
        click.option(
            "--commit-message", type=TEXT, metavar="TXT", help="First line of the commit.  [default: what the slice is]"
        ),
        click.option("--create-pr", is_flag=True, help="Propose a pull request instead of changing the branch."),
        click.option("--private", is_flag=True, help="Make the repository private if it is new."),
    ):
        function = option(function)
    return function


def publication_options(chosen: Mapping[str, Any], revision: str | None = None) -> PushOptions:
    """Return how a slice is published, from the options above and the token."""
    from slicecli.hub.push import PushOptions

    fields = ("private", "create_pr", "commit_message", "token")
    return PushOptions(**{name: chosen[name] for name in fields}, revision=revision)


def device_options(function: Function) -> Function:
    """Add the options that say which devices take the model."""
    for option in (
        click.option(
            "--max-memory",
            type=MEMORY_BY_DEVICE,
            metavar="0=SIZE,cpu=SIZE",
            help="Most bytes of weights on each device; what fits on none is read from disk.",
        ),
        click.option(
            "--device-map",
            type=DEVICE_MAP,
            default="auto",
            show_default=True,
            metavar="MAP",
            help="Where the model goes: auto, balanced, sequential, a device (cpu, cuda:N), or a .json file that maps "
            "modules to devices, cpu or disk.",
        ),
    ):
        function = option(function)
    return function


def streams_option(function: Function) -> Function:
    """Add `--streams`."""
    return click.option(
        "--streams",
        type=click.Choice(["auto", "device", "host", "disk"]),
        default="auto",
        show_default=True,
        help="Where the activations of the calibration text are kept; auto takes the first that has room.",
    )(function)


def run_options(function: Function) -> Function:
    """Add the options that say how rows of text go through a model."""
    for option in (
        click.option(
            "--dtype",
            type=DTYPE,
            default="auto",
            show_default=True,
            callback=auto_as_none,
            help="Dtype of the weights; auto keeps the checkpoint's (a CPU computes in float32).",
        ),
        click.option(
            "--batch-size", type=Auto(), default="auto", show_default=True, metavar="N|auto", help="Rows per batch."
        ),
        click.option(
            "--seq-len", type=int, metavar="N", help="Tokens per row.  [default: 2048, or the model's longest]"
        ),
    ):
        function = option(function)
    return function


def method_options(function: Function) -> Function:
    """Add the options that say how weights are made."""
    for option in (
        click.option(
            "--slice-head/--no-slice-head",
            default=None,
            help="slicegpt: slice the input of the head too.  [default: no, as published, where the family allows it]",
        ),
        click.option(
            "--final-orientation",
            type=click.Choice(["pca", "random"]),
            default="pca",
            show_default=True,
            help="slicegpt: leave the kept directions as PCA orders them, or turn them at random (--seed).",
        ),
        click.option(
            "--method",
            type=click.Choice(["refit", "slicegpt"]),
            default="refit",
            show_default=True,
            help="refit: one shared basis, every map refitted by least squares, a stock checkpoint where the family "
            "allows it. slicegpt: as published, a basis at every place, nothing refitted, shortcut matrices in code of "
            "its own.",
        ),
    ):
        function = option(function)
    return function


def calibration_options(function: Function) -> Function:
    """Add the options that say what a slice is fitted to."""
    for option in (
        click.option(
            "--seed", type=int, default=42, show_default=True, metavar="N", help="Seed of the choice of rows."
        ),
        click.option(
            "--samples", type=int, default=128, show_default=True, metavar="N", help="Rows of calibration text."
        ),
        click.option(
            "--calibration",
            type=TEXT,
            default="wikitext2",
            show_default=True,
            metavar="NAME|FILE|HUB_ID",
            help="Calibration text: wikitext2, c4, alpaca, ptb, demo, a .txt or .jsonl file, or a Hub dataset.",
        ),
    ):
        function = option(function)
    return function


def cache_options(function: Function) -> Function:
    """Add the options of the statistics cache."""
    for option in (
        click.option(
            "--cache-dir",
            type=LocalPath(file_okay=False),
            metavar="DIR",
            help="Where statistics are kept for other dims.  [default: SLICECLI_CACHE, or the user's cache folder]",
        ),
        click.option(
            "--cache/--no-cache", default=True, show_default=True, help="Take statistics from the cache and keep them."
        ),
    ):
        function = option(function)
    return function


def measure_options(function: Function) -> Function:
    """Add the options that say what is measured."""
    for option in (
        click.option(
            "--limit", type=int, metavar="N", help="Only the first N rows of each text and questions of each task."
        ),
        click.option(
            "--num-fewshot",
            type=int,
            metavar="N",
            help="Solved examples before each question.  [default: the task's]",
        ),
        click.option(
            "--include-path",
            type=LocalPath(),
            metavar="DIR",
            help="Folder with task YAMLs of your own, for --tasks.",
        ),
        click.option(
            "--tasks",
            type=Names(),
            default=(),
            metavar="NAME|FILE,...",
            help="Tasks: names that lm-eval knows (* stands for anything), .jsonl files of questions, or demo.",
        ),
        click.option(
            "--perplexity",
            "texts",
            type=TEXT,
            multiple=True,
            metavar="NAME|FILE|HUB_ID",
            help="Text to measure perplexity on; may be given several times.  "
            f"[default: {DEFAULT_TEXT}, or none with --tasks]",
        ),
    ):
        function = option(function)
    return function


def auto_as_none(_context: click.Context, _option: click.Parameter, value: str) -> str | None:
    """Read `auto` as `None`: whatever the rest of the program would take."""
    return None if value == "auto" else value


def slice_request(chosen: Mapping[str, Any], **more: Any) -> SliceOptions:
    """Return the engine's options, from those of the options above that a command has."""
    from slicecli.jobs.plan import SliceOptions

    return SliceOptions(**{field: chosen[name] for name, field in SLICE_FIELDS.items() if name in chosen}, **more)


def evaluation_request(chosen: Mapping[str, Any], **more: Any) -> EvaluationOptions:
    """Return what is to be measured, from the options above: the usual text where nothing is asked for."""
    from slicecli.evaluation.measure import EvaluationOptions

    texts = chosen["texts"] or (() if chosen["tasks"] else (DEFAULT_TEXT,))
    return EvaluationOptions(texts=texts, **{field: chosen[name] for name, field in EVALUATION_FIELDS.items()}, **more)


def adapter_option(function: Function) -> Function:
    """Add the `--adapter` of commands that slice."""
    return click.option(
        "--adapter",
        type=TEXT,
        metavar="NAME",
        help="Use this adapter instead of the one for the model's type; auto infers one.",
    )(function)
