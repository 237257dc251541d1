"""How wide the stream is at each norm site of a slice whose basis changes from site to site (SliceGPT).

Such a slice has one width for each norm input: for each block the width where each of its sublayers reads the stream
(attention and MLP of a sequential block, or both at once), and the width before the head. What writes the stream
writes it at the next site's width. From the widths and the declaration follow all shapes, without torch.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from slicecli.errors import RequestError, UnsupportedModelError
from slicecli.family.dimensions import EXPERTS_REASON, Dimensions, name_nearest, nearest_in, why_outside
from slicecli.runtime.inputs import local_path
from slicecli.runtime.json import load_json

__all__ = ["PublishedSizes", "Schedule", "read_schedule", "slices_head"]


@dataclass(frozen=True)
class Schedule:
    """The width of the stream at every norm site.

    Attributes:
        blocks: For each block the width at each of its sublayers.
    """

    blocks: tuple[tuple[int, ...], ...]
    head: int

    @classmethod
    def constant(cls, dimensions: Dimensions, dim: int, head: int | None = None) -> Schedule:
        """Return the schedule of one width for all blocks, and for the head unless that has its own."""
        blocks = tuple((dim,) * len(block.sublayers) for block in dimensions.declared_blocks)
        return cls(blocks, dim if head is None else head)

    @property
    def site_widths(self) -> tuple[int, ...]:
        """The widths in order, the head's last; `Parameter.site` counts them."""
        return (*(width for block in self.blocks for width in block), self.head)

    @property
    def dim(self) -> int:
        """The mean width of the blocks, rounded: the k that stands for the whole slice."""
        widths = self.site_widths[:-1]
        return round(sum(widths) / len(widths))

    def shortcuts(self, block: int) -> list[tuple[int, int]]:
        """Return the widths before and after each sublayer of a block."""
        following = self.blocks[block + 1][0] if block + 1 < len(self.blocks) else self.head
        widths = (*self.blocks[block], following)
        return list(pairwise(widths))

    def shapes(self, dimensions: Dimensions) -> dict[str, tuple[int, ...]]:
        """Return the shape of every parameter of the slice by name.

        Norms have none left: weights and biases of norms move into the linears behind them, which get a bias where
        they had none. Every sublayer has a shortcut.
        """
        widths = self.site_widths
        adapter = dimensions.adapter
        declared = [one for one in dimensions.declared_parameters() if one.role != "norm"]
        shapes = {one.name: tuple(widths[one.site] if size is None else size for size in one.shape) for one in declared}
        if adapter.norm.has_bias:
            heads = [(adapter.head.path, dimensions.width(adapter.head.width))]
            readers = [
                (f"{adapter.blocks}.{index}.{reader.path}", dimensions.width(reader.width))
                for index, block in enumerate(dimensions.declared_blocks)
                for branch in block.branches
                for reader in branch.readers
            ]
            shapes |= {f"{path}.bias": (width,) for path, width in readers + heads}
        for index in range(len(self.blocks)):
            for sublayer, (before, after) in enumerate(self.shortcuts(index)):
                shapes[f"{adapter.blocks}.{index}.shortcuts.{sublayer}.weight"] = (after, before)
        return shapes

    def check(self, dimensions: Dimensions) -> None:
        """Refuse a schedule that does not fit a model."""
        _require_published(dimensions)
        size = dimensions.hidden_size
        sublayers = [len(block.sublayers) for block in dimensions.declared_blocks]
        if [len(block) for block in self.blocks] != sublayers:
            found = (
                f"{len(self.blocks)} blocks"
                if len(self.blocks) != len(sublayers)
                else "blocks with other numbers of sublayers"
            )
            raise RequestError(
                f"The schedule has {found}, but the model has {len(sublayers)} blocks of {max(sublayers)} sublayers.",
                "For each block, list the width of the residual stream at each of its sublayers.",
            )
        for site, width in enumerate(self.site_widths):
            if not 0 < width <= size:
                raise RequestError(
                    f"The schedule has a width of {width} at norm site {site}.", f"Widths range from 1 to {size}."
                )
        if dimensions.adapter.keeps_width and self.head != self.site_widths[0]:
            raise RequestError(
                f"{dimensions.adapter.name} models must start and end with the same width, but the schedule starts "
                f"with {self.site_widths[0]} and ends with {self.head}.",
                "Use --slice-head, or a schedule that ends with its first width.",
            )
        multiple = dimensions.experts_multiple(size)
        for index, block in enumerate(dimensions.declared_blocks):
            for sublayer, (before, after) in zip(block.sublayers, self.shortcuts(index), strict=True):
                if not any(branch.experts for branch in sublayer):
                    continue
                if before % multiple:
                    raise RequestError(
                        f"The schedule has a width of {before} before the experts of block {index}, but "
                        f"{EXPERTS_REASON}.",
                        name_nearest("width", nearest_in(range(multiple, size + 1, multiple), before)),
                    )
                if before != after:
                    raise RequestError(
                        f"The residual stream is {before} wide before the experts of block {index} and {after} after "
                        "them, but experts write the width they read.",
                        "Use --slice-head, or a schedule that keeps the width there.",
                    )


