"""The published method: a basis of its own at every place of the stream, by projection alone (SliceGPT).

One pass over the blocks. At each sublayer the branches run on the sliced stream up to their writers; the dense writers
turn that into the stream of full width as slicing so far has left it; the principal directions of that stream are
the next basis. The writers are rotated into it, and a shortcut matrix takes the stream from the old basis to the new
one. Nothing is refitted and no dense stream runs beside the sliced one.

Where it departs from the published implementation it is more exact: the mean is taken out of the stream for LayerNorm
families only, the norm has the model's own ε and at least float32, products of bases are taken in float64, random
orientations are drawn uniformly from a seed, and each half of a block runs once.

Symbols: docs/notation.md; formulas: arXiv 2401.15024, section 3.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from slicecli.adapters import Block, Branch
from slicecli.family.schedule import Schedule
from slicecli.linalg.basis import principal_basis, random_rotation
from slicecli.linalg.normal_equations import add_square, widen
from slicecli.linalg.sliced_maps import fold_reader, rows_times
from slicecli.progress import Progress
from slicecli.runtime.microbatch import concat
from slicecli.slicing import modules
from slicecli.slicing.context import Batches, Content, DenseModel, Journal, NoJournal, Snapshot, Target, activations_in
from slicecli.slicing.layerwise import (
    blocks_left,
    embedding_tables,
    enter,
    fill_kept,
    hand_over_block,
    hand_over_buffers,
    read_blocks,
    require_finite,
)
from slicecli.slicing.sliced_tensors import (
    final_norm_weight_and_bias,
    matrix_of,
    norm_weight_and_bias,
    published_reader,
    stored_form,
)

__all__ = ["Orientation", "Spectrum", "slice_published"]

Orientation = Literal["pca", "random"]
"""How the kept directions are turned among themselves: as PCA orders them, or at random, which spreads outliers."""


@dataclass(frozen=True)
class Spectrum:
    """The energy of the stream along the principal directions, the mean over all sites.

    Attributes:
        shares: Share of the stream's second moment in the first so many directions, float64 of shape (d,).
    """

    shares: torch.Tensor
    kept: float

    def energy_kept(self, dim: int) -> float:
        """Return the share in the first `dim` directions."""
        return float(self.shares[dim - 1])


class _Bases:
    """Finds the basis of each site in turn, and keeps count of the energy."""

    def __init__(self, dense: DenseModel, orientation: Orientation, seed: int) -> None:
        self._dense = dense
        self._is_random = orientation == "random"
        self._generator = torch.Generator().manual_seed(seed)
        self._shares: list[torch.Tensor] = []
        self._kept: list[float] = []

    def find(self, stream: Iterable[torch.Tensor], width: int) -> torch.Tensor:
        """Return Q at a site, float64 of shape (d, width), from the stream there."""
        size = self._dense.dimensions.hidden_size
        moment = torch.zeros(size, size, dtype=torch.float64, device=self._dense.device)
        for batch in stream:
            flat = widen(batch).flatten(0, -2)
            add_square(moment, flat)
        self._dense.processes.sum_square_to_main(moment)
        basis, shares = self._dense.processes.tensors_from_main(
            lambda: self._solve(moment, width), [(size, width), (size,)], moment.device
        )
        self._shares.append(shares.cpu())
        self._kept.append(float(shares[width - 1]))
        return basis

    def _solve(self, moment: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return Q, and the share of the energy in the first so many directions, float64 of shape (d,)."""
        vectors, energies = principal_basis(moment)
        shares = energies.cumsum(0) / energies.sum().clamp_min(torch.finfo(torch.float64).tiny)
        basis = vectors[:, :width].contiguous()
        if self._is_random:
            basis = basis @ random_rotation(width, self._generator).to(basis.device)
        return basis, shares

    def content(self) -> Content:
        """Return what the sites so far leave for those that follow."""
        tensors = {"shares": torch.stack(self._shares), "generator": self._generator.get_state()}
        return Content({}, tensors, {"kept": self._kept})

    def go_on(self, snapshot: Snapshot) -> None:
        """Take up what `content` returned."""
        self._shares = list(snapshot.tensors["shares"])
        self._kept = [float(value) for value in snapshot.about["kept"]]
        self._generator.set_state(snapshot.tensors["generator"])

    def spectrum(self) -> Spectrum:
        """Return the mean over the sites so far."""
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
    journal: Journal | None = None,
) -> Spectrum:
    """Slice a model as published; each tensor goes to the target's sink."""
    bases = _Bases(dense, orientation, seed)
    journal = journal or NoJournal()
    phase = f"slice {target.number}"
    finished = journal.result(phase)
    if finished is not None:
        bases.go_on(finished)
        return bases.spectrum()
    progress.start("slice", len(dense.blocks) + 1)
    wide, _ = enter(dense, dense.meta_model, embedding_tables(dense), batches)
    basis = bases.find((_without_mean(dense, batch) for batch in wide), schedule.blocks[0][0])
    del wide
    turn = _without_mean(dense, basis, axis=0)
    tables = {name: rows_times(table, turn, target.dtype) for name, table in embedding_tables(dense).items()}
    target.stream, calls = enter(dense, target.meta_model, tables, batches)
    for name, table in tables.items():
        target.sink(name, table.to("cpu", target.dtype))
    del tables
    snapshot = journal.resume(phase)
    if snapshot is not None:
        bases.go_on(snapshot)
        target.stream = activations_in("slice", snapshot, dense.activations)
        basis = snapshot.tensors["basis"].to(dense.device)

    for index, weights in read_blocks(dense, blocks_left(dense, snapshot, progress)):
        declared, name = dense.dimensions.declared_blocks[index], dense.block_name(index)
        block = target.meta_model.get_submodule(name)
        fill_kept(dense, target, declared, block, weights)
        for position, (_, width) in enumerate(schedule.shortcuts(index)):
            sublayer = _Sublayer(dense, target, block, declared, position, weights)
            sublayer.set_readers(basis)
            sublayer.widen_stream(
                functools.partial(calls.of, index),
                basis,
                f"the sliced activations of block {index}, sublayer {position + 1}",
            )
            following = bases.find(target.stream, width)
            sublayer.set_writers(basis, following)
            turn = following.to(torch.promote_types(dense.dtype, torch.float32))
            target.stream = dense.activations.filled((widen(batch) @ turn).to(dense.dtype) for batch in target.stream)
            basis = following
        hand_over_block(target, name, weights)
        journal.offer(phase, index + 1, _content(bases, target, basis))
        progress.advance()

    _hand_over_head(dense, target, basis)
    hand_over_buffers(dense, target)
    target.stream.clear()
    journal.finish(phase, bases.content())
    progress.advance()
    return bases.spectrum()


