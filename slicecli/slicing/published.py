"""The published method: a basis of its own at every place of the stream, by projection alone (SliceGPT).

One pass over the blocks. At each step the branches run on the sliced stream up to their writers; the dense writers
turn that into the stream of full width as slicing so far has left it; the principal directions of that stream are
the next basis. The writers are rotated into it, and a shortcut matrix takes the stream from the old basis to the new
one. Nothing is refitted and no dense stream runs beside the sliced one.

Where it departs from the published implementation it is more exact: the mean is taken out of the stream for LayerNorm
families only, the norm has the model's own ε and at least float32, products of bases are taken in float64, random
orientations are drawn uniformly from a seed, and each half of a block runs once.

Legend: d hidden size, x stream of the sliced model at full width, C its second moment, Q basis at a place (d, k),
y = Qᵀ x the sliced stream, W a writer, S = Qᵀ Q' the shortcut from a place to the next (arXiv 2401.15024, section 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from slicecli.adapters import Branch
from slicecli.schedule import Schedule
from slicecli.slicing import blocks as running
from slicecli.slicing.basis import principal_basis, random_rotation
from slicecli.slicing.folding import (
    final_norm_weight_and_bias,
    matrix_of,
    norm_weight_and_bias,
    published_reader,
    stored_form,
)
from slicecli.slicing.moments import add_outer, widen
from slicecli.slicing.state import Batches, DenseModel, Progress, Target
from slicecli.slicing.walk import (
    embedding_tables,
    enter,
    hand_over_block,
    hand_over_buffers,
    read_block,
    require_finite,
)

__all__ = ["Orientation", "Spectrum", "slice_published"]

Orientation = Literal["pca", "random"]
"""How the kept directions are turned among themselves: as PCA orders them, or at random, which spreads outliers."""


@dataclass(frozen=True)
class Spectrum:
    """The energy of the stream along the principal directions, the mean over all places.

    Attributes:
        shares: Share of the stream's second moment in the first so many directions, float64 of shape (d,).
        kept: Share in the slice.
    """

    shares: torch.Tensor
    kept: float

    def energy_kept(self, dim: int) -> float:
        """Return the share in the first `dim` directions."""
        return float(self.shares[dim - 1])


class _Bases:
    """Finds the basis of each place in turn, and keeps count of the energy."""

    def __init__(self, dense: DenseModel, orientation: Orientation, seed: int) -> None:
        self._dense = dense
        self._is_random = orientation == "random"
        self._generator = torch.Generator().manual_seed(seed)
        self._shares: list[torch.Tensor] = []
        self._kept: list[float] = []

    def find(self, streams: Sequence[torch.Tensor], width: int) -> torch.Tensor:
        """Return Q at a place, float64 of shape (d, width), from the stream there."""
        size = self._dense.dimensions.hidden_size
        moment = torch.zeros(size, size, dtype=torch.float64, device=self._dense.device)
        for stream in streams:
            flat = widen(stream).flatten(0, -2)
            add_outer(moment, flat, flat)
        vectors, energies = principal_basis(moment)
        shares = (energies.cumsum(0) / energies.sum().clamp_min(torch.finfo(torch.float64).tiny)).cpu()
        self._shares.append(shares)
        self._kept.append(float(shares[width - 1]))
        basis = vectors[:, :width].contiguous()
        return basis @ random_rotation(width, self._generator).to(basis.device) if self._is_random else basis

    def spectrum(self) -> Spectrum:
        """Return the mean over the places so far."""
        return Spectrum(torch.stack(self._shares).mean(0), sum(self._kept) / len(self._kept))


@torch.no_grad()
def slice_published(
    dense: DenseModel,
    target: Target,
    schedule: Schedule,
    orientation: Orientation,
    seed: int,
    batches: Batches,
    progress: Progress,
) -> Spectrum:
    """Slice a model as published; each tensor goes to the target's sink.

    Args:
        dense: The dense model.
        target: The slice in the making, its blocks with shortcuts.
        schedule: Its widths.
        orientation: How the kept directions are turned.
        seed: Seed of random orientations.
        batches: The calibration rows.
        progress: Hears of each block.

    Raises:
        WeightsError: The stream becomes NaN or infinite; the message names the block.
    """
    bases = _Bases(dense, orientation, seed)
    progress.start("slice", len(dense.blocks) + 1)
    wide, _ = enter(dense, dense.shell, embedding_tables(dense), batches)
    basis = bases.find([_without_mean(dense, stream) for stream in wide], schedule.blocks[0][0])
    del wide
    tables = {
        name: (_without_mean(dense, table.double()) @ basis).to(target.dtype)
        for name, table in embedding_tables(dense).items()
    }
    target.stream, calls = enter(dense, target.shell, tables, batches)
    for name, table in tables.items():
        target.sink(name, table.to("cpu", target.dtype))
    del tables

    for index, declared in enumerate(dense.dimensions.declared_blocks):
        name = dense.block_name(index)
        weights = read_block(dense, name)
        block = target.shell.get_submodule(name)
        kept = [one.path for one in declared.kept] + running.persistent_buffers(block)
        running.fill(block, {one: weights[one].to(target.dtype) for one in kept}, dense.device, dense.dtype)
        shortcuts: list[nn.Module] = list(block.get_submodule("shortcuts").children())
        steps = declared.steps
        for position, branches in enumerate(steps):
            others = [one.module for step in steps[:position] + steps[position + 1 :] for one in step if one.module]
            _fill(dense, target, block, _readers(dense, target, branches, weights, basis))
            writers = _Writers(dense, block, branches, weights)
            for number, stream in enumerate(target.stream):
                call = calls[tuple(stream.shape[:2])][index]
                with running.passing_through(shortcuts):
                    seen = running.writer_inputs(block, call, stream, branches, dict.fromkeys(others, 0))
                after = widen(stream).flatten(0, -2) @ basis.T.to(widen(stream).dtype) + writers.add(seen)
                require_finite(after, f"the sliced activations of block {index} ({branches[-1].norm})")
                target.stream[number] = after.reshape(*stream.shape[:-1], -1).to(dense.dtype)
            _, width = schedule.shortcuts(index)[position]
            following = bases.find(target.stream, width)
            shortcut = {f"shortcuts.{position}.weight": following.T @ basis}
            _fill(dense, target, block, writers.rotated(following) | shortcut)
            basis = following
            turn = basis.to(torch.promote_types(dense.dtype, torch.float32))
            target.stream = [(widen(stream) @ turn).to(dense.dtype) for stream in target.stream]
        hand_over_block(dense, target, name, weights)
        progress.advance()

    _hand_over_head(dense, target, basis)
    hand_over_buffers(dense, target)
    target.stream.clear()
    progress.advance()
    return bases.spectrum()


class _Writers:
    """The writers of a step: what they add to the stream of dense width, and how they look in a new basis."""

    def __init__(
        self, dense: DenseModel, block: nn.Module, branches: Sequence[Branch], weights: dict[str, torch.Tensor]
    ) -> None:
        self._dense = dense
        self._block = block
        self._branches = branches
        self._weights = weights

    def add(self, seen: running.WriterInputs) -> torch.Tensor:
        """Return what the dense writers make of their inputs, shape (tokens, d), at least float32."""
        dimensions, dtype = self._dense.dimensions, self._dense.dtype
        total: torch.Tensor | float = 0.0
        for branch in self._branches:
            multiplier, writer = dimensions.multiplier(branch.multiplier), branch.writer
            if writer is not None:
                matrix = matrix_of(writer, self._weights).to(dtype)
                bias = self._weights[f"{writer.path}.bias"].to(dtype) if dimensions.has_bias(writer) else None
                added = widen(nn.functional.linear(seen.linear[writer.path], matrix, bias))
                if writer.gate:
                    added = added * torch.sigmoid(seen.gates[writer.gate].to(added.dtype))
                total = total + multiplier * added
            if branch.experts is not None:
                declared = branch.experts
                module = self._block.get_submodule(declared.module)
                reader, matrices = module.get_parameter(declared.reader), self._weights[declared.writer_path]
                routing = seen.routings[declared.module]
                added = running.run_experts(module, declared, routing, reader, matrices.to(dtype))
                total = total + multiplier * widen(added)
        assert isinstance(total, torch.Tensor)
        return _without_mean(self._dense, total)

    def rotated(self, basis: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return Qᵀ W and Qᵀ b of every writer, as their modules store them, float64."""
        tensors = {}
        for branch in self._branches:
            writer = branch.writer
            if writer is not None:
                matrix = _without_mean(self._dense, matrix_of(writer, self._weights).double(), axis=0)
                tensors[f"{writer.path}.weight"] = stored_form(writer, basis.T @ matrix)
                if self._dense.dimensions.has_bias(writer):
                    bias = self._weights[f"{writer.path}.bias"].double()
                    tensors[f"{writer.path}.bias"] = basis.T @ _without_mean(self._dense, bias)
            if branch.experts is not None:
                matrices = _without_mean(self._dense, self._weights[branch.experts.writer_path], axis=1)
                rotated = [basis.T @ matrix.double() for matrix in matrices]
                tensors[branch.experts.writer_path] = torch.stack(rotated)
        return tensors


