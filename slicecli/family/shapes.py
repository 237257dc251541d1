"""Which pairs of widths meet a target: the hidden size beside the MLP's, at as many parameters as are allowed.

The count is bilinear: a channel more adds as many parameters as channels before, a number that is linear in the dim. So
two counts at each dim tell those of every pair.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from slicecli.errors import RequestError
from slicecli.family.dimensions import Dimensions
from slicecli.family.friendly_dims import preferred_dims, preferred_widths
from slicecli.family.slice_plan import Method, Width, WidthPair, slice_sizes
from slicecli.family.written_class import SliceClasses

__all__ = ["is_met_by_pairs", "pairs_within"]

PAIR_STEP = 1 / 16  # of the hidden size: the MLP's width fills what so large a step leaves


def is_met_by_pairs(width: Width, dimensions: Dimensions, method: Method) -> bool:
    """Say whether a wish may be met by the MLP's width too, of a model whose MLPs can be sliced or must be."""
    is_open = width.is_target and width.shape != "width" and not width.chooses_mlp and method == "refit"
    return is_open and (width.shape == "mlp" or not dimensions.mlp_obstacle)


def pairs_within(
    width: Width, dimensions: Dimensions, classes: SliceClasses | None, bytes_per_parameter: int
) -> list[WidthPair]:
    """Return the pairs of preferred widths that use up a target, from the widest stream to the widest MLP.

    One of the widths may be the dense model's.

    Args:
        width: A target.
        bytes_per_parameter: Of the dtype that will be written.

    Raises:
        RequestError: No pair fits.
    """
    dimensions.check_mlp_dim(1)  # refuses where no width is legal
    whole = dimensions.mlp_size
    sizes = classes.to_choose_in(width) if classes else slice_sizes(dimensions, "refit")
    limit = width.most_parameters(sizes, bytes_per_parameter)
    dims = {*preferred_dims(sizes, width.multiple_of, PAIR_STEP), dimensions.hidden_size}
    mlp_dims = {*preferred_widths(dimensions.legal_mlp_dims(), whole, multiple_of=width.multiple_of), whole}
    if width.shape == "mlp":
        dims = {dimensions.hidden_size}
    count = _counter(dimensions, classes)
    fitting = [(dim, mlp_dim) for dim in dims for mlp_dim in mlp_dims if count(dim, mlp_dim) <= limit]
    if not fitting:
        smallest = min(count(dim, mlp_dim) for dim in dims for mlp_dim in mlp_dims)
        raise RequestError(f"No slice of this model fits in {limit:,} parameters.", f"The smallest has {smallest:,}.")
    pairs: list[tuple[int, int]] = []
    for dim, mlp_dim in sorted(fitting, reverse=True):
        if not pairs or mlp_dim > pairs[-1][1]:  # no pair has both widths larger
            pairs.append((dim, mlp_dim))
    if pairs[0] == (dimensions.hidden_size, whole):
        raise RequestError(f"The dense model fits in {limit:,} parameters.", "Choose a smaller target.")
    return [WidthPair(dim, None if mlp_dim == whole else mlp_dim) for dim, mlp_dim in pairs]


def _counter(dimensions: Dimensions, classes: SliceClasses | None) -> Callable[[int, int], int]:
    """Return what counts the parameters of a pair."""
    narrow = [(dimensions.with_mlp_dim(mlp_dim), classes and classes.with_mlp_dim(mlp_dim)) for mlp_dim in (1, 2)]

    @functools.cache
    def counts_at(dim: int) -> tuple[int, int]:
        with_one, with_two = ((some.at(dim) if some else sizes).parameters(dim) for sizes, some in narrow)
        return with_one, with_two - with_one

    def count(dim: int, mlp_dim: int) -> int:
        with_one, per_channel = counts_at(dim)
        return with_one + (mlp_dim - 1) * per_channel

    return count
