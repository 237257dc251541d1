"""Declarations of model families: what slicecli must know to slice a residual stream.

An adapter is data: the names of the modules that read and write the stream, the kind of norm between them, and
the rule for legal dims. It contains no forward pass: the family's own transformers modules run unchanged. The
sizes and exact parameter counts of a model follow from the declaration and a config alone
(`slicecli.family.dimensions`), so nothing here imports torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from slicecli.errors import (
    NoAdapterError,
    PluginError,
    RequestError,
    SlicecliError,
    UnsupportedModelError,
    reason_of,
    shown,
)

if TYPE_CHECKING:
    from typing import TypeAlias

__all__ = [
    "AUTO_ADAPTER",
    "Adapter",
    "Block",
    "Branch",
    "Embedding",
    "Experts",
    "Fields",
    "Linear",
    "Norm",
    "PassedThrough",
    "PortableClass",
    "Refusal",
    "Sizes",
    "ask",
    "attention",
    "gated_mlp",
    "mlp",
    "select_adapter",
]

AUTO_ADAPTER = "auto"
"""The name that requests an inferred adapter; plugins cannot use it."""

Answer = TypeVar("Answer")

Fields: TypeAlias = Mapping[str, Any]
"""The fields of a config: the content of `config.json`."""


class Sizes(Protocol):
    """The sizes of one model, available to a declaration; implemented by `slicecli.family.dimensions.Dimensions`.

    Attributes:
        heads: Attention heads.
        key_value_heads: Key/value heads.
        head_dim: Width of a head.
    """

    heads: int
    key_value_heads: int
    head_dim: int

    def value(self, name: str, otherwise: Any = None) -> Any:
        """Return a config field by its usual name; if missing, the family's default, then `otherwise`."""
        ...

    def number(self, name: str, otherwise: int | None = None) -> int:
        """Return a config field that must be a positive integer."""
        ...


@dataclass(frozen=True)
class Norm:
    """The kind of norm through which the residual stream is read; one kind serves a whole model.

    Attributes:
        kind: `rms` divides by the root mean square; `layer` subtracts the mean first.
        epsilon: The ε under the root: a config field, or a number if the class fixes it.
        has_weight: Whether it multiplies by a weight.
        has_bias: Whether it adds a bias after that.
        weight_offset: What is added to the stored weight before it multiplies (1 for Gemma).
    """

    kind: Literal["rms", "layer"] = "rms"
    epsilon: str | float = "rms_norm_eps"
    has_weight: bool = True
    has_bias: bool = False
    weight_offset: float = 0.0

    @property
    def is_centred(self) -> bool:
        """Whether it subtracts the mean of its input."""
        return self.kind == "layer"


@dataclass(frozen=True)
class Linear:
    """One linear map that reads or writes the residual stream.

    Attributes:
        path: Module path inside the block (for the head, in the model).
        width: Size of the side that is not the stream, as `Dimensions.width` reads it.
        bias: Whether it has a bias, or the config field that says so.
        is_transposed: Whether the weight is stored as (inputs, outputs), as in GPT-2's Conv1D.
        gate: For a writer, path of the one-row linear whose sigmoid multiplies the output of each token.
    """

    path: str
    width: str
    bias: bool | str = False
    is_transposed: bool = False
    gate: str = ""


@dataclass(frozen=True)
class PassedThrough:
    """A parameter of the block without an axis of hidden size; it is passed through.

    Attributes:
        path: Parameter path inside the block, for example `self_attn.q_norm.weight`.
        width: Its number of elements, as `Dimensions.width` reads it.
    """

    path: str
    width: str


@dataclass(frozen=True)
class Embedding:
    """A table whose rows add into the stream before the first block.

    Attributes:
        path: Module path in the model.
        rows: Its number of rows, as `Dimensions.width` reads it.
        extra_rows: Rows beyond that number.
    """

    path: str
    rows: str = "vocab_size"
    extra_rows: int = 0


@dataclass(frozen=True)
class Experts:
    """A mixture of experts whose weights are stored in two three-dimensional parameters.

    Attributes:
        module: Path of the module inside the block; it is called with the normalised tokens (tokens, d), the
            index of each token's experts and their weights (both of shape (tokens, experts per token)).
        count: Number of experts, as `Dimensions.width` reads it.
        reader_width: Rows of one expert's first map.
        writer_width: Columns of one expert's second map.
        reader: Name of the parameter with all first maps, shape (experts, reader_width, d).
        writer: Name of the parameter with all second maps, shape (experts, d, writer_width).
        per_token: Number of experts per token, as `Dimensions.width` reads it. Used only for costs.
    """

    module: str
    count: str
    reader_width: str
    writer_width: str
    reader: str = "gate_up_proj"
    writer: str = "down_proj"
    per_token: str = "num_experts_per_tok"

    @property
    def reader_path(self) -> str:
        """Path of the first maps' parameter inside the block."""
        return f"{self.module}.{self.reader}"

    @property
    def writer_path(self) -> str:
        """Path of the second maps' parameter inside the block."""
        return f"{self.module}.{self.writer}"


