"""The two passes over the blocks: statistics of the dense model, then the refit of its slices.

Blocks are filled with weights one at a time and freed again, so the whole model is never in memory; what lives
through a pass are the streams, (tokens, width) numbers each. Several slices of one model share the dense half of
the refit pass. Weights come from a `WeightReader`, sliced tensors go to each target's `sink`; no files here.

Legend: d hidden size, k dim kept, Q basis (d, k), x dense stream, y sliced stream, n the norm without its weight,
g a norm's weight, z what enters a writer, A and B the refitted maps of readers and writers, A₀ and B₀ the plain
projections they start from. Formulas: least squares as in "ours" of `docs/method.md`; the rotation itself is
SliceGPT's (arXiv 2401.15024, theorem 1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from slicecli.adapters import Adapter, Branch, Dimensions, Linear
from slicecli.errors import WeightsError
from slicecli.slicing import blocks as running
from slicecli.slicing.basis import Basis, reader_basis
from slicecli.slicing.blocks import Call
from slicecli.slicing.moments import Moments, add_outer, normalise
from slicecli.slicing.ridge import Correction, solve_ridge

__all__ = ["Batches", "DenseModel", "Progress", "Target", "WeightReader", "collect_basis", "refit"]

TABLE_ROWS = 8192
HELD_OUT_EVERY = 5


class WeightReader(Protocol):
    """Reads dense parameters by module name."""

    def tensor(self, name: str) -> torch.Tensor:
        """Return one parameter."""
        ...

    def module(self, path: str) -> dict[str, torch.Tensor]:
        """Return all parameters below a module, by their names inside it."""
        ...


class Progress(Protocol):
    """Hears how far a pass has come."""

    def start(self, phase: str, total: int) -> None:
        """A phase of `total` steps begins."""
        ...

    def advance(self, detail: str = "") -> None:
        """One step is done; `detail` is a short remark on it."""
        ...


@dataclass(frozen=True)
class DenseModel:
    """The dense model as the passes see it: an empty shell, its weights, and where to compute.

    Attributes:
        shell: The transformers model with all parameters on `meta`.
        weights: Reads its parameters.
        adapter: The family's declaration.
        dimensions: Its sizes.
        device: Where blocks run.
        dtype: Dtype of blocks and streams.
    """

    shell: Any
    weights: WeightReader
    adapter: Adapter
    dimensions: Dimensions
    device: torch.device
    dtype: torch.dtype

    @property
    def epsilon(self) -> float:
        """The ε of the norms that read the stream."""
        return float(self.dimensions.value(self.adapter.norm_epsilon))

    @property
    def blocks(self) -> Sequence[nn.Module]:
        """The empty blocks in order."""
        return list(self.shell.get_submodule(self.adapter.blocks))

    def block_name(self, index: int) -> str:
        """Return the path of a block in the model."""
        return f"{self.adapter.blocks}.{index}"


@dataclass
class Target:
    """One slice in the making.

    Attributes:
        dim: k.
        shell: The empty model of the sliced config.
        dtype: Dtype in which its tensors are written.
        sink: Takes each finished tensor: parameter name and value on the CPU.
    """

    dim: int
    shell: Any
    dtype: torch.dtype
    sink: Callable[[str, torch.Tensor], None]
    _stream: list[torch.Tensor] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Batches:
    """Calibration rows in batches, with the tokens set apart to choose ridges.

    Attributes:
        rows: Token ids, int64 of shape (rows, sequence length).
        size: Rows per batch.
    """

    rows: torch.Tensor
    size: int

    def __len__(self) -> int:
        return math.ceil(len(self.rows) / self.size)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(self.rows.split(self.size))

    def held_out(self) -> list[torch.Tensor]:
        """Say for each batch which of its tokens are held out, bool of shape (rows * sequence length,).

        Every fifth row is; of fewer than five rows, the last fifth of each.
        """
        is_held_out = torch.zeros(self.rows.shape, dtype=torch.bool)
        if len(self.rows) >= HELD_OUT_EVERY:
            is_held_out[HELD_OUT_EVERY - 1 :: HELD_OUT_EVERY] = True
        else:
            is_held_out[:, -(self.rows.shape[1] // HELD_OUT_EVERY) :] = True
        return [batch.flatten() for batch in is_held_out.split(self.size)]


@torch.no_grad()
def collect_basis(dense: DenseModel, batches: Batches, progress: Progress) -> Basis:
    """Run the dense model over the calibration rows and solve for the shared basis.

    Raises:
        WeightsError: The stream becomes NaN or infinite; the message names the block.
    """
    adapter = dense.adapter
    statistics = _Statistics(dense)
    progress.start("statistics", len(dense.blocks) + 1)
    streams, calls = _enter(dense, dense.shell, _embedding_tables(dense), batches)
    for index, block in enumerate(dense.blocks):
        weights = _read_block(dense, dense.block_name(index))
        with _filled(dense, block, weights):
            moments = [statistics.empty() for _ in adapter.branches]
            for number, stream in enumerate(streams):
                call = calls[tuple(stream.shape[:2])][index]
                streams[number], inputs, _ = running.record_block(block, call, stream, adapter.branches)
                _require_finite(streams[number], f"the activations after block {index}")
                for moment, norm_input in zip(moments, inputs, strict=True):
                    statistics.add_tokens(moment, norm_input)
            for moment, branch in zip(moments, adapter.branches, strict=True):
                readers = [weights[f"{reader.path}.weight"] for reader in branch.readers]
                statistics.add_norm_input(moment, weights[f"{branch.norm}.weight"], readers)
        progress.advance()
    final = statistics.empty()
    for stream in streams:
        statistics.add_tokens(final, stream)
    norm_weight = dense.weights.tensor(f"{adapter.final_norm}.weight").to(dense.device)
    statistics.add_norm_input(final, norm_weight, [dense.weights.tensor(f"{adapter.head}.weight").to(dense.device)])
    basis = reader_basis(statistics.second_moment, statistics.metric)
    progress.advance()
    return basis


@torch.no_grad()
def refit(dense: DenseModel, basis: Basis, targets: Sequence[Target], batches: Batches, progress: Progress) -> None:
    """Slice: run dense and sliced streams side by side and fit every map that touches the stream.

    Each target's tensors go to its sink in the order embeddings, blocks, final norm, head.

    Raises:
        WeightsError: A stream becomes NaN or infinite; the message names the block.
    """
    adapter = dense.adapter
    held_out = [mask.to(dense.device) for mask in batches.held_out()]
    progress.start("refit", len(dense.blocks) + 1)
    streams, calls = _enter(dense, dense.shell, _embedding_tables(dense), batches)
    bases = {target.dim: basis.leading(target.dim) for target in targets}
    for target in targets:
        _slice_embeddings(dense, target, bases[target.dim], batches)

    for index, block in enumerate(dense.blocks):
        name = dense.block_name(index)
        weights = _read_block(dense, name)
        with _filled(dense, block, weights):
            before: list[list[torch.Tensor]] = [[] for _ in adapter.branches]
            branch_calls: dict[tuple[int, ...], list[Call]] = {}
            for number, stream in enumerate(streams):
                shape = tuple(stream.shape[:2])
                streams[number], inputs, branch_calls[shape] = running.record_block(
                    block, calls[shape][index], stream, adapter.branches
                )
                _require_finite(streams[number], f"the activations after block {index}")
                for position, norm_input in enumerate(inputs):
                    before[position].append(norm_input)
        errors = []
        sliced_blocks = [target.shell.get_submodule(name) for target in targets]
        for target, sliced_block in zip(targets, sliced_blocks, strict=True):
            _prepare_block(dense, target, sliced_block, weights)
        for position, branch in enumerate(adapter.branches):
            after = before[position + 1] if position + 1 < len(adapter.branches) else streams
            for target, sliced_block in zip(targets, sliced_blocks, strict=True):
                half = _Half(
                    dense, target, sliced_block, branch, weights, {s: c[position] for s, c in branch_calls.items()}
                )
                errors.append(half.fit_readers(before[position], bases[target.dim], held_out))
                half.fit_writer(after, bases[target.dim], held_out)
                for stream in target._stream:
                    _require_finite(stream, f"the sliced activations of block {index} ({branch.module})")
            before[position].clear()
        for target, sliced_block in zip(targets, sliced_blocks, strict=True):
            for parameter_name, parameter in sliced_block.named_parameters():
                target.sink(f"{name}.{parameter_name}", parameter.to("cpu", target.dtype))
            running.clear(sliced_block)
        progress.advance(f"energy kept {1 - max(errors):.4f}")

    for target in targets:
        _fit_head(dense, target, streams, bases[target.dim], held_out)
        target._stream.clear()
    progress.advance()


class _Statistics:
    """Sums up C and M of `slicecli.slicing.basis`, one norm input at a time.

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
        flat = normalise(norm_input, self._dense.epsilon).flatten(0, -2)
        add_outer(moment, flat, flat)

    def add_norm_input(self, moment: torch.Tensor, weight: torch.Tensor, readers: Sequence[torch.Tensor]) -> None:
        """Add a finished norm input: its Cⱼ to C, its Mⱼ, scaled to a total of one, to M."""
        metric = self.empty()
        wide = _wide(weight.dtype)
        for reader in readers:
            for rows in reader.split(TABLE_ROWS):
                scaled = rows.to(wide) * weight.to(wide)
                add_outer(metric, scaled, scaled)
        self.second_moment += moment
        seen = (metric * moment).sum()
        if bool(seen > 0):
            self.metric += metric / seen


