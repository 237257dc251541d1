"""Training a slice one block at a time: each block learns to give what the dense stream is after it.

The dense model and the slice run side by side over cached activations, as in the refit. A block of the slice is trained
on the stream that the trained blocks before it give, so it also repairs what they have lost. Its target is the dense
stream after it in the slice's coordinates, c Qᵀ x, and errors are weighted as the next norm sees them. The last block
is trained with the final norm to predict as the teacher does. No gradient goes through more than one block, and only
one block is in memory with its optimiser.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from slicecli.linalg.normal_equations import inverse_scale, widen
from slicecli.linalg.stream_map import StreamMap, WrittenStreamMap
from slicecli.recovery.block_training import BlockFit, BlockSchedule, BlockTraining, move_streams
from slicecli.recovery.objectives import Activations, Objective, Part, Predictions, with_head
from slicecli.slicing import modules
from slicecli.slicing.activations import Stream
from slicecli.slicing.context import Batches, Content, DenseModel, Journal, NoJournal, Snapshot, activations_in
from slicecli.slicing.layerwise import blocks_left, embedding_tables, enter, filled, read_blocks
from slicecli.slicing.modules import Calls

if TYPE_CHECKING:
    from slicecli.progress import Progress
    from slicecli.recovery.data import TrainingRows

__all__ = ["BlocksResult", "Slicing", "distil_blocks"]

PHASE = "blocks"
STREAMS = ("dense", "own")


@dataclass(frozen=True)
class Slicing:
    """What of a slice's making its training needs.

    Attributes:
        scale: c, the scale of the slice's stream.
        has_one_basis: All blocks have the same coordinates, without shortcuts between them.
        dtype: Dtype in which its tensors are written.
    """

    scale: float
    has_one_basis: bool
    dtype: torch.dtype


@dataclass(frozen=True)
class BlocksResult:
    """What came out of training all blocks.

    Attributes:
        kl_before: Mean divergence from the teacher on the held-out rows, in nats per token.
        kl_after: The same of the weights that went to the sink.
    """

    kl_before: float
    kl_after: float
    blocks: tuple[BlockFit, ...]


@torch.no_grad()
def distil_blocks(
    teacher: DenseModel,
    student: DenseModel,
    rows: TrainingRows,
    schedule: BlockSchedule,
    slicing: Slicing,
    sink: Callable[[str, torch.Tensor], None],
    progress: Progress,
    journal: Journal | None = None,
) -> BlocksResult:
    """Train every block of a slice; the blocks' tensors go to the sink, after an interruption some of them twice.

    Args:
        student: The slice, as its own class runs it.
    """
    journal = journal or NoJournal()
    run = _Run(teacher, student, rows, schedule)
    snapshot, fits = journal.resume(PHASE), list[BlockFit]()
    if snapshot is None:
        turns, before = run.survey(slicing, progress)
    else:
        turns, before = list(activations_in("turns", snapshot, student.activations)), snapshot.about["kl_before"]
        run.training, run.held_out = (_part_in(snapshot, name, student) for name in ("training", "held_out"))
        fits = [BlockFit(**one) for one in snapshot.about["fits"]]
        run.tuple_lengths = tuple(snapshot.about["tuple_lengths"])
    progress.start(PHASE, len(student.blocks) * schedule.epochs + 1)
    for index, weights in run.blocks(blocks_left(student, snapshot, progress, schedule.epochs)):
        if index + 1 == len(student.blocks):
            with run.heads(torch.float32):
                fits.append(run.train_block(index, weights, None, slicing, sink, progress))
                after = run.divergence()
        else:
            turn = turns[index % len(turns)]
            fits.append(run.train_block(index, weights, turn, slicing, sink, progress))
            about = {"kl_before": before, "fits": [asdict(one) for one in fits], "tuple_lengths": run.tuple_lengths}
            journal.offer(PHASE, index + 1, Content({"turns": turns, **run.streams()}, about=about))
    progress.advance(f"held-out KL {before:.4f} → {after:.4f}")
    return BlocksResult(before, after, tuple(fits))


@dataclass
class _Run:
    """Teacher and slice side by side, with their activations as far as the pass has come.

    Attributes:
        tuple_lengths: The length of the tuple that the blocks of each give; 0 where they give a tensor.
    """

    teacher: DenseModel
    student: DenseModel
    rows: TrainingRows
    schedule: BlockSchedule
    tuple_lengths: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        for model in (self.teacher, self.student):
            model.meta_model.requires_grad_(False)  # until something is trained
        self.enter()

    def enter(self) -> None:
        """Begin with what the embeddings give."""
        share = len(self.rows.training.ids) // self.student.processes.count
        first = self.student.processes.rank * share
        own = Batches(self.rows.training.ids, self.schedule.rows_per_pass, slice(first, first + share))
        all_of_them = Batches(self.rows.held_out.ids, self.schedule.rows_per_pass)
        self.training, self._dense_calls, self.calls = self._entering(own)
        self.held_out, *_ = self._entering(all_of_them)

    def _entering(self, batches: Batches) -> tuple[Part, Calls, Calls]:
        teacher, student = self.teacher, self.student
        dense, dense_calls = enter(teacher, teacher.meta_model, embedding_tables(teacher), batches)
        own, calls = enter(student, student.meta_model, embedding_tables(student), batches)
        return Part(dense, own), dense_calls, calls

    def blocks(self, indices: range) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
        """Move the dense streams behind block after block, and give the slice's weights of each."""
        both = zip(read_blocks(self.teacher, indices), read_blocks(self.student, indices), strict=True)
        for (index, dense_weights), (_, weights) in both:
            block = self.teacher.blocks[index]
            with filled(self.teacher, block, dense_weights):
                dense_weights.clear()
                run = functools.partial(_call, self._dense_calls, index, block)
                streams = self.training.dense, self.held_out.dense
                length = move_streams(self.teacher, run, f"the activations after block {index}", streams)
            self.tuple_lengths = length, self.tuple_lengths[1]
            yield index, weights

    def survey(self, slicing: Slicing, progress: Progress) -> tuple[list[torch.Tensor], float]:
        """Run both over all rows as they are.

        Returns:
            What turns the dense stream, as a row, into that of the slice: one map, or one for each block. And the
            divergence on the held-out rows.
        """
        student = self.student
        progress.start("survey", len(student.blocks))
        turns = _Turns(self.teacher, student, slicing)
        for index, weights in self.blocks(range(len(student.blocks))):
            block = student.blocks[index]
            with filled(student, block, weights):
                at = BlockTraining(student, index, block, self.calls)
                for number, (dense, before) in enumerate(zip(self.training.dense, self.training.own, strict=True)):
                    moved = [before]
                    length = at.move(moved)
                    turns.add(dense, before, moved[0])
                    self.training.own[number] = moved[0]
                at.move(self.held_out.own)
            self.tuple_lengths = self.tuple_lengths[0], length
            turns.finish_block()
            progress.advance()
        found = turns.solve()
        with self.heads():
            before_training = self.divergence()
        self.enter()
        return found, before_training

    def train_block(
        self,
        index: int,
        weights: dict[str, torch.Tensor],
        turn: torch.Tensor | None,
        slicing: Slicing,
        sink: Callable[[str, torch.Tensor], None],
        progress: Progress,
    ) -> BlockFit:
        """Train a block, give its tensors to the sink, and move the slice's streams behind it.

        Args:
            weights: Of the block as it is; of no use afterwards.
            turn: What its target is found with; `None` trains it, with the final norm, to predict.
        """
        student, name = self.student, self.student.block_name(index)
        block = student.blocks[index]
        modules.fill(block, weights, student.device, torch.float32)
        buffers = {f"{name}.{one}": weights[one] for one in modules.persistent_buffers(block)}
        weights.clear()
        trained = {f"{name}.{one}": value for one, value in block.named_parameters()}
        objective: Objective
        if turn is None:
            objective, norm = Predictions(self.teacher, student, self.tuple_lengths), student.adapter.final_norm
            own = student.meta_model.get_submodule(norm).named_parameters()
            trained |= {f"{norm}.{one}": value for one, value in own}
        else:
            objective = Activations(turn, self.teacher, student, slicing.has_one_basis and self.teacher.is_centred)
        at = BlockTraining(student, index, block, self.calls, list(trained.values()))
        fit = at.train(self.training, self.held_out, objective, self.schedule, slicing.dtype, progress)
        for one, value in (trained | buffers).items():
            sink(one, value.to("cpu", slicing.dtype))
        at.move(self.training.own, self.held_out.own)
        modules.clear(block)
        return fit

    def streams(self) -> dict[str, Stream]:
        """Return the activations by name."""
        parts = {"training": self.training, "held_out": self.held_out}
        return {f"{name}_{kind}": getattr(part, kind) for name, part in parts.items() for kind in STREAMS}

    def heads(self, norm_dtype: torch.dtype | None = None) -> ExitStack:
        """Fill final norm and head of both models for as long as they run.

        Args:
            norm_dtype: Of the slice's final norm, as of `with_head`.
        """
        with ExitStack() as stack:
            stack.enter_context(with_head(self.teacher))
            stack.enter_context(with_head(self.student, norm_dtype))
            return stack.pop_all()

    def divergence(self) -> float:
        """Return the mean divergence on the held-out rows, from what both models leave behind their last block."""
        predictions = Predictions(self.teacher, self.student, self.tuple_lengths)
        total, count = 0.0, 0
        for dense, own in zip(self.held_out.dense, self.held_out.own, strict=True):
            total += float(predictions.loss(own, dense)) * len(own)
            count += len(own)
        return total / count


