"""The two passes over the blocks: statistics of the dense model, then the refit of its slices.

Blocks are filled with weights one at a time and freed again, so the whole model is never in memory; what lives
through a pass are the streams, (tokens, width) numbers each. Several slices of one model share the dense half of
the refit pass.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from slicecli.adapters import Block, Branch
from slicecli.linalg.normal_equations import add_square, widen
from slicecli.linalg.ridge import RidgeMemory
from slicecli.linalg.tied_table import Tie
from slicecli.progress import Progress
from slicecli.runtime.microbatch import concat
from slicecli.slicing import modules
from slicecli.slicing.activation_cache import ActivationCache, CachedBlock
from slicecli.slicing.activations import Stream
from slicecli.slicing.channel_losses import ChannelLosses
from slicecli.slicing.context import (
    Batches,
    Content,
    DenseModel,
    DenseStatistics,
    Journal,
    NoJournal,
    Target,
    activations_in,
)
from slicecli.slicing.layerwise import (
    blocks_left,
    embedding_tables,
    enter,
    fill_kept,
    filled,
    hand_over_block,
    hand_over_buffers,
    read_blocks,
    require_finite,
)
from slicecli.slicing.modules import Calls
from slicecli.slicing.reductions import solve_statistics
from slicecli.slicing.sliced_tensors import (
    final_norm_weight_and_bias,
    fold_head,
    matrix_of,
    neutral_norm,
    norm_weight_and_bias,
    slice_embeddings,
)
from slicecli.slicing.sublayer_fit import BlockPass, Sublayer, fit_reading
from slicecli.slicing.tied_head import fit_tied_head, measure_logits, solve_tie

__all__ = ["collect_statistics", "refit"]

READER_ROWS = 8192
STATISTICS = "statistics"
CHANNELS = "channel_losses"


@torch.no_grad()
def collect_statistics(
    dense: DenseModel,
    batches: Batches,
    progress: Progress,
    journal: Journal | None = None,
    activations: ActivationCache | None = None,
    with_channels: bool = False,
) -> DenseStatistics:
    """Run the dense model over the calibration rows and solve for the shared basis.

    Args:
        with_channels: Find out too what the MLPs would lose with fewer channels.
    """
    adapter = dense.adapter
    journal = journal or NoJournal()
    statistics = _Statistics(dense)
    progress.start(STATISTICS, len(dense.blocks) + 1)
    stream, calls = enter(dense, dense.meta_model, embedding_tables(dense), batches)
    channels = ChannelLosses(dense) if with_channels else None
    phase = STATISTICS if channels is None else f"{STATISTICS} with {CHANNELS}"
    snapshot = journal.resume(phase)
    if snapshot is not None:
        stream = activations_in("dense", snapshot, dense.activations)
        statistics.second_moment = snapshot.tensors["second_moment"].to(dense.device)
        statistics.metric = snapshot.tensors["metric"].to(dense.device)
        activations = None  # blocks before the resume point were not cached
    if channels is not None and snapshot is not None:
        channels.total = snapshot.tensors[CHANNELS].to(dense.device)
    for index, weights in read_blocks(dense, blocks_left(dense, snapshot, progress)):
        block, declared = dense.blocks[index], dense.dimensions.declared_blocks[index]
        mlp = None if channels is None else channels.begin(index)
        run_block = functools.partial(_run_block, block, calls, index, declared, watched=mlp)
        if activations is not None:
            activations.begin(len(declared.sublayers))
        with filled(dense, block, weights):
            equations = {path: statistics.empty() for path in declared.norms}
            for number, batch in enumerate(stream):
                runs = []
                for rows, run in dense.micro_batches.run(run_block, batch):
                    require_finite(run.output, f"the activations after block {index}")
                    if channels is not None:
                        run = channels.take(run)
                    for path, moment in equations.items():
                        statistics.add_tokens(moment, run.norm_inputs[path])
                    runs.append((rows, run))
                if activations is not None:
                    activations.add(batch, [sublayer[0].norm for sublayer in declared.sublayers], runs)
                stream[number] = concat([run.output for _, run in runs])
            for path, moment in equations.items():
                readers = _reader_matrices(declared, path, weights)
                statistics.add_norm_input(moment, norm_weight_and_bias(dense.dimensions, path, weights)[0], readers)
            if channels is not None:
                channels.finish(weights)
        sums = {"second_moment": statistics.second_moment, "metric": statistics.metric}
        if channels is not None:
            sums[CHANNELS] = channels.total
        journal.offer(phase, index + 1, Content({"dense": stream}, sums))
        progress.advance()
    final = statistics.empty()
    for batch in stream:
        statistics.add_tokens(final, batch)
    weight, _ = final_norm_weight_and_bias(dense.dimensions, dense.weights, dense.device)
    statistics.add_norm_input(final, weight, [dense.weights.tensor(f"{adapter.head.path}.weight").to(dense.device)])
    found = solve_statistics(dense, statistics.second_moment, statistics.metric, final)
    progress.advance()
    if channels is None or not dense.processes.is_main:
        return found
    return dataclasses.replace(found, channel_losses=channels.total.cpu())


@torch.no_grad()
def refit(
    dense: DenseModel,
    statistics: DenseStatistics,
    targets: Sequence[Target],
    batches: Batches,
    progress: Progress,
    journal: Journal | None = None,
    activations: ActivationCache | None = None,
) -> None:
    """Refit every map that reads or writes the stream, for one or more slices at once.

    Each target's tensors go to its sink in the order embeddings, blocks, final norm, head; after an interruption
    some of them a second time.
    """
    journal = journal or NoJournal()
    phase = f"refit {','.join(str(target.number) for target in targets)}"
    if journal.result(phase) is not None:
        return
    held_out = [mask.to(dense.device) for mask in batches.held_out()]
    progress.start("refit", len(dense.blocks) + 1)
    stream, calls = enter(dense, dense.meta_model, embedding_tables(dense), batches)
    bases = [statistics.basis.leading(target.dim) for target in targets]
    ties: list[Tie | None] = [None] * len(targets)
    if dense.dimensions.keeps_tie:
        ties = [solve_tie(dense, statistics, leading) for leading in bases]
        bases = [tied.axes for tied in ties if tied is not None]
    for target, leading, tied in zip(targets, bases, ties, strict=True):
        _slice_embeddings(dense, target, leading, tied, batches)
    snapshot = journal.resume(phase)
    if snapshot is not None:
        stream = activations_in("dense", snapshot, dense.activations)
        for target, ridges in zip(targets, snapshot.about["ridges"], strict=True):
            target.stream = activations_in(_stream_name(target), snapshot, dense.activations)
            target.ridges = RidgeMemory(ridges)

    for index, weights in read_blocks(dense, blocks_left(dense, snapshot, progress)):
        seen = None if activations is None else activations.of(index)
        if seen is None:
            seen = _run_dense_block(dense, index, weights, calls, stream)
        at = BlockPass(dense, index, weights, calls, seen, held_out)
        blocks = [_prepare_block(at, target) for target in targets]
        lost = 0.0
        for position in range(len(at.sublayers)):
            for target, leading, block in zip(targets, bases, blocks, strict=True):
                sublayer, is_last_use = Sublayer(at, target, block, position), target is targets[-1]
                lost = max(lost, _fit_sublayer(sublayer, leading, is_last_use))
            if activations is None:
                seen.inputs[position].clear()
        for target in targets:
            hand_over_block(target, dense.block_name(index), weights)
        stream = seen.output
        journal.offer(phase, index + 1, _content(stream, targets))
        progress.advance(f"energy kept {1 - lost:.4f}")

    metric = measure_logits(dense, batches) if dense.dimensions.keeps_tie else None
    for target, leading, tied in zip(targets, bases, ties, strict=True):
        if tied is None:
            _fit_head(dense, target, stream, leading, held_out)
        else:
            fit_tied_head(dense, target, stream, tied, metric, held_out)
        hand_over_buffers(dense, target)
        target.stream.clear()
    journal.finish(phase, Content())
    progress.advance()


def _run_dense_block(
    dense: DenseModel, index: int, weights: dict[str, torch.Tensor], calls: Calls, stream: Stream
) -> CachedBlock:
    """Run a dense block: move the dense stream on, and keep it as each sublayer reads it."""
    block, declared = dense.blocks[index], dense.dimensions.declared_blocks[index]
    seen = CachedBlock([dense.activations.new() for _ in declared.sublayers], stream)
    run_block = functools.partial(_run_block, block, calls, index, declared)
    with filled(dense, block, weights):
        for number, batch in enumerate(stream):
            runs = [run for _, run in dense.micro_batches.run(run_block, batch)]
            output = concat([run.output for run in runs])
            require_finite(output, f"the activations after block {index}")
            for inputs, branches in zip(seen.inputs, declared.sublayers, strict=True):
                inputs.append(concat([run.norm_inputs[branches[0].norm] for run in runs]))
            stream[number] = output
            seen.tuple_lengths = runs[0].tuple_lengths
    return seen


def _prepare_block(at: BlockPass, target: Target) -> nn.Module:
    """Return the block of a slice in the making, with what passes through unchanged and norms of weight one."""
    dense, declared = at.dense, at.dense.dimensions.declared_blocks[at.index]
    block: nn.Module = target.meta_model.get_submodule(dense.block_name(at.index))
    fill_kept(dense, target, declared, block, at.weights)
    norms: dict[str, torch.Tensor] = {}
    for path in declared.norms:
        norms |= neutral_norm(dense.dimensions, path, target.dim)
    modules.fill(block, norms, dense.device, dense.dtype)
    return block


def _fit_sublayer(sublayer: Sublayer, basis: torch.Tensor, is_last_use: bool) -> float:
    """Refit the readers, then the writers of a sublayer; return the share of energy that the readers do not get."""
    lost = sublayer.fit_readers(basis)
    projected = sublayer.project_writers(basis)
    if sublayer.is_last and is_last_use:
        _keep_buffers(sublayer.at.weights, sublayer.block)
    sublayer.fit_writers(projected, basis)
    return lost


def _run_block(
    block: nn.Module,
    calls: Calls,
    index: int,
    declared: Block,
    batch: torch.Tensor,
    watched: Branch | None = None,
) -> modules.BlockRun:
    return modules.run_block(block, calls.of(index, batch), batch, declared.branches, watched)


def _keep_buffers(weights: dict[str, torch.Tensor], block: nn.Module) -> None:
    """Free a dense block's parameters once all is folded: the last fit of a block is what needs most memory."""
    for name in weights.keys() - set(modules.persistent_buffers(block)):
        del weights[name]