@dataclass(frozen=True)
class _Half:
    """One branch of one block of one target: fits its readers, then its writer, then moves the stream on."""

    dense: DenseModel
    target: Target
    block: nn.Module
    branch: Branch
    weights: dict[str, torch.Tensor]
    calls: dict[tuple[int, ...], Call]

    def fit_readers(
        self, dense_inputs: Sequence[torch.Tensor], basis: torch.Tensor, held_out: Sequence[torch.Tensor]
    ) -> float:
        """Fit A, the map from the sliced to the dense normalised stream, and fold it into every reader.

        Returns:
            The share of the dense normalised stream's energy (held-out tokens) that A does not explain.
        """
        norm = self.block.get_submodule(self.branch.norm)
        matrix, lost = _fit_reading(self.dense, norm, dense_inputs, self.target._stream, basis, held_out)
        weight = self.weights[f"{self.branch.norm}.weight"].double()
        scale = math.sqrt(self.dense.dimensions.hidden_size / self.target.dim)
        for reader in self.branch.readers:
            folded = (self.weights[f"{reader.path}.weight"].double() * weight) @ matrix
            # a norm with the sliced ε gives the dense output when its input grows by the same factor
            factor = scale if reader.feeds_norm else 1.0
            self._set(f"{reader.path}.weight", folded * factor)
            if self._has_bias(reader):
                self._set(f"{reader.path}.bias", self.weights[f"{reader.path}.bias"].double() * factor)
        return lost

    def fit_writer(
        self, dense_after: Sequence[torch.Tensor], basis: torch.Tensor, held_out: Sequence[torch.Tensor]
    ) -> None:
        """Fit B to what the dense stream is after this branch, and add the branch to the sliced stream."""
        path = self.branch.writer.path
        has_bias = self._has_bias(self.branch.writer)
        projected = basis.T @ self.weights[f"{path}.weight"].double()
        if has_bias:
            projected = torch.cat([projected, (basis.T @ self.weights[f"{path}.bias"].double())[:, None]], dim=1)
        moments = Moments(projected.shape[1], self.target.dim, self.dense.device)
        # an input of the stream's own size is kept; a wider one costs less to compute again than to hold
        is_kept = projected.shape[1] <= 2 * self.dense.dimensions.hidden_size
        kept: list[torch.Tensor] = []
        wide = _wide(self.dense.dtype)
        start, leading = projected.to(wide), basis.to(wide)
        for stream, after, mask in zip(self.target._stream, dense_after, held_out, strict=True):
            entering = self._writer_input(stream)
            if is_kept:
                kept.append(entering)
            flat, target = entering.flatten(0, -2).to(wide), after.flatten(0, -2).to(wide)
            if has_bias:
                flat = torch.cat([flat, flat.new_ones(len(flat), 1)], dim=1)
            residual = target @ leading - stream.flatten(0, -2).to(wide) - flat @ start.T
            # errors count as the next norm will see them: relative to the size of the stream
            root = torch.rsqrt(target.square().mean(-1, keepdim=True) + self.dense.epsilon)
            moments.add(flat * root, residual * root, mask)
        matrix = projected + solve_ridge(moments).matrix
        del moments
        if has_bias:
            self._set(f"{path}.bias", matrix[:, -1])
            matrix = matrix[:, :-1]
        self._set(f"{path}.weight", matrix)
        module, writer = self.block.get_submodule(self.branch.module), self.block.get_submodule(path)
        for number, stream in enumerate(self.target._stream):
            if is_kept:
                added, kept[number] = writer(kept[number]), torch.empty(0)
            else:
                added = running.first_tensor(self._call(stream)(module, self._normalised(stream)))
            self.target._stream[number] = stream + added

    def _normalised(self, stream: torch.Tensor) -> torch.Tensor:
        normalised: torch.Tensor = self.block.get_submodule(self.branch.norm)(stream)
        return normalised

    def _call(self, stream: torch.Tensor) -> Call:
        return self.calls[tuple(stream.shape[:2])]

    def _writer_input(self, stream: torch.Tensor) -> torch.Tensor:
        return running.writer_input(self.block, self.branch, self._call(stream), self._normalised(stream))

    def _has_bias(self, linear: Linear) -> bool:
        return f"{linear.path}.bias" in self.weights

    def _set(self, name: str, value: torch.Tensor) -> None:
        stored = _store(value, self.target)
        running.fill(self.block, {name: stored}, self.dense.device, self.dense.dtype)


