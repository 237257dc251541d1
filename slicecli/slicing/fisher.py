"""What a slice of any width would lose, told by the dense model alone: its Fisher weight.

Dropping δ from a normalised norm input n moves the model's predictions, to second order, by a Kullback-Leibler
divergence of ½ E (g · δ)² nats per token, g being the gradient of the log-likelihood of labels that the model draws
itself with respect to n (the Fisher information; arXiv 1905.12558). With δ the part of n along all
directions of a basis Q but the first k, g · δ is a partial sum of products in rotated coordinates, so one gradient
serves every k at once:

    F(k) = ½ Σⱼ meanₜ (Σᵢ≥ₖ (Qᵀ gⱼₜ)ᵢ (Qᵀ nⱼₜ)ᵢ)²,   j over norm inputs, t over tokens, i over directions from 0.

The model runs forwards block by block and keeps the stream before each, then backwards, each block once more on the
stream that was kept. Only one block's weights are in memory at a time; what lives through both passes are the kept
streams, (blocks + 1) · tokens · d numbers. They stay on the device if they fit there, else they wait in main memory.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import nn

from slicecli.family.schedule import slices_head
from slicecli.linalg.basis import Basis, principal_basis
from slicecli.linalg.normal_equations import add_square, widen
from slicecli.progress import Progress
from slicecli.runtime.memory import available_memory_bytes
from slicecli.runtime.microbatch import concat
from slicecli.slicing import modules
from slicecli.slicing.context import Batches, DenseModel
from slicecli.slicing.layerwise import embedding_tables, enter, filled, read_blocks, require_finite
from slicecli.slicing.modules import Calls
from slicecli.slicing.sliced_tensors import final_norm_weight_and_bias, norm_weight_and_bias

__all__ = ["FisherSpectrum", "collect_fisher", "drawn_labels"]

# tokens at a time: logits are as wide as the vocabulary, effects are float64
HEAD_TOKENS = 256
EFFECT_TOKENS = 2048
# of the memory that is free on the device, for the kept streams
MEMORY_SHARE = 0.5
NO_LABEL = -100  # what cross_entropy ignores

# input and output of each norm, by its path
NormSights: TypeAlias = dict[str, tuple[torch.Tensor, torch.Tensor]]


@dataclass(frozen=True)
class FisherSpectrum:
    """What slices would lose in nats per token, by the width they keep.

    Attributes:
        shared: With the one basis of the refit at every norm input and before the head; float64 of shape (d + 1,),
            F(k) at index k. A centred basis gives a slice of k dims k - 1 directions, which is allowed for.
        layer: With the principal directions of each norm input, as the published method has them; without the input
            of the head where that method leaves it whole. The same shape.
        sites: As `layer`, of all norm inputs: also that of the head. The same shape.
        nll: Of the rows under the dense model, nats per predicted token.
    """

    shared: torch.Tensor
    layer: torch.Tensor
    sites: torch.Tensor
    nll: float
    tokens: int


def collect_fisher(dense: DenseModel, basis: Basis, batches: Batches, seed: int, progress: Progress) -> FisherSpectrum:
    """Run the dense model forwards and backwards over rows of text, block by block."""
    dense.meta_model.requires_grad_(False)  # of weights, no gradient is wanted
    return _Passes(dense, basis, batches, progress).run(seed)


def drawn_labels(logits: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """Return labels drawn from the distributions that logits stand for, by inverting the cumulative distribution.

    Args:
        logits: Shape (tokens, vocabulary).
        draws: Uniform numbers from 0 to below 1, float64 of shape (tokens,).

    Returns:
        Token ids of shape (tokens,).

    Example:
        >>> drawn_labels(torch.zeros(3, 4), torch.tensor([0.1, 0.3, 0.9])).tolist()
        [0, 1, 3]
    """
    cumulative = widen(logits).softmax(-1).double().cumsum(-1)
    found = torch.searchsorted(cumulative, draws[:, None] * cumulative[:, -1:], right=True)
    return found[:, 0].clamp_max(logits.shape[-1] - 1)


class _Weights:
    """Sums up the variants of F over norm inputs and tokens."""

    def __init__(self, dense: DenseModel, basis: Basis) -> None:
        self._dense = dense
        self._dtype = torch.promote_types(dense.dtype, torch.float32)
        self._shared = basis.vectors.to(dense.device, self._dtype)
        size = dense.dimensions.hidden_size
        self._sums = {
            name: torch.zeros(size + 1, dtype=torch.float64, device=dense.device)
            for name in ("shared", "layer", "sites")
        }

    def empty_moment(self) -> torch.Tensor:
        """Return a zero matrix of shape (d, d)."""
        size = self._dense.dimensions.hidden_size
        return torch.zeros(size, size, dtype=torch.float64, device=self._dense.device)

    def add_tokens(self, moment: torch.Tensor, norm_input: torch.Tensor) -> None:
        """Add tokens to the second moment of one norm input."""
        n = self._dense.normalise(norm_input).flatten(0, -2)
        add_square(moment, n)

    def principal(self, moment: torch.Tensor) -> torch.Tensor:
        """Return the principal directions of a norm input, of the tokens of all processes, in the dtype of products."""
        processes = self._dense.processes
        processes.sum_square_to_main(moment)
        (vectors,) = processes.tensors_from_main(
            lambda: principal_basis(moment)[:1], [tuple(moment.shape)], moment.device
        )
        return vectors.to(self._dtype)

    def add(
        self,
        norm_input: torch.Tensor,
        gradient: torch.Tensor,
        weight: torch.Tensor | None,
        principal: torch.Tensor,
        is_sliced_as_published: bool = True,
    ) -> None:
        """Add tokens of one norm input.

        Args:
            norm_input: What the norm reads, shape (..., d).
            is_sliced_as_published: The published method slices it.
        """
        n = self._dense.normalise(norm_input).flatten(0, -2)
        g = widen(gradient).flatten(0, -2)
        if weight is not None:
            g = g * weight.to(g)
        own = ("layer", "sites") if is_sliced_as_published else ("sites",)
        for some_n, some_g in zip(n.split(EFFECT_TOKENS), g.split(EFFECT_TOKENS), strict=True):
            for names, vectors in ((("shared",), self._shared), (own, principal)):
                effects = ((some_n @ vectors) * (some_g @ vectors)).double().flip(-1).cumsum(-1).flip(-1)
                for name in names:
                    # no direction is left out at the end, and a centred basis has one direction less than there are
                    # dims
                    self._sums[name][: effects.shape[-1]] += effects.square().sum(0)

    def spectrum(self, nll: float, tokens: int) -> FisherSpectrum:
        """Return half the means over the tokens."""
        self._dense.processes.sum_everywhere(*self._sums.values())
        means = {name: (0.5 / tokens * total).cpu() for name, total in self._sums.items()}
        if self._dense.is_centred:
            # a slice of k dims keeps k - 1 directions
            means["shared"] = torch.cat([means["shared"][:1], means["shared"][:-1]])
        return FisherSpectrum(**means, nll=nll, tokens=tokens)


class _Passes:
    """The pass forwards and the pass backwards."""

    def __init__(self, dense: DenseModel, basis: Basis, batches: Batches, progress: Progress) -> None:
        self._dense = dense
        self._batches = batches
        self._progress = progress
        self._weights = _Weights(dense, basis)
        numbers = batches.tokens * dense.dimensions.hidden_size * (len(dense.blocks) + 1)
        fits = numbers * dense.dtype.itemsize <= MEMORY_SHARE * available_memory_bytes(dense.device)
        self._place = dense.device if fits else torch.device("cpu")

    @torch.no_grad()
    def run(self, seed: int) -> FisherSpectrum:
        """Return what both passes find; the labels are drawn with `seed`."""
        dense = self._dense
        kept, calls, tuple_length = self._forwards()
        self._progress.start("backward", len(dense.blocks) + 1)
        gradients, nll = self._through_head(kept.pop(), tuple_length, seed)
        self._progress.advance()
        for index, weights in read_blocks(dense, range(len(dense.blocks))[::-1]):
            self._through_block(index, weights, calls, kept.pop(), gradients)
            self._progress.advance()
        return self._weights.spectrum(nll, self._batches.rows.numel())

    def _forwards(self) -> tuple[list[list[torch.Tensor]], Calls, int]:
        """Run all blocks."""
        dense = self._dense
        self._progress.start("forward", len(dense.blocks))
        streams, calls = enter(dense, dense.meta_model, embedding_tables(dense), self._batches)
        kept = [[stream.to(self._place) for stream in streams]]
        tuple_length = 0
        for index, weights in read_blocks(dense, range(len(dense.blocks))):
            block = dense.blocks[index]
            with filled(dense, block, weights):
                run = functools.partial(_run, block, calls, index)
                for number, stream in enumerate(streams):
                    outputs = [output for _, output in dense.micro_batches.run(run, stream)]
                    tuple_length = len(outputs[0]) if isinstance(outputs[0], tuple) else 0
                    streams[number] = concat([modules.first_tensor(output) for output in outputs])
                    require_finite(streams[number], f"the activations after block {index}")
            kept.append([stream.to(self._place) for stream in streams])
            self._progress.advance()
        return kept, calls, tuple_length

    def _through_head(
        self, streams: list[torch.Tensor], tuple_length: int, seed: int
    ) -> tuple[list[torch.Tensor], float]:
        """Draw the labels and go back through head and final norm."""
        dense, adapter = self._dense, self._dense.adapter
        rows = self._batches.rows
        generator = torch.Generator().manual_seed(seed)
        # for all rows at once, so that the labels of a row do not depend on the batch it is in
        draws = torch.rand(rows.shape, dtype=torch.float64, generator=generator)
        following = torch.full_like(rows, NO_LABEL)
        following[:, :-1] = rows[:, 1:]
        final, head = (dense.meta_model.get_submodule(path) for path in (adapter.final_norm, adapter.head.path))
        bias = ["bias"] * dense.dimensions.has_bias(adapter.head)
        moment = self._weights.empty_moment()
        for stream in streams:
            self._weights.add_tokens(moment, stream.to(dense.device))
        principal = self._weights.principal(moment)
        is_sliced_as_published = slices_head(dense.dimensions, None)
        weight, _ = final_norm_weight_and_bias(dense.dimensions, dense.weights, dense.device)
        nll = torch.zeros((), dtype=torch.float64, device=dense.device)
        gradients = []
        # never longer than a row: the model may have no more positions than that
        size = min(HEAD_TOKENS, rows.shape[1])
        with (
            filled(dense, final, dense.weights.module(adapter.final_norm)),
            # by name, because a tied head is not listed among the checkpoint's tensors
            filled(
                dense, head, {leaf: dense.weights.tensor(f"{adapter.head.path}.{leaf}") for leaf in ("weight", *bias)}
            ),
        ):
            for stream, some_draws, targets in zip(
                streams, self._batches.split(draws), self._batches.split(following), strict=True
            ):
                parts = []
                for some, numbers, labels in zip(
                    stream.flatten(0, -2).split(size),
                    some_draws.flatten().split(size),
                    targets.flatten().split(size),
                    strict=True,
                ):
                    norm_input = some[None].to(dense.device)
                    with torch.enable_grad():
                        norm_input = norm_input.detach().requires_grad_()
                        norm_output, logits = modules.run_head(dense.meta_model, adapter, norm_input, tuple_length)
                        logits = widen(logits)
                        drawn = drawn_labels(logits.detach(), numbers.to(dense.device))
                        loss = nn.functional.cross_entropy(logits, drawn, reduction="sum")
                        to_output, to_input = torch.autograd.grad(loss, [norm_output, norm_input])
                    nll += nn.functional.cross_entropy(
                        logits.detach(), labels.to(dense.device), ignore_index=NO_LABEL, reduction="sum"
                    )
                    self._weights.add(norm_input.detach(), to_output, weight, principal, is_sliced_as_published)
                    parts.append(to_input[0])
                gradient = torch.cat(parts).reshape(stream.shape)
                require_finite(gradient, "the gradients before the head")
                gradients.append(gradient.to(self._place))
        dense.processes.sum_everywhere(nll)
        return gradients, float(nll) / (rows.numel() - len(rows))

    def _through_block(
        self,
        index: int,
        weights: dict[str, torch.Tensor],
        calls: Calls,
        streams: list[torch.Tensor],
        gradients: list[torch.Tensor],
    ) -> None:
        """Go back through one block."""
        dense = self._dense
        block, norms = dense.blocks[index], dense.dimensions.declared_blocks[index].norms
        with filled(dense, block, weights):
            equations = {path: self._weights.empty_moment() for path in norms}
            watch = functools.partial(_watch, block, calls, index, norms)
            for stream in streams:
                for _, (_, seen) in dense.micro_batches.run(watch, stream.to(dense.device)):
                    for path, moment in equations.items():
                        self._weights.add_tokens(moment, seen[path][0])
            # each taken out as it is solved: matrices of d x d are what this pass needs most memory for
            principal = {path: self._weights.principal(equations.pop(path)) for path in norms}
            gains = {path: norm_weight_and_bias(dense.dimensions, path, weights)[0] for path in norms}
            for number, (stream, gradient) in enumerate(zip(streams, gradients, strict=True)):
                go_back = functools.partial(_go_back, watch, norms, stream.to(dense.device), gradient.to(dense.device))
                to_inputs = []
                for _, (to_input, sights) in dense.micro_batches.run(go_back, torch.arange(len(stream))):
                    require_finite(to_input, f"the gradients before block {index}")
                    for path, (norm_input, to_output) in zip(norms, sights, strict=True):
                        self._weights.add(norm_input, to_output, gains[path], principal[path])
                    to_inputs.append(to_input)
                gradients[number] = concat(to_inputs).to(self._place)


def _run(block: nn.Module, calls: Calls, index: int, stream: torch.Tensor) -> Any:
    return calls.of(index, stream)(block, stream)


def _go_back(
    watch: Callable[[torch.Tensor], tuple[torch.Tensor, NormSights]],
    norms: Sequence[str],
    stream: torch.Tensor,
    gradient: torch.Tensor,
    rows: torch.Tensor,
) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Go back through a block with some rows of a batch."""
    some = slice(int(rows[0]), int(rows[-1]) + 1)
    with torch.enable_grad():
        entering = stream[some].detach().requires_grad_()
        output, seen = watch(entering)
        *to_outputs, to_input = torch.autograd.grad(
            output, [*(seen[path][1] for path in norms), entering], gradient[some]
        )
    return to_input, [(seen[path][0].detach(), to_output) for path, to_output in zip(norms, to_outputs, strict=True)]


def _watch(
    block: nn.Module, calls: Calls, index: int, norms: Sequence[str], stream: torch.Tensor
) -> tuple[torch.Tensor, NormSights]:
    """Run a block; return the stream behind it, and input and output of each norm by its path."""
    seen: NormSights = {}

    def hook_for(path: str) -> Callable[..., None]:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: torch.Tensor) -> None:
            seen[path] = args[0] if args else next(iter(kwargs.values())), output

        return hook

    handles = [block.get_submodule(path).register_forward_hook(hook_for(path), with_kwargs=True) for path in norms]
    try:
        return modules.first_tensor(_run(block, calls, index, stream)), seen
    finally:
        for handle in handles:
            handle.remove()
