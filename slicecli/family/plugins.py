"""Finding plugins, and living with those that are broken.

Built-in families ship as plugins and are found exactly as a third party's are: through the entry-point group
`slicecli`. A plugin that cannot be imported, or that fails while it registers, is remembered with its reason
and skipped; the others go on. The environment variable `SLICECLI_PLUGINS` chooses: unset loads all, empty
loads none, `a,b` loads the entry points named.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points

import pluggy

from slicecli.adapters import AUTO_ADAPTER, Adapter, Refusal
from slicecli.errors import RequestError
from slicecli.family import hookspecs

__all__ = ["PLUGINS_VARIABLE", "LoadedPlugin", "Plugins", "load_plugins", "plugins"]

PLUGINS_VARIABLE = "SLICECLI_PLUGINS"


@dataclass(frozen=True)
class LoadedPlugin:
    """What became of one entry point.

    Attributes:
        error: Why it was skipped; empty when it works.
    """

    name: str
    module: str
    distribution: str
    version: str
    hooks: tuple[str, ...] = ()
    adapters: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Plugins:
    """The outcome of one discovery.

    Attributes:
        refusals: The families that are refused by name.
    """

    manager: pluggy.PluginManager
    adapters: dict[str, Adapter]
    refusals: tuple[Refusal, ...]
    loaded: tuple[LoadedPlugin, ...]

    @property
    def broken(self) -> tuple[LoadedPlugin, ...]:
        """The plugins that were skipped because of an error."""
        return tuple(plugin for plugin in self.loaded if plugin.error)


def load_plugins(found: list[EntryPoint], wanted: set[str] | None = None) -> Plugins:
    """Load entry points one by one, keeping each one's failure to itself."""
    names = {entry.name for entry in found}
    if wanted is not None and not wanted <= names:
        missing = ", ".join(sorted(wanted - names))
        raise RequestError(
            f"{PLUGINS_VARIABLE} names plugins that are not installed: {missing}.",
            f"Installed: {', '.join(sorted(names)) or 'none'}.",
        )
    manager = pluggy.PluginManager("slicecli")
    manager.add_hookspecs(hookspecs)
    declared: list[Adapter | Refusal] = []
    loaded = tuple(
        _load_one(entry, manager, declared)
        for entry in sorted(found, key=lambda entry: entry.name)
        if wanted is None or entry.name in wanted
    )
    adapters = {adapter.name: adapter for adapter in declared if isinstance(adapter, Adapter)}
    refusals = tuple(refusal for refusal in declared if isinstance(refusal, Refusal))
    return Plugins(manager, adapters, refusals, loaded)


def _load_one(entry: EntryPoint, manager: pluggy.PluginManager, declared: list[Adapter | Refusal]) -> LoadedPlugin:
    """Import one plugin and let it register; anything it raises becomes its `error`."""
    distribution = entry.dist.name if entry.dist else "?"
    version = entry.dist.version if entry.dist else "?"
    registered: list[Adapter | Refusal] = []

    def register(declaration: Adapter | Refusal) -> None:
        if isinstance(declaration, Adapter):
            names = {other.name for other in (*declared, *registered) if isinstance(other, Adapter)}
            if declaration.name in names | {AUTO_ADAPTER}:
                raise ValueError(f"an adapter named {declaration.name!r} is registered already")
        for model_type in declaration.model_types:
            holder = next((other for other in (*declared, *registered) if model_type in other.model_types), None)
            if holder is not None:
                how = f"served by adapter {holder.name!r}" if isinstance(holder, Adapter) else "refused by a plugin"
                raise ValueError(f"model type {model_type!r} is {how} already")
        registered.append(declaration)

    module = None
    try:
        module = entry.load()
        manager.register(module, name=entry.name)
        manager.check_pending()
        hook = getattr(module, "slicecli_register_adapters", None)
        if hook is not None:
            hook(register=register)
    except Exception as error:  # a plugin may raise anything; none of it may stop the program
        if module is not None and manager.is_registered(module):
            manager.unregister(module)
        reason = f"{type(error).__name__}: {error}"
        return LoadedPlugin(entry.name, entry.value, distribution, version, error=reason)
    declared += registered
    hooks = tuple(sorted(caller.name for caller in manager.get_hookcallers(module) or []))
    names = tuple(adapter.name for adapter in registered if isinstance(adapter, Adapter))
    return LoadedPlugin(entry.name, entry.value, distribution, version, hooks, names)


@functools.cache
def plugins() -> Plugins:
    """Return the plugins of this process, discovered once, as `SLICECLI_PLUGINS` says."""
    switch = os.environ.get(PLUGINS_VARIABLE)
    wanted = None if switch is None else {name.strip() for name in switch.split(",") if name.strip()}
    return load_plugins(list(entry_points(group=hookspecs.ENTRY_POINT_GROUP)), wanted)
