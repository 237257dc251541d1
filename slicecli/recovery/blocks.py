"""Training a slice one block at a time: each block learns to give what the dense stream is after it.

The dense model and the slice run side by side over cached activations, as in the refit. A block of the slice is trained
on the stream that the trained blocks before it give, so it also repairs what they have lost. Its target is the dense
stream after it in the slice's coordinates, c Qᵀ x, and errors are weighted as the next norm sees them. No gradient goes
through more than one block, and only one block is in memory with its optimiser.

Symbols: docs/notation.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import torch

from slicecli.linalg.normal_equations import inverse_scale, widen
from slicecli.linalg.stream_map import StreamMap
from slicecli.recovery.block_training import BlockFit, BlockSchedule, BlockTraining, Goals, Part
from slicecli.recovery.loss import CHUNK_NUMBERS, forward_divergence
from slicecli.slicing import modules
from slicecli.slicing.activations import Stream
from slicecli.slicing.context import Batches, Content, DenseModel, Journal, NoJournal, Snapshot, activations_in
from slicecli.slicing.layerwise import blocks_left, embedding_tables, enter, filled, read_blocks, require_finite
from slicecli.slicing.modules import Calls

if TYPE_CHECKING:
    from slicecli.progress import Progress
    from slicecli.recovery.data import TrainingRows

__all__ = ["BlocksResult", "distil_blocks"]

PHASE = "blocks"
STREAMS = ("dense", "before", "own")


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
    scale: float,
    dtype: torch.dtype,
    sink: Callable[[str, torch.Tensor], None],
    progress: Progress,
    journal: Journal | None = None,
) -> BlocksResult:
    """Train every block of a slice; the blocks' tensors go to the sink, after an interruption some of them twice.

    Args:
        student: The slice, as its own class runs it.
        scale: c, the scale of the slice's stream.
        dtype: Dtype in which its tensors are written.
    """
    journal = journal or NoJournal()
    progress.start(PHASE, len(student.blocks) * schedule.epochs + 1)
    batches = Batches(rows.training.ids, schedule.rows_per_pass, _own_rows(student, len(rows.training.ids)))
    training, dense_calls, calls = _enter(teacher, student, batches)
    held_out, *_ = _enter(teacher, student, Batches(rows.held_out.ids, schedule.rows_per_pass))
    fits: list[BlockFit] = []
    snapshot = journal.resume(PHASE)
    if snapshot is not None:
        training, held_out = (_part_in(snapshot, name, student) for name in ("training", "held_out"))
        fits = [BlockFit(**one) for one in snapshot.about["fits"]]
    left = blocks_left(student, snapshot, progress, schedule.epochs)
    tuple_lengths = [0, 0]
    both = zip(read_blocks(teacher, left), read_blocks(student, left), strict=True)
    for (index, dense_weights), (_, weights) in both:
        tuple_lengths[0] = _move_dense(teacher, index, dense_weights, dense_calls, (training.dense, held_out.dense))
        dense_weights.clear()
        name, block = student.block_name(index), student.blocks[index]
        modules.fill(block, weights, student.device, torch.float32)
        at = BlockTraining(student, index, block, calls)
        tuple_lengths[1] = at.move(training.before, held_out.before)
        goals = Goals(_map(student, training, scale), teacher)
        fits.append(at.train(training, held_out, goals, schedule, dtype, progress))
        for parameter_name, parameter in block.named_parameters():
            sink(f"{name}.{parameter_name}", parameter.to("cpu", dtype))
        for buffer_name in modules.persistent_buffers(block):
            sink(f"{name}.{buffer_name}", weights[buffer_name].to("cpu", dtype))
        at.move(training.own, held_out.own)
        modules.clear(block)
        streams = _streams("training", training) | _streams("held_out", held_out)
        journal.offer(PHASE, index + 1, Content(streams, about={"fits": [asdict(one) for one in fits]}))
    before, after = _divergences(teacher, student, held_out, tuple_lengths)
    progress.advance(f"held-out KL {before:.4f} → {after:.4f}")
    return BlocksResult(before, after, tuple(fits))


def _streams(name: str, part: Part) -> dict[str, Stream]:
    return {f"{name}_{kind}": getattr(part, kind) for kind in STREAMS}


def _part_in(snapshot: Snapshot, name: str, student: DenseModel) -> Part:
    return Part(*(activations_in(f"{name}_{kind}", snapshot, student.activations) for kind in STREAMS))


def _own_rows(student: DenseModel, rows: int) -> slice:
    """Return this process's share of the training rows."""
    share = rows // student.processes.count
    return slice(student.processes.rank * share, (student.processes.rank + 1) * share)


