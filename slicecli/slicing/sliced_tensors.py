"""From a family's declaration to the tensors of a slice: which dense tensors go through which map.

These functions know the declaration and nothing of data: they take dense tensors by name and return sliced ones by
name. The refit calls them with fitted matrices, `project` with the plain projection, so both treat norms, biases,
transposed weights and experts alike.

Symbols: docs/notation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from slicecli.adapters import Branch, Experts, Linear
from slicecli.family.dimensions import Dimensions
from slicecli.linalg.basis import Basis
from slicecli.linalg.sliced_maps import (
    fold_bias,
    fold_reader,
    projected_table,
    projected_writer,
    projection_for_readers,
    rows_times,
    usual_gain,
)
from slicecli.linalg.tied_table import Tie, tie

__all__ = [
    "Cut",
    "WeightReader",
    "channel_cuts",
    "expert_cuts",
    "final_norm_weight_and_bias",
    "fold_head",
    "matrix_of",
    "neutral_norm",
    "norm_weight_and_bias",
    "project",
    "project_writers",
    "published_reader",
    "slice_embeddings",
    "sliced_readers",
    "stored_form",
    "stored_writers",
    "tie_of",
    "tied_head",
]

Tensors = dict[str, torch.Tensor]
TIED_TABLE = 0  # the first that is declared is the one a head shares


class WeightReader(Protocol):
    """Reads dense parameters and persistent buffers by their names in the model."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return one of them."""
        ...

    def module(self, path: str) -> Tensors:
        """Return all of them below a module, by their names inside it."""
        ...