@dataclass(frozen=True)
class Branch:
    """One residual branch: a norm, its readers, and its writers.

    Attributes:
        norm: Path of its norm inside the block.
        readers: Linears applied to the normalised stream (a fused one counts once).
        writer: The linear whose output is added to the stream; `None` if only experts write.
        module: Path of the module inside the block that holds the branch; it is skipped while another branch
        runs alone. Only a block's last branch may lack one.
        activation: If there is no such module, path of the function between its only reader and its writer.
        multiplier: Config field that multiplies what the branch adds.
        experts: Experts that also read and write.
    """

    norm: str
    readers: tuple[Linear, ...]
    writer: Linear | None
    module: str = ""
    activation: str = ""
    multiplier: str = ""
    experts: Experts | None = None

    @property
    def linears(self) -> tuple[Linear, ...]:
        """Its readers, then its writer if it has one."""
        return self.readers if self.writer is None else (*self.readers, self.writer)

    @property
    def reader_paths(self) -> list[str]:
        """Paths inside the block of all readers, including experts."""
        experts = [] if self.experts is None else [self.experts.reader_path]
        return [reader.path for reader in self.readers] + experts

    @property
    def writer_paths(self) -> list[str]:
        """Paths inside the block of all writers, including experts."""
        experts = [] if self.experts is None else [self.experts.writer_path]
        return ([] if self.writer is None else [self.writer.path]) + experts


@dataclass(frozen=True)
class Block:
    """One block of the model.

    Attributes:
        branches: Its branches in the order in which they run.
        is_parallel: Whether all branches read the stream as it enters the block, instead of after the previous branch.
        passed_through: Parameters that do not touch the stream; slices have them unchanged.
    """

    branches: tuple[Branch, ...]
    is_parallel: bool = False
    passed_through: tuple[PassedThrough, ...] = ()

    @property
    def norms(self) -> tuple[str, ...]:
        """Paths of the norms, each once, in the order of the branches."""
        return tuple(dict.fromkeys(branch.norm for branch in self.branches))

    @property
    def sublayers(self) -> tuple[tuple[Branch, ...], ...]:
        """The branches grouped by the stream they read: one group if parallel, otherwise one per branch."""
        return (self.branches,) if self.is_parallel else tuple((branch,) for branch in self.branches)


def attention(
    bias: bool | str = False,
    writer_bias: bool | str = False,
    writer: str = "o_proj",
    norm: str = "input_layernorm",
    multiplier: str = "",
) -> Branch:
    """Declare the usual attention branch: separate query, key and value, under the names most families use.

    Args:
        bias: Bias of query, key and value.
        writer_bias: Bias of the output projection.
        writer: Name of the output projection.
        norm: Name of the norm.
        multiplier: Config field that multiplies what the branch adds.
    """
    return Branch(
        norm=norm,
        readers=(
            Linear("self_attn.q_proj", "query", bias),
            Linear("self_attn.k_proj", "key_value", bias),
            Linear("self_attn.v_proj", "key_value", bias),
        ),
        writer=Linear(f"self_attn.{writer}", "query", writer_bias),
        module="self_attn",
        multiplier=multiplier,
    )


def gated_mlp(bias: bool | str = False, norm: str = "post_attention_layernorm", multiplier: str = "") -> Branch:
    """Declare the usual gated MLP branch: gate and up, then down, under the names most families use.

    Args:
        bias: Bias of all three.
        norm: Name of the norm.
        multiplier: Config field that multiplies what the branch adds.
    """
    return Branch(
        norm=norm,
        readers=(
            Linear("mlp.gate_proj", "intermediate_size", bias),
            Linear("mlp.up_proj", "intermediate_size", bias),
        ),
        writer=Linear("mlp.down_proj", "intermediate_size", bias),
        module="mlp",
        multiplier=multiplier,
    )