def _stream_name(target: Target) -> str:
    return f"slice{target.number}"


def _content(stream: Stream, targets: Sequence[Target]) -> Content:
    """Return what the next block needs, for a journal."""
    streams = {"dense": stream, **{_stream_name(target): target.stream for target in targets}}
    return Content(streams, about={"ridges": [target.ridges.found for target in targets]})


class _Statistics:
    """Sums up C and M of `slicecli.linalg.basis`, one norm input at a time.

    Attributes:
        second_moment: C so far, float64 of shape (d, d).
        metric: M so far, float64 of shape (d, d).
    """

    def __init__(self, dense: DenseModel) -> None:
        self._dense = dense
        self.second_moment = self.empty()
        self.metric = self.empty()

    def empty(self) -> torch.Tensor:
        """Return a zero matrix of shape (d, d)."""
        width = self._dense.dimensions.hidden_size
        return torch.zeros(width, width, dtype=torch.float64, device=self._dense.device)

    def add_tokens(self, moment: torch.Tensor, norm_input: torch.Tensor) -> None:
        """Add tokens to the second moment Cⱼ of one norm input."""
        flat = self._dense.normalise(norm_input).flatten(0, -2)
        add_square(moment, flat)

    def add_norm_input(
        self, moment: torch.Tensor, weight: torch.Tensor | None, readers: Sequence[torch.Tensor]
    ) -> None:
        """Add a finished norm input: its Cⱼ to C, its Mⱼ, scaled to a total of one, to M.

        Args:
            readers: The weights of its readers, shape (..., d) each.
        """
        metric = self.empty()
        for reader in readers:
            for rows in reader.reshape(-1, reader.shape[-1]).split(READER_ROWS):
                scaled = widen(rows)
                if weight is not None:
                    scaled = scaled * weight.to(scaled)
                add_square(metric, scaled)
        self.second_moment += moment
        seen = (metric * moment).sum()
        self._dense.processes.sum_everywhere(seen)
        if bool(seen > 0):
            self.metric += metric / seen