def _readers(
    dense: DenseModel,
    target: Target,
    branches: Sequence[Branch],
    weights: Mapping[str, torch.Tensor],
    basis: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """Return everything that reads behind the norms of a step, in the basis of its place."""
    tensors: dict[str, torch.Tensor] = {}
    for branch in branches:
        gain, bias = norm_weight_and_bias(dense.dimensions, branch.norm, weights)
        for reader in branch.readers:
            tensors |= published_reader(dense.dimensions, reader, weights, gain, bias, basis, target.dtype)
        if branch.experts is not None:
            inner = basis if gain is None else gain[:, None] * basis
            rotated = [(matrix.double() @ inner).to(target.dtype) for matrix in weights[branch.experts.reader_path]]
            tensors[branch.experts.reader_path] = torch.stack(rotated)
    return tensors


def _hand_over_head(dense: DenseModel, target: Target, basis: torch.Tensor) -> None:
    """Give the head, in the last basis, to the sink."""
    head = dense.adapter.head
    gain, bias = final_norm_weight_and_bias(dense.dimensions, dense.weights, dense.device)
    names = [f"{head.path}.weight"] + [f"{head.path}.bias"] * dense.dimensions.has_bias(head)
    weights = {name: dense.weights.tensor(name).to(dense.device) for name in names}
    for name, tensor in published_reader(dense.dimensions, head, weights, gain, bias, basis, target.dtype).items():
        target.sink(name, tensor.to("cpu", target.dtype))


def _without_mean(dense: DenseModel, tensor: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """Take the mean over the stream's axis out of what writes it, for families whose norms never read it."""
    return tensor - tensor.mean(axis, keepdim=True) if dense.is_centred else tensor


def _fill(dense: DenseModel, target: Target, block: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Give a block tensors, rounded to what will be written."""
    stored = {name: value.to(target.dtype).contiguous() for name, value in tensors.items()}
    running.fill(block, stored, dense.device, dense.dtype)
