"""Options, each defined once: as a field of a request, with what the command line says of it.

A request is a frozen dataclass whose fields are made by `Option.field`. The command line turns them into options of its
own, the Python API takes them as keyword arguments, and the command that makes a slice again is put together from them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from slicecli.runtime.inputs import parse_text, parse_token

__all__ = [
    "BATCH_SIZE",
    "DEVICE_MAP",
    "DTYPE",
    "MAX_MEMORY",
    "REVISION",
    "SEQUENCE_LENGTH",
    "TOKEN",
    "TRUST_REMOTE_CODE",
    "Option",
    "from_chosen",
    "option_of",
    "options_of",
    "result_fields",
    "words_of",
]

KEY = "option"
Request = TypeVar("Request")


@dataclass(frozen=True)
class Option:
    """One option.

    Attributes:
        flag: How it is written, such as `--seed`; `--cache/--no-cache` for a switch with a negative.
        help: What it does.
        default: Its value where it is not given.
        reads: The type of its value (`bool` for a switch), or a function that reads it from text.
        metavar: What stands for the value in help.
        choices: The only values there are.
        is_auto: `auto` stands for `None`.
        is_multiple: It may be given several times.
        is_folder: Of a path: a folder, which need not exist.
        shows_default: Help names the default.
        affects_result: Another value may give other numbers.
        is_secret: It is not printed.
    """

    flag: str
    help: str
    default: Any = None
    reads: Callable[[str], Any] = str
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    is_auto: bool = False
    is_multiple: bool = False
    is_folder: bool = False
    shows_default: bool = True
    affects_result: bool = True
    is_secret: bool = False

    def field(self) -> Any:
        """Return the field of a request that holds this option's value."""
        return dataclasses.field(default=self.default, repr=not self.is_secret, metadata={KEY: self})

    def words(self, value: Any) -> list[str]:
        """Return the words of a command line that give a value."""
        if self.reads is bool:
            positive, _, negative = self.flag.partition("/")
            return [positive] if value else [negative] if negative and value is not None else []
        return [self.flag, str(value)]


def options_of(request: type[Any]) -> dict[str, Option]:
    """Return the options of a request by the names of its fields."""
    return {one.name: one.metadata[KEY] for one in dataclasses.fields(request) if KEY in one.metadata}


def option_of(request: type[Any], name: str) -> Option:
    """Return the option of one field."""
    return options_of(request)[name]


def words_of(request: type[Any], values: Mapping[str, Any]) -> list[str]:
    """Return the words of a command line that give values to fields of a request, in their order."""
    options = options_of(request)
    return [word for name, value in values.items() for word in options[name].words(value)]


def result_fields(request: Any) -> dict[str, Any]:
    """Return the fields of a request that a result depends on."""
    return {name: getattr(request, name) for name, one in options_of(type(request)).items() if one.affects_result}


def from_chosen(request: type[Request], chosen: Mapping[str, Any], leave_out: Container[str] = ()) -> Request:
    """Make a request from chosen values by field name; names without a field, and those to leave out, are ignored."""
    names = (name for name in options_of(request) if name in chosen and name not in leave_out)
    return request(**{name: chosen[name] for name in names})


def _read_device_map(text: str) -> Any:
    from slicecli.runtime.placement import read_device_map

    return read_device_map(parse_text(text))


def _read_max_memory(text: str) -> Any:
    from slicecli.runtime.placement import parse_max_memory

    return parse_max_memory(text)


SEQUENCE_LENGTH = Option(
    "--seq-len", "Tokens per row.  [default: 2048, or the model's longest]", reads=int, metavar="N"
)
BATCH_SIZE = Option("--batch-size", "Rows per batch.", reads=int, metavar="N|auto", is_auto=True, affects_result=False)
DTYPE = Option(
    "--dtype",
    "Dtype of the weights; auto keeps the checkpoint's (a CPU computes in float32).",
    choices=("auto", "bfloat16", "float16", "float32"),
    is_auto=True,
)
DEVICE_MAP = Option(
    "--device-map",
    "Where to place the model: auto, balanced, sequential, a device (cpu, cuda:N), or a .json file that maps modules "
    "to devices, cpu or disk.",
    default="auto",
    reads=_read_device_map,
    metavar="MAP",
    affects_result=False,
)
MAX_MEMORY = Option(
    "--max-memory",
    "Maximum bytes of weights on each device; weights that fit nowhere are read from disk.",
    reads=_read_max_memory,
    metavar="0=SIZE,cpu=SIZE",
    affects_result=False,
)
REVISION = Option("--revision", "Branch, tag or commit on the Hub.", reads=parse_text, metavar="REV")
TOKEN = Option(
    "--token",
    "Hub token; by default the one that `hf auth login` stored.",
    reads=parse_token,
    metavar="T",
    affects_result=False,
    is_secret=True,
)
TRUST_REMOTE_CODE = Option("--trust-remote-code", "Run code from the model's repository.", default=False, reads=bool)
