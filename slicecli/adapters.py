"""What a model family must declare so that its residual stream can be sliced, and what follows from it.

An adapter is data: the names of the modules that read and write the stream, the kind of norm in between, and
the rule for legal dims. It holds no code of the forward pass: the family's own modules of transformers are run
as they are. From the declaration and a config alone follow the exact parameter counts, so nothing here imports
torch.

Legend: d hidden size, k dim kept, L blocks, V vocabulary.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from slicecli.errors import PluginError, RequestError, UnsupportedModelError

__all__ = [
    "Adapter",
    "Branch",
    "Dimensions",
    "Kept",
    "Linear",
    "NormKind",
    "attention",
    "gated_mlp",
    "require_declared",
    "select_adapter",
]

NormKind = Literal["rms"]
"""How a norm treats its input: `rms` divides by the root mean square and multiplies by its weight."""


@dataclass(frozen=True)
class Linear:
    """One linear map that reads or writes the residual stream.

    Attributes:
        path: Module path inside the block.
        width: Size of the side that is not the stream: a name known to `Dimensions.width`.
        bias: Whether it has a bias, or the config field that says so.
        feeds_norm: The output goes into nothing but a norm that shares the stream norms' epsilon (Qwen3's
            query and key norms), so the change of epsilon must be undone by the scale of this map.
    """

    path: str
    width: str
    bias: bool | str = False
    feeds_norm: bool = False


@dataclass(frozen=True)
class Kept:
    """A parameter of the block without an axis of hidden size; it is copied unchanged.

    Attributes:
        path: Parameter path inside the block, for example `self_attn.q_norm.weight`.
        width: Its number of elements, as a name known to `Dimensions.width`.
    """

    path: str
    width: str


@dataclass(frozen=True)
class Branch:
    """One residual branch: norm, then linears that read, then a linear that writes back.

    Attributes:
        module: Path of the module inside the block that is called with the normalised stream.
        norm: Path of its norm inside the block.
        readers: Linears applied to the normalised stream (a fused one counts once).
        writer: The linear whose output is added to the stream.
    """

    module: str
    norm: str
    readers: tuple[Linear, ...]
    writer: Linear


def attention(bias: bool | str = False, writer_bias: bool | str = False, has_query_norm: bool = False) -> Branch:
    """Declare the usual attention branch: separate query, key and value, under the names most families use.

    Args:
        bias: Bias of query, key and value.
        writer_bias: Bias of the output projection.
        has_query_norm: Queries and keys go through norms of their own, which share the stream norms' epsilon.
    """
    return Branch(
        module="self_attn",
        norm="input_layernorm",
        readers=(
            Linear("self_attn.q_proj", "query", bias, feeds_norm=has_query_norm),
            Linear("self_attn.k_proj", "key_value", bias, feeds_norm=has_query_norm),
            Linear("self_attn.v_proj", "key_value", bias),
        ),
        writer=Linear("self_attn.o_proj", "query", writer_bias),
    )


def gated_mlp(bias: bool | str = False) -> Branch:
    """Declare the usual MLP branch: gate and up, then down, under the names most families use.

    Args:
        bias: Bias of all three.
    """
    return Branch(
        module="mlp",
        norm="post_attention_layernorm",
        readers=(
            Linear("mlp.gate_proj", "intermediate_size", bias),
            Linear("mlp.up_proj", "intermediate_size", bias),
        ),
        writer=Linear("mlp.down_proj", "intermediate_size", bias),
    )


@dataclass(frozen=True)
class Adapter:
    """The declaration of one model family.

    Attributes:
        name: Name of the adapter, for `--adapter`.
        model_types: Values of `config.model_type` it serves.
        branches: The branches of a block in the order in which they run.
        blocks: Path of the list of blocks in the model.
        embeddings: Paths of the embedding tables that add into the stream.
        final_norm: Path of the norm before the head.
        head: Path of the head.
        norm: Kind of every norm that reads the stream.
        norm_epsilon: Config field with the epsilon of these norms.
        kept: Parameters of a block that do not touch the stream.
        dim_divisors: Config fields that must divide the hidden size for the config class to accept it.
        defaults: Values of the config class for fields that a config file may leave out.
        obstacle: Called with the fields of a config; returns why this very config cannot be sliced, or `""`.
    """

    name: str
    model_types: tuple[str, ...]
    branches: tuple[Branch, ...]
    blocks: str = "model.layers"
    embeddings: tuple[str, ...] = ("model.embed_tokens",)
    final_norm: str = "model.norm"
    head: str = "lm_head"
    norm: NormKind = "rms"
    norm_epsilon: str = "rms_norm_eps"
    kept: tuple[Kept, ...] = ()
    dim_divisors: tuple[str, ...] = ()
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    obstacle: Callable[[Mapping[str, Any]], str] | None = None

    def dimensions(self, config: Mapping[str, Any]) -> Dimensions:
        """Read the sizes that matter out of a config's fields (the content of `config.json`).

        Raises:
            UnsupportedModelError: A needed field is missing or is not a positive integer.
        """
        return Dimensions(self, config)


class Dimensions:
    """The sizes of one model: its config seen through the family's adapter.

    Attributes:
        hidden_size: d, the width of the residual stream.
        blocks: L, the number of blocks.
        vocabulary: V, the number of rows of the embedding table.
        heads: Attention heads.
        key_value_heads: Key/value heads.
        head_dim: Width of one head.
        is_tied: Whether the head shares the embedding table.
        dim_multiple: Every legal dim is a multiple of it.
    """

    def __init__(self, adapter: Adapter, config: Mapping[str, Any]) -> None:
        self.adapter = adapter
        self._config = config
        self.hidden_size = self.number("hidden_size")
        self.blocks = self.number("num_hidden_layers")
        self.vocabulary = self.number("vocab_size")
        self.heads = self.number("num_attention_heads")
        self.key_value_heads = self.number("num_key_value_heads", self.heads)
        self.head_dim = self.number("head_dim", self.hidden_size // self.heads)
        self.is_tied = bool(self.value("tie_word_embeddings", False))
        self.dim_multiple = math.lcm(1, *(self.number(name) for name in adapter.dim_divisors))

    def value(self, name: str, otherwise: Any = None) -> Any:
        """Return a config field; where it is absent or null, the family's default, then `otherwise`."""
        value = self._config.get(name)
        if value is None:
            value = self.adapter.defaults.get(name)
        return otherwise if value is None else value

    def number(self, name: str, otherwise: int | None = None) -> int:
        """Return a config field that must be a positive integer."""
        value = self.value(name, otherwise)
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise UnsupportedModelError(
                f"config.json gives {name} = {value!r}, where a positive integer is needed.",
                f"Check the config, or whether the model really is of type {self.adapter.name}.",
            )
        return value

    def width(self, name: str) -> int:
        """Return the size a declaration refers to by name; any config field will do as a name."""
        query = self.heads * self.head_dim
        key_value = self.key_value_heads * self.head_dim
        if name == "query":
            return query
        if name == "key_value":
            return key_value
        if name == "query_key_value":
            return query + 2 * key_value
        if name == "head_dim":
            return self.head_dim
        if name == "gate_up":
            return 2 * self.number("intermediate_size")
        return self.number(name)

    def has_bias(self, linear: Linear) -> bool:
        """Say whether a declared linear has a bias in this config."""
        return bool(self.value(linear.bias, False)) if isinstance(linear.bias, str) else linear.bias

    def parameters(self, dim: int | None = None) -> int:
        """Count the parameters: of the dense model as shipped, or of its stock slice at `dim`.

        A slice has its head apart from the embedding table even where the dense model ties them, because the
        head is refitted.
        """
        stream = self.hidden_size if dim is None else dim
        is_tied = self.is_tied and dim is None
        block = sum(self.width(kept.width) for kept in self.adapter.kept)
        for branch in self.adapter.branches:
            block += stream  # the norm's weight
            for reader in branch.readers:
                block += self.width(reader.width) * (stream + self.has_bias(reader))
            block += stream * (self.width(branch.writer.width) + self.has_bias(branch.writer))
        tables = len(self.adapter.embeddings) + (not is_tied)
        return self.blocks * block + tables * self.vocabulary * stream + stream

    def legal_dims(self) -> range:
        """Return the dims a slice of this model may have, in ascending order."""
        return range(self.dim_multiple, self.hidden_size, self.dim_multiple)

    def nearest_legal(self, dim: int) -> tuple[int, ...]:
        """Return the legal dims next to `dim`: one below and one above where they exist."""
        legal = self.legal_dims()
        below = [value for value in legal if value <= dim][-1:]
        above = [value for value in legal if value >= dim][:1]
        return tuple(dict.fromkeys(below + above))

    def check_dim(self, dim: int) -> None:
        """Refuse a dim that the family or its config class cannot have.

        Raises:
            RequestError: The dim is not positive, not below the hidden size, or not a legal multiple.
        """
        if dim in self.legal_dims():
            return
        if dim <= 0:
            cause = f"A dim of {dim} is not a width: it must be positive and below {self.hidden_size}."
        elif dim >= self.hidden_size:
            cause = f"A dim of {dim} does not slice a model whose hidden size is {self.hidden_size}."
        else:
            fields = " and ".join(f"{name} ({self.number(name)})" for name in self.adapter.dim_divisors)
            cause = f"A dim of {dim} is not legal here: the {self.adapter.name} config demands a multiple of {fields}."
        nearest = self.nearest_legal(dim)
        names = " and ".join(str(value) for value in nearest)
        raise RequestError(cause, f"The nearest legal: {names}." if nearest else "This model has no legal dim.")


