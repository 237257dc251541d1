"""The class of transformers that a slice is written in: its family's own, or a portable one that computes the same.

Which one follows from the declaration, the config, the dim and the programs that run each; torch is not needed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from slicecli.adapters import PortableClass, Sizes, ask, select_adapter
from slicecli.errors import NoAdapterError, PluginError, RequestError
from slicecli.family.dimensions import Dimensions, nearest_in
from slicecli.family.plugins import plugins
from slicecli.family.serving import NOT_MEASURED, SERVERS, SliceKind, Verdict, describe_verdicts, verdicts_on
from slicecli.family.slice_plan import Method, Width

__all__ = ["AUTO", "OWN", "SliceClasses", "WrittenClass", "values_of_fields"]

AUTO, OWN = "auto", "own"
# what the family's own config may name otherwise, or leave to its class
_STATED = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def values_of_fields(sizes: Sizes, portable: PortableClass, adapter: str) -> dict[str, Any]:
    """Return the config fields that a portable class sets, with their values for one model."""
    return {name: ask(adapter, value, sizes) if callable(value) else value for name, value in portable.fields.items()}


@dataclass(frozen=True, eq=False)
class WrittenClass:
    """A class that slices of one model can be written in (`slicecli.family.slice_plan.SliceSizes`).

    Attributes:
        own: The model in its family's own class.
        dimensions: The model as this class has it.
        portable: What tells this class from the own one; `None` where it is that.
        has_own_code: Whether the model's class is not transformers' own, so that nothing measured is of it.
    """

    model_type: str
    own: Dimensions
    dimensions: Dimensions
    portable: PortableClass | None = None
    has_own_code: bool = False

    @classmethod
    def of_portable(cls, own: Dimensions, portable: PortableClass) -> WrittenClass:
        """Return a portable class of a model, which must have no obstacle to it.

        Raises:
            PluginError: No adapter serves it.
        """
        try:
            adapter = select_adapter({"model_type": portable.model_type}, plugins().adapters)
        except NoAdapterError as error:
            raise PluginError(
                f"Adapter {own.adapter.name!r} declares the portable class {portable.model_type}, which no adapter "
                "serves.",
                "Install the plugin that serves it.",
            ) from error
        fields = {
            **own.fields,
            **{name: own.value(name) for name in _STATED},
            "num_key_value_heads": own.key_value_heads,
            "head_dim": own.head_dim,
            "tie_word_embeddings": own.keeps_tie,
            **values_of_fields(own, portable, own.adapter.name),
            "model_type": portable.model_type,
        }
        return cls(portable.model_type, own, Dimensions(adapter, fields), portable)

    def with_mlp_dim(self, mlp_dim: int | None) -> WrittenClass:
        """Return the same class for slices whose MLPs have a width."""
        own, dimensions = self.own.with_mlp_dim(mlp_dim), self.dimensions.with_mlp_dim(mlp_dim)
        return replace(self, own=own, dimensions=dimensions)

    @property
    def hidden_size(self) -> int:
        """The hidden size of the dense model."""
        return self.own.hidden_size

    @property
    def dim_multiple(self) -> int:
        """What every legal dim is a multiple of."""
        return self.dimensions.dim_multiple

    def legal_dims(self) -> range:
        """Return the dims a slice may have, in ascending order."""
        return self.dimensions.legal_dims()

    def check_dim(self, dim: int) -> None:
        """Refuse a dim that is not legal."""
        self.dimensions.check_dim(dim)

    def parameters(self, dim: int | None = None) -> int:
        """Count the parameters: of the dense model as shipped, or of its slice at `dim`."""
        return self.own.parameters() if dim is None else self.dimensions.parameters(dim)

    @functools.cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """What programs that serve models make of slices in this class, where that was measured."""
        if self.has_own_code:
            return {}
        kind = SliceKind(self.model_type, "stock", "refit", self.own.keeps_tie, self.own.activation)
        return verdicts_on(kind)

    @property
    def servers(self) -> dict[str, str]:
        """The verdicts of the programs that `auto` looks for a class for."""
        found = self.verdicts
        return {client: found[client].verdict if client in found else NOT_MEASURED for client in SERVERS}

    @property
    def runs_everywhere(self) -> bool:
        """Whether each of these programs runs it correctly."""
        return set(self.servers.values()) == {"correct"}

    @property
    def misfits(self) -> str:
        """Say in which of them it is known not to run, in a clause; empty where it does."""
        found = [f"{verdict} in {client}" for client, verdict in self.servers.items()]
        return " and ".join(one for one in found if one.startswith(("wrong", "refused")))

    def to_json(self) -> dict[str, Any]:
        """Return what a user may know of it, as plain data."""
        legal = self.legal_dims()
        return {
            "model_type": self.model_type,
            "is_own": self.portable is None,
            "legal_dims": {
                "multiple_of": self.dim_multiple,
                "smallest": legal[0] if legal else None,
                "largest": legal[-1] if legal else None,
            },
            "clients": describe_verdicts(self.verdicts),
        }


@dataclass(frozen=True)
class SliceClasses:
    """The classes that slices of one model can be written in by the refit, the family's own first.

    Attributes:
        obstacles: Why the others that are declared cannot be used, by model type.
        wish: `auto`, `own`, or the model type of a portable class.
    """

    available: tuple[WrittenClass, ...]
    obstacles: Mapping[str, str]
    wish: str = AUTO

    @classmethod
    def of(cls, own: Dimensions, model_type: str, wish: str = AUTO, has_own_code: bool = False) -> SliceClasses:
        """Return the classes of a model.

        Args:
            has_own_code: Whether the model's class is not transformers' own, so that nothing declared is of it.

        Raises:
            RequestError: The wished class is not declared, or does not compute the same.
            PluginError: No adapter serves a declared class.
        """
        available, obstacles = [WrittenClass(model_type, own, own, has_own_code=has_own_code)], {}
        for portable in own.adapter.portable:
            reason = _obstacle(own, portable, has_own_code)
            if reason:
                obstacles[portable.model_type] = reason
            else:
                available.append(WrittenClass.of_portable(own, portable))
        classes = cls(tuple(available), obstacles, wish)
        classes._check_wish()
        return classes

    @classmethod
    def of_method(
        cls, own: Dimensions, method: Method, model_type: str, wish: str = AUTO, has_own_code: bool = False
    ) -> SliceClasses | None:
        """Return the classes of a model for one method; `None` where its slices bring code of their own."""
        if method == "refit" and own.layout == "stock":
            return cls.of(own, model_type, wish, has_own_code)
        if wish not in (AUTO, OWN):
            raise RequestError(f"--write-as {wish} requires a slice without custom code.", "Leave out --write-as.")
        return None

    def with_mlp_dim(self, mlp_dim: int | None) -> SliceClasses:
        """Return the same classes for slices whose MLPs have a width."""
        if mlp_dim is None:
            return self
        return replace(self, available=tuple(one.with_mlp_dim(mlp_dim) for one in self.available))

    @property
    def own(self) -> WrittenClass:
        """The family's own class."""
        return self.available[0]

    def at(self, dim: int | None = None) -> WrittenClass:
        """Return the class of a slice at a dim, or where the dim is still to be chosen.

        `auto` takes the family's own class if vLLM and llama.cpp run it at that dim, otherwise the first portable one
        that they run, otherwise the own one, or the first that can have the dim.
        """
        if self.wish == OWN:
            return self.own
        if self.wish != AUTO:
            return next(one for one in self.available if one.model_type == self.wish)
        legal = [one for one in self.available if dim is None or dim in one.legal_dims()]
        everywhere = [one for one in legal if one.runs_everywhere]
        return next(iter([*everywhere, *legal]), self._widest())

    def resolve(self, width: Width, bytes_per_parameter: int) -> tuple[int, WrittenClass]:
        """Return the dim that meets a wish, and the class of a slice at that dim."""
        dim = width.resolve(self.to_choose_in(width), bytes_per_parameter)
        return dim, self.at(dim)

    def to_choose_in(self, width: Width) -> WrittenClass:
        """Return the class whose dims a wish chooses among.

        Multiples of a number of the user's are looked for in whichever class that runs has most dims.
        """
        usual = self.at(width.dim)
        if width.multiple_of is None or self.wish != AUTO:
            return usual
        running = [one for one in self.available if one.runs_everywhere]
        return min(running or [usual], key=lambda one: one.dim_multiple)

    def legal_dims(self) -> list[int]:
        """Return the dims that a slice may have in any of the classes that may be taken, in ascending order."""
        classes = self.available if self.wish == AUTO else (self.at(),)
        return sorted({dim for one in classes for dim in one.legal_dims()})

    def note(self, chosen: WrittenClass, dim: int) -> str:
        """Say in a sentence why a slice is written in a class; empty where that needs no word."""
        own = self.own
        if chosen.portable is None:
            return f"Written as {own.model_type}, which is {own.misfits}; {self._way_out(dim)}." if own.misfits else ""
        where = [client for client, verdict in chosen.servers.items() if verdict == "correct"]
        runs = f" and runs in {' and '.join(where)}" if where else ""
        reason = f"{own.model_type} cannot have this dim"
        if dim in own.legal_dims():
            reason = f"{own.model_type} is {own.misfits or 'not measured there'}"
        hint = f"; {reason}" if self.wish == AUTO else ""
        return f"Written as {chosen.model_type}, which computes the same as {own.model_type}{runs}{hint}."

    def _way_out(self, dim: int) -> str:
        """Say in a clause in which class a slice would run everywhere."""
        other = next((one for one in self.available if one.runs_everywhere), None)
        if other is None:
            return "no other class that computes the same is known to run there"
        if dim in other.legal_dims():
            return f"--write-as {other.model_type} runs there"
        nearest = " or ".join(map(str, nearest_in(other.legal_dims(), dim)))
        return f"at dim {nearest} it can be written as {other.model_type}, which runs there"

    def _widest(self) -> WrittenClass:
        """Return the class with the fewest rules on dims, whose refusal is the one to read."""
        return min(self.available, key=lambda one: one.dim_multiple)

    def _check_wish(self) -> None:
        known = [one.model_type for one in self.available if one.portable is not None]
        if self.wish in (AUTO, OWN, *known):
            return
        own = self.own.model_type
        if self.wish in self.obstacles:
            raise RequestError(
                f"This model cannot be written as {self.wish}: {self.obstacles[self.wish]}.",
                "Use --write-as own.",
            )
        raise RequestError(
            f"Models of type {own} cannot be written as {self.wish!r}.",
            f"Choose one of: {', '.join([AUTO, OWN, *known])}.",
        )


def _obstacle(own: Dimensions, portable: PortableClass, has_own_code: bool) -> str:
    if has_own_code:
        return "the model has a class of its own"
    if own.layout != "stock":
        return "its slices need custom code"
    if isinstance(portable.obstacle, str):
        return portable.obstacle
    return ask(own.adapter.name, portable.obstacle, own)
