"""What the dense MLPs would lose with fewer channels, found while the statistics are collected.

For each block the Gram matrix of what enters the MLP's writer is summed up, gives what every width would cost
(`slicecli.linalg.channels.removal_losses`), and goes again. Experts have one each, of the tokens that are sent to them;
a mixture's losses are the sum of theirs.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from slicecli.adapters import Branch, Experts, Linear
from slicecli.linalg.channels import removal_losses
from slicecli.linalg.normal_equations import add_square, inverse_scale, widen
from slicecli.runtime.memory import make_room
from slicecli.slicing.context import DenseModel
from slicecli.slicing.modules import BlockRun, Routing, expert_activations
from slicecli.slicing.sliced_tensors import matrix_of

__all__ = ["ChannelLosses"]


class ChannelLosses:
    """Measures block after block what its MLP loses of its output when channels go.

    Attributes:
        total: What the MLPs of all blocks so far lose: the squared errors as shares of the squared stream behind each,
            each token counted as a norm sees it; float64 of shape (m + 1,), at index c for the best c channels. Of
            several processes only the main one has it.
    """

    def __init__(self, dense: DenseModel) -> None:
        self._dense = dense
        self._widths: dict[str, torch.Tensor] = {}
        self.total = torch.zeros(dense.dimensions.mlp_size + 1, dtype=torch.float64, device=dense.device)

    def begin(self, index: int) -> Branch:
        """Begin with a block; return the branch for whose writers it is wanted what enters them."""
        dimensions, device = self._dense.dimensions, self._dense.device
        declared = dimensions.declared_blocks[index]
        position, self._branch = next(
            (position, branch)
            for position, sublayer in enumerate(declared.sublayers)
            for branch in sublayer
            if dimensions.is_mlp(branch)
        )
        self._module = self._dense.blocks[index]
        following = declared.sublayers[position + 1 : position + 2]
        self._norm_behind = following[0][0].norm if following else None
        self._tokens = torch.zeros(1, dtype=torch.float64, device=device)
        self._routed: list[tuple[Routing, torch.Tensor]] = []
        if self._writer is not None:
            size = dimensions.width(self._writer.width) + dimensions.has_bias(self._writer)
            self._gram = _empty(size, device)
        return self._branch

    @property
    def _writer(self) -> Linear | None:
        """The linear writer, where its inputs are channels."""
        writer = self._branch.writer
        return writer if writer is not None and self._dense.dimensions.has_channels(writer.width) else None

    def take(self, run: BlockRun) -> BlockRun:
        """Add tokens; return what was seen without the wide inputs that were wanted for that."""
        seen = run.writer_inputs
        assert seen is not None
        behind = run.output if self._norm_behind is None else run.norm_inputs[self._norm_behind]
        root = inverse_scale(widen(behind).flatten(0, -2), self._dense.dimensions.epsilon, self._dense.is_centred)
        self._tokens += len(root)
        if self._writer is not None:
            path, gate = self._writer.path, self._writer.gate
            gain = root * torch.sigmoid(widen(seen.gates[gate])) if gate else root
            entering = widen(seen.linear[path]) * gain
            add_square(self._gram, torch.cat([entering, gain], dim=1) if self._has_bias else entering)
        if self._branch.experts is not None:
            self._routed.append((seen.routings[self._branch.experts.module], root))
        return dataclasses.replace(run, writer_inputs=None)

    @property
    def _has_bias(self) -> bool:
        return self._writer is not None and self._dense.dimensions.has_bias(self._writer)

    def finish(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Find what the block's MLP loses, while the block is filled.

        Args:
            weights: Dense parameters by name inside the block.
        """
        self._dense.processes.sum_to_main(self._tokens)
        if self._writer is not None:
            self._add(self._gram, matrix_of(self._writer, weights), self._writer.width, self._has_bias)
            del self._gram
        if self._branch.experts is not None:
            declared = self._branch.experts
            for expert, weight in enumerate(weights[declared.writer_path]):
                self._add(self._gram_of_expert(declared, expert), weight, declared.writer_width)
            self._routed.clear()

    def _gram_of_expert(self, declared: Experts, expert: int) -> torch.Tensor:
        """Sum up what enters an expert's writer over the tokens sent to it, times its share of each."""
        width = self._dense.dimensions.width(declared.writer_width)
        module, gram = self._module.get_submodule(declared.module), _empty(width, self._dense.device)
        for routing, root in self._routed:
            tokens, gain = routing.of_expert(expert)
            inner = widen(expert_activations(module, declared, expert, routing.tokens[tokens], width))
            add_square(gram, inner * (widen(gain) * root[tokens]))
        return gram

    def _add(self, gram: torch.Tensor, matrix: torch.Tensor, width: str, has_bias: bool = False) -> None:
        """Add what one writer loses to the total.

        Args:
            matrix: The writer, shape (d, inputs).
            width: Its declared width.
            has_bias: Whether the last of the inputs is a constant.
        """
        dense = self._dense
        dense.processes.sum_square_to_main(gram)
        if dense.processes.is_main:
            weight = matrix * dense.dimensions.multiplier(self._branch.multiplier)
            lost = removal_losses(_without_constant(gram) if has_bias else gram, weight)
            self.total += lost[self._widths_of(width)] / (self._tokens * dense.dimensions.hidden_size)

    def _widths_of(self, width: str) -> torch.Tensor:
        """Return for every m how many channels a writer then has."""
        if width not in self._widths:
            dimensions = self._dense.dimensions
            widths = [dimensions.channels_at(width, mlp_dim) for mlp_dim in range(dimensions.mlp_size + 1)]
            self._widths[width] = torch.tensor(widths, device=self._dense.device)
        return self._widths[width]


def _empty(size: int, device: torch.device) -> torch.Tensor:
    make_room(size * size * torch.float64.itemsize)
    return torch.zeros(size, size, dtype=torch.float64, device=device)


def _without_constant(gram: torch.Tensor) -> torch.Tensor:
    """Return the Gram matrix of what the last input, which always stays, does not explain of the others."""
    constant = gram[-1, :-1]
    return gram[:-1, :-1] - torch.outer(constant, constant) / gram[-1, -1]