def _fit_head(
    dense: DenseModel,
    target: Target,
    stream: Stream,
    basis: torch.Tensor,
    held_out: Sequence[torch.Tensor],
) -> None:
    """Fit the head, a reader of the final norm, and hand norm and head to the sink."""
    path = dense.adapter.final_norm
    norm = target.meta_model.get_submodule(path)
    modules.fill(norm, modules.below(path, neutral_norm(dense.dimensions, path, target.dim)), dense.device, dense.dtype)
    matrix, _ = fit_reading(
        dense, norm, stream, target.stream, basis, held_out, functools.partial(target.ridges.solve, "head")
    )
    modules.clear(norm)
    if not dense.processes.is_main:
        return  # the head is only written
    for name, tensor in fold_head(dense.dimensions, dense.weights, matrix, target.dtype).items():
        target.sink(name, tensor.to("cpu", target.dtype))


def _slice_embeddings(
    dense: DenseModel, target: Target, basis: torch.Tensor, tied: Tie | None, batches: Batches
) -> None:
    """Slice the embedding tables, start the sliced stream from them, and hand them to the sink."""
    tables = slice_embeddings(dense.dimensions, dense.weights, basis, target.dtype, tied)
    target.stream, _ = enter(dense, target.meta_model, tables, batches)
    for name, table in tables.items():
        target.sink(name, table.to("cpu", target.dtype))


def _reader_matrices(declared: Block, norm: str, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the weights of everything that reads behind a norm, shape (..., outputs, d) each."""
    matrices = []
    for branch in declared.branches:
        if branch.norm == norm:
            matrices += [matrix_of(reader, weights) for reader in branch.readers]
            if branch.experts is not None:
                matrices.append(weights[branch.experts.reader_path])
    return matrices
