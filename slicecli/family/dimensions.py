"""The sizes of one model: its config seen through its family's declaration, and the counts that follow.

Everything here follows from the fields of `config.json`, without torch.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from slicecli.adapters import ask
from slicecli.errors import PluginError, RequestError, UnsupportedModelError, shown
from slicecli.family.context_length import context_length
from slicecli.family.friendly_dims import friendly_multiple

if TYPE_CHECKING:
    from typing import TypeAlias

    from slicecli.adapters import Adapter, Block, Branch, Linear

__all__ = [
    "EXPERTS_REASON",
    "MOST_BLOCKS",
    "Dimensions",
    "Parameter",
    "Shape",
    "name_nearest",
    "nearest_in",
    "why_outside",
]

# more than any model has; of each of these something is made or tried, so that a wrong number would take for ever
MOST_BLOCKS = MOST_HEADS = 1024
MOST_WIDTH = 2**20
MOST = 2**31 - 1  # of all other sizes
MOST_NAMED = 4  # in a message
EXPERTS_MULTIPLE = 8  # numbers of 16 bits: torch's product for all experts at once needs rows of a multiple of 16 bytes
EXPERTS_REASON = f"transformers multiplies experts only in rows of a multiple of {EXPERTS_MULTIPLE} numbers"

Shape: TypeAlias = "tuple[int | None, ...]"
"""Shape of a parameter; `None` stands for the axis of hidden size."""


@dataclass(frozen=True)
class Parameter:
    """One declared parameter of a model.

    Attributes:
        shape: Its shape (of what is passed through, its elements).
        site: Where it meets the stream: the number of the norm input, counted through the model, that it stands at
            or reads; of what writes, the number of the next one.
    """

    name: str
    shape: Shape
    role: Literal["embedding", "norm", "reader", "writer", "experts", "passed_through"]
    site: int

    def elements(self, width: int) -> int:
        """Count its elements where the stream has a width."""
        return math.prod(width if size is None else size for size in self.shape)


def nearest_in(dims: range, dim: int) -> tuple[int, ...]:
    """Return the members of some dims next to `dim`: one below and one above where they exist, or itself."""
    below = [value for value in dims if value <= dim][-1:]
    above = [value for value in dims if value >= dim][:1]
    return tuple(dict.fromkeys(below + above))


def name_nearest(what: str, values: Sequence[int]) -> str:
    """Return the sentence that names the legal values next to one that is not.

    Args:
        what: `dim` or `width`.
    """
    if not values:
        return f"This model has no legal {what}."
    plural = "s" * (len(values) > 1)
    return f"The nearest legal {what}{plural}: {' and '.join(map(str, values))}."


def why_outside(dim: int, hidden_size: int) -> str:
    """Say why a dim is that of no slice, whatever the family; empty where it is between 1 and the hidden size."""
    if dim <= 0:
        return f"A dim of {dim} is impossible: it must be positive and below {hidden_size}."
    return f"A dim of {dim} is not below the model's hidden size of {hidden_size}." if dim >= hidden_size else ""


def _name_of_width(width: str) -> str:
    """Return the config field behind a declared width, which may be a multiple of it."""
    return width.rpartition("*")[2]


def _first_of(names: list[str]) -> str:
    """Return some names for a message, and how many there are besides."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