class _Turns:
    """Finds what turns the dense stream into that of the slice, while both run; the same bits for all processes.

    A slice whose blocks have coordinates of their own has a map for each.
    """

    def __init__(self, teacher: DenseModel, student: DenseModel, slicing: Slicing) -> None:
        self._teacher, self._student, self._slicing = teacher, student, slicing
        self._sums: StreamMap | WrittenStreamMap | None = None
        self._found: list[torch.Tensor] = []

    def add(self, dense: torch.Tensor, before: torch.Tensor, after: torch.Tensor) -> None:
        """Add tokens behind a block.

        Args:
            dense: x⁺, shape (rows, sequence length, d).
            before, after: y and y⁺, shape (rows, sequence length, k).
        """
        wide, narrow = (widen(one).flatten(0, -2) for one in (dense, after))
        root = inverse_scale(wide, self._teacher.dimensions.epsilon, self._teacher.is_centred)
        if self._sums is None:
            self._sums = self._empty(wide.shape[1], narrow.shape[1])
        if isinstance(self._sums, StreamMap):
            self._sums.add(wide, narrow, root)
            return
        written = narrow - widen(before).flatten(0, -2)
        if self._teacher.is_centred:  # the norms do not see a mean
            narrow, written = (one - one.mean(1, keepdim=True) for one in (narrow, written))
        self._sums.add(wide, narrow, written, root)

    def _empty(self, width: int, dim: int) -> StreamMap | WrittenStreamMap:
        is_determined = WrittenStreamMap.is_determined(len(self._student.blocks), width, dim)
        kind = WrittenStreamMap if self._slicing.has_one_basis and is_determined else StreamMap
        return kind(width, dim, self._student.device)

    def finish_block(self) -> None:
        """Take up what was added behind a block."""
        if isinstance(self._sums, WrittenStreamMap):
            self._student.processes.sum_everywhere(self._sums.square, self._sums.dense, self._sums.sliced)
            self._sums.finish_block()
        elif not self._slicing.has_one_basis:
            self._solve()

    def solve(self) -> list[torch.Tensor]:
        """Return c Q, float64 of shape (d, k), of all blocks or of each."""
        if self._sums is not None:
            self._solve()
        return self._found

    def _solve(self) -> None:
        sums, processes, scale = self._sums, self._student.processes, self._slicing.scale
        assert sums is not None
        if isinstance(sums, StreamMap):
            processes.sum_to_main(sums.gram, sums.cross)
            shape = tuple(sums.cross.shape)
        else:
            shape = sums.dense.shape[1], sums.dense.shape[0]

        def solution() -> list[torch.Tensor]:
            return [sums.solve(scale) if isinstance(sums, StreamMap) else sums.solve()]

        self._found += processes.tensors_from_main(solution, [shape], self._student.device)
        self._sums = None


def _call(calls: Calls, index: int, block: nn.Module, batch: torch.Tensor) -> Any:
    return calls.of(index, batch)(block, batch)


def _part_in(snapshot: Snapshot, name: str, student: DenseModel) -> Part:
    return Part(*(activations_in(f"{name}_{kind}", snapshot, student.activations) for kind in STREAMS))
