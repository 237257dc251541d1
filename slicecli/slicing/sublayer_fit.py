"""One sublayer of the refit: what reads the stream at one norm site, and what is then written to it.

A sublayer is a branch of a sequential block, or all branches of a parallel one. Its readers are fitted first, then its
writers with the readers as they are now, then the sliced stream moves on. Linear writers are fitted together, experts
one after the other.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slicecli.adapters import Branch, Linear
from slicecli.family.dimensions import Dimensions
from slicecli.linalg.normal_equations import NormalEquations, inverse_scale, widen
from slicecli.linalg.ridge import Correction
from slicecli.linalg.sliced_maps import projection_for_readers, projection_of_stream
from slicecli.runtime.microbatch import concat
from slicecli.slicing import modules
from slicecli.slicing.activation_cache import CachedBlock
from slicecli.slicing.activations import Stream
from slicecli.slicing.context import DenseModel, Target
from slicecli.slicing.layerwise import require_finite
from slicecli.slicing.modules import Call, Calls, Routing
from slicecli.slicing.reductions import solve_normal_equations, solve_with_channels
from slicecli.slicing.sliced_tensors import channel_cuts, expert_cuts, project_writers, sliced_readers, stored_writers

__all__ = ["BlockPass", "Sublayer", "fit_reading"]


@dataclass(frozen=True)
class Entry:
    """A linear writer's part in the regression of its sublayer.

    Attributes:
        module: The module of the block that holds its branch.
        has_bias: Whether it has a bias, which is one more input.
    """

    writer: Linear
    module: str
    multiplier: float
    width: int
    has_bias: bool

    def gain(self, seen: modules.WriterInputs, dtype: torch.dtype) -> torch.Tensor | float:
        """Return what multiplies the writer's output: one number, or one for each token, shape (tokens, 1)."""
        if not self.writer.gate:
            return self.multiplier
        return self.multiplier * torch.sigmoid(seen.gates[self.writer.gate].to(dtype))

    def columns(self, seen: modules.WriterInputs, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return what enters the writer as it counts in the stream: (tokens, width), and (tokens, 1) for a bias."""
        entering, gain = seen.linear[self.writer.path].to(dtype), self.gain(seen, dtype)
        constant = [entering.new_ones(len(entering), 1) * gain] if self.has_bias else []
        is_plain = isinstance(gain, float) and gain == 1.0
        return [entering if is_plain else entering * gain, *constant]


@dataclass(frozen=True)
class Goals:
    """What the writers of a sublayer are fitted to.

    Attributes:
        basis: Q, float64 of shape (d, k).
    """

    dense: DenseModel
    basis: torch.Tensor

    @functools.cached_property
    def _turn(self) -> torch.Tensor:
        """What the dense stream is multiplied by, in the dtype for products."""
        return projection_of_stream(self.basis).to(torch.promote_types(self.dense.dtype, torch.float32))

    def residual(self, after: torch.Tensor, batch: torch.Tensor) -> torch.Tensor:
        """Return what the sublayer has to add to the sliced stream, sqrt(k/d) Qᵀ x⁺ - y, shape (tokens, k).

        Args:
            after: x⁺, the dense stream after the sublayer, shape (rows, sequence length, d).
            batch: y, the sliced stream before it, shape (rows, sequence length, k).
        """
        sliced = widen(batch).flatten(0, -2)
        if self.dense.is_centred and self.dense.dimensions.keeps_tie:  # tables of tied heads have a mean, unread here
            sliced = sliced - sliced.mean(1, keepdim=True)
        return widen(after).flatten(0, -2) @ self._turn - sliced

    def root(self, after: torch.Tensor) -> torch.Tensor:
        """Return the root of each token's weight, shape (tokens, 1): errors count as the next norm will see them."""
        flat = widen(after).flatten(0, -2)
        return inverse_scale(flat, self.dense.dimensions.epsilon, self.dense.is_centred)


@dataclass(frozen=True)
class BlockPass:
    """One block while the refit is at it: what its sublayers, and the slices in the making, have in common.

    Attributes:
        weights: Dense parameters by name inside the block.
        seen: The dense activations at each sublayer and behind the block.
        held_out: Which tokens of each batch are held out.
    """

    dense: DenseModel
    index: int
    weights: dict[str, torch.Tensor]
    calls: Calls
    seen: CachedBlock
    held_out: Sequence[torch.Tensor]

    @property
    def sublayers(self) -> tuple[tuple[Branch, ...], ...]:
        """The branches of each sublayer, in order."""
        return self.dense.dimensions.declared_blocks[self.index].sublayers

    def is_last(self, position: int) -> bool:
        """Say whether the block ends with a sublayer."""
        return position + 1 == len(self.sublayers)

    def before(self, position: int) -> Stream:
        """Return the dense stream as a sublayer reads it."""
        return self.seen.inputs[position]

    def after(self, position: int) -> Stream:
        """Return the dense stream after a sublayer."""
        return self.seen.output if self.is_last(position) else self.seen.inputs[position + 1]


@dataclass(frozen=True)
class Sublayer:
    """One sublayer of one block of one target: fits its readers, then its writers, then moves the stream on.

    Attributes:
        at: The block, and what belongs to it.
        position: Which sublayer of the block it is.
    """

    at: BlockPass
    target: Target
    block: nn.Module
    position: int

    @property
    def dense(self) -> DenseModel:
        """The dense model."""
        return self.at.dense

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The branches of the sublayer."""
        return self.at.sublayers[self.position]

    @property
    def is_last(self) -> bool:
        """Whether the block ends with this sublayer."""
        return self.at.is_last(self.position)

    @property
    def lengths(self) -> dict[str, int]:
        """What each branch's module returns, see `slicecli.slicing.modules.BlockRun`."""
        return self.at.seen.tuple_lengths

    @functools.cached_property
    def zero_ablated(self) -> dict[str, int]:
        """Modules of the block's other sublayers, likewise."""
        others = [*self.at.sublayers[: self.position], *self.at.sublayers[self.position + 1 :]]
        modules = (branch.module for branches in others for branch in branches)
        return {module: self.lengths[module] for module in modules if module}

    def call_of(self, batch: torch.Tensor) -> Call:
        """Say how the model calls the block with a piece of the stream."""
        return self.at.calls.of(self.at.index, batch)

    def fit_readers(self, basis: torch.Tensor) -> float:
        """Fit A, the map from the sliced to the dense normalised stream, and fold it into every reader."""
        norm = self.block.get_submodule(self.branches[0].norm)
        dense_inputs, solve = self.at.before(self.position), self._solver("readers")
        matrix, lost = fit_reading(self.dense, norm, dense_inputs, self.target.stream, basis, self.at.held_out, solve)
        self._set(sliced_readers(self.dense.dimensions, self.branches, self.at.weights, matrix, self.target.dtype))
        return lost

    def project_writers(self, basis: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the writers' plain projections; after that the sublayer has no use for dense weights any more.

        They are in the dtype of products: the residuals are taken from what they give in it, and it is half as large.
        """
        projected = project_writers(self.dense.dimensions, self.branches, self.at.weights, basis)
        return {name: value.to(self._wide) for name, value in projected.items()}

    def fit_writers(self, projected: Mapping[str, torch.Tensor], basis: torch.Tensor) -> None:
        """Fit the writers to what the dense stream is after this sublayer, and add it to the sliced stream."""
        self._set_writers(projected)
        goals, dense_after = Goals(self.dense, basis), self.at.after(self.position)
        entries = list(self._entries())
        with_experts = [branch for branch in self.branches if branch.experts is not None]
        kept = {entry.writer.path: stream for entry in entries if (stream := self._room_for(entry)) is not None}
        if entries:
            self._fit_linear(entries, projected, dense_after, goals, kept)
        for branch in with_experts:
            self._fit_experts(branch, projected, dense_after, goals)
        what = f"the sliced activations of block {self.at.index} ({self.branches[-1].norm})"
        self._move_on(entries, kept, what)

    def _solver(self, kind: str) -> Callable[[NormalEquations], Correction]:
        return functools.partial(self.target.ridges.solve, f"{self.position}.{kind}")

    @property
    def _wide(self) -> torch.dtype:
        return torch.promote_types(self.dense.dtype, torch.float32)

    def _entries(self) -> Iterator[Entry]:
        for branch in self.branches:
            if branch.writer is not None:
                width = self.dense.dimensions.width(branch.writer.width)
                has_bias = self.dense.dimensions.has_bias(branch.writer)
                yield Entry(branch.writer, branch.module, self._multiplier(branch), width, has_bias)

    def _multiplier(self, branch: Branch) -> float:
        return self.dense.dimensions.multiplier(branch.multiplier)

    def _room_for(self, entry: Entry) -> Stream | None:
        """Return where a writer's input is kept; `None` lets a wide one be computed again.

        Before the block's last sublayer there is no choice, because a later branch may have no module that could be
        left out of the run; beside others of its sublayer only a branch that has one can be left out itself.
        """
        store = self.dense.activations
        is_narrow = entry.width <= 2 * self.dense.dimensions.hidden_size
        can_be_left_out = bool(entry.module) or len(self.branches) == 1
        if entry.writer.gate or not can_be_left_out:
            return None
        if is_narrow or not self.is_last:
            return store.new()
        return store.aside(sum(len(mask) for mask in self.at.held_out) * entry.width * self.dense.dtype.itemsize)

    def _seen(self, batch: torch.Tensor) -> modules.WriterInputs:
        return modules.writer_inputs(self.block, self.call_of(batch), batch, self.branches, self.zero_ablated)

    def _fit_linear(
        self,
        entries: Sequence[Entry],
        projected: Mapping[str, torch.Tensor],
        dense_after: Stream,
        goals: Goals,
        kept: Mapping[str, Stream],
    ) -> None:
        """Fit the linear writers of the sublayer together; experts beside them count as their projections make them."""
        starts = []
        for entry in entries:
            starts.append(projected[f"{entry.writer.path}.weight"])
            if entry.has_bias:
                starts.append(projected[f"{entry.writer.path}.bias"][:, None])
        start = _beside(starts)
        equations = self._moments_of_linear(entries, start, dense_after, goals, kept)
        matrix = self._solve_linear(entries, equations, start)
        del equations  # before anything else of its size is wanted
        matrix += start
        widths = [size for entry in entries for size in ((entry.width, 1) if entry.has_bias else (entry.width,))]
        solved = iter(matrix.split(widths, dim=1))
        for entry in entries:
            fitted = {f"{entry.writer.path}.weight": next(solved)}
            if entry.has_bias:
                fitted[f"{entry.writer.path}.bias"] = next(solved).squeeze(1)
            self._set_writers(fitted)

    def _solve_linear(self, entries: Sequence[Entry], equations: NormalEquations, start: torch.Tensor) -> torch.Tensor:
        """Return the correction of the linear writers; where MLP channels go, it takes them out of the writer.

        They stay in the block until it is handed over, and add nothing to the stream.
        """
        processes, solve, first = self.dense.processes, self._solver("writers"), 0
        for entry, branch in zip(entries, (one for one in self.branches if one.writer is not None), strict=True):
            count = self._narrower.width(entry.writer.width)
            if count < entry.width:
                inputs = slice(first, first + entry.width)
                found, channels = solve_with_channels(processes, equations, solve, start, inputs, count)
                self.target.cuts.update(channel_cuts(self.dense.dimensions, branch, channels))
                return found.matrix
            first += entry.width + entry.has_bias
        return solve_normal_equations(processes, equations, solve).matrix

    @property
    def _narrower(self) -> Dimensions:
        """The sizes of the slice but for its hidden size."""
        return self.dense.dimensions.with_mlp_dim(self.target.mlp_dim)

    def _moments_of_linear(
        self,
        entries: Sequence[Entry],
        start: torch.Tensor,
        dense_after: Stream,
        goals: Goals,
        kept: Mapping[str, Stream],
    ) -> NormalEquations:
        """Return the normal equations of the linear writers, and keep what enters them where there is a place for it.

        Args:
            start: What they are pulled towards, beside each other, shape (k, inputs).
        """
        equations = NormalEquations(start.shape[1], self.target.dim, self.dense.device)
        for batch, after, is_held_out in zip(self.target.stream, dense_after, self.at.held_out, strict=True):
            held: dict[str, list[torch.Tensor]] = {path: [] for path in kept}
            for rows, seen in self.dense.micro_batches.run(self._seen, batch):
                for path, parts in held.items():
                    parts.append(seen.linear[path])
                flat = _beside([column for entry in entries for column in entry.columns(seen, self._wide)])
                residual = goals.residual(after[rows], batch[rows]) - flat @ start.T - self._experts_add(seen)
                root = goals.root(after[rows])
                equations.add(flat * root, residual * root, _of_rows(is_held_out, rows, batch))
            for path, parts in held.items():
                kept[path].append(concat(parts))
        return equations

    def _fit_experts(
        self, branch: Branch, projected: Mapping[str, torch.Tensor], dense_after: Stream, goals: Goals
    ) -> None:
        """Fit the experts' writers one after the other, each to what the others leave of the goal.

        Where MLP channels go, each expert loses those that its own tokens miss least.
        """
        declared = branch.experts
        assert declared is not None
        module = self.block.get_submodule(declared.module)
        multiplier = self._multiplier(branch)
        wide = self._wide
        width = self.dense.dimensions.width(declared.writer_width)
        routings: list[Routing] = []
        residuals: list[torch.Tensor] = []
        roots: list[torch.Tensor] = []
        held_out: list[torch.Tensor] = []
        for batch, after, is_held_out in zip(self.target.stream, dense_after, self.at.held_out, strict=True):
            for rows, seen in self.dense.micro_batches.run(self._seen, batch):
                routings.append(seen.routings[declared.module])
                residual = goals.residual(after[rows], batch[rows]) - self._experts_add(seen)
                for entry in self._entries():
                    written = self.block.get_submodule(entry.writer.path)(seen.linear[entry.writer.path])
                    residual -= entry.gain(seen, wide) * widen(written)
                residuals.append(residual)
                roots.append(goals.root(after[rows]))
                held_out.append(_of_rows(is_held_out, rows, batch))
        starts, fitted, stays = projected[declared.writer_path], [], []
        count = self._narrower.width(declared.writer_width)
        for expert, start in enumerate(starts):
            equations = NormalEquations(width, self.target.dim, self.dense.device)
            shares = []
            for number, routing in enumerate(routings):
                tokens, share = routing.of_expert(expert)
                gain = share.to(wide) * multiplier
                inner = modules.expert_activations(module, declared, expert, routing.tokens[tokens], width).to(wide)
                inputs, root = inner * gain, roots[number][tokens]
                equations.add(inputs * root, residuals[number][tokens] * root, held_out[number][tokens])
                shares.append((tokens, inputs))
            processes, solve = self.dense.processes, self._solver("experts")
            if count < width:
                found, channels = solve_with_channels(processes, equations, solve, start, slice(0, width), count)
                stays.append(channels)
            else:
                found = solve_normal_equations(processes, equations, solve)
            correction = found.matrix
            for residual, (tokens, inputs) in zip(residuals, shares, strict=True):
                residual[tokens] -= inputs @ correction.to(wide).T
            fitted.append(_store(start + correction, self.target))
        self._set({declared.writer_path: torch.stack(fitted)})
        if stays:
            self.target.cuts.update(expert_cuts(self.dense.dimensions, declared, torch.stack(stays)))

    def _experts_add(self, seen: modules.WriterInputs) -> torch.Tensor | float:
        """Return what the sublayer's experts add to the stream with their writers as they are, shape (tokens, k)."""
        total: torch.Tensor | float = 0.0
        for branch in self.branches:
            if branch.experts is not None:
                routing = seen.routings[branch.experts.module]
                module = self.block.get_submodule(branch.experts.module)
                added = module(routing.tokens, routing.index, routing.weights)
                total = total + self._multiplier(branch) * widen(added)
        return total

    def _move_on(self, entries: Sequence[Entry], kept: Mapping[str, Stream], what: str) -> None:
        """Add the sublayer to the sliced stream."""
        held = [entry for entry in entries if entry.writer.path in kept]
        is_complete = len(held) == len(entries) and not any(branch.experts for branch in self.branches)
        silent = self.zero_ablated | {entry.module: self.lengths[entry.module] for entry in held if entry.module}

        def run(batch: torch.Tensor) -> torch.Tensor:
            with modules.zero_ablated(self.block, silent, batch):
                return modules.first_tensor(self.call_of(batch)(self.block, batch))

        for number, batch in enumerate(self.target.stream):
            moved = batch if is_complete else concat([some for _, some in self.dense.micro_batches.run(run, batch)])
            for entry in held:
                added = self.block.get_submodule(entry.writer.path)(kept[entry.writer.path][number])
                moved = moved + entry.multiplier * added.reshape(batch.shape)
            require_finite(moved, what)
            self.target.stream[number] = moved

    def _set_writers(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Fill writers whose weights are given as (outputs, inputs)."""
        self._set(stored_writers(self.branches, tensors))

    def _set(self, tensors: Mapping[str, torch.Tensor]) -> None:
        stored = {name: _store(value, self.target) for name, value in tensors.items()}
        modules.fill(self.block, stored, self.dense.device, self.dense.dtype)


def fit_reading(
    dense: DenseModel,
    norm: nn.Module,
    dense_inputs: Stream,
    sliced_inputs: Stream,
    basis: torch.Tensor,
    held_out: Sequence[torch.Tensor],
    solve: Callable[[NormalEquations], Correction],
) -> tuple[torch.Tensor, float]:
    """Fit A = argmin Σ |n(x) − A n'(y)|², pulled towards A₀ = sqrt(d/k) Q.

    Returns:
        A, float64 of shape (d, k), and the share of Σ |n(x)|² over held-out tokens that it leaves.
    """
    width, dim = basis.shape
    start = projection_for_readers(basis)
    equations = NormalEquations(dim, width, dense.device)
    energy = torch.zeros((), dtype=torch.float64, device=dense.device)
    for dense_input, sliced_input, mask in zip(dense_inputs, sliced_inputs, held_out, strict=True):
        goal = dense.normalise(dense_input).flatten(0, -2)
        given = widen(norm(sliced_input)).flatten(0, -2)
        equations.add(given, goal - given @ start.to(given).T, mask)
        energy += goal[mask].double().square().sum()
    dense.processes.sum_to_main(energy)
    correction: Correction = solve_normal_equations(dense.processes, equations, solve)
    lost = float(equations.residual_energy[1]) * correction.error / float(energy) if float(energy) else 0.0
    fitted = start + correction.matrix
    if dense.is_centred:
        # n'(y) has no mean but for rounding; the place must be free for the norms' biases
        fitted = fitted - fitted.mean(1, keepdim=True)
    return fitted, lost


def _of_rows(values: torch.Tensor, rows: slice, batch: torch.Tensor) -> torch.Tensor:
    """Return those of a batch's values, one for each token, that belong to some of its rows."""
    length = batch.shape[1]
    return values[rows.start * length : rows.stop * length]


def _beside(columns: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return matrices side by side, without a copy where there is but one."""
    return columns[0] if len(columns) == 1 else torch.cat(list(columns), dim=1)


def _store(value: torch.Tensor, target: Target) -> torch.Tensor:
    """Round a value to what will be written, so that later fits see and repair the rounding too."""
    return value.to(target.dtype).contiguous()