class Dimensions:
    """The sizes of one model.

    Attributes:
        hidden_size: d, the width of the residual stream.
        vocabulary: V, the number of rows of the token embedding.
        is_tied: Whether the head shares the embedding table.
        keeps_tie: Whether it does so in slices by the refit too.
        layout: How the refit writes a slice: `stock` or `custom-code`.
        shortcut_obstacle: Why the published method cannot slice the model; empty where it can.
        config_multiple: The config class accepts multiples of it as hidden size.
        sliced_mlp_widths: The widths of the MLPs of slices, by the names that declarations have for them; none where
            they keep those of the dense model.
    """

    def __init__(
        self,
        adapter: Adapter,
        config: Mapping[str, Any],
        unties: bool = False,
        sliced_mlp_widths: Mapping[str, int] | None = None,
    ) -> None:
        self.adapter = adapter
        self.sliced_mlp_widths = dict(sliced_mlp_widths or {})
        self._config = {**config, **self.mlp_fields()}
        self._unties = unties
        self._narrower: dict[int, Dimensions] = {}
        self.layout = adapter.layout(config)
        self.shortcut_obstacle = adapter.why_no_shortcuts(config)
        self.hidden_size = self.number("hidden_size")
        self.blocks = self.number("num_hidden_layers")
        self.vocabulary = self.number("vocab_size")
        self.heads = self.number("num_attention_heads")
        self.key_value_heads = self.number("num_key_value_heads", self.heads)
        self.head_dim = self.number("head_dim", self.hidden_size // self.heads)
        self.is_tied = bool(self.value("tie_word_embeddings", False))
        self.tie_obstacle = adapter.why_untied(config) if self.is_tied else ""
        self.keeps_tie = self.is_tied and not unties and not self.tie_obstacle
        # a slice with code of its own keeps the dense config, whose class then has nothing to refuse
        divisors = adapter.dim_divisors if self.layout == "stock" else ()
        self.config_multiple = math.lcm(1, *(self.number(name) for name in divisors))

    @functools.cached_property
    def has_experts(self) -> bool:
        """Whether some of the MLPs are mixtures of experts."""
        return any(branch.experts for block in self.declared_blocks for branch in block.branches)

    @functools.cached_property
    def dim_multiple(self) -> int:
        """Every legal dim is a multiple of it: the config class and the product of experts may ask for one."""
        return math.lcm(self.config_multiple, self.experts_multiple(self.hidden_size))

    def experts_multiple(self, width: int) -> int:
        """Return what a width of experts, narrower than this, must be a multiple of."""
        return EXPERTS_MULTIPLE if self.has_experts and width % EXPERTS_MULTIPLE == 0 else 1

    @property
    def fields(self) -> Mapping[str, Any]:
        """The fields of the config."""
        return self._config

    def value(self, name: str, otherwise: Any = None) -> Any:
        """Return a config field by its usual name; where it has none, the family's default, then `otherwise`.

        A null is not a missing field: it stands for what follows from others, not for the class's default.
        """
        if name in self.adapter.derived:
            value = ask(self.adapter.name, self.adapter.derived[name], self._config)
            return otherwise if value is None else value
        # transformers writes some configs under the usual names
        given = [self._config[one] for one in (self._own_name(name), name) if one in self._config]
        value = next((one for one in given if one is not None), None)
        if not given:
            value = self.adapter.defaults.get(name)
        return otherwise if value is None else value

    def number(self, name: str, otherwise: int | None = None) -> int:
        """Return a config field that must be a positive integer."""
        value = self.value(name, otherwise)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self._misfit(name, value, "a positive integer")
        most = {
            "hidden_size": MOST_WIDTH,
            "num_hidden_layers": MOST_BLOCKS,
            "num_attention_heads": MOST_HEADS,
            "num_key_value_heads": MOST_HEADS,
        }.get(name, MOST)
        if value > most:
            raise self._misfit(name, value, f"a number of at most {most:,}")
        return value

    def _real_number(self, name: str) -> float:
        """Return a config field that must be a finite number."""
        value = self.value(name)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= MOST:
            raise self._misfit(name, value, "a number")
        return float(value)

    def _misfit(self, name: str, value: object, needed: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"config.json gives {self._own_name(name)} = {shown(value)}, but {needed} is required.",
            f"Check config.json, and whether the model really is of type {self.adapter.name}.",
        )

    def _own_name(self, name: str) -> str:
        return self.adapter.names.get(name, name)

    def width(self, name: str) -> int:
        """Return the size a declaration refers to by name.

        Args:
            name: `query` (heads x head_dim), `key_value`, `query_key_value`, `head_dim`, a plain number, or any
                config field; `2*` in front of any of them multiplies.
        """
        factor, _, rest = name.rpartition("*")
        if factor:
            return int(factor) * self.width(rest)
        query = self.heads * self.head_dim
        key_value = self.key_value_heads * self.head_dim
        known = {
            "query": query,
            "key_value": key_value,
            "query_key_value": query + 2 * key_value,
            "head_dim": self.head_dim,
        }
        if name in known:
            return known[name]
        return int(name) if name.isdecimal() else self.number(name)

    def has_bias(self, linear: Linear) -> bool:
        """Say whether a declared linear has a bias in this config."""
        return bool(self.value(linear.bias, False)) if isinstance(linear.bias, str) else linear.bias

    @property
    def epsilon(self) -> float:
        """The ε of the norms that read the stream."""
        epsilon = self.adapter.norm.epsilon
        return self._real_number(epsilon) if isinstance(epsilon, str) else epsilon

    @property
    def activation(self) -> str:
        """The activation of the MLPs, as the config names it."""
        return str(self.value("hidden_act", "silu"))

    @property
    def context_length(self) -> int | None:
        """The most tokens that one row may have; `None` where the class sets no limit."""
        default = self.adapter.defaults.get("max_position_embeddings")
        return context_length(self._config, self.adapter.names, default)

    @functools.cached_property
    def declared_blocks(self) -> tuple[Block, ...]:
        """The declaration of each block, in order."""
        block = self.adapter.block
        return tuple(
            ask(self.adapter.name, block, self, index) if callable(block) else block for index in range(self.blocks)
        )

    def window(self, block: int) -> int | None:
        """Return the sliding window of a block's attention: the tokens that one attends to, itself among them."""
        if not self.value("sliding_window"):
            return None
        kinds = self.value("layer_types")
        if kinds and not isinstance(kinds, list):
            raise self._misfit("layer_types", kinds, "a list")
        if kinds and len(kinds) != self.blocks:
            raise UnsupportedModelError(
                f"config.json lists {len(kinds)} layer_types for {self.blocks} blocks.", "Check config.json."
            )
        slides = (
            kinds[block] == "sliding_attention"
            if kinds
            else ask(self.adapter.name, self.adapter.has_window, self, block)
        )
        return self.number("sliding_window") if slides else None

    def multiplier(self, name: str) -> float:
        """Return what multiplies a branch's output: the value of a config field, or 1 without a name."""
        return self._real_number(name) if name else 1.0

    def stream_parameters(self) -> dict[str, Shape]:
        """Return the shape of every declared parameter with an axis of hidden size, by name; that axis is `None`."""
        return {one.name: one.shape for one in self.declared_parameters() if None in one.shape}

    def other_parameters(self) -> dict[str, Shape]:
        """Return the shape of every declared parameter without such an axis (of what is passed through, its size)."""
        return {one.name: one.shape for one in self.declared_parameters() if None not in one.shape}

    def parameters(self, dim: int | None = None) -> int:
        """Count the parameters: of the dense model as shipped, or of its slice by the refit at `dim`."""
        fixed, per_width = self._counts
        if self.is_tied if dim is None else self.keeps_tie:
            per_width -= self.width(self.adapter.head.width)
        return fixed + per_width * (self.hidden_size if dim is None else dim)

    @functools.cached_property
    def _counts(self) -> tuple[int, int]:
        """Elements without an axis of hidden size, and elements for each unit of hidden size; no shape has it twice."""
        parameters = list(self.declared_parameters())
        fixed = sum(one.elements(0) for one in parameters)
        return fixed, sum(one.elements(1) for one in parameters) - fixed

    def largest_regression(self) -> int:
        """Return the most inputs of one regression of the refit: of a step's linear writers, or of an expert."""
        sizes = [1]
        for block in self.declared_blocks:
            for step in block.sublayers:
                sizes.append(sum(self.width(branch.writer.width) for branch in step if branch.writer is not None))
                sizes += [self.width(branch.experts.writer_width) for branch in step if branch.experts is not None]
        return max(sizes)

    def declared_parameters(self) -> Iterator[Parameter]:
        """Yield every declared parameter, a tied head too."""
        return iter(self._declared)

    @functools.cached_property
    def _declared(self) -> tuple[Parameter, ...]:
        return tuple(self._declare_parameters())

    def _declare_parameters(self) -> Iterator[Parameter]:
        adapter = self.adapter
        for table in adapter.embeddings:
            yield Parameter(f"{table.path}.weight", (self.width(table.rows) + table.extra_rows, None), "embedding", 0)
        site = 0
        for index, block in enumerate(self.declared_blocks):
            prefix = f"{adapter.blocks}.{index}."
            for other in block.passed_through:
                yield Parameter(prefix + other.path, (self.width(other.width),), "passed_through", site)
            norms: set[str] = set()
            for step in block.sublayers:
                for branch in step:
                    if branch.norm not in norms:
                        yield from self._norm_parameters(prefix + branch.norm, site)
                    norms.add(branch.norm)
                    for linear in branch.readers:
                        yield from self._linear_parameters(prefix, linear, "reader", site)
                    if branch.writer is not None:
                        yield from self._linear_parameters(prefix, branch.writer, "writer", site + 1)
                    if branch.experts is not None:
                        experts = branch.experts
                        count = self.width(experts.count)
                        reads = (count, self.width(experts.reader_width), None)
                        writes = (count, None, self.width(experts.writer_width))
                        yield Parameter(prefix + experts.reader_path, reads, "experts", site)
                        yield Parameter(prefix + experts.writer_path, writes, "experts", site + 1)
                site += 1
        yield from self._norm_parameters(adapter.final_norm, site)
        yield from self._linear_parameters("", adapter.head, "reader", site)

    def _linear_parameters(
        self, prefix: str, linear: Linear, role: Literal["reader", "writer"], site: int
    ) -> Iterator[Parameter]:
        """Yield weight and bias of a linear."""
        width = self.width(linear.width)
        shape: Shape = (width, None) if role == "reader" else (None, width)
        weight = shape[::-1] if linear.is_transposed else shape
        yield Parameter(f"{prefix}{linear.path}.weight", weight, role, site)
        if self.has_bias(linear):
            yield Parameter(f"{prefix}{linear.path}.bias", shape[:1], role, site)

    def _norm_parameters(self, path: str, site: int) -> Iterator[Parameter]:
        if self.adapter.norm.has_weight:
            yield Parameter(f"{path}.weight", (None,), "norm", site)
        if self.adapter.norm.has_bias:
            yield Parameter(f"{path}.bias", (None,), "norm", site)

    def declaration(self) -> dict[str, Any]:
        """Return the declaration as it applies to this model, as plain data: names with their sizes.

        Two adapters that say the same of a model return equal data, in whatever order they name readers.
        """
        adapter = self.adapter
        kinds: list[dict[str, Any]] = []
        for index, block in enumerate(self.declared_blocks):
            kind = self._block_declaration(block)
            known = next((other for other in kinds if other["declaration"] == kind), None)
            if known is None:
                kinds.append({"blocks": [index], "declaration": kind})
            else:
                known["blocks"].append(index)
        return {
            "embeddings": [
                {"path": table.path, "rows": self.width(table.rows) + table.extra_rows} for table in adapter.embeddings
            ],
            "scales_embeddings_by_width": adapter.scales_embeddings_by_width,
            "blocks": adapter.blocks,
            "block_kinds": [{"blocks": kind["blocks"], **kind["declaration"]} for kind in kinds],
            "norm": {**dataclasses.asdict(adapter.norm), "epsilon": self.epsilon},
            "final_norm": adapter.final_norm,
            "head": self._linear_declaration(adapter.head),
            "dim_multiple": self.dim_multiple,
        }

    def _block_declaration(self, block: Block) -> dict[str, Any]:
        return {
            "is_parallel": block.is_parallel,
            "branches": [
                {
                    "norm": branch.norm,
                    "readers": sorted(
                        (self._linear_declaration(reader) for reader in branch.readers), key=lambda one: one["path"]
                    ),
                    "writer": None if branch.writer is None else self._linear_declaration(branch.writer),
                    "experts": None
                    if branch.experts is None
                    else {
                        "reader": branch.experts.reader_path,
                        "writer": branch.experts.writer_path,
                        "count": self.width(branch.experts.count),
                        "reader_width": self.width(branch.experts.reader_width),
                        "writer_width": self.width(branch.experts.writer_width),
                    },
                    "module": branch.module,
                    "activation": branch.activation,
                    "multiplier": self.multiplier(branch.multiplier),
                }
                for branch in block.branches
            ],
            "passed_through": sorted(one.path for one in block.passed_through),
        }

    def _linear_declaration(self, linear: Linear) -> dict[str, Any]:
        return {
            "path": linear.path,
            "width": self.width(linear.width),
            "bias": self.has_bias(linear),
            "is_transposed": linear.is_transposed,
            "gate": linear.gate,
        }

    def sliced_fields(self, dim: int) -> dict[str, Any]:
        """Return the config fields that a slice changes, with their values at `dim`.

        The width of a head is stated, because the class would otherwise derive it from the new hidden size.
        """
        return {
            self._own_name("hidden_size"): dim,
            "head_dim": self.head_dim,
            "tie_word_embeddings": self.keeps_tie,
            **self.mlp_fields(),
        }

    def mlp_fields(self) -> dict[str, Any]:
        """Return the config fields of the MLPs' widths with their values in a slice; none where the MLPs stay whole."""
        return {self._own_name(name): width for name, width in self.sliced_mlp_widths.items()}

    @property
    def mlp_dim(self) -> int | None:
        """The width that was asked of the MLPs of slices, m; `None` where they keep that of the dense model."""
        return next(iter(self.sliced_mlp_widths.values()), None)

    def untied(self) -> Dimensions:
        """Return the same sizes for slices with a head of their own."""
        return Dimensions(self.adapter, self._config, unties=True, sliced_mlp_widths=self.sliced_mlp_widths)

    def with_mlp_dim(self, mlp_dim: int | None) -> Dimensions:
        """Return the sizes for slices with fewer MLP channels; these where none are removed.

        Raises:
            PluginError: The adapter does not say which config field has the width.
        """
        if mlp_dim is None or mlp_dim == self.mlp_size:
            return self
        if mlp_dim not in self._narrower:
            widths = {name: self.mlp_width_at(name, mlp_dim) for name in self.mlp_widths}
            narrower = Dimensions(self.adapter, self._config, self._unties, widths)
            for name, width in widths.items():
                if narrower.number(name) != width:
                    raise PluginError(
                        f"Adapter {self.adapter.name!r} does not take the width of the MLP from "
                        f"{self._own_name(name)}.",
                        f"Name the config field of {name} in `names`.",
                    )
            self._narrower[mlp_dim] = narrower
        return self._narrower[mlp_dim]

    @functools.cached_property
    def mlp_widths(self) -> tuple[str, ...]:
        """The widths that MLPs of this model have, by the names in its declaration; `mlp_dim` is of the first."""
        used = {
            _name_of_width(width)
            for block in self.declared_blocks
            for branch in block.branches
            for width in self._channels_of(branch)
        }
        return tuple(name for name in self.adapter.mlp_widths if name in used)

    @property
    def mlp_size(self) -> int:
        """The width of the MLPs: how many channels they have; of mixtures, that of the experts to which tokens go."""
        return self.number(next(iter(self.mlp_widths or self.adapter.mlp_widths), ""))

    def mlp_width_at(self, name: str, mlp_dim: int) -> int:
        """Return one of the MLPs' widths in a slice.

        The first is m. Every other keeps the same share of its channels, rounded to a multiple of the largest of the
        numbers that formats ask for (`slicecli.family.friendly_dims`) that divides both m and the width, if one does.

        Args:
            name: One of `mlp_widths`.
            mlp_dim: m, from 0 to all channels.
        """
        if name == self.mlp_widths[0] or mlp_dim == 0:
            return mlp_dim
        size = self.number(name)
        step = friendly_multiple(math.gcd(mlp_dim, size)) or 1
        return max(step, round(size * mlp_dim / self.mlp_size / step) * step)

    def channels_at(self, width: str, mlp_dim: int) -> int:
        """Return how many channels a writer of MLPs with a declared width has in a slice.

        Args:
            width: As `width` reads it.
            mlp_dim: m, from 0 to all channels.
        """
        name = _name_of_width(width)
        return self.width(width) // self.number(name) * self.mlp_width_at(name, mlp_dim)

    def _channels_of(self, branch: Branch) -> list[str]:
        """Return the widths of the writers of a branch that are MLPs: what they read are channels."""
        widths = [] if branch.writer is None else [branch.writer.width]
        widths += [] if branch.experts is None else [branch.experts.writer_width]
        return [width for width in widths if self.has_channels(width)]

    def has_channels(self, width: str) -> bool:
        """Say whether a declared width is that of MLPs whose channels can be removed, or a multiple of it."""
        return _name_of_width(width) in self.adapter.mlp_widths

    def groups_of(self, reader: str, writer: str) -> int:
        """Return how often a reader's declared width has the channels of a writer's side by side; 0 for other widths.

        `2*intermediate_size` has those of `intermediate_size` twice, as gate and up in one.
        """
        if _name_of_width(reader) != _name_of_width(writer) or not self.has_channels(writer):
            return 0
        return self.width(reader) // self.width(writer)

    def is_mlp(self, branch: Branch) -> bool:
        """Say whether a branch is an MLP, or a mixture of them, whose channels can be removed."""
        return bool(self._channels_of(branch))

    @functools.cached_property
    def mlp_obstacle(self) -> str:
        """Why channels cannot be removed from the MLPs of this model; empty where they can."""
        name, known = self.adapter.name, " or ".join(map(repr, self.adapter.mlp_widths))
        if reason := self.adapter.why_whole_mlps(self._config):
            return reason.rstrip(".")
        if not known:
            return f"adapter {name!r} lists no mlp_widths"
        for index, block in enumerate(self.declared_blocks):
            for experts in (branch.experts for branch in block.branches if branch.experts is not None):
                reads, writes = experts.reader_width, experts.writer_width
                if not self.has_channels(writes):
                    return f"adapter {name!r} does not list {writes!r}, the width of experts, in mlp_widths"
                if not self.groups_of(reads, writes):
                    return f"adapter {name!r} gives {experts.reader_path} no width with the channels of {writes!r}"
            if sum(self.is_mlp(branch) for branch in block.branches) != 1:
                return f"adapter {name!r} declares no writer of width {known} in block {index}"
            if any(self.has_channels(other.width) for other in block.passed_through):
                return f"adapter {name!r} keeps a parameter of width {known} in block {index}"
        return ""

    def legal_mlp_dims(self) -> range:
        """Return the widths that the MLPs of a slice may have, the dense model's among them; none where it cannot."""
        if self.mlp_obstacle:
            return range(0)
        step = self.experts_multiple(self.mlp_size)
        return range(step, self.mlp_size + 1, step)

    def require_sliceable_mlps(self) -> None:
        """Refuse a model whose MLPs keep their channels."""
        if self.mlp_obstacle:
            raise RequestError(f"The MLPs of this model cannot be sliced: {self.mlp_obstacle}.", "Use --dim alone.")

    def check_mlp_dim(self, mlp_dim: int) -> None:
        """Refuse an MLP width that a slice cannot have."""
        self.require_sliceable_mlps()
        legal = self.legal_mlp_dims()
        if mlp_dim in range(1, self.mlp_size + 1) and mlp_dim not in legal:
            raise RequestError(
                f"Experts cannot have a width of {mlp_dim}: {EXPERTS_REASON}.",
                name_nearest("width", nearest_in(legal, mlp_dim)),
            )
        if mlp_dim not in legal:
            raise RequestError(
                f"An MLP width of {mlp_dim} is impossible.", f"MLP widths range from {legal[0]} to {self.mlp_size}."
            )

    def legal_dims(self) -> range:
        """Return the dims a slice of this model may have, in ascending order."""
        smallest = self.dim_multiple
        if self.adapter.norm.is_centred:
            smallest = max(smallest, 2)  # one direction is taken by the mean
        first = -(-smallest // self.dim_multiple) * self.dim_multiple
        # where channels are removed, the stream may keep its width
        return range(first, self.hidden_size + (self.mlp_dim is not None), self.dim_multiple)

    def nearest_legal(self, dim: int) -> tuple[int, ...]:
        """Return the legal dims next to `dim`: one below and one above where they exist."""
        return nearest_in(self.legal_dims(), dim)

    def check_dim(self, dim: int) -> None:
        """Refuse a dim that the family or its config class cannot have."""
        if dim in self.legal_dims():
            return
        if outside := why_outside(dim, self.hidden_size):
            cause = outside
        elif self.dim_multiple == 1:
            cause = f"A dim of {dim} is too small: the mean that {self.adapter.name} norms subtract uses up one."
        elif dim % self.config_multiple == 0 and dim > 0 and self.has_experts:
            cause = f"A dim of {dim} is not legal for a model with experts: {EXPERTS_REASON}."
        else:
            fields = " and ".join(f"{name} ({self.number(name)})" for name in self.adapter.dim_divisors)
            cause = f"A dim of {dim} is not legal: the {self.adapter.name} config requires a multiple of {fields}."
        raise RequestError(cause, name_nearest("dim", self.nearest_legal(dim)))

    def require_declared(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Check that the declaration and the parameters of a real model name the same things, of the same sizes."""
        declared = {one.name: one.shape for one in self.declared_parameters()}
        passed_through = {
            f"{self.adapter.blocks}.{index}.{other.path}"
            for index, block in enumerate(self.declared_blocks)
            for other in block.passed_through
        }
        if self.is_tied:
            # whether the shared table is listed under the head's name too depends on how the model was built
            head = f"{self.adapter.head.path}.weight"
            shapes = {name: shape for name, shape in shapes.items() if name != head}
            declared.pop(head)
        missing, extra = sorted(shapes.keys() - declared.keys()), sorted(declared.keys() - shapes.keys())
        wrong = []
        for name, shape in declared.items():
            expected = tuple(self.hidden_size if size is None else size for size in shape)
            found = shapes.get(name, expected)
            # of what is passed through only the number of elements is declared
            if (math.prod(found) != math.prod(expected)) if name in passed_through else (found != expected):
                wrong.append(f"{name} is {' x '.join(map(str, found))}, not {' x '.join(map(str, expected))}")
        parts = [f"it does not cover {_first_of(missing)}"] if missing else []
        parts += [f"the model has no {_first_of(extra)}"] if extra else []
        parts += wrong[:MOST_NAMED]
        if parts:
            raise PluginError(
                f"Adapter {self.adapter.name!r} does not describe this model: {'; '.join(parts)}.",
                "Fix the adapter, or choose another with --adapter.",
            )