def _fit_reading(
    dense: DenseModel,
    norm: nn.Module,
    dense_inputs: Sequence[torch.Tensor],
    sliced_inputs: Sequence[torch.Tensor],
    basis: torch.Tensor,
    held_out: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, float]:
    """Fit A = argmin Σ |n(x) − A n'(y)|², pulled towards A₀ = sqrt(d/k) Q.

    Returns:
        A, float64 of shape (d, k), and the share of Σ |n(x)|² over held-out tokens that it leaves.
    """
    width, dim = basis.shape
    start = basis * math.sqrt(width / dim)
    wide = _wide(dense.dtype)
    start_wide = start.to(wide)
    moments = Moments(dim, width, dense.device)
    energy = torch.zeros((), dtype=torch.float64, device=dense.device)
    for dense_input, sliced_input, mask in zip(dense_inputs, sliced_inputs, held_out, strict=True):
        goal = normalise(dense_input, dense.epsilon).flatten(0, -2)
        given = norm(sliced_input).flatten(0, -2).to(wide)
        moments.add(given, goal - given @ start_wide.T, mask)
        energy += goal[mask].double().square().sum()
    correction: Correction = solve_ridge(moments)
    lost = float(moments.residual_energy[1]) * correction.error / float(energy) if float(energy) else 0.0
    return start + correction.matrix, lost