def matrix_of(linear: Linear, weights: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return a linear's weight as (outputs, inputs), however it is stored."""
    weight = weights[f"{linear.path}.weight"]
    return weight.mT if linear.is_transposed else weight


def stored_form(linear: Linear, matrix: torch.Tensor) -> torch.Tensor:
    """Return a matrix (outputs, inputs) as the linear stores it."""
    return matrix.mT.contiguous() if linear.is_transposed else matrix.contiguous()


def norm_weight_and_bias(
    dimensions: Dimensions, path: str, weights: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return g and β of a norm as they act, float64; `None` for what the family's norms do not have."""
    norm = dimensions.adapter.norm
    weight = weights[f"{path}.weight"].double() + norm.weight_offset if norm.has_weight else None
    bias = weights[f"{path}.bias"].double() if norm.has_bias else None
    return weight, bias


def neutral_norm(dimensions: Dimensions, path: str, dim: int, bias: float = 0.0, gain: float = 1.0) -> Tensors:
    """Return the tensors of a norm over `dim` coordinates that multiplies by `gain` and adds `bias`."""
    norm = dimensions.adapter.norm
    tensors = {}
    if norm.has_weight:
        tensors[f"{path}.weight"] = torch.full((dim,), gain - norm.weight_offset)
    if norm.has_bias:
        tensors[f"{path}.bias"] = torch.full((dim,), bias)
    return tensors


def sliced_readers(
    dimensions: Dimensions,
    branches: Sequence[Branch],
    weights: Mapping[str, torch.Tensor],
    matrix: torch.Tensor,
    dtype: torch.dtype,
) -> Tensors:
    """Return the sliced norms and readers of branches that read the same stream.

    Args:
        matrix: A, float64 of shape (d, k).
        dtype: Dtype to round to.
    """
    tensors: Tensors = {}
    for path in dict.fromkeys(branch.norm for branch in branches):
        weight, bias = norm_weight_and_bias(dimensions, path, weights)
        gain = usual_gain(weight)
        scaled = matrix / gain
        carries_bias = False
        for branch in branches:
            if branch.norm != path:
                continue
            for reader in branch.readers:
                carries_bias |= _fold_linear(tensors, dimensions, reader, weights, weight, bias, scaled, dtype)
            if branch.experts is not None:
                name = branch.experts.reader_path
                tensors[name] = fold_reader(weights[name], weight, bias, scaled, has_bias=False, dtype=dtype)
                carries_bias = True
        tensors |= neutral_norm(dimensions, path, matrix.shape[1], float(carries_bias), gain)
    return tensors


def final_norm_weight_and_bias(
    dimensions: Dimensions, weights: WeightReader, device: torch.device
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return g and β of the norm before the head, as `norm_weight_and_bias` does."""
    norm, path = dimensions.adapter.norm, dimensions.adapter.final_norm
    names = [f"{path}.weight"] * norm.has_weight + [f"{path}.bias"] * norm.has_bias
    return norm_weight_and_bias(dimensions, path, {name: weights.tensor(name).to(device) for name in names})


def fold_head(dimensions: Dimensions, weights: WeightReader, matrix: torch.Tensor, dtype: torch.dtype) -> Tensors:
    """Return the sliced final norm and head.

    Args:
        matrix: A, float64 of shape (d, k), on the device that computes.
        dtype: Dtype to round to.
    """
    adapter, head = dimensions.adapter, dimensions.adapter.head
    weight, bias = final_norm_weight_and_bias(dimensions, weights, matrix.device)
    names = [f"{head.path}.weight"] + [f"{head.path}.bias"] * dimensions.has_bias(head)
    dense = {name: weights.tensor(name).to(matrix.device) for name in names}
    tensors: Tensors = {}
    gain = usual_gain(weight)
    carries_bias = _fold_linear(tensors, dimensions, head, dense, weight, bias, matrix / gain, dtype)
    return tensors | neutral_norm(dimensions, adapter.final_norm, matrix.shape[1], float(carries_bias), gain)


def published_reader(
    dimensions: Dimensions,
    reader: Linear,
    weights: Mapping[str, torch.Tensor],
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    basis: torch.Tensor,
    dtype: torch.dtype,
) -> Tensors:
    """Return a reader behind a norm of the dense width: W diag(g) Q, and b + W β wherever the family's norms have a β.

    Args:
        norm_weight: g, shape (d,); `None` stands for ones.
        norm_bias: β, shape (d,), where the family's norms have one.
        basis: Q at this place, float64 of shape (d, k).
        dtype: Dtype to round to.
    """
    dense = matrix_of(reader, weights)
    # the bias goes into a bias of its own, which the reader gets if it has none
    folded = fold_reader(dense, norm_weight, None, basis, has_bias=True, dtype=dtype)
    tensors = {f"{reader.path}.weight": stored_form(reader, folded)}
    if dimensions.has_bias(reader) or norm_bias is not None:
        own = weights[f"{reader.path}.bias"] if dimensions.has_bias(reader) else dense.new_zeros(len(dense))
        tensors[f"{reader.path}.bias"] = fold_bias(own, dense, norm_bias).to(dtype)
    return tensors


def project_writers(
    dimensions: Dimensions, branches: Sequence[Branch], weights: Mapping[str, torch.Tensor], basis: torch.Tensor
) -> Tensors:
    """Return the writers of branches as the rotation alone makes them, float64, weights as (outputs, inputs).

    Args:
        basis: Q, float64 of shape (d, k).
    """
    tensors: Tensors = {}
    for branch in branches:
        writer = branch.writer
        if writer is not None:
            tensors[f"{writer.path}.weight"] = projected_writer(matrix_of(writer, weights), basis)
            if dimensions.has_bias(writer):
                tensors[f"{writer.path}.bias"] = projected_writer(weights[f"{writer.path}.bias"], basis)
        if branch.experts is not None:
            name = branch.experts.writer_path
            tensors[name] = projected_writer(weights[name], basis)
    return tensors


@dataclass(frozen=True)
class Cut:
    """What is kept of a parameter.

    Attributes:
        axis: The axis on which it has channels.
        stays: The indices that stay, int64 in ascending order, shape (indices,); of fused experts, whose axis is not
            the first, each expert's own, shape (experts, indices).
    """

    axis: int
    stays: torch.Tensor

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """Return the parameter without the rest."""
        if self.stays.dim() == 1:
            return parameter.index_select(self.axis, self.stays)
        shape = [-1 if axis == self.axis else size for axis, size in enumerate(parameter.shape)]
        stays = self.stays.unsqueeze(3 - self.axis).expand(*shape)
        return parameter.gather(self.axis, stays)


def channel_cuts(dimensions: Dimensions, branch: Branch, channels: torch.Tensor) -> dict[str, Cut]:
    """Return what is kept of each parameter of an MLP, the linear writer and its readers, that has channels.

    Args:
        channels: The channels that stay, int64 in ascending order.
    """
    writer = branch.writer
    assert writer is not None
    cuts = {f"{writer.path}.weight": Cut(int(not writer.is_transposed), channels)}
    for reader in branch.readers:
        groups = dimensions.groups_of(reader.width, writer.width)
        if groups:
            stays = _in_groups(channels, groups, dimensions.width(writer.width))
            cuts[f"{reader.path}.weight"] = Cut(int(reader.is_transposed), stays)
            if dimensions.has_bias(reader):
                cuts[f"{reader.path}.bias"] = Cut(0, stays)
    return cuts


def expert_cuts(dimensions: Dimensions, experts: Experts, channels: torch.Tensor) -> dict[str, Cut]:
    """Return what is kept of the two parameters of a mixture.

    Args:
        channels: The channels of each expert that stay, int64 of shape (experts, channels), in ascending order.
    """
    groups = dimensions.groups_of(experts.reader_width, experts.writer_width)
    stays = _in_groups(channels, groups, dimensions.width(experts.writer_width))
    return {experts.writer_path: Cut(2, channels), experts.reader_path: Cut(1, stays)}


def _in_groups(channels: torch.Tensor, groups: int, size: int) -> torch.Tensor:
    """Return the places of channels in a reader that has all of them several times, side by side."""
    return torch.cat([channels + group * size for group in range(groups)], dim=-1)


def stored_writers(branches: Sequence[Branch], tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Return the tensors of writers, whose weights are given as (outputs, inputs), as their modules store them."""
    writers = {f"{branch.writer.path}.weight": branch.writer for branch in branches if branch.writer is not None}
    return {name: stored_form(writers[name], tensor) if name in writers else tensor for name, tensor in tensors.items()}


def tie_of(
    dimensions: Dimensions, weights: WeightReader, basis: torch.Tensor, second_moment: torch.Tensor | None = None
) -> Tie:
    """Return how one table serves as embedding and head of a slice.

    Args:
        basis: Q, float64 of shape (d, k), on the device that computes.
        second_moment: As of `slicecli.linalg.tied_table.tie`.
    """
    gain, bias = final_norm_weight_and_bias(dimensions, weights, basis.device)
    assert gain is not None  # the norms of tied slices have a weight
    adapter = dimensions.adapter
    return tie(basis, gain, bias, second_moment, adapter.norm.is_centred, adapter.scales_embeddings_by_width)


def slice_embeddings(
    dimensions: Dimensions,
    weights: WeightReader,
    basis: torch.Tensor,
    dtype: torch.dtype,
    tied: Tie | None = None,
) -> Tensors:
    """Return the sliced embedding tables.

    Args:
        basis: Q, float64 of shape (d, k), on the device that computes.
        dtype: Dtype to round to.
        tied: How one of them serves as the head too.
    """
    adapter = dimensions.adapter
    tables = {}
    for number, declared in enumerate(adapter.embeddings):
        name = f"{declared.path}.weight"
        table = weights.tensor(name).to(basis.device)
        if tied is not None and number == TIED_TABLE:
            tables[name] = rows_times(table, tied.table_map, dtype)
        else:
            tables[name] = projected_table(table, basis, adapter.scales_embeddings_by_width, dtype)
    return tables


def tied_head(dimensions: Dimensions, weights: WeightReader, gain: torch.Tensor, bias: torch.Tensor | None) -> Tensors:
    """Return the final norm of a tied slice, and the head's bias where it has one; its weight is the embedding table.

    Args:
        gain: What the norm multiplies by, float64 of shape (k,).
        bias: What it adds, of the same form, where the family's norms have a bias.
    """
    adapter, head = dimensions.adapter, dimensions.adapter.head
    tensors = {f"{adapter.final_norm}.weight": gain - adapter.norm.weight_offset}
    if bias is not None:
        tensors[f"{adapter.final_norm}.bias"] = bias
    if dimensions.has_bias(head):
        tensors[f"{head.path}.bias"] = weights.tensor(f"{head.path}.bias")
    return tensors


def project(
    dimensions: Dimensions,
    weights: WeightReader,
    basis: Basis,
    dim: int,
    dtype: torch.dtype,
    sink: Callable[[str, torch.Tensor], None],
) -> None:
    """Slice a whole model by projection alone, without any calibration text.

    At `dim` = d the result computes exactly what the dense model does, which is how a declaration is proved.

    Args:
        dtype: Dtype of the result.
    """
    adapter = dimensions.adapter
    leading = basis.leading(dim)
    tied = tie_of(dimensions, weights, leading) if dimensions.keeps_tie else None
    if tied is not None:
        leading = tied.axes
    matrix = projection_for_readers(leading)
    for name, tensor in slice_embeddings(dimensions, weights, leading, dtype, tied).items():
        sink(name, tensor)
    for index, block in enumerate(dimensions.declared_blocks):
        path = f"{adapter.blocks}.{index}"
        dense = weights.module(path)
        tensors = sliced_readers(dimensions, block.branches, dense, matrix, dtype)
        tensors |= stored_writers(block.branches, project_writers(dimensions, block.branches, dense, leading))
        tensors |= {one.path: dense[one.path] for one in block.passed_through}
        for name, tensor in tensors.items():
            sink(f"{path}.{name}", tensor.to(dtype))
    head = (
        tied_head(dimensions, weights, tied.gain, tied.bias) if tied else fold_head(dimensions, weights, matrix, dtype)
    )
    for name, tensor in head.items():
        sink(name, tensor.to(dtype))


def _fold_linear(
    tensors: Tensors,
    dimensions: Dimensions,
    reader: Linear,
    weights: Mapping[str, torch.Tensor],
    norm_weight: torch.Tensor | None,
    norm_bias: torch.Tensor | None,
    matrix: torch.Tensor,
    dtype: torch.dtype,
) -> bool:
    """Add a sliced reader to `tensors`; return whether its weight carries the norm's bias."""
    has_bias = dimensions.has_bias(reader)
    dense = matrix_of(reader, weights)
    folded = fold_reader(dense, norm_weight, norm_bias, matrix, has_bias, dtype)
    tensors[f"{reader.path}.weight"] = stored_form(reader, folded)
    if has_bias:
        tensors[f"{reader.path}.bias"] = fold_bias(weights[f"{reader.path}.bias"], dense, norm_bias).to(dtype)
    return not has_bias