def _enter(teacher: DenseModel, student: DenseModel, batches: Batches) -> tuple[Part, Calls, Calls]:
    """Run the embeddings of both models."""
    dense, dense_calls = enter(teacher, teacher.meta_model, embedding_tables(teacher), batches)
    before, calls = enter(student, student.meta_model, embedding_tables(student), batches)
    return Part(dense, before, student.activations.filled(iter(before))), dense_calls, calls


def _move_dense(
    teacher: DenseModel, index: int, weights: dict[str, torch.Tensor], calls: Calls, streams: Sequence[Stream]
) -> int:
    """Move the dense streams behind a block; return the length of the tuple it gives, 0 where it gives a tensor."""
    block, output = teacher.blocks[index], None
    with filled(teacher, block, weights):
        for stream in streams:
            for number, batch in enumerate(stream):
                output = calls.of(index, batch)(block, batch)
                moved = modules.first_tensor(output)
                require_finite(moved, f"the activations after block {index}")
                stream[number] = moved
    return len(output) if isinstance(output, tuple) else 0


def _map(student: DenseModel, part: Part, scale: float) -> torch.Tensor:
    """Return what turns the dense stream, as a row, into that of the slice as it was, behind the same block."""
    found: StreamMap | None = None
    for dense, sliced in zip(part.dense, part.before, strict=True):
        wide, narrow = widen(dense).flatten(0, -2), widen(sliced).flatten(0, -2)
        if found is None:
            found = StreamMap(wide.shape[1], narrow.shape[1], student.device)
        found.add(wide, narrow, inverse_scale(wide, student.dimensions.epsilon))
    assert found is not None
    sums, processes = found, student.processes
    processes.sum_to_main(sums.gram, sums.cross)
    (turn,) = processes.tensors_from_main(lambda: [sums.solve(scale)], [tuple(sums.cross.shape)], student.device)
    return turn


def _divergences(
    teacher: DenseModel, student: DenseModel, part: Part, tuple_lengths: Sequence[int]
) -> tuple[float, float]:
    """Return the mean divergence of the slice as it was, and as it is, from what both leave behind their last block."""
    totals, count = [0.0, 0.0], 0
    with _with_head(teacher), _with_head(student):
        for streams in zip(part.dense, part.before, part.own, strict=True):
            flat = [stream[:, :-1].flatten(0, -2) for stream in streams]
            count += len(flat[0])
            for dense, *sliced in zip(*(one.split(_head_tokens(teacher, part)) for one in flat), strict=True):
                _, expected = modules.run_head(teacher.meta_model, teacher.adapter, dense[None], tuple_lengths[0])
                for number, some in enumerate(sliced):
                    _, logits = modules.run_head(student.meta_model, student.adapter, some[None], tuple_lengths[1])
                    totals[number] += float(forward_divergence(logits, expected))
    return totals[0] / count, totals[1] / count


def _head_tokens(teacher: DenseModel, part: Part) -> int:
    """Return how many tokens' logits are computed at once: not more than a row has, which is what a model may take."""
    return int(min(part.dense[0].shape[1], max(1, CHUNK_NUMBERS // teacher.dimensions.vocabulary)))


@contextmanager
def _with_head(model: DenseModel) -> Iterator[None]:
    """Fill the final norm and the head of a model for as long as they run."""
    adapter = model.adapter
    with ExitStack() as stack:
        for path in (adapter.final_norm, adapter.head.path):
            module = model.meta_model.get_submodule(path)
            # by name, because a tied head is not listed among the checkpoint's tensors
            weights = {name: model.weights.tensor(f"{path}.{name}") for name, _ in module.named_parameters()}
            stack.enter_context(filled(model, module, weights))
        yield