def _content(bases: _Bases, target: Target, basis: torch.Tensor) -> Content:
    """Return what the next block needs, for a journal."""
    content = bases.content()
    return Content({"slice": target.stream}, {**content.tensors, "basis": basis}, content.about)


@dataclass(frozen=True)
class _Sublayer:
    """One sublayer of one block: from the basis of its site to that of the next.

    Attributes:
        weights: The dense block's tensors by name inside it.
    """

    dense: DenseModel
    target: Target
    block: nn.Module
    declared: Block
    position: int
    weights: dict[str, torch.Tensor]

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches of the sublayer."""
        return self.declared.sublayers[self.position]

    def set_readers(self, basis: torch.Tensor) -> None:
        """Fill everything that reads behind the norms of the sublayer, in the basis of its site."""
        dimensions, dtype = self.dense.dimensions, self.target.dtype
        tensors: dict[str, torch.Tensor] = {}
        for branch in self.branches:
            gain, bias = norm_weight_and_bias(dimensions, branch.norm, self.weights)
            for reader in branch.readers:
                tensors |= published_reader(dimensions, reader, self.weights, gain, bias, basis, dtype)
            if branch.experts is not None:
                name = branch.experts.reader_path
                tensors[name] = fold_reader(self.weights[name], gain, None, basis, has_bias=True, dtype=dtype)
        self._fill(tensors)

    def widen_stream(self, call_of: Callable[[torch.Tensor], modules.Call], basis: torch.Tensor, what: str) -> None:
        """Run the sublayer up to its writers, and make of the stream what the dense writers would, at full width."""
        sublayers = self.declared.sublayers
        others = [sublayer for position, sublayer in enumerate(sublayers) if position != self.position]
        zero_ablated = {branch.module: 0 for sublayer in others for branch in sublayer if branch.module}
        shortcuts = list(self.block.get_submodule("shortcuts").children())

        def run(batch: torch.Tensor) -> torch.Tensor:
            with modules.passing_through(shortcuts):
                seen = modules.writer_inputs(self.block, call_of(batch), batch, self.branches, zero_ablated)
            flat = widen(batch).flatten(0, -2)
            after = flat @ basis.T.to(flat.dtype) + self._added(seen)
            require_finite(after, what)
            return after.reshape(*batch.shape[:-1], -1).to(self.dense.dtype)

        for number, batch in enumerate(self.target.stream):
            self.target.stream[number] = concat([some for _, some in self.dense.micro_batches.run(run, batch)])

    def set_writers(self, basis: torch.Tensor, following: torch.Tensor) -> None:
        """Fill the writers, in the basis of the next site, and the shortcut from this one to it."""
        turn = _without_mean(self.dense, following, axis=0).T
        tensors = {f"shortcuts.{self.position}.weight": following.T @ basis}
        for branch in self.branches:
            writer = branch.writer
            if writer is not None:
                rotated = turn @ matrix_of(writer, self.weights).double()
                tensors[f"{writer.path}.weight"] = stored_form(writer, rotated)
                if self.dense.dimensions.has_bias(writer):
                    tensors[f"{writer.path}.bias"] = turn @ self.weights[f"{writer.path}.bias"].double()
            if branch.experts is not None:
                path, dtype = branch.experts.writer_path, self.target.dtype
                tensors[path] = torch.stack([(turn @ matrix.double()).to(dtype) for matrix in self.weights[path]])
        self._fill(tensors)

    def _added(self, seen: modules.WriterInputs) -> torch.Tensor:
        """Return what the dense writers make of their inputs, shape (tokens, d), at least float32."""
        dimensions, dtype = self.dense.dimensions, self.dense.dtype
        total: torch.Tensor | float = 0.0
        for branch in self.branches:
            multiplier, writer = dimensions.multiplier(branch.multiplier), branch.writer
            if writer is not None:
                matrix = matrix_of(writer, self.weights).to(dtype)
                bias = self.weights[f"{writer.path}.bias"].to(dtype) if dimensions.has_bias(writer) else None
                added = widen(nn.functional.linear(seen.linear[writer.path], matrix, bias))
                if writer.gate:
                    added = added * torch.sigmoid(seen.gates[writer.gate].to(added.dtype))
                total = total + multiplier * added
            if branch.experts is not None:
                declared = branch.experts
                module = self.block.get_submodule(declared.module)
                reader, matrices = module.get_parameter(declared.reader), self.weights[declared.writer_path]
                added = modules.run_experts(
                    module, declared, seen.routings[declared.module], reader, matrices.to(dtype)
                )
                total = total + multiplier * widen(added)
        assert isinstance(total, torch.Tensor)
        return _without_mean(self.dense, total)

    def _fill(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Give the block tensors, rounded to what will be written."""
        stored = {name: value.to(self.target.dtype).contiguous() for name, value in tensors.items()}
        modules.fill(self.block, stored, self.dense.device, self.dense.dtype)


def _hand_over_head(dense: DenseModel, target: Target, basis: torch.Tensor) -> None:
    """Give the head, in the last basis, to the sink."""
    if not dense.processes.is_main:
        return
    head = dense.adapter.head
    gain, bias = final_norm_weight_and_bias(dense.dimensions, dense.weights, dense.device)
    names = [f"{head.path}.weight"] + [f"{head.path}.bias"] * dense.dimensions.has_bias(head)
    weights = {name: dense.weights.tensor(name).to(dense.device) for name in names}
    for name, tensor in published_reader(dense.dimensions, head, weights, gain, bias, basis, target.dtype).items():
        target.sink(name, tensor.to("cpu", target.dtype))


def _without_mean(dense: DenseModel, tensor: torch.Tensor, axis: int = -1) -> torch.Tensor:
    """Take the mean out along the axis of the stream, for families whose norms never read it.

    Out of a stream; or out of a basis, and so out of everything that is turned by it.
    """
    return tensor - tensor.mean(axis, keepdim=True) if dense.is_centred else tensor