def mlp(
    reader: str,
    writer: str,
    norm: str = "post_attention_layernorm",
    bias: bool | str = False,
    width: str = "intermediate_size",
    module: str = "mlp",
    activation: str = "",
) -> Branch:
    """Declare an MLP branch of two maps.

    Args:
        reader: Path of the first inside the block.
        writer: Path of the second.
        norm: Name of the norm.
        bias: Bias of both.
        width: Size between them.
        module: Path of the module that holds them; empty if they belong to the block itself.
        activation: In that case, path of the function between them.
    """
    return Branch(norm, (Linear(reader, width, bias),), Linear(writer, width, bias), module, activation)


@dataclass(frozen=True)
class PortableClass:
    """Another class of transformers that computes the same as the family's own, in which a slice can be written.

    Programs that serve models load some classes with widths of heads that a slice does not have; in another class the
    same slice runs. Modules have the same names in both, except those in `splits`. An adapter must serve the type: it
    has the rule on dims and the sizes. Functions take the dense model's sizes.

    Attributes:
        model_type: Its `config.model_type`.
        fields: Config fields whose values differ from those of the same names in the family's own config: a value, or
            a function that returns it. Fields that only the family's own class has are left out.
        splits: Linears of a block whose rows are those of several linears there, in this order, by path.
        constants: Parameters of every block (by path in the block) or of the model (by name) that the family's own
            class lacks, with the value that fills them.
        scales: What the weight and bias of a module are multiplied by: functions, by path in the block or name in the
            model.
        centres_stream: Whether everything that adds into the stream loses its mean, so that an RMSNorm computes what
            the family's LayerNorm does.
        obstacle: Why it does not compute the same for a config: a sentence, or a function that returns one; empty if
            it does.
    """

    model_type: str
    fields: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    splits: Mapping[str, tuple[Linear, ...]] = field(default_factory=lambda: MappingProxyType({}))
    constants: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))
    scales: Mapping[str, Callable[[Sizes], float]] = field(default_factory=lambda: MappingProxyType({}))
    centres_stream: bool = False
    obstacle: str | Callable[[Sizes], str] = ""


@dataclass(frozen=True)
class Adapter:
    """The declaration of one model family.

    Attributes:
        name: Name of the adapter, for `--adapter`.
        model_types: Values of `config.model_type` it serves.
        block: The block, or a function of the model's sizes and the block's index that returns it, if blocks differ
        with the config or their position.
        blocks: Path of the list of blocks in the model.
        embeddings: The tables that add into the stream.
        final_norm: Path of the norm before the head.
        head: The head.
        norm: Kind of every norm that reads the stream.
        scales_embeddings_by_width: Whether the embeddings are multiplied by sqrt(hidden size).
        keeps_width: Whether the model reshapes the stream before the head to the width of the embeddings, whatever its
        blocks return.
        names: The family's own names of config fields, by the usual name (`hidden_size`: `n_embd`).
        defaults: Values of the config class for fields that a config file may leave out, by the usual name.
        derived: Fields that follow from others, by the usual name: functions of the config's fields.
        has_window: Whether a block's attention uses the config's `sliding_window` if the config does not list
        `layer_types`: a function of the model's sizes and the block's index. Used only for costs.
        unused_tensors: Regular expressions (searched) for names of tensors that old checkpoints of the family contain
        but its class does not use; they are left out with a warning. Other unused tensors stop a slice.
        dim_divisors: Fields that must divide the hidden size for the config class to accept it.
        mlp_widths: Config fields, by the usual name, that give MLPs and experts their widths. A width asked for is that
            of the first that the model has; the others keep the same share of their channels.
        stock_obstacle: Why the family's own class cannot describe a slice, which then needs custom code: a sentence, or
            a function of the config's fields that returns one; empty if it can.
        shortcut_obstacle: Why blocks cannot be split into the stream and the branches that add to it, as the published
            method requires; in the same form.
        tie_obstacle: Why a slice of a tied model cannot share one table between embedding and head; in the same form.
        mlp_obstacle: Why channels cannot be removed from the MLPs; in the same form.
        obstacle: Why the stream cannot be sliced at all; in the same form.
        portable: Other classes that compute the same, the preferred one first.
    """

    name: str
    model_types: tuple[str, ...]
    block: Block | Callable[[Sizes, int], Block]
    blocks: str = "model.layers"
    embeddings: tuple[Embedding, ...] = (Embedding("model.embed_tokens"),)
    final_norm: str = "model.norm"
    head: Linear = Linear("lm_head", "vocab_size")
    norm: Norm = Norm()
    scales_embeddings_by_width: bool = False
    keeps_width: bool = False
    names: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    defaults: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    derived: Mapping[str, Callable[[Fields], Any]] = field(default_factory=lambda: MappingProxyType({}))
    has_window: Callable[[Sizes, int], bool] = lambda _sizes, _index: True
    unused_tensors: tuple[str, ...] = ()
    dim_divisors: tuple[str, ...] = ()
    mlp_widths: tuple[str, ...] = ("intermediate_size",)
    stock_obstacle: str | Callable[[Fields], str] = ""
    shortcut_obstacle: str | Callable[[Fields], str] = ""
    tie_obstacle: str | Callable[[Fields], str] = ""
    mlp_obstacle: str | Callable[[Fields], str] = ""
    obstacle: str | Callable[[Fields], str] = ""
    portable: tuple[PortableClass, ...] = ()

    def require_sliceable(self, config: Fields) -> None:
        """Check that the residual stream of a config can be sliced.

        Raises:
            UnsupportedModelError: It cannot be sliced; the message gives the reason.
        """
        reason = _reason(self.name, self.obstacle, config)
        if reason:
            raise UnsupportedModelError(reason)

    def why_not_stock(self, config: Fields) -> str:
        """Return why the family's own class cannot describe a slice of a config; empty if it can."""
        return _reason(self.name, self.stock_obstacle, config)

    def why_no_shortcuts(self, config: Fields) -> str:
        """Return why the published method cannot slice a config; empty if it can."""
        return _reason(self.name, self.shortcut_obstacle, config)

    def why_whole_mlps(self, config: Fields) -> str:
        """Return why channels cannot be removed from the MLPs of a config; empty if nothing is declared against it."""
        return _reason(self.name, self.mlp_obstacle, config)

    def why_untied(self, config: Fields) -> str:
        """Say why a slice of a tied model with a config has a head of its own; empty where it stays tied."""
        if not self.norm.has_weight:
            return "its final norm has no weight, so that one table cannot serve as embedding and as head"
        return _reason(self.name, self.tie_obstacle, config)

    def layout(self, config: Fields) -> Literal["stock", "custom-code"]:
        """Return the layout of a refitted slice of a config: the family's own class, or custom code."""
        return "custom-code" if self.why_not_stock(config) else "stock"


