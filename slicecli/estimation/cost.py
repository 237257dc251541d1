"""What a dense model and its slices cost, from `config.json` alone.

Parameters are counted by the declaration of the family (`slicecli.family`); everything else follows from them, from the
matrices that are declared, and from the config's heads, windows and experts.

Operations (FLOPs): 2 for each multiply-add. A token meets every matrix once: those that read and write the stream,
the head, the shortcut matrices of the published method, routers, and of a mixture's experts those it is sent to;
looking up an embedding is no operation. To this the attention adds, for each block and token, its scores and the
weighted sum of values,

    2 h a c + 2 h a c,

where the token attends to c tokens, itself among them. Biases, norms, activation functions, rotations of positions
and the softmax are left out. That is the count of Kaplan et al. (arXiv 2001.08361, table 1) with the causal mask taken
exactly and the head counted.

Times are the larger of two bounds (roofline: Williams, Waterman, Patterson, Communications of the ACM 52, 2009):
bytes read / bandwidth, and operations / peak.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from slicecli.errors import RequestError, UnsupportedModelError
from slicecli.estimation.devices import Device
from slicecli.family.dimensions import Dimensions
from slicecli.family.schedule import PublishedSizes, slices_head
from slicecli.family.slice_plan import DTYPE_BYTES, Method, SliceSizes
from slicecli.runtime.inputs import check_count

__all__ = ["Bound", "Cost", "CostModel", "SpeedUp", "Times", "Workload", "speed_up", "times"]

Bound = Literal["bandwidth", "compute"]

LOGIT_BYTES = 4  # a token is chosen from logits in float32


@dataclass(frozen=True)
class Workload:
    """What is served at a time."""

    batch: int = 1
    length: int = 2048

    def __post_init__(self) -> None:
        if self.batch < 1 or self.length < 1:
            raise RequestError(
                f"A batch of {self.batch} sequences of {self.length} tokens is empty.", "Use positive numbers."
            )
        check_count(self.batch, "A batch of {} sequences is", "Use --batch")
        check_count(self.length, "A length of {} tokens is", "Use --length")


@dataclass(frozen=True)
class Cost:
    """What one model costs under one workload.

    Attributes:
        parameters: Its parameters, a shared one counted once.
        active_parameters: Those that one token needs: all but the experts it is not sent to.
        bytes: Bytes of its weights.
        flops_per_token_prefill: Operations per token of a prompt of the workload's length that is read at once: the
            mean over the prompt, in which a token attends to itself and those before it.
        flops_per_token_decode: Operations for one more token, which is then the last of a sequence of that length.
        kv_cache_bytes_per_token: Bytes of keys and values for one token of one sequence in all blocks.
        kv_cache_bytes: Bytes of keys and values that the whole batch attends to when its sequences have that length; a
            sliding window keeps no more tokens than it has. In the dtype of the weights, and for the key/value heads
            that the weights have (a class that repeats them for every query head stores more).
        working_bytes: Bytes of what lives only while tokens pass through: for the tokens of one prompt of that length
            (prompts are read one after another) or one for each sequence, whichever are more, the stream, the norm's
            output, the output of each branch of a step, and the inner values of the branch that has most of them
            (outputs of its readers, input of its writer, and of the experts a token meets the same); and
            the batch's logits of one position in the dtype and in float32. Kernels are taken to be fused: attention
            scores are never whole, activation functions make no copies (written out in single operations, a GELU
            doubles the figure). Not in it: the runtime's own memory, fragmentation, compiled graphs.
        prefill_bytes_read: Bytes read from memory to read all prompts in one pass: the weights once (embeddings are
            looked up, so their tables do not count; of E experts those that are expected to be needed,
            E (1 - (1 - e/E)^n) for n tokens, if tokens are sent evenly and independently), and the cache.
        decode_bytes_read: Bytes read to make one more token for each sequence: likewise.
    """

    parameters: int
    active_parameters: int
    bytes: int
    flops_per_token_prefill: float
    flops_per_token_decode: int
    kv_cache_bytes_per_token: int
    kv_cache_bytes: int
    working_bytes: int
    serve_bytes: int
    prefill_bytes_read: float
    decode_bytes_read: float

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Times:
    """The least time a device needs, in seconds.

    Attributes:
        prefill: To read all prompts of the batch.
        decode: To make one more token for every sequence of the batch.
    """

    prefill: float
    decode: float
    prefill_bound: Bound
    decode_bound: Bound


@dataclass(frozen=True)
class SpeedUp:
    """How many times as fast a slice is as the dense model: the ratio of their least times."""

    prefill: float
    decode: float
    prefill_bound: Bound
    decode_bound: Bound

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class _PerWidth:
    """A number of elements that grows with the width of the stream.

    Attributes:
        blocks: Elements for each unit of width where blocks read, which is one width.
        head: Elements for each unit of the width before the head.
    """

    blocks: int = 0
    head: int = 0

    def at(self, widths: tuple[int, int]) -> int:
        """Return the elements for a width of the blocks and one before the head."""
        return self.blocks * widths[0] + self.head * widths[1]


@dataclass(frozen=True)
class _Mixture:
    """The experts of all blocks that have as many and send a token to as many."""

    experts: int
    per_token: int
    elements: _PerWidth

    def idle(self, tokens: int) -> float:
        """Return the fraction of them that none of some tokens is expected to need."""
        return float((1 - self.per_token / self.experts) ** tokens)


class CostModel:
    """The costs of one model and of its slices by one method, whose blocks have one width."""

    def __init__(self, dimensions: Dimensions, method: Method, slice_head: bool | None = None) -> None:
        self._dimensions = dimensions
        self._published = PublishedSizes(dimensions, slice_head) if method == "slicegpt" else None
        self._slices_head = method == "refit" or slices_head(dimensions, slice_head)
        self._keeps_tie = method == "refit" and dimensions.keeps_tie
        self._steps = sum(len(block.sublayers) for block in dimensions.declared_blocks)
        self._windows = Counter(dimensions.window(block) for block in range(dimensions.blocks))
        self._list_matrices()

    def dense(self, dtype: str, workload: Workload | None = None) -> Cost:
        """Return what the dense model costs.

        Args:
            dtype: Dtype of weights, activations and cache.
        """
        return self._cost(None, dtype, workload or Workload())

    def sliced(self, dim: int, dtype: str, workload: Workload | None = None) -> Cost:
        """Return what a slice costs.

        Args:
            dtype: Dtype of weights, activations and cache.
        """
        if not 0 < dim <= self._dimensions.hidden_size:
            raise RequestError(
                f"A slice cannot have a dim of {dim}.", f"Dims range from 1 to {self._dimensions.hidden_size}."
            )
        return self._cost(dim, dtype, workload or Workload())

    def _cost(self, dim: int | None, dtype: str, workload: Workload) -> Cost:
        dimensions, widths = self._dimensions, self._widths(dim)
        sizes: SliceSizes = self._published or dimensions
        parameters, size = sizes.parameters(dim), _bytes_of(dtype)
        batch, length = workload.batch, workload.length

        matrices = self._matrices.at(widths)
        if dim is not None and self._published is not None:
            matrices += (self._steps - 1) * dim**2 + dim * widths[1]  # shortcuts, from each width to the next
        matrices += sum(one.elements.at(widths) * one.per_token // one.experts for one in self._mixtures)
        # scores and weighted sum, for each token attended to
        attention = 4 * dimensions.heads * dimensions.head_dim
        prefill = (
            2 * matrices + attention * self._attended(_all_attended(length, one) for one in self._windows) / length
        )
        attended = self._attended(_attended(length, one) for one in self._windows)

        key_values = 2 * dimensions.key_value_heads * dimensions.head_dim * size
        cache = batch * key_values * attended
        working = self._working_elements(widths) * max(length, batch) * size
        working += batch * dimensions.vocabulary * (size + LOGIT_BYTES)
        return Cost(
            parameters=parameters,
            active_parameters=parameters
            - sum(one.elements.at(widths) * (one.experts - one.per_token) // one.experts for one in self._mixtures),
            bytes=parameters * size,
            flops_per_token_prefill=prefill,
            flops_per_token_decode=2 * matrices + attention * attended,
            kv_cache_bytes_per_token=key_values * dimensions.blocks,
            kv_cache_bytes=cache,
            working_bytes=working,
            serve_bytes=parameters * size + cache + working,
            prefill_bytes_read=self._weights_read(parameters, dim, batch * length) * size + cache,
            decode_bytes_read=self._weights_read(parameters, dim, batch) * size + cache,
        )

    def _widths(self, dim: int | None) -> tuple[int, int]:
        """Return the width of the stream in the blocks and before the head."""
        size = self._dimensions.hidden_size
        if dim is None:
            return size, size
        return dim, dim if self._slices_head else size

    def _attended(self, tokens_by_window: Iterable[int]) -> int:
        """Sum over all blocks what is given for each window."""
        return sum(count * tokens for count, tokens in zip(self._windows.values(), tokens_by_window, strict=True))

    def _weights_read(self, parameters: int, dim: int | None, tokens: int) -> float:
        """Return the number of weights that are read when some tokens pass at once."""
        widths = self._widths(dim)
        looked_up = self._embeddings.at(widths)
        if self._dimensions.is_tied if dim is None else self._keeps_tie:
            looked_up -= self._dimensions.width(self._dimensions.adapter.head.width) * widths[1]  # read as the head
        idle = sum(one.elements.at(widths) * one.idle(tokens) for one in self._mixtures)
        return parameters - looked_up - idle

    def _list_matrices(self) -> None:
        """Sum up the declared matrices, so that a cost at any width is a few multiplications."""
        dimensions, adapter = self._dimensions, self._dimensions.adapter
        mixture_of = {}
        for index, block in enumerate(dimensions.declared_blocks):
            for branch in block.branches:
                if branch.experts is not None:
                    kind = (dimensions.width(branch.experts.count), dimensions.width(branch.experts.per_token))
                    if kind[1] > kind[0]:
                        raise UnsupportedModelError(
                            f"config.json sends each token to {kind[1]:,} of {kind[0]:,} experts.", "Check config.json."
                        )
                    for path in (branch.experts.reader_path, branch.experts.writer_path):
                        mixture_of[f"{adapter.blocks}.{index}.{path}"] = kind
        declared = list(dimensions.declared_parameters())
        last = max(one.site for one in declared)
        # by what is counted (a role, or a mixture of experts), then by whether the width is that before the head
        counts: Counter[tuple[str | tuple[int, int], bool]] = Counter()
        for one in declared:
            if one.role == "embedding" or (one.role in ("reader", "writer", "experts") and len(one.shape) > 1):
                counts[mixture_of.get(one.name, one.role), one.site == last] += one.elements(1)
        per_width = {kind: _PerWidth(counts[kind, False], counts[kind, True]) for kind, _ in counts}
        self._embeddings = per_width["embedding"]
        self._matrices = _PerWidth(
            per_width["reader"].blocks + per_width["writer"].blocks,
            per_width["reader"].head + per_width["writer"].head,
        )
        self._mixtures = [_Mixture(*kind, elements) for kind, elements in per_width.items() if isinstance(kind, tuple)]

    def _working_elements(self, widths: tuple[int, int]) -> int:
        """Return how many values live at once for each token that passes, at most."""
        dimensions, most = self._dimensions, 0
        for block in dict.fromkeys(dimensions.declared_blocks):
            for step in block.sublayers:
                inner = [0]
                for branch in step:
                    values = sum(dimensions.width(linear.width) for linear in branch.linears)
                    if branch.experts is not None:
                        each = dimensions.width(branch.experts.reader_width) + dimensions.width(
                            branch.experts.writer_width
                        )
                        values += dimensions.width(branch.experts.per_token) * each
                    inner.append(values)
                most = max(most, (2 + len(step)) * max(widths) + max(inner))
        return most


def times(cost: Cost, workload: Workload, device: Device) -> Times:
    """Return the least time that a device needs, by the roofline."""
    prompts = workload.batch * workload.length
    prefill, prefill_bound = _bound(cost.prefill_bytes_read, cost.flops_per_token_prefill * prompts, device)
    decode, decode_bound = _bound(cost.decode_bytes_read, cost.flops_per_token_decode * workload.batch, device)
    return Times(prefill, decode, prefill_bound, decode_bound)


def speed_up(dense: Cost, sliced: Cost, workload: Workload, device: Device) -> SpeedUp:
    """Return how many times as fast a slice can be as the dense model.

    Both are taken to reach the same fraction of what the device can do.
    """
    before, after = times(dense, workload, device), times(sliced, workload, device)
    return SpeedUp(
        before.prefill / after.prefill, before.decode / after.decode, after.prefill_bound, after.decode_bound
    )


def _bound(read: float, operations: float, device: Device) -> tuple[float, Bound]:
    reading = 0.0 if device.bandwidth is None else read / device.bandwidth
    computing = 0.0 if device.flops is None else operations / device.flops
    return (reading, "bandwidth") if reading > computing else (computing, "compute")


def _attended(length: int, window: int | None) -> int:
    """Return how many tokens the last of a sequence attends to, itself among them."""
    return length if window is None else min(length, window)


def _all_attended(length: int, window: int | None) -> int:
    """Return that number summed over all tokens of a sequence."""
    growing = _attended(length, window)
    return growing * (growing + 1) // 2 + (length - growing) * growing


def _bytes_of(dtype: str) -> int:
    if dtype not in DTYPE_BYTES:
        raise RequestError(f"There is no dtype {dtype!r}.", f"Known: {', '.join(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype]
