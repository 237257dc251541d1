"""Options that several commands share, each defined once."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from slicecli.errors import RequestError
from slicecli.evaluation.options import EvaluationOptions
from slicecli.hub.options import PushOptions
from slicecli.jobs.options import SliceOptions
from slicecli.runtime.inputs import (
    local_path,
    parse_bytes,
    parse_count,
    parse_prompt,
    parse_repository,
    parse_text,
)
from slicecli.runtime.options import Option, from_chosen, option_of

__all__ = [
    "BYTES",
    "COUNT",
    "COUNTS",
    "DTYPE",
    "MODEL",
    "PROMPT",
    "REPOSITORY",
    "TEXT",
    "Auto",
    "DimList",
    "LocalPath",
    "Named",
    "Sweep",
    "activations_option",
    "adapter_option",
    "add_options",
    "auto_as_none",
    "cache_options",
    "calibration_options",
    "device_options",
    "evaluation_request",
    "format_option",
    "measure_options",
    "method_options",
    "model_options",
    "push_options",
    "run_options",
    "token_option",
]

DTYPE = click.Choice(["auto", "bfloat16", "float16", "float32"])
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
            self.fail(f"{value!r} is not a range from a fraction to a larger one in positive steps.", param, ctx)
        count = math.floor((high - low) / step + 1e-9)
        return tuple(low + step * index for index in range(count + 1))


def _parse_model(text: str) -> str:
    """Return a Hub id as it is, and a path with the user's home in the place of `~`."""
    return str(local_path(text)) if text.startswith("~") else parse_text(text)


TEXT = Parsed("text", parse_text)
PROMPT = Parsed("prompt", parse_prompt)
MODEL = Parsed("model", _parse_model)
REPOSITORY = Parsed("repository", parse_repository)
COUNT = Parsed("count", parse_count)
COUNTS = Parsed("counts", lambda text: tuple(dict.fromkeys(map(parse_count, text.split(",")))))
BYTES = Parsed("size", parse_bytes)


def format_option(function: Function) -> Function:
    """Add `--format`."""
    return click.option(
        "--format",
        "output_format",
        type=click.Choice(["human", "json"]),
        default="human",
        show_default=True,
        help="Format of the result on standard output.",
    )(function)


def add_options(request: type[Any], *names: str) -> Callable[[Function], Function]:
    """Add options of a request, those of the named fields, in this order."""

    def add(function: Function) -> Function:
        for name in reversed(names):
            function = add_option(name, option_of(request, name))(function)
        return function

    return add


def add_option(name: str, option: Option) -> Callable[[Function], Function]:
    """Add one option, whose value the command takes by a name."""
    given: dict[str, Any] = {"help": option.help, "metavar": option.metavar}
    if option.reads is bool:
        is_switch = "/" in option.flag
        given |= {"default": option.default, "show_default": is_switch and option.default is not None}
        given |= {} if is_switch else {"is_flag": True}
    else:
        default = "auto" if option.is_auto else option.default
        given |= {"type": _type_of(option), "default": default, "show_default": default not in (None, ())}
        given |= {"multiple": True} if option.is_multiple else {}
        if option.is_auto and option.choices:
            given["callback"] = auto_as_none
    return click.option(option.flag, name, **given)


def _type_of(option: Option) -> Any:
    """Return the click type that reads an option's value."""
    if option.choices:
        return click.Choice(option.choices)
    if option.is_auto:
        return Auto()
    if option.reads in (int, float):
        return option.reads
    if option.reads is local_path:
        return LocalPath(file_okay=not option.is_folder)
    return Parsed("value", option.reads)


# the options that several commands share, in the order of their help
method_options = add_options(SliceOptions, "method", "orientation", "slice_head", "unties", "write_as")
calibration_options = add_options(SliceOptions, "calibration", "samples", "seed")
cache_options = add_options(SliceOptions, "cache", "cache_folder")
run_options = add_options(SliceOptions, "sequence_length", "batch_size", "dtype")
device_options = add_options(SliceOptions, "device_map", "max_memory")
model_options = add_options(SliceOptions, "revision", "token", "trust_remote_code")
token_option = add_options(SliceOptions, "token")
activations_option = add_options(SliceOptions, "activations")
adapter_option = add_options(SliceOptions, "adapter")


measure_options = add_options(
    EvaluationOptions,
    *("texts", "tasks", "include_path", "num_fewshot", "limit"),
    *("apply_chat_template", "system_instruction", "fewshot_as_multiturn"),
)
push_options = add_options(PushOptions, "private", "create_pr", "commit_message")


def auto_as_none(_context: click.Context, _option: click.Parameter, value: str) -> str | None:
    """Read `auto` as `None`: whatever the rest of the program would take."""
    return None if value == "auto" else value


def evaluation_request(chosen: Mapping[str, Any], leave_out: Container[str] = ()) -> EvaluationOptions:
    """Return what is to be measured: the usual text where nothing is asked for."""
    texts = chosen["texts"] or (() if chosen["tasks"] else (DEFAULT_TEXT,))
    return from_chosen(EvaluationOptions, {**chosen, "texts": texts}, leave_out)
