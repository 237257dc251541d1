"""The two passes over the blocks: statistics of the dense model, then the refit of its slices.

Blocks are filled with weights one at a time and freed again, so the whole model is never in memory; what lives
through a pass are the streams, (tokens, width) numbers each. Several slices of one model share the dense half of
the refit pass. Weights come from a `WeightReader`, sliced tensors go to each target's `sink`; no files here.

Legend: d hidden size, k dim kept, Q basis (d, k), x dense stream, y sliced stream, n the norm without its weight,
z what enters a writer, A and B the refitted maps of readers and writers, A₀ and B₀ the plain projections they
start from. A step is what reads the stream at one place: a branch of a sequential block, all branches of a parallel
one. Formulas: least squares as in "ours" of `docs/method.md`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

from slicecli.adapters import Adapter, Block, Branch, Linear
from slicecli.dimensions import Dimensions
from slicecli.errors import WeightsError
from slicecli.slicing import blocks as running
from slicecli.slicing.basis import Basis, reader_basis
from slicecli.slicing.blocks import Call, Routing
from slicecli.slicing.folding import (
    WeightReader,
    final_norm_weight_and_bias,
    fold_head,
    fold_readers,
    matrix_of,
    neutral_norm,
    norm_weight_and_bias,
    project_embeddings,
    project_writers,
    stored_form,
)
from slicecli.slicing.maps import projection_for_readers, stream_scale
from slicecli.slicing.moments import Moments, add_outer, inverse_scale, normalise, widen
from slicecli.slicing.ridge import Correction, solve_ridge

__all__ = ["Batches", "DenseModel", "Progress", "Silent", "Target", "collect_basis", "refit"]

READER_ROWS = 8192
HELD_OUT_EVERY = 5


class Progress(Protocol):
    """Hears how far a pass has come."""

    def start(self, phase: str, total: int) -> None:
        """A phase of `total` steps begins."""
        ...

    def advance(self, detail: str = "") -> None:
        """One step is done; `detail` is a short remark on it."""
        ...


class Silent:
    """A progress that nobody watches."""

    def start(self, phase: str, total: int) -> None:
        """Ignore the beginning of a phase."""

    def advance(self, detail: str = "") -> None:
        """Ignore a step."""


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
    def is_centred(self) -> bool:
        """Whether the norms that read the stream subtract its mean."""
        return self.adapter.norm.kind == "layer"

    def normalise(self, stream: torch.Tensor) -> torch.Tensor:
        """Return n(x), what a norm passes on before its weight and bias."""
        return normalise(stream, self.dimensions.epsilon, self.is_centred)

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
    for index, (block, declared) in enumerate(zip(dense.blocks, dense.dimensions.declared_blocks, strict=True)):
        weights = _read_block(dense, dense.block_name(index))
        with _filled(dense, block, weights):
            moments = {path: statistics.empty() for path in declared.norms}
            for number, stream in enumerate(streams):
                call = calls[tuple(stream.shape[:2])][index]
                run = running.run_block(block, call, stream, declared.branches)
                streams[number] = run.output
                _require_finite(run.output, f"the activations after block {index}")
                for path, moment in moments.items():
                    statistics.add_tokens(moment, run.norm_inputs[path])
            for path, moment in moments.items():
                readers = _reader_matrices(declared, path, weights)
                statistics.add_norm_input(moment, norm_weight_and_bias(dense.dimensions, path, weights)[0], readers)
        progress.advance()
    final = statistics.empty()
    for stream in streams:
        statistics.add_tokens(final, stream)
    weight, _ = final_norm_weight_and_bias(dense.dimensions, dense.weights, dense.device)
    statistics.add_norm_input(final, weight, [dense.weights.tensor(f"{adapter.head.path}.weight").to(dense.device)])
    basis = reader_basis(statistics.second_moment, statistics.metric, dense.is_centred)
    progress.advance()
    return basis


@torch.no_grad()
def refit(dense: DenseModel, basis: Basis, targets: Sequence[Target], batches: Batches, progress: Progress) -> None:
    """Refit every map that reads or writes the stream, for one or more slices at once.

    Each target's tensors go to its sink in the order embeddings, blocks, final norm, head.

    Raises:
        WeightsError: A stream becomes NaN or infinite; the message names the block.
    """
    held_out = [mask.to(dense.device) for mask in batches.held_out()]
    progress.start("refit", len(dense.blocks) + 1)
    streams, calls = _enter(dense, dense.shell, _embedding_tables(dense), batches)
    bases = {target.dim: basis.leading(target.dim) for target in targets}
    for target in targets:
        _slice_embeddings(dense, target, bases[target.dim], batches)

    for index, (block, declared) in enumerate(zip(dense.blocks, dense.dimensions.declared_blocks, strict=True)):
        name = dense.block_name(index)
        weights = _read_block(dense, name)
        block_calls = {shape: some[index] for shape, some in calls.items()}
        steps = declared.steps
        # the stream as each step reads it, batch by batch
        before: list[list[torch.Tensor]] = [[] for _ in steps]
        lengths: dict[str, int] = {}
        with _filled(dense, block, weights):
            for number, stream in enumerate(streams):
                run = running.run_block(block, block_calls[tuple(stream.shape[:2])], stream, declared.branches)
                _require_finite(run.output, f"the activations after block {index}")
                streams[number], lengths = run.output, run.tuple_lengths
                for inputs, step in zip(before, steps, strict=True):
                    inputs.append(run.norm_inputs[step[0].norm])
        errors = []
        sliced_blocks = [target.shell.get_submodule(name) for target in targets]
        for target, sliced_block in zip(targets, sliced_blocks, strict=True):
            _prepare_block(dense, target, declared, sliced_block, weights)
        for position, branches in enumerate(steps):
            is_last = position + 1 == len(steps)
            after = streams if is_last else before[position + 1]
            others = [branch.module for step in steps[:position] + steps[position + 1 :] for branch in step]
            silent = {module: lengths[module] for module in others if module}
            for target, sliced_block in zip(targets, sliced_blocks, strict=True):
                fitting = _Step(
                    dense, target, sliced_block, branches, weights, block_calls, lengths, silent, is_last, held_out
                )
                errors.append(fitting.fit_readers(before[position], bases[target.dim]))
                fitting.fit_writers(after, bases[target.dim])
                for stream in target._stream:
                    _require_finite(stream, f"the sliced activations of block {index} ({branches[-1].norm})")
            before[position].clear()
        for target, sliced_block in zip(targets, sliced_blocks, strict=True):
            for parameter_name, parameter in sliced_block.named_parameters():
                target.sink(f"{name}.{parameter_name}", parameter.to("cpu", target.dtype))
            for buffer_name in running.persistent_buffers(sliced_block):
                target.sink(f"{name}.{buffer_name}", weights[buffer_name].to("cpu", target.dtype))
            running.clear(sliced_block)
        progress.advance(f"energy kept {1 - max(errors):.4f}")

    for target in targets:
        _fit_head(dense, target, streams, bases[target.dim], held_out)
        for name in running.persistent_buffers(target.shell):
            if not name.startswith(f"{dense.adapter.blocks}."):
                target.sink(name, dense.weights.tensor(name).to("cpu", target.dtype))
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
        flat = self._dense.normalise(norm_input).flatten(0, -2)
        add_outer(moment, flat, flat)

    def add_norm_input(
        self, moment: torch.Tensor, weight: torch.Tensor | None, readers: Sequence[torch.Tensor]
    ) -> None:
        """Add a finished norm input: its Cⱼ to C, its Mⱼ, scaled to a total of one, to M.

        Args:
            moment: Cⱼ.
            weight: The norm's weight; `None` stands for ones.
            readers: The weights of its readers, shape (..., d) each.
        """
        metric = self.empty()
        for reader in readers:
            for rows in reader.reshape(-1, reader.shape[-1]).split(READER_ROWS):
                scaled = widen(rows)
                if weight is not None:
                    scaled = scaled * weight.to(scaled)
                add_outer(metric, scaled, scaled)
        self.second_moment += moment
        seen = (metric * moment).sum()
        if bool(seen > 0):
            self.metric += metric / seen


@dataclass(frozen=True)
class _Entry:
    """A linear writer's place in the regression of its step.

    Attributes:
        writer: The writer.
        multiplier: What multiplies its branch.
        width: Its inputs.
        has_bias: Whether it has a bias, which is one more input.
    """

    writer: Linear
    multiplier: float
    width: int
    has_bias: bool

    def gain(self, seen: running.WriterInputs, dtype: torch.dtype) -> torch.Tensor | float:
        """Return what multiplies the writer's output: one number, or one for each token, shape (tokens, 1)."""
        if not self.writer.gate:
            return self.multiplier
        return self.multiplier * torch.sigmoid(seen.gates[self.writer.gate].to(dtype))

    def columns(self, seen: running.WriterInputs, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return what enters the writer as it counts in the stream: (tokens, width), and (tokens, 1) for a bias."""
        entering, gain = seen.linear[self.writer.path].to(dtype), self.gain(seen, dtype)
        constant = [entering.new_ones(len(entering), 1) * gain] if self.has_bias else []
        return [entering * gain, *constant]


@dataclass(frozen=True)
class _Goals:
    """What the writers of a step are fitted to, batch by batch.

    Attributes:
        dense: The dense model.
        after: The dense stream after the step.
        streams: The sliced stream before it.
        basis: Q, float64 of shape (d, k).
    """

    dense: DenseModel
    after: Sequence[torch.Tensor]
    streams: Sequence[torch.Tensor]
    basis: torch.Tensor

    def residual(self, number: int) -> torch.Tensor:
        """Return what the step has to add to the sliced stream, sqrt(k/d) Qᵀ x⁺ - y, shape (tokens, k)."""
        after = widen(self.after[number]).flatten(0, -2)
        leading = (stream_scale(self.basis) * self.basis).to(after)
        return after @ leading - widen(self.streams[number]).flatten(0, -2)

    def root(self, number: int) -> torch.Tensor:
        """Return the root of each token's weight, shape (tokens, 1): errors count as the next norm will see them."""
        after = widen(self.after[number]).flatten(0, -2)
        return inverse_scale(after, self.dense.dimensions.epsilon, self.dense.is_centred)


@dataclass(frozen=True)
class _Step:
    """One step of one block of one target: fits its readers, then its writers, then moves the stream on.

    Attributes:
        dense: The dense model.
        target: The slice in the making.
        block: Its block.
        branches: The branches of the step.
        weights: Dense parameters by name inside the block.
        calls: How the model calls the block, by batch shape.
        lengths: What each branch's module returns, see `slicecli.slicing.blocks.BlockRun`.
        silent: Modules of the block's other branches, likewise.
        is_last: Whether the block ends with this step.
        held_out: Which tokens of each batch are held out.
    """

    dense: DenseModel
    target: Target
    block: nn.Module
    branches: tuple[Branch, ...]
    weights: dict[str, torch.Tensor]
    calls: dict[tuple[int, ...], Call]
    lengths: dict[str, int]
    silent: dict[str, int]
    is_last: bool
    held_out: Sequence[torch.Tensor]

    def fit_readers(self, dense_inputs: Sequence[torch.Tensor], basis: torch.Tensor) -> float:
        """Fit A, the map from the sliced to the dense normalised stream, and fold it into every reader.

        Returns:
            The share of the dense normalised stream's energy (held-out tokens) that A does not explain.
        """
        norm = self.block.get_submodule(self.branches[0].norm)
        matrix, lost = _fit_reading(self.dense, norm, dense_inputs, self.target._stream, basis, self.held_out)
        self._set(fold_readers(self.dense.dimensions, self.branches, self.weights, matrix, self.target.dtype))
        return lost

    def fit_writers(self, dense_after: Sequence[torch.Tensor], basis: torch.Tensor) -> None:
        """Fit the writers to what the dense stream is after this step, and add the step to the sliced stream."""
        projected = project_writers(self.dense.dimensions, self.branches, self.weights, basis)
        self._set_writers(projected)
        goals = _Goals(self.dense, dense_after, self.target._stream, basis)
        entries = list(self._entries())
        with_experts = [branch for branch in self.branches if branch.experts is not None]
        kept: dict[str, list[torch.Tensor]] = {entry.writer.path: [] for entry in entries if self._is_kept(entry)}
        if entries:
            self._fit_linear(entries, projected, goals, kept)
        for branch in with_experts:
            self._fit_experts(branch, projected, goals)
        self._move_on(entries, kept)

    def _entries(self) -> Iterator[_Entry]:
        for branch in self.branches:
            if branch.writer is not None:
                width = self.dense.dimensions.width(branch.writer.width)
                has_bias = self.dense.dimensions.has_bias(branch.writer)
                yield _Entry(branch.writer, self._multiplier(branch), width, has_bias)

    def _multiplier(self, branch: Branch) -> float:
        return self.dense.dimensions.multiplier(branch.multiplier)

    def _is_kept(self, entry: _Entry) -> bool:
        """Say whether a writer's input is held in memory: a wide one costs less to compute again.

        A branch that is not its block's last step cannot be computed apart where a later one has no module.
        """
        is_narrow = entry.width <= 2 * self.dense.dimensions.hidden_size
        return not entry.writer.gate and (is_narrow or not self.is_last)

    def _seen(self, stream: torch.Tensor) -> running.WriterInputs:
        return running.writer_inputs(self.block, self._call(stream), stream, self.branches, self.silent)

    def _fit_linear(
        self,
        entries: Sequence[_Entry],
        projected: Mapping[str, torch.Tensor],
        goals: _Goals,
        kept: Mapping[str, list[torch.Tensor]],
    ) -> None:
        """Fit the linear writers of the step together; experts beside them count as their projections make them."""
        parts = []
        for entry in entries:
            parts.append(projected[f"{entry.writer.path}.weight"])
            if entry.has_bias:
                parts.append(projected[f"{entry.writer.path}.bias"][:, None])
        start = torch.cat(parts, dim=1)
        wide = torch.promote_types(self.dense.dtype, torch.float32)
        moments = Moments(start.shape[1], self.target.dim, self.dense.device)
        for number, stream in enumerate(self.target._stream):
            seen = self._seen(stream)
            for path, held in kept.items():
                held.append(seen.linear[path])
            flat = torch.cat([column for entry in entries for column in entry.columns(seen, wide)], dim=1)
            residual = goals.residual(number) - flat @ start.to(wide).T - self._experts_add(seen)
            root = goals.root(number)
            moments.add(flat * root, residual * root, self.held_out[number])
        matrix = start + solve_ridge(moments).matrix
        del moments
        widths = [size for entry in entries for size in ((entry.width, 1) if entry.has_bias else (entry.width,))]
        solved = iter(matrix.split(widths, dim=1))
        for entry in entries:
            fitted = {f"{entry.writer.path}.weight": next(solved)}
            if entry.has_bias:
                fitted[f"{entry.writer.path}.bias"] = next(solved).squeeze(1)
            self._set_writers(fitted)

    def _fit_experts(self, branch: Branch, projected: Mapping[str, torch.Tensor], goals: _Goals) -> None:
        """Fit the experts' writers one after the other, each to what the others leave of the goal."""
        declared = branch.experts
        assert declared is not None
        module = self.block.get_submodule(declared.module)
        multiplier = self._multiplier(branch)
        wide = torch.promote_types(self.dense.dtype, torch.float32)
        width = self.dense.dimensions.width(declared.writer_width)
        routings: list[Routing] = []
        residuals: list[torch.Tensor] = []
        for number, stream in enumerate(self.target._stream):
            seen = self._seen(stream)
            routings.append(seen.routings[declared.module])
            residual = goals.residual(number) - self._experts_add(seen)
            for entry in self._entries():
                written = self.block.get_submodule(entry.writer.path)(seen.linear[entry.writer.path])
                residual -= entry.gain(seen, wide) * widen(written)
            residuals.append(residual)
        starts, fitted = projected[declared.writer_path], []
        for expert, start in enumerate(starts):
            moments = Moments(width, self.target.dim, self.dense.device)
            shares = []
            for number, routing in enumerate(routings):
                is_chosen = routing.index == expert
                tokens = is_chosen.any(-1).nonzero().squeeze(-1)
                gain = (routing.weights * is_chosen).sum(-1, keepdim=True)[tokens].to(wide) * multiplier
                inner = running.expert_activations(module, declared, expert, routing.tokens[tokens], width).to(wide)
                inputs, root = inner * gain, goals.root(number)[tokens]
                moments.add(inputs * root, residuals[number][tokens] * root, self.held_out[number][tokens])
                shares.append((tokens, inputs))
            correction = solve_ridge(moments).matrix
            for residual, (tokens, inputs) in zip(residuals, shares, strict=True):
                residual[tokens] -= inputs @ correction.to(wide).T
            fitted.append(_store(start + correction, self.target))
        self._set({declared.writer_path: torch.stack(fitted)})

    def _experts_add(self, seen: running.WriterInputs) -> torch.Tensor | float:
        """Return what the experts of the step add to the stream with their writers as they are, shape (tokens, k)."""
        total: torch.Tensor | float = 0.0
        for branch in self.branches:
            if branch.experts is not None:
                routing = seen.routings[branch.experts.module]
                module = self.block.get_submodule(branch.experts.module)
                added = module(routing.tokens, routing.index, routing.weights)
                total = total + self._multiplier(branch) * widen(added)
        return total

    def _move_on(self, entries: Sequence[_Entry], kept: Mapping[str, Sequence[torch.Tensor]]) -> None:
        """Add the step to the sliced stream."""
        held = [entry for entry in entries if entry.writer.path in kept]
        is_complete = len(held) == len(entries) and not any(branch.experts for branch in self.branches)
        modules = [branch.module for branch in self.branches if branch.writer and branch.writer.path in kept]
        silent = self.silent | {module: self.lengths[module] for module in modules if module}
        for number, stream in enumerate(self.target._stream):
            moved = stream
            if not is_complete:
                with running.silenced(self.block, silent, stream):
                    moved = running.first_tensor(self._call(stream)(self.block, stream))
            for entry in held:
                added = self.block.get_submodule(entry.writer.path)(kept[entry.writer.path][number])
                moved = moved + entry.multiplier * added.reshape(stream.shape)
            self.target._stream[number] = moved

    def _call(self, stream: torch.Tensor) -> Call:
        return self.calls[tuple(stream.shape[:2])]

    def _set_writers(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill writers whose weights are given as (outputs, inputs)."""
        writers = {branch.writer.path: branch.writer for branch in self.branches if branch.writer is not None}
        stored = {}
        for name, tensor in tensors.items():
            linear = writers.get(name.removesuffix(".weight"))
            stored[name] = tensor if linear is None else stored_form(linear, tensor)
        self._set(stored)

    def _set(self, tensors: Mapping[str, torch.Tensor]) -> None:
        stored = {name: _store(value, self.target) for name, value in tensors.items()}
        running.fill(self.block, stored, self.dense.device, self.dense.dtype)


def _fit_reading(
    dense: DenseModel,
    norm: nn.Module,
    dense_inputs: Sequence[torch.Tensor],
    sliced_inputs: Sequence[torch.Tensor],
    basis: torch.Tensor,
    held_out: Sequence[torch.Tensor],
) -> tuple[torch.Tensor, float]:
    """Fit A = argmin Σ |n(x) − A n'(y)|², pulled towards A₀ = sqrt(d/k) Q.

    Args:
        dense: The dense model.
        norm: The sliced norm, without effect of its own (`slicecli.slicing.folding.neutral_norm`).
        dense_inputs: x, batch by batch.
        sliced_inputs: y, likewise.
        basis: Q.
        held_out: Which tokens of each batch are held out.

    Returns:
        A, float64 of shape (d, k), and the share of Σ |n(x)|² over held-out tokens that it leaves.
    """
    width, dim = basis.shape
    start = projection_for_readers(basis)
    moments = Moments(dim, width, dense.device)
    energy = torch.zeros((), dtype=torch.float64, device=dense.device)
    for dense_input, sliced_input, mask in zip(dense_inputs, sliced_inputs, held_out, strict=True):
        goal = dense.normalise(dense_input).flatten(0, -2)
        given = widen(norm(sliced_input)).flatten(0, -2)
        moments.add(given, goal - given @ start.to(given).T, mask)
        energy += goal[mask].double().square().sum()
    correction: Correction = solve_ridge(moments)
    lost = float(moments.residual_energy[1]) * correction.error / float(energy) if float(energy) else 0.0
    fitted = start + correction.matrix
    if dense.is_centred:
        # n'(y) has no mean but for rounding; the place must be free for the norms' biases
        fitted = fitted - fitted.mean(1, keepdim=True)
    return fitted, lost


def _fit_head(
    dense: DenseModel,
    target: Target,
    streams: Sequence[torch.Tensor],
    basis: torch.Tensor,
    held_out: Sequence[torch.Tensor],
) -> None:
    """Fit the head, a reader of the final norm, and hand norm and head to the sink."""
    path = dense.adapter.final_norm
    norm = target.shell.get_submodule(path)
    running.fill(norm, _below(path, neutral_norm(dense.dimensions, path, target.dim)), dense.device, dense.dtype)
    matrix, _ = _fit_reading(dense, norm, streams, target._stream, basis, held_out)
    running.clear(norm)
    for name, tensor in fold_head(dense.dimensions, dense.weights, matrix, target.dtype).items():
        target.sink(name, tensor.to("cpu", target.dtype))


def _slice_embeddings(dense: DenseModel, target: Target, basis: torch.Tensor, batches: Batches) -> None:
    """Project the embedding tables, start the sliced stream from them, and hand them to the sink."""
    tables = project_embeddings(dense.dimensions, dense.weights, basis, target.dtype)
    target._stream, _ = _enter(dense, target.shell, tables, batches)
    for name, table in tables.items():
        target.sink(name, table.to("cpu", target.dtype))


def _prepare_block(
    dense: DenseModel, target: Target, declared: Block, block: nn.Module, weights: dict[str, torch.Tensor]
) -> None:
    """Fill what needs no fit: norms lose their effect, what does not touch the stream is copied."""
    names = [kept.path for kept in declared.kept] + running.persistent_buffers(block)
    values = {name: weights[name].to(target.dtype) for name in names}
    for path in declared.norms:
        values |= neutral_norm(dense.dimensions, path, target.dim)
    running.fill(block, values, dense.device, dense.dtype)


def _reader_matrices(declared: Block, norm: str, weights: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return the weights of everything that reads behind a norm, shape (..., outputs, d) each."""
    matrices = []
    for branch in declared.branches:
        if branch.norm == norm:
            matrices += [matrix_of(reader, weights) for reader in branch.readers]
            if branch.experts is not None:
                matrices.append(weights[branch.experts.reader_path])
    return matrices


def _embedding_tables(dense: DenseModel) -> dict[str, torch.Tensor]:
    """Read the embedding tables that add into the stream, by parameter name."""
    names = [f"{table.path}.weight" for table in dense.adapter.embeddings]
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
    for table in dense.adapter.embeddings:
        running.clear(shell.get_submodule(table.path))
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


def _below(path: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors by their names inside a module."""
    return {name.removeprefix(f"{path}."): value for name, value in tensors.items()}


def _store(value: torch.Tensor, target: Target) -> torch.Tensor:
    """Round a value to what will be written, so that later fits see and repair the rounding too."""
    return value.to(target.dtype).contiguous()


def _require_finite(tensor: torch.Tensor, what: str) -> None:
    if not bool(torch.isfinite(tensor).all()):
        raise WeightsError(
            f"NaN or infinity appeared in {what}.", "Try --dtype float32; if it stays, the checkpoint is damaged."
        )