def _fit_head(
    dense: DenseModel,
    target: Target,
    streams: Sequence[torch.Tensor],
    basis: torch.Tensor,
    held_out: Sequence[torch.Tensor],
) -> None:
    """Fit the head, a reader of the final norm, and hand norm and head to the sink."""
    adapter = dense.adapter
    norm = target.shell.get_submodule(adapter.final_norm)
    ones = torch.ones(target.dim)
    running.fill(norm, {"weight": ones}, dense.device, dense.dtype)
    matrix, _ = _fit_reading(dense, norm, streams, target._stream, basis, held_out)
    weight = dense.weights.tensor(f"{adapter.final_norm}.weight").to(dense.device).double()
    head = dense.weights.tensor(f"{adapter.head}.weight")
    target.sink(f"{adapter.final_norm}.weight", ones.to(target.dtype))
    running.clear(norm)
    folded = _times(head.to(dense.device), weight[:, None] * matrix)
    target.sink(f"{adapter.head}.weight", _store(folded, target).cpu())


def _slice_embeddings(dense: DenseModel, target: Target, basis: torch.Tensor, batches: Batches) -> None:
    """Project the embedding tables, start the sliced stream from them, and hand them to the sink."""
    tables = {name: _store(_times(table, basis), target) for name, table in _embedding_tables(dense).items()}
    target._stream, _ = _enter(dense, target.shell, tables, batches)
    for name, table in tables.items():
        target.sink(name, table.to("cpu", target.dtype))


