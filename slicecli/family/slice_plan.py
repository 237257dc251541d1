"""What will be done, decided before anything is done: from a wish in the user's units to one legal dim.

A plan is plain data, made from a config alone and without torch, so that it can be printed by `--dry-run` and
refused before a weight is downloaded.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol, TypedDict

from slicecli.errors import RequestError
from slicecli.family.dimensions import Dimensions
from slicecli.family.friendly_dims import preferred_dims, preferred_widths
from slicecli.family.schedule import PublishedSizes, Schedule
from slicecli.runtime.inputs import check_count, parse_bytes, parse_count, parse_text
from slicecli.runtime.options import Option

__all__ = [
    "DTYPE_BYTES",
    "DTYPE_CODES",
    "METHODS",
    "Layout",
    "Method",
    "SlicePlan",
    "SliceSizes",
    "Width",
    "WidthChange",
    "WidthPair",
    "check_method",
    "slice_sizes",
    "sliced_widths",
    "width_name",
]

Method = Literal["refit", "slicegpt"]
Layout = Literal["stock", "custom-code"]
METHODS: tuple[Method, ...] = ("refit", "slicegpt")

# dtypes by their names in safetensors files
DTYPE_CODES = {"float64": "F64", "float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DTYPE_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2}


class SliceSizes(Protocol):
    """What a slice of a model may be and weighs, for one method: `Dimensions` for the refit, or `PublishedSizes`."""

    @property
    def hidden_size(self) -> int:
        """The hidden size of the dense model."""
        ...

    @property
    def dim_multiple(self) -> int:
        """What every legal dim is a multiple of."""
        ...

    def legal_dims(self) -> range:
        """Return the dims a slice may have, in ascending order."""
        ...

    def check_dim(self, dim: int) -> None:
        """Refuse a dim that is not legal."""
        ...

    def parameters(self, dim: int | None = None) -> int:
        """Count the parameters: of the dense model as shipped, or of its slice at `dim`."""
        ...


@dataclass(frozen=True)
class Width:
    """How wide the slice shall be, in the user's units: one way to choose the hidden size, one for the MLP's width.

    With an MLP width, none has to be: the hidden size then stays. A schedule is as
    `slicecli.family.schedule.read_schedule` takes it.
    """

    dim: int | None = Option("--dim", "Hidden size to keep.", reads=int, metavar="N").field()
    sparsity: float | None = Option(
        "--sparsity", "Instead: fraction of the hidden size to remove; see --of.", reads=float, metavar="F"
    ).field()
    target_parameters: int | None = Option(
        "--target-params", "Instead: maximum number of parameters.", reads=parse_count, metavar="6B"
    ).field()
    memory: int | None = Option(
        "--memory", "Instead: maximum bytes of the weights.", reads=parse_bytes, metavar="12GiB"
    ).field()
    of: Literal["hidden", "parameters"] = Option(
        "--of",
        "What --sparsity is a fraction of: the hidden size, or the parameters, which makes it a target like "
        "--target-params.",
        default="hidden",
        choices=("hidden", "parameters"),
    ).field()
    shape: Literal["auto", "width", "mlp"] = Option(
        "--shape",
        "How a target of parameters or memory is met: by the hidden size alone (width), by fewer MLP channels alone "
        "(mlp), or by the pair of both that loses least, judged from the calibration text (auto).",
        default="auto",
        choices=("auto", "width", "mlp"),
    ).field()
    multiple_of: int | None = Option(
        "--multiple-of",
        "With --sparsity, --target-params and --memory: choose among multiples of this number.  [default: 256, 128, 64 "
        "or 32, the largest that is a small step for the model]",
        reads=int,
        metavar="N",
    ).field()
    schedule: str | None = Option(
        "--schedule",
        "slicegpt: instead of one width, fractions to remove from the first to the last block, or a file with the "
        "width at each sublayer of each block.  [default: constant]",
        reads=parse_text,
        metavar="constant|linear:S0:S1|FILE.json",
    ).field()
    mlp_dim: int | None = Option(
        "--mlp-dim",
        "MLP channels to keep; of a mixture, those of each routed expert, and its other MLPs keep the same share. "
        "Alone, it leaves the hidden size as it is.",
        reads=int,
        metavar="M",
    ).field()
    mlp_sparsity: float | None = Option(
        "--mlp-sparsity", "Instead: fraction of the MLP channels to remove.", reads=float, metavar="F"
    ).field()

    def __post_init__(self) -> None:
        if self.schedule == "constant":  # one width, which another option gives
            object.__setattr__(self, "schedule", None)
        wishes = (self.dim, self.sparsity, self.target_parameters, self.memory, self.schedule)
        given = [value for value in wishes if value is not None]
        if len(given) > 1 or not (given or self.chooses_mlp):
            raise RequestError(
                "No width was chosen." if not given else "The width was chosen more than once.",
                "Use exactly one of --dim, --sparsity, --target-params, --memory and --schedule.",
            )
        check_count(self.multiple_of, "A multiple of {} is", "Use --multiple-of")
        if self.multiple_of is not None and self.dim is not None:
            raise RequestError("--multiple-of has no effect on --dim.", "Leave out one of them.")
        if self.mlp_dim is not None and self.mlp_sparsity is not None:
            raise RequestError("The MLP's width was chosen twice.", "Use one of --mlp-dim and --mlp-sparsity.")
        removed_of = "parameters" if self.of == "parameters" else "hidden size"
        for share, what in ((self.sparsity, removed_of), (self.mlp_sparsity, "MLP channels")):
            if share is not None and not 0 < share < 1:
                raise RequestError(f"A sparsity of {share} is not a fraction of the {what}.", "Use 0 < F < 1.")
        if self.of != "hidden" and self.sparsity is None:
            raise RequestError(f"--of {self.of} has no effect without --sparsity.", "Leave it out.")
        if self.shape != "auto" and not self.is_target:
            raise RequestError(
                f"--shape {self.shape} has no effect without a target.",
                "Use it with --target-params, --memory or --sparsity --of parameters.",
            )
        if self.shape == "mlp" and self.chooses_mlp:
            raise RequestError("--shape mlp chooses the MLP's width.", "Leave out --mlp-dim and --mlp-sparsity.")

    @property
    def is_target(self) -> bool:
        """Whether it bounds parameters or bytes, which several widths can meet."""
        return self.target_parameters is not None or self.memory is not None or self.of == "parameters"

    @property
    def chooses_mlp(self) -> bool:
        """Whether a width of the MLP is given."""
        return self.mlp_dim is not None or self.mlp_sparsity is not None

    @property
    def changes_mlp(self) -> bool:
        """Whether the MLPs are to be sliced."""
        return self.chooses_mlp or self.shape == "mlp"

    def resolve_mlp(self, dimensions: Dimensions) -> int | None:
        """Return the MLP width that meets the wish; `None` where the MLPs stay whole.

        A width is taken as it is or refused; a sparsity goes to the nearest, of those that kernels and formats can
        use.
        """
        if not self.chooses_mlp:
            return None
        if self.mlp_dim is not None:
            dimensions.check_mlp_dim(self.mlp_dim)
            found = self.mlp_dim
        else:
            assert self.mlp_sparsity is not None
            dimensions.require_sliceable_mlps()
            wish = (1 - self.mlp_sparsity) * dimensions.mlp_size
            legal = preferred_widths(dimensions.legal_mlp_dims(), dimensions.mlp_size)
            found = min(legal, key=lambda width: (abs(width - wish), width))
        return None if found == dimensions.mlp_size else found

    def resolve(self, sizes: SliceSizes, bytes_per_parameter: int) -> int:
        """Return the legal dim that meets the wish, of all but a schedule.

        A dim is taken as it is or refused. A sparsity goes to the nearest preferred dim, a target to the largest that
        fits (`preferred_dims`).

        Args:
            bytes_per_parameter: Of the dtype that will be written.
        """
        if self.dim is not None:
            sizes.check_dim(self.dim)
            return self.dim
        if self.sparsity is None and self.target_parameters is None and self.memory is None:
            if sizes.hidden_size not in sizes.legal_dims():
                raise RequestError("Nothing would be removed.", "Choose a smaller MLP width, or a --dim.")
            return sizes.hidden_size
        legal = preferred_dims(sizes, self.multiple_of)
        if not legal:
            what = "" if self.multiple_of is None else f" that {self.multiple_of} divides"
            raise RequestError(f"This model has no legal dim{what} below its hidden size.")
        if not self.is_target:
            assert self.sparsity is not None
            wish = (1 - self.sparsity) * sizes.hidden_size
            return min(legal, key=lambda dim: (abs(dim - wish), dim))
        limit = self.most_parameters(sizes, bytes_per_parameter)
        fitting = [dim for dim in legal if sizes.parameters(dim) <= limit]
        if not fitting:
            smallest = sizes.parameters(legal[0])
            what = "parameters" if self.memory is None else "parameters' worth of memory"
            raise RequestError(
                f"No slice of this model fits in {limit:,} {what}.",
                f"The smallest slice, of dim {legal[0]}, has {smallest:,} parameters.",
            )
        return fitting[-1]

    def most_parameters(self, sizes: SliceSizes, bytes_per_parameter: int) -> int:
        """Return the most parameters that a target allows."""
        if self.target_parameters is not None:
            return self.target_parameters
        if self.memory is not None:
            return self.memory // bytes_per_parameter
        assert self.sparsity is not None
        return math.floor((1 - self.sparsity) * sizes.parameters())


class WidthPair(NamedTuple):
    """Two widths of a slice: k, and m, which is `None` where the MLPs stay whole."""

    dim: int
    mlp_dim: int | None

    @property
    def width(self) -> Width:
        """The wish for just these widths."""
        return Width(self.dim, mlp_dim=self.mlp_dim)


class WidthChange(TypedDict):
    """A width of the dense model, and of the slice."""

    dense: int
    sliced: int


@dataclass(frozen=True)
class SlicePlan:
    """One slice, decided.

    Attributes:
        method: How weights are made: by the `refit`, or as SliceGPT does.
        is_tied: Whether the slice shares one table between embedding and head.
        layout: `stock`, a checkpoint that transformers loads without custom code, or `custom-code`.
        dim: k; of a schedule of several widths, their mean.
        dtype: Dtype of the written weights.
        dense_parameters: Parameters of the dense model as shipped.
        schedule: The widths of the published method; `None` for the refit, which has one.
        schedule_name: How they were asked for, without the folder of a file; empty where that was by one dim.
        written_type: The model type of the class it is written in, in its config.
        activation: The activation of its MLPs, as `hidden_act` names it.
        mlp_size: MLP channels of the dense model where some of them are removed; otherwise `None`.
        mlp_dim: m, how many of them stay; likewise.
        other_mlp_widths: Where MLPs of the model have other widths besides, those by their declared names.
    """

    model: str
    model_type: str
    adapter: str
    hidden_size: int
    dim: int
    dtype: str
    dense_parameters: int
    sliced_parameters: int
    dense_dtype: str
    method: Method = "refit"
    layout: Layout = "stock"
    is_tied: bool = False
    schedule: Schedule | None = None
    schedule_name: str = ""
    written_type: str = ""
    activation: str = "silu"
    mlp_size: int | None = None
    mlp_dim: int | None = None
    other_mlp_widths: Mapping[str, WidthChange] = field(default_factory=dict)

    @property
    def sparsity(self) -> float:
        """s, the fraction of the hidden size removed."""
        return 1 - self.dim / self.hidden_size

    @property
    def dense_bytes(self) -> int:
        """Bytes of the dense weights."""
        return self.dense_parameters * DTYPE_BYTES[self.dense_dtype]

    @property
    def sliced_bytes(self) -> int:
        """Bytes of the sliced weights."""
        return self.sliced_parameters * DTYPE_BYTES[self.dtype]


def slice_sizes(dimensions: Dimensions, method: Method, slice_head: bool | None = None) -> SliceSizes:
    """Return what a slice of a model may be and weighs, by one method."""
    return dimensions if method == "refit" else PublishedSizes(dimensions, slice_head)


def width_name(dim: int, mlp_dim: int | None) -> str:
    """Return what the widths of a slice add to its name."""
    return f"dim{dim}" + ("" if mlp_dim is None else f"-mlp{mlp_dim}")


def sliced_widths(record: Mapping[str, Any]) -> list[str]:
    """Name the widths of a slice that differ from the dense model's, from its record."""
    keeps_hidden_size = record["mlp_dim"] is not None and record["dim"] == record["hidden_size"]
    widths = [] if keeps_hidden_size else [f"hidden size {record['dim']}"]
    return widths + ([] if record["mlp_dim"] is None else [f"MLP width {record['mlp_dim']}"])


def check_method(
    method: Method,
    slice_head: bool | None = None,
    has_schedule: bool = False,
    has_orientation: bool = False,
    changes_mlp: bool = False,
) -> None:
    """Refuse options of one method where the other is asked for."""
    if method == "slicegpt":
        if changes_mlp:
            raise RequestError(
                "--mlp-dim, --mlp-sparsity and --shape mlp require the refit; slicegpt keeps all MLP channels.",
                "Leave out --method slicegpt.",
            )
        return
    given = {
        "--schedule": has_schedule,
        "--slice-head": slice_head is not None,
        "--final-orientation": has_orientation,
    }
    for name, is_given in given.items():
        if is_given:
            raise RequestError(
                f"{name} requires the slicegpt method; the refit has one basis and one width.", "Add --method slicegpt."
            )
