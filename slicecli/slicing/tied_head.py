"""The tied head of a slice in the making: its axes before the first block, its final norm after the last.

Symbols: docs/notation.md.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from slicecli.linalg.normal_equations import add_outer, add_square, widen
from slicecli.linalg.tied_table import FinalNormSums, Tie, fit_final_norm, token_metric
from slicecli.slicing import modules
from slicecli.slicing.activations import Stream
from slicecli.slicing.context import Batches, DenseModel, DenseStatistics, Target
from slicecli.slicing.sliced_tensors import final_norm_weight_and_bias, neutral_norm, tie_of, tied_head

__all__ = ["fit_tied_head", "measure_logits", "solve_tie"]


def solve_tie(dense: DenseModel, statistics: DenseStatistics, basis: torch.Tensor) -> Tie:
    """Return how one table serves as embedding and head of a slice, the same bits for all processes.

    Args:
        basis: Q, float64 of shape (d, k).
    """
    has_bias = dense.adapter.norm.has_bias

    def solution() -> list[torch.Tensor]:
        found = tie_of(dense.dimensions, dense.weights, basis, statistics.final_moment)
        return [found.axes, found.table_map, found.gain] + ([] if found.bias is None else [found.bias])

    shape = tuple(basis.shape)
    shapes = [shape, shape, shape[1:]] + [shape[1:]] * has_bias
    axes, table_map, gain, *bias = dense.processes.tensors_from_main(solution, shapes, dense.device)
    return Tie(axes, gain, bias[0] if has_bias else None, table_map)


def measure_logits(dense: DenseModel, batches: Batches) -> torch.Tensor | None:
    """Return G, which weighs errors of the head's input, once for all slices; `None` but on the main process.

    Returns:
        See `slicecli.linalg.tied_table.token_metric`.
    """
    if not dense.processes.is_main:
        return None
    table = dense.weights.tensor(f"{dense.adapter.head.path}.weight").to(dense.device)
    return token_metric(table, torch.bincount(batches.rows.flatten(), minlength=len(table)))


def fit_tied_head(
    dense: DenseModel,
    target: Target,
    stream: Stream,
    found: Tie,
    metric: torch.Tensor | None,
    held_out: Sequence[torch.Tensor],
) -> None:
    """Fit the final norm to the sliced stream as it is there, and hand it to the sink.

    Args:
        metric: As `measure_logits` returns it.
    """
    path = dense.adapter.final_norm
    norm = target.meta_model.get_submodule(path)
    modules.fill(norm, modules.below(path, neutral_norm(dense.dimensions, path, target.dim)), dense.device, dense.dtype)
    sums = [_empty(found), _empty(found)]
    for wide, narrow, mask in zip(stream, target.stream, held_out, strict=True):
        goal = _with_one(dense.normalise(wide).flatten(0, -2))
        given = _with_one(widen(norm(narrow)).flatten(0, -2))
        for one, chosen in zip(sums, (~mask, mask), strict=True):
            add_square(one.sliced, given[chosen])
            add_outer(one.crossed, goal[chosen], given[chosen])
    modules.clear(norm)
    for one in sums:
        dense.processes.sum_to_main(one.sliced, one.crossed)
    if metric is None:  # the head is only written
        return
    gain, bias = final_norm_weight_and_bias(dense.dimensions, dense.weights, dense.device)
    assert gain is not None
    fitted = fit_final_norm(found, gain, bias, metric, sums)
    for name, tensor in tied_head(dense.dimensions, dense.weights, *fitted).items():
        target.sink(name, tensor.to("cpu", target.dtype))


def _empty(found: Tie) -> FinalNormSums:
    width, dim = found.axes.shape
    return FinalNormSums(found.axes.new_zeros(dim + 1, dim + 1), found.axes.new_zeros(width + 1, dim + 1))


def _with_one(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1)