def _prepare_block(dense: DenseModel, target: Target, block: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Fill what needs no fit: norms become the identity, parameters apart from the stream are copied."""
    values = {f"{branch.norm}.weight": torch.ones(target.dim) for branch in dense.adapter.branches}
    values |= {kept.path: weights[kept.path].to(target.dtype) for kept in dense.adapter.kept}
    running.fill(block, values, dense.device, dense.dtype)


def _embedding_tables(dense: DenseModel) -> dict[str, torch.Tensor]:
    """Read the embedding tables that add into the stream, by parameter name."""
    names = [f"{path}.weight" for path in dense.adapter.embeddings]
    return {name: dense.weights.tensor(name).to(dense.device) for name in names}


def _enter(
    dense: DenseModel, shell: Any, tables: dict[str, torch.Tensor], batches: Batches
) -> tuple[list[torch.Tensor], dict[tuple[int, ...], list[Call]]]:
    """Run a model's embeddings over all batches.

    Returns:
        The stream that enters the first block, per batch, and the calls of the blocks per batch shape.
    """
    running.move_buffers(shell, dense.device)
    running.fill(shell, tables, dense.device, dense.dtype)
    blocks = list(shell.get_submodule(dense.adapter.blocks))
    streams, calls = [], {}
    for batch in batches:
        stream, calls[tuple(batch.shape)] = running.record_calls(shell, blocks, batch.to(dense.device))
        streams.append(stream)
    for path in dense.adapter.embeddings:
        running.clear(shell.get_submodule(path))
    return streams, calls


def _read_block(dense: DenseModel, name: str) -> dict[str, torch.Tensor]:
    """Read a block's weights onto the device, in the checkpoint's dtype."""
    return {key: value.to(dense.device) for key, value in dense.weights.module(name).items()}


@contextmanager
def _filled(dense: DenseModel, block: nn.Module, weights: dict[str, torch.Tensor]) -> Iterator[None]:
    """Fill a block of the dense model for as long as it runs."""
    running.fill(block, weights, dense.device, dense.dtype)
    try:
        yield
    finally:
        running.clear(block)


def _times(table: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Return table @ matrix, computed in float64 a few thousand rows at a time, in float32 or wider."""
    dtype = torch.float64 if table.dtype == torch.float64 else torch.float32
    return torch.cat([(rows.double() @ matrix).to(dtype) for rows in table.split(TABLE_ROWS)])


def _store(value: torch.Tensor, target: Target) -> torch.Tensor:
    """Round a value to what will be written, so that later fits see and repair the rounding too."""
    return value.to(target.dtype).contiguous()


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype for products of streams: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _require_finite(tensor: torch.Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise WeightsError(
            f"NaN or infinity appeared in {what}.", "Try --dtype float32; if it stays, the checkpoint is damaged."
        )
