"""Every hook a plugin can implement, on one screen.

A plugin is a module named by an entry point in the group `slicecli`. It marks its functions with
`slicecli.hookimpl`; see `docs/plugins.md` for a whole one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    import click

    from slicecli.adapters import Adapter, Refusal

__all__ = ["ENTRY_POINT_GROUP", "hookimpl", "hookspec"]

ENTRY_POINT_GROUP = "slicecli"
hookspec = pluggy.HookspecMarker("slicecli")
hookimpl = pluggy.HookimplMarker("slicecli")


@hookspec
def slicecli_register_adapters(register: Callable[[Adapter | Refusal], None]) -> None:
    """Declare model families: call `register(...)` once for each, with an `Adapter` or a `Refusal`."""


@hookspec
def slicecli_register_relations(register: Callable[[Any], None]) -> None:
    """Declare relations of width and quality: call `register(...)` with an `estimation.relations.Relation` for each."""


@hookspec
def slicecli_register_commands(group: click.Group) -> None:
    """Add commands to the command line: `group.add_command(...)`; import heavy packages inside the command."""
