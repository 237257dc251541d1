"""What a config says, found out by changing it: which field a size follows, what switches a bias, which widths do.

Models are built without weights here; nothing is run.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

from slicecli.checkpoint.meta_model import build_meta_model, parameter_shapes
from slicecli.errors import SlicecliError, UnsupportedModelError
from slicecli.family.context_length import own_names
from slicecli.proof.tiny import HEAD_DIM, SIZES, tiny_config

__all__ = ["ConfigProbe", "shapes_of"]

# distinct values for epsilons and multipliers, so that a norm or branch tells which field it follows
EPSILON_STEP, FIRST_MULTIPLIER, MULTIPLIER_STEP = 0.0037, 0.53, 0.11
LARGEST_BARE_SIZE = 8


def shapes_of(config: Any, trust_remote_code: bool = False) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a config's parameters by name."""
    return parameter_shapes(build_meta_model(config, trust_remote_code))


class ConfigProbe:
    """A config seen through a tiny one of its class.

    Attributes:
        has_head_dim: Whether its heads have a width of their own.
    """

    def __init__(self, config: Any, has_head_dim: bool, trust_remote_code: bool) -> None:
        self.config = config
        self.has_head_dim = has_head_dim
        self.trust_remote_code = trust_remote_code
        floats = sorted(name for name, value in config.to_dict().items() if isinstance(value, float))
        epsilons = [name for name in floats if "eps" in name]
        multipliers = [name for name in floats if "multiplier" in name]
        self.epsilons = {name: EPSILON_STEP * (index + 1) for index, name in enumerate(epsilons)}
        self._floats: dict[str, float] = self.epsilons | {
            name: FIRST_MULTIPLIER + MULTIPLIER_STEP * index for index, name in enumerate(multipliers)
        }
        self.tiny = self.changed()
        self.fields: dict[str, Any] = self.tiny.to_dict()
        self.width = int(self.tiny.hidden_size)

    def changed(self, **changes: Any) -> Any:
        """Return the tiny config with some fields changed."""
        return tiny_config(self.config, self.has_head_dim, **(self._floats | changes))

    def wider(self) -> Any:
        """Return the tiny config with twice the hidden size and all else the same."""
        return self.changed(**{self.own_name("hidden_size"): 2 * self.width})

    def shapes(self, config: Any) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a config's parameters by name."""
        return shapes_of(config, self.trust_remote_code)

    def own_name(self, name: str) -> str:
        """Return this class's own name of a field that is usually called otherwise."""
        return self._attribute_map.get(name, name)

    def usual_name(self, name: str) -> str:
        """Return the usual name of one of this class's fields."""
        usual = {own: usual for usual, own in self._attribute_map.items()}
        return usual.get(name, name)

    @functools.cached_property
    def _attribute_map(self) -> Mapping[str, str]:
        return own_names(self.config)

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """The sizes of the tiny model by the names that a declaration may use."""
        heads = SIZES["num_attention_heads"]
        head_dim = HEAD_DIM if self.has_head_dim else self.width // heads
        groups = getattr(self.tiny, "num_key_value_heads", None) or heads
        sizes = {
            "query": heads * head_dim,
            "key_value": groups * head_dim,
            "query_key_value": (heads + 2 * groups) * head_dim,
            "head_dim": head_dim,
            "vocab_size": SIZES["vocab_size"],
        }
        for name, value in self.fields.items():
            is_count = name in ("num_experts", "num_local_experts")
            if type(value) is int and (value > LARGEST_BARE_SIZE or is_count):
                sizes.setdefault(self.usual_name(name), value)
        return sizes

    def size_name(self, size: int, what: str) -> str:
        """Return the name under which a declaration refers to a size of the tiny model."""
        sizes: dict[str, int] = self._sizes
        for factor in (1, 2, 3, 4):
            for name, value in sizes.items():
                # a width that is the hidden size itself would not be told from the stream
                if factor * value == size and (factor > 1 or name != "hidden_size"):
                    return name if factor == 1 else f"{factor}*{name}"
        if size <= LARGEST_BARE_SIZE:
            return "num_attention_heads" if size == SIZES["num_attention_heads"] else str(size)
        raise UnsupportedModelError(f"no config field gives the size {size} of {what}")

    def table_rows(self, count: int, is_tokens: bool, what: str) -> tuple[str, int]:
        """Return the name of a table's number of rows, and how many rows it has beyond that."""
        if is_tokens:
            return "vocab_size", 0
        positions = SIZES["max_position_embeddings"]
        if 0 <= count - positions <= LARGEST_BARE_SIZE:
            return "max_position_embeddings", count - positions
        raise UnsupportedModelError(f"no config field gives the {count} rows of {what}")

    def multiplier_name(self, value: float) -> str:
        """Return the field that has a value with which something is multiplied; empty for 1."""
        if abs(value - 1) < 1e-9:
            return ""
        names = [name for name, field in self._floats.items() if abs(field - value) < 1e-9]
        if not names:
            raise UnsupportedModelError(f"a branch is multiplied by {value:.6g}, which no config field gives")
        return names[0]

    def bias(self, path: str, has_bias: bool) -> bool | str:
        """Return the field that switches a module's bias on and off, or whether it has one."""
        switches: dict[str, set[str]] = self._bias_switches
        for name, switched in switches.items():
            if path in switched:
                return name
        return has_bias

    @functools.cached_property
    def _bias_switches(self) -> dict[str, set[str]]:
        """By field, the modules whose bias comes or goes with it."""
        switches, here = {}, _biased(self.shapes(self.tiny))
        for name, value in self.fields.items():
            if "bias" in name and isinstance(value, bool):
                try:
                    switches[name] = here ^ _biased(self.shapes(self.changed(**{name: not value})))
                except SlicecliError:
                    continue  # the class does not allow the other value
        return switches

    def refuses(self, **changes: Any) -> bool:
        """Say whether the class refuses some values of its fields."""
        try:
            type(self.tiny).from_dict(self.fields | changes)
        except Exception:  # config classes raise what they like
            return True
        return False

    def dim_divisors(self) -> tuple[str, ...]:
        """Return the fields that must divide the hidden size."""
        name, heads = self.own_name("hidden_size"), SIZES["num_attention_heads"]
        is_bound = self.refuses(**{name: self.width - heads // 2}) and not self.refuses(**{name: self.width - heads})
        return ("num_attention_heads",) if is_bound else ()

    def class_defaults(self, names: set[str]) -> dict[str, Any]:
        """Return the class's own values of fields that a config file may leave out, where they say something."""
        kind = type(self.config)
        own = {one.name: one.default for one in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        silent = (None, False, dataclasses.MISSING)
        return {name: own[name] for name in sorted(names) if own.get(name) not in silent}


def _biased(shapes: Mapping[str, tuple[int, ...]]) -> set[str]:
    return {name.removesuffix(".bias") for name in shapes if name.endswith(".bias")}
