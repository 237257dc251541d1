"""What every pass over the blocks does: run the embeddings, read block after block, fill one, check the stream."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from slicecli.adapters import Block
from slicecli.errors import WeightsError
from slicecli.linalg.normal_equations import is_finite
from slicecli.progress import Progress
from slicecli.runtime.memory import return_freed_memory
from slicecli.slicing import modules
from slicecli.slicing.activations import Carrier, Stream
from slicecli.slicing.context import Batches, DenseModel, Snapshot, Target
from slicecli.slicing.modules import Calls

__all__ = [
    "blocks_left",
    "embedding_tables",
    "enter",
    "fill_kept",
    "filled",
    "hand_over_block",
    "hand_over_buffers",
    "read_blocks",
    "require_finite",
]


def embedding_tables(dense: DenseModel) -> dict[str, torch.Tensor]:
    """Read the embedding tables that add into the stream, by parameter name."""
    names = [f"{table.path}.weight" for table in dense.adapter.embeddings]
    return {name: dense.weights.tensor(name).to(dense.device) for name in names}


def enter(
    dense: DenseModel, meta_model: Any, tables: dict[str, torch.Tensor], batches: Batches
) -> tuple[Stream, Calls]:
    """Run a model's embeddings over all batches."""
    modules.move_buffers(meta_model, dense.device)
    modules.fill(meta_model, tables, dense.device, dense.dtype)
    stream, calls = dense.activations.new(), Calls(meta_model, dense.adapter)
    for batch in batches:
        stream.append(calls.record(batch.to(dense.device)))
    for table in dense.adapter.embeddings:
        modules.clear(meta_model.get_submodule(table.path))
    return stream, calls


def blocks_left(dense: DenseModel, snapshot: Snapshot | None, progress: Progress, advances: int = 1) -> range:
    """Return the indices of the blocks that a pass still has to do, counting those that were done before.

    Args:
        advances: How often the progress advances for each block.
    """
    first = 0 if snapshot is None else snapshot.position
    for _ in range(first * advances):
        progress.advance("done before")
    return range(first, len(dense.blocks))


def read_blocks(dense: DenseModel, indices: Sequence[int]) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Read the weights of blocks onto the device, in the checkpoint's dtype, each while the one before is worked on."""
    carrier = Carrier(dense.device)

    def read(index: int) -> dict[str, Callable[[], torch.Tensor]]:
        tensors = dense.weights.module(dense.block_name(index))
        # what rests on a GPU goes from there, not through main memory
        near = {name: value if value.is_cuda else carrier.pinned(value) for name, value in tensors.items()}
        return {name: carrier.send(value) for name, value in near.items()}

    with ThreadPoolExecutor(1, thread_name_prefix="slicecli-block") as pool:
        ahead = deque(pool.submit(read, index) for index in indices[:1])
        for position, index in enumerate(indices):
            arrived = {name: receive() for name, receive in ahead.popleft().result().items()}
            ahead.extend(pool.submit(read, following) for following in indices[position + 1 : position + 2])
            yield index, arrived
            return_freed_memory()


@contextmanager
def filled(dense: DenseModel, block: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Fill a block of the dense model for as long as it runs."""
    modules.fill(block, weights, dense.device, dense.dtype)
    try:
        yield
    finally:
        modules.clear(block)


def fill_kept(
    dense: DenseModel, target: Target, declared: Block, block: nn.Module, weights: dict[str, torch.Tensor]
) -> None:
    """Copy into a sliced block what does not touch the stream."""
    names = [one.path for one in declared.passed_through] + modules.persistent_buffers(block)
    values = {name: weights[name].to(target.dtype) for name in names}
    modules.fill(block, values, dense.device, dense.dtype)


def hand_over_block(target: Target, name: str, weights: dict[str, torch.Tensor]) -> None:
    """Give a finished block's tensors to the sink and free it."""
    block = target.meta_model.get_submodule(name)
    for parameter_name, parameter in block.named_parameters():
        if parameter_name in target.cuts:
            parameter = target.cuts[parameter_name].of(parameter)
        target.sink(f"{name}.{parameter_name}", parameter.to("cpu", target.dtype))
    target.cuts.clear()
    for buffer_name in modules.persistent_buffers(block):
        target.sink(f"{name}.{buffer_name}", weights[buffer_name].to("cpu", target.dtype))
    modules.clear(block)


def hand_over_buffers(dense: DenseModel, target: Target) -> None:
    """Give the persistent buffers outside the blocks to the sink."""
    for name in modules.persistent_buffers(target.meta_model):
        if not name.startswith(f"{dense.adapter.blocks}."):
            target.sink(name, dense.weights.tensor(name).to("cpu", target.dtype))


def require_finite(tensor: torch.Tensor, what: str) -> None:
    """Stop where a stream is damaged."""
    if not is_finite(tensor):
        raise WeightsError(
            f"NaN or infinity appeared in {what}.",
            "Try --dtype float32; if that does not help, the checkpoint is damaged.",
        )