class PublishedSizes:
    """What a slice of the published method may be and weighs, for schedules of one width.

    Attributes:
        dim_multiple: Every legal dim is a multiple of it; no config class refuses any, but the product of experts may.
    """

    def __init__(self, dimensions: Dimensions, head: bool | None = None) -> None:
        _require_published(dimensions)
        self._dimensions = dimensions
        self._slices_head = slices_head(dimensions, head)
        self.hidden_size = dimensions.hidden_size
        self.dim_multiple = dimensions.experts_multiple(self.hidden_size)

    def schedule(self, dim: int) -> Schedule:
        """Return the schedule of one width."""
        return Schedule.constant(self._dimensions, dim, dim if self._slices_head else self.hidden_size)

    def legal_dims(self) -> range:
        """Return the dims a slice may have, in ascending order."""
        return range(self.dim_multiple, self.hidden_size, self.dim_multiple)

    def check_dim(self, dim: int) -> None:
        """Refuse a dim that is no slice."""
        if dim in self.legal_dims():
            return
        of_experts = f"A dim of {dim} is not legal for a model with experts: {EXPERTS_REASON}."
        cause = why_outside(dim, self.hidden_size) or of_experts
        raise RequestError(cause, name_nearest("dim", nearest_in(self.legal_dims(), dim)))

    def parameters(self, dim: int | None = None) -> int:
        """Count the parameters: of the dense model as shipped, or of its slice at `dim`."""
        if dim is None:
            return self._dimensions.parameters()
        return count(self.schedule(dim).shapes(self._dimensions))


def count(shapes: dict[str, tuple[int, ...]]) -> int:
    """Count the elements of all parameters."""
    return sum(math.prod(shape) for shape in shapes.values())


def slices_head(dimensions: Dimensions, wanted: bool | None) -> bool:
    """Say whether the input of the head is sliced: as wanted, else as published (not), where that is possible.

    Experts write the width they read, so behind experts the width before the head is that of the last block; and some
    families' models end with the width they start with.
    """
    if wanted is not None:
        return wanted
    return dimensions.adapter.keeps_width or any(
        branch.experts for branch in dimensions.declared_blocks[-1].sublayers[-1]
    )


def read_schedule(text: str, dimensions: Dimensions, head: bool | None = None) -> Schedule:
    """Read a schedule from the command line.

    Args:
        text: `linear:S0:S1`, the fractions of the hidden size that the first and the last block lose; or the name of
            a JSON file with `blocks`, for each block the width at each of its sublayers, and perhaps `head`.
    """
    size = dimensions.hidden_size
    linear = re.fullmatch(r"linear:(\d*\.?\d+):(\d*\.?\d+)", text)
    if linear is not None:
        first, last = float(linear[1]), float(linear[2])
        if not (0 <= first < 1 and 0 <= last < 1):
            raise RequestError(f"{text!r} does not give two fractions of the hidden size.", "Use 0 <= S < 1.")
        steps, multiple = max(dimensions.blocks - 1, 1), dimensions.experts_multiple(size)
        sparsities = [first + (last - first) * index / steps for index in range(dimensions.blocks)]
        blocks = tuple(
            (max(multiple, round((1 - sparsity) * size / multiple) * multiple),) * len(block.sublayers)
            for sparsity, block in zip(sparsities, dimensions.declared_blocks, strict=True)
        )
        own_head = None
    else:
        blocks, own_head = _read_file(local_path(text))
        if own_head is not None and head is not None:
            raise RequestError("The schedule file already sets the width of the head.", "Leave out --slice-head.")
    if own_head is None:
        own_head = blocks[-1][-1] if blocks and blocks[-1] and slices_head(dimensions, head) else size
    schedule = Schedule(blocks, own_head)
    schedule.check(dimensions)
    return schedule


def _read_file(path: Path) -> tuple[tuple[tuple[int, ...], ...], int | None]:
    remedy = 'Write {"blocks": [[48, 40], [48, 40]], "head": 64}, or use linear:S0:S1.'
    try:
        content = load_json(path)
    except (OSError, ValueError):
        raise RequestError(f"The schedule {path.name!r} does not exist or cannot be read.", remedy) from None
    blocks = content.get("blocks") if isinstance(content, dict) else None
    head = content.get("head") if isinstance(content, dict) else None
    if not (
        isinstance(blocks, list)
        and all(isinstance(block, list) and _are_widths(block) for block in blocks)
        and (head is None or _are_widths([head]))
        and not content.keys() - {"blocks", "head"}
    ):
        raise RequestError(f"{path.name!r} is not a schedule.", remedy)
    return tuple(tuple(block) for block in blocks), head


def _are_widths(values: Sequence[object]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _require_published(dimensions: Dimensions) -> None:
    """Refuse a declaration whose blocks cannot be taken apart into stream and branches."""
    if dimensions.shortcut_obstacle:
        raise UnsupportedModelError(
            f"The slicegpt method cannot slice this model: {dimensions.shortcut_obstacle}",
            "Use --method refit.",
        )
    for block in dimensions.declared_blocks:
        for branch in block.branches:
            if branch.experts is not None and dimensions.adapter.norm.has_bias:
                raise UnsupportedModelError(
                    f"Adapter {dimensions.adapter.name!r} has experts after a norm with a bias, which this method "
                    "cannot fold into them.",
                    "Use --method refit.",
                )
            if not branch.module and not branch.activation:
                raise UnsupportedModelError(
                    f"Adapter {dimensions.adapter.name!r} does not declare what lies between reader and writer of the "
                    f"branch after {branch.norm}.",
                    "Declare the branch's module or activation, or use --method refit.",
                )
