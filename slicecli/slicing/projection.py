"""What the dense model says when its normalised stream is projected on the leading directions: a probe of slices.

Nothing is sliced: every norm passes on only the part of n along the first k directions of the refit's basis, the
weights stay as they are, and the stream itself keeps its width. All k go through the model together, block by block,
so that only one block's weights are in memory at a time.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slicecli.linalg.basis import Basis
from slicecli.linalg.normal_equations import widen
from slicecli.progress import Progress
from slicecli.runtime.microbatch import concat
from slicecli.slicing import modules
from slicecli.slicing.activations import Stream
from slicecli.slicing.context import Batches, DenseModel
from slicecli.slicing.layerwise import embedding_tables, enter, filled, read_blocks, require_finite
from slicecli.slicing.sliced_tensors import final_norm_weight_and_bias, norm_weight_and_bias

__all__ = ["ProjectedLoss", "collect_projected_loss"]

HEAD_TOKENS = 256  # at a time: logits are as wide as the vocabulary

# takes what a norm reads, returns what it passes on
Norm = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class ProjectedLoss:
    """Nats per predicted token.

    Attributes:
        dense: Of the model as it is.
        projected: With the stream projected, by the dim of the slice that keeps as many directions.
        tokens: Tokens that were read.
    """

    dense: float
    projected: Mapping[int, float]
    tokens: int


@torch.no_grad()
def collect_projected_loss(
    dense: DenseModel, basis: Basis, batches: Batches, dims: Sequence[int], progress: Progress
) -> ProjectedLoss:
    """Run the dense model over rows of text, as it is and projected at several dims, block by block."""
    progress.start("projected", len(dense.blocks) + 1)
    first, calls = enter(dense, dense.meta_model, embedding_tables(dense), batches)
    variants: list[int | None] = [None, *dims]
    streams: list[Stream] = [first, *(dense.activations.filled(iter(first)) for _ in dims)]
    tuple_length = 0
    for index, weights in read_blocks(dense, range(len(dense.blocks))):
        block = dense.blocks[index]
        with filled(dense, block, weights):
            for dim, stream in zip(variants, streams, strict=True):
                norms = {
                    path: _projected_norm(dense, basis, dim, *norm_weight_and_bias(dense.dimensions, path, weights))
                    for path in dense.dimensions.declared_blocks[index].norms
                }
                run = functools.partial(_run_block, block, calls, index)
                with _replaced(block, {} if dim is None else norms):
                    for number, batch in enumerate(stream):
                        outputs = [output for _, output in dense.micro_batches.run(run, batch)]
                        tuple_length = len(outputs[0]) if isinstance(outputs[0], tuple) else 0
                        stream[number] = concat([modules.first_tensor(output) for output in outputs])
                        require_finite(stream[number], f"the activations after block {index}")
        progress.advance()
    losses = _through_head(dense, basis, batches, variants, streams, tuple_length)
    progress.advance()
    return ProjectedLoss(losses[0], dict(zip(dims, losses[1:], strict=True)), batches.rows.numel())


def _through_head(
    dense: DenseModel,
    basis: Basis,
    batches: Batches,
    variants: Sequence[int | None],
    streams: Sequence[Stream],
    tuple_length: int,
) -> list[float]:
    """Return the nats per predicted token of each variant."""
    adapter, rows = dense.adapter, batches.rows
    final, head = (dense.meta_model.get_submodule(path) for path in (adapter.final_norm, adapter.head.path))
    names = ["weight", *(["bias"] * dense.dimensions.has_bias(adapter.head))]
    weight, bias = final_norm_weight_and_bias(dense.dimensions, dense.weights, dense.device)
    sums = torch.zeros(len(variants), dtype=torch.float64, device=dense.device)
    size = min(HEAD_TOKENS, rows.shape[1])  # never longer than a row: the model may have no more positions than that
    with (
        filled(dense, final, dense.weights.module(adapter.final_norm)),
        # by name, because a tied head is not listed among the checkpoint's tensors
        filled(dense, head, {leaf: dense.weights.tensor(f"{adapter.head.path}.{leaf}") for leaf in names}),
    ):
        for number, (dim, stream) in enumerate(zip(variants, streams, strict=True)):
            norm = {"": _projected_norm(dense, basis, dim, weight, bias)}
            with _replaced(final, {} if dim is None else norm):
                for batch, ids in zip(stream, batches, strict=True):
                    predicting, targets = batch[:, :-1].flatten(0, -2), ids[:, 1:].flatten().to(dense.device)
                    for some, labels in zip(predicting.split(size), targets.split(size), strict=True):
                        _, logits = modules.run_head(
                            dense.meta_model, adapter, some[None].to(dense.device), tuple_length
                        )
                        sums[number] += nn.functional.cross_entropy(widen(logits), labels, reduction="sum")
    dense.processes.sum_everywhere(sums)
    losses: list[float] = (sums / (rows.numel() - len(rows))).tolist()
    return losses


def _projected_norm(
    dense: DenseModel, basis: Basis, dim: int | None, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> Norm:
    """Return a norm of the dense model that passes on only what a slice of some dim keeps."""
    dtype = torch.promote_types(dense.dtype, torch.float32)
    kept = basis.vectors if dim is None else basis.vectors[:, : dim - dense.is_centred]
    directions = kept.to(dense.device, dtype)

    def norm(stream: torch.Tensor) -> torch.Tensor:
        n = dense.normalise(stream).to(dtype)
        output = n @ directions @ directions.T
        output = output if weight is None else output * weight.to(output)
        return (output if bias is None else output + bias.to(output)).to(stream.dtype)

    return norm


def _run_block(block: nn.Module, calls: modules.Calls, index: int, stream: torch.Tensor) -> Any:
    return calls.of(index, stream)(block, stream)


@contextmanager
def _replaced(module: nn.Module, norms: Mapping[str, Norm]) -> Iterator[None]:
    """Let other functions answer for the norms inside a module, by path."""

    def hook_for(norm: Norm) -> Callable[..., torch.Tensor]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> torch.Tensor:
            return norm(args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [
        module.get_submodule(path).register_forward_hook(hook_for(norm), with_kwargs=True)
        for path, norm in norms.items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