def select_adapter(config: Mapping[str, Any], adapters: Mapping[str, Adapter], name: str | None = None) -> Adapter:
    """Choose the adapter of a config: by name where one is given, else by `model_type`.

    Raises:
        RequestError: No adapter has the name.
        UnsupportedModelError: No adapter serves the model type, or the chosen one refuses this config.
    """
    if name is not None:
        if name not in adapters:
            raise RequestError(f"There is no adapter named {name!r}.", _known(name, adapters))
        adapter = adapters[name]
    else:
        model_type = str(config.get("model_type", ""))
        found = [candidate for candidate in adapters.values() if model_type in candidate.model_types]
        if not found:
            types = {kind: kind for candidate in adapters.values() for kind in candidate.model_types}
            raise UnsupportedModelError(
                f"Models of type {model_type!r} are not supported."
                if model_type
                else "config.json states no model_type.",
                _known(model_type, types),
            )
        adapter = found[0]
    reason = adapter.obstacle(config) if adapter.obstacle is not None else ""
    if reason:
        raise UnsupportedModelError(reason)
    return adapter


def _known(name: str, known: Iterable[str]) -> str:
    """Say which names exist, the nearest first where one is near."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    listed = f"Supported: {', '.join(names) or 'none (no adapter plugin is loaded)'}."
    return f"Did you mean {near[0]!r}? {listed}" if near else listed


def require_declared(missing: Iterable[str], extra: Iterable[str], adapter: Adapter) -> None:
    """Check that a declaration and the parameters of a real model name the same things.

    Args:
        missing: Parameters of the model that nothing in the declaration covers.
        extra: Parameters that the declaration names and the model lacks.
        adapter: The declaration.

    Raises:
        PluginError: They differ.
    """
    missing, extra = sorted(missing), sorted(extra)
    if missing or extra:
        parts = [f"it does not cover {', '.join(missing)}"] if missing else []
        parts += [f"the model has no {', '.join(extra)}"] if extra else []
        raise PluginError(
            f"Adapter {adapter.name!r} does not describe this model: {'; '.join(parts)}.",
            "Mend the adapter, or choose another with --adapter.",
        )
