"""How a slice can be published, each option defined once."""

from __future__ import annotations

from dataclasses import dataclass

from slicecli.runtime import options
from slicecli.runtime.inputs import parse_text
from slicecli.runtime.options import Option

__all__ = ["PushOptions"]


@dataclass(frozen=True)
class PushOptions:
    """How a slice is published; each field says what it is."""

    private: bool = Option("--private", "Make the repository private if it is new.", default=False, reads=bool).field()
    create_pr: bool = Option(
        "--create-pr", "Open a pull request instead of changing the branch.", default=False, reads=bool
    ).field()
    commit_message: str | None = Option(
        "--commit-message",
        "First line of the commit message.  [default: a description of the slice]",
        reads=parse_text,
        metavar="TXT",
    ).field()
    revision: str | None = Option(
        "--revision",
        "Branch to push to, created if missing.  [default: main]",
        reads=parse_text,
        metavar="BRANCH",
    ).field()
    token: str | None = options.TOKEN.field()