@dataclass(frozen=True)
class Refusal:
    """A model family that cannot be sliced, whatever the config.

    Attributes:
        model_types: Values of `config.model_type`.
        reason: The reason, in one sentence.
    """

    model_types: tuple[str, ...]
    reason: str


def _reason(adapter: str, given: str | Callable[[Fields], str], config: Fields) -> str:
    return given if isinstance(given, str) else ask(adapter, given, config)


def ask(adapter: str, function: Callable[..., Answer], *arguments: object) -> Answer:
    """Call a function of a declaration.

    Args:
        adapter: Name of the adapter, for the message.
        function: The function.
        *arguments: Its arguments.

    Raises:
        PluginError: The function fails.
    """
    try:
        return function(*arguments)
    except SlicecliError:
        raise
    except Exception as error:  # it is a plugin's, and a config may hold anything
        raise PluginError(
            f"Adapter {adapter!r} failed on this config: {type(error).__name__}: {reason_of(error)}.",
            "Check config.json, or fix the adapter.",
        ) from error


def select_adapter(
    config: Fields,
    adapters: Mapping[str, Adapter],
    name: str | None = None,
    refusals: Iterable[Refusal] = (),
) -> Adapter:
    """Choose the adapter of a config by name if given, otherwise by `model_type`.

    Raises:
        RequestError: No adapter has that name.
        UnsupportedModelError: No adapter serves the model type, or the type or this config is refused.
    """
    if name is not None:
        if name not in adapters:
            raise RequestError(f"There is no adapter named {name!r}.", _known(name, adapters))
        adapter = adapters[name]
    else:
        model_type = str(config.get("model_type", ""))
        refused = next((refusal for refusal in refusals if model_type in refusal.model_types), None)
        if refused is not None:
            raise UnsupportedModelError(f"Models of type {shown(model_type)} cannot be sliced: {refused.reason}")
        found = [candidate for candidate in adapters.values() if model_type in candidate.model_types]
        if not found:
            raise NoAdapterError(
                f"Models of type {shown(model_type)} are not supported."
                if model_type
                else "config.json has no model_type.",
                _known(model_type, (kind for candidate in adapters.values() for kind in candidate.model_types)),
            )
        adapter = found[0]
    adapter.require_sliceable(config)
    return adapter


def _known(name: str, known: Iterable[str]) -> str:
    """List the known names, with a suggestion if one is similar."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1)
    listed = f"Supported: {', '.join(names) or 'none (no adapter plugin is loaded)'}."
    return f"Did you mean {near[0]!r}? {listed}" if near else listed
