"""What the dense MLPs would lose with fewer channels, found while the statistics are collected.

For each block the Gram matrix of what enters the MLP's writer is summed up, gives what every width would cost
(`slicecli.linalg.channels.removal_losses`), and goes again.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from slicecli.linalg.channels import removal_losses
from slicecli.linalg.normal_equations import add_square, inverse_scale, widen
from slicecli.runtime.memory import make_room
from slicecli.slicing.context import DenseModel
from slicecli.slicing.modules import BlockRun
from slicecli.slicing.sliced_tensors import matrix_of

__all__ = ["ChannelLosses"]


class ChannelLosses:
    """Measures block after block what its MLP loses of its output when channels go.

    Attributes:
        found: For each block so far the squared error as a share of the squared stream behind the MLP, each token
            counted as a norm sees it; float64 of shape (m + 1,), at index c for the best c channels. Of several
            processes only the main one has it.
    """

    def __init__(self, dense: DenseModel) -> None:
        self._dense = dense
        self.found: list[torch.Tensor] = []

    def begin(self, index: int) -> str:
        """Begin with a block; return the path of the writer whose input is wanted."""
        dimensions = self._dense.dimensions
        declared = dimensions.declared_blocks[index]
        position, self._branch = next(
            (position, branch)
            for position, sublayer in enumerate(declared.sublayers)
            for branch in sublayer
            if dimensions.has_channels(branch)
        )
        following = declared.sublayers[position + 1 : position + 2]
        self._norm_behind = following[0][0].norm if following else None
        size = dimensions.mlp_size + self._has_bias
        make_room(size * size * torch.float64.itemsize)
        self._gram = torch.zeros(size, size, dtype=torch.float64, device=self._dense.device)
        self._tokens = torch.zeros(1, dtype=torch.float64, device=self._dense.device)
        assert self._branch.writer is not None
        return self._branch.writer.path

    @property
    def _has_bias(self) -> bool:
        assert self._branch.writer is not None
        return self._dense.dimensions.has_bias(self._branch.writer)

    def take(self, run: BlockRun) -> BlockRun:
        """Add tokens; return what was seen without the wide input that was wanted for that."""
        assert run.writer_input is not None
        behind = run.output if self._norm_behind is None else run.norm_inputs[self._norm_behind]
        root = inverse_scale(widen(behind).flatten(0, -2), self._dense.dimensions.epsilon, self._dense.is_centred)
        entering = widen(run.writer_input) * root
        add_square(self._gram, torch.cat([entering, root], dim=1) if self._has_bias else entering)
        self._tokens += len(entering)
        return dataclasses.replace(run, writer_input=None)

    def finish(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Find what the block's MLP loses.

        Args:
            weights: Dense parameters by name inside the block.
        """
        dense, branch = self._dense, self._branch
        dense.processes.sum_square_to_main(self._gram)
        dense.processes.sum_to_main(self._tokens)
        if dense.processes.is_main:
            assert branch.writer is not None
            weight = matrix_of(branch.writer, weights) * dense.dimensions.multiplier(branch.multiplier)
            gram = _without_constant(self._gram) if self._has_bias else self._gram
            lost = removal_losses(gram, weight)
            self.found.append((lost / (self._tokens * dense.dimensions.hidden_size)).cpu())
        del self._gram

    def total(self) -> torch.Tensor | None:
        """Return what the MLPs of all blocks lose together; `None` outside of the main process."""
        return torch.stack(self.found).sum(0) if self.found else None


def _without_constant(gram: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrix of what the last input, which always stays, does not explain of the others."""
    constant = gram[-1, :-1]
    return gram[:-1, :-1] - torch.outer(constant, constant) / gram[-1, -1]
