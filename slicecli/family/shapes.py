"""Which pairs of widths meet a target: the hidden size beside the MLP's, at as many parameters as are allowed.

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
    dimensions.require_sliceable_mlps()
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

    @functools.cache
    def classes_with(mlp_dim: int) -> SliceClasses | None:
        return classes and classes.with_mlp_dim(mlp_dim)

    def count(dim: int, mlp_dim: int) -> int:
        narrower = classes_with(mlp_dim)
        return (narrower.at(dim) if narrower else dimensions.with_mlp_dim(mlp_dim)).parameters(dim)

    return count
