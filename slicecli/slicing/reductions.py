"""What the passes do where several processes share the calibration rows: divide them, add up, solve once.

The main process solves and gives the solution to all, so that all fold the same bits into their blocks, whatever
machines they run on. Of what is summed only what a solution needs is sent, in float64.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch

from slicecli.linalg.basis import Basis, reader_basis
from slicecli.linalg.channels import choose_channels
from slicecli.linalg.normal_equations import NormalEquations
from slicecli.linalg.ridge import Correction
from slicecli.runtime.distributed import Processes
from slicecli.runtime.memory import make_room
from slicecli.slicing.context import Batches, DenseModel, DenseStatistics

__all__ = ["give_statistics", "share_rows", "solve_normal_equations", "solve_statistics", "solve_with_channels"]


def share_rows(processes: Processes, dense: DenseModel, rows: torch.Tensor, batch: int) -> tuple[DenseModel, Batches]:
    """Return the dense model and the batches as this process has them, with its share of the rows.

    Args:
        rows: The rows of all processes, int64 of shape (rows, sequence length).
    """
    share = processes.share(len(rows), batch)
    return dataclasses.replace(dense, processes=share.processes), Batches(rows, batch, share.rows)


def solve_normal_equations(
    processes: Processes, equations: NormalEquations, solve: Callable[[NormalEquations], Correction]
) -> Correction:
    """Add up normal equations over processes and solve them once."""
    make_room(equations.gram.nbytes)
    if processes.count == 1:
        return solve(equations)
    gram, cross = equations.sum_held_out()
    processes.sum_square_to_main(equations.gram, gram)
    processes.sum_to_main(equations.cross, cross, *equations.residual_energy)
    inputs, outputs = equations.cross.shape
    del gram, cross

    def solution() -> tuple[torch.Tensor, torch.Tensor]:
        found = solve(equations)
        return found.matrix, torch.tensor([found.ridge, found.error], dtype=torch.float64)

    matrix, numbers = processes.tensors_from_main(solution, [(outputs, inputs), (2,)], equations.cross.device)
    ridge, error = numbers.tolist()
    return Correction(matrix, ridge, error)


def solve_with_channels(
    processes: Processes,
    equations: NormalEquations,
    solve: Callable[[NormalEquations], Correction],
    start: torch.Tensor,
    channels: slice,
    count: int,
) -> tuple[Correction, torch.Tensor]:
    """Do the same for a map that may use only so many of some inputs: choose them, and solve for what stays.

    Args:
        start: The map that is corrected, B₀, shape (outputs, inputs).
        channels: The inputs to choose from.
        count: How many of them stay.

    Returns:
        The correction, -B₀ where an input is removed, and which of the channels stay.
    """
    chosen: list[int] = []

    def solve_with_the_best(equations: NormalEquations) -> Correction:
        stays = choose_channels(equations, start, channels, count)
        chosen.extend((stays[(stays >= channels.start) & (stays < channels.stop)] - channels.start).tolist())
        found = solve(equations)
        matrix = -start.double()
        matrix[:, stays] = found.matrix
        return dataclasses.replace(found, matrix=matrix)

    correction = solve_normal_equations(processes, equations, solve_with_the_best)
    return correction, torch.tensor(processes.from_main(lambda: chosen), device=start.device)


def solve_statistics(
    dense: DenseModel, second_moment: torch.Tensor, metric: torch.Tensor, final_moment: torch.Tensor
) -> DenseStatistics:
    """Add up the second moments of processes and solve for the basis once.

    Args:
        second_moment: C of this process's tokens, float64 of shape (d, d); of no use afterwards.
        metric: M of all tokens, float64 of shape (d, d).
        final_moment: The part of C at the final norm, likewise.
    """
    dense.processes.sum_square_to_main(second_moment, final_moment)
    if not dense.processes.is_main:
        return give_statistics(dense, None)
    return give_statistics(dense, DenseStatistics(reader_basis(second_moment, metric, dense.is_centred), final_moment))


def give_statistics(dense: DenseModel, statistics: DenseStatistics | None) -> DenseStatistics:
    """Give the main process's basis to all processes."""
    if dense.processes.count == 1 and statistics is not None:
        return statistics
    width = dense.dimensions.hidden_size
    directions = width - dense.is_centred

    def tensors() -> list[torch.Tensor]:
        assert statistics is not None
        return [statistics.basis.vectors, statistics.basis.energies, statistics.basis.importances]

    shapes = [(width, directions), (directions,), (directions,)]
    vectors, energies, importances = dense.processes.tensors_from_main(tensors, shapes, dense.device)
    basis = Basis(vectors, energies, importances, dense.is_centred)
    return DenseStatistics(basis, None) if statistics is None else dataclasses.replace(statistics, basis=basis)
