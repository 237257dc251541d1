"""What a block of a slice is trained for: to give the teacher's activations, or, of the last block, its predictions.

Symbols: docs/notation.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from slicecli.linalg.normal_equations import inverse_scale, widen
from slicecli.recovery.loss import forward_divergence
from slicecli.runtime.placement import mixed_precision
from slicecli.slicing import modules
from slicecli.slicing.activations import Stream
from slicecli.slicing.context import DenseModel

__all__ = ["Activations", "Objective", "Part", "Predictions", "with_head"]

HEAD_NUMBERS = 1 << 22  # most logits at once, so that a head needs little beside its own weights


@dataclass
class Part:
    """The cached activations of some rows, as far as the pass has come.

    Attributes:
        dense: x, of the teacher.
        own: y, of the slice.
    """

    dense: Stream
    own: Stream


class Objective(Protocol):
    """What a block is trained for.

    Attributes:
        name: What its loss is called.
    """

    name: str

    def targets(self, part: Part) -> Stream:
        """Return the targets of rows, from the dense stream behind the block."""
        ...

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of some rows.

        Args:
            output: What the block gives, shape (rows, sequence length, k).
        """
        ...

    def learn(self, output: torch.Tensor, target: torch.Tensor, share: float) -> None:
        """Add a share of the loss's gradient to that of all parameters."""
        ...


class Activations:
    """The dense stream in the slice's coordinates, errors weighted as the next norm sees them.

    Args:
        turn: c Q, shape (d, k).
        is_centred: The slice's norms subtract the mean, so that the mean of its stream does not count.
    """

    name = "error"

    def __init__(self, turn: torch.Tensor, teacher: DenseModel, student: DenseModel, is_centred: bool = False) -> None:
        self._turn = turn.to(torch.promote_types(teacher.dtype, torch.float32))
        self._teacher = teacher
        self._student = student
        self._is_centred = is_centred

    def targets(self, part: Part) -> Stream:
        """Return w c Qᵀ x⁺ for each token, and w beside it, shape (rows, sequence length, k + 1)."""
        return self._student.activations.filled(self._target(after) for after in part.dense)

    def _target(self, after: torch.Tensor) -> torch.Tensor:
        wide = widen(after)
        root = inverse_scale(wide, self._teacher.dimensions.epsilon, self._teacher.is_centred)
        return torch.cat([wide @ self._turn * root, root], dim=-1).to(self._student.dtype)

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean over tokens and coordinates of w² (c Qᵀ x⁺ - y⁺)²."""
        wide, own = widen(target), widen(output)
        if self._is_centred:
            own = own - own.mean(-1, keepdim=True)
        return (own * wide[..., -1:] - wide[..., :-1]).square().mean()

    def learn(self, output: torch.Tensor, target: torch.Tensor, share: float) -> None:
        """Add a share of the loss's gradient."""
        self.loss(output, target).mul(share).backward()


class Predictions:
    """The teacher's predictions of the next token; final norm and head of both models must be filled.

    Args:
        tuple_lengths: The length of the tuple that the blocks of each give; 0 where they give a tensor.
    """

    name = "KL"

    def __init__(self, teacher: DenseModel, student: DenseModel, tuple_lengths: tuple[int, int]) -> None:
        self._teacher = teacher
        self._student = student
        self._tuple_lengths = tuple_lengths

    def targets(self, part: Part) -> Stream:
        """Return the dense stream, of which the logits are computed when they are needed."""
        return part.dense

    def loss(self, output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """Return the mean divergence per predicted token."""
        parts = [self._divergence(own, dense) for own, dense in self._pieces(output, target)]
        return torch.stack(parts).sum() / (output.shape[0] * (output.shape[1] - 1))

    def learn(self, output: torch.Tensor, target: torch.Tensor, share: float) -> None:
        """Add a share of the loss's gradient; the logits of only a few tokens exist at a time."""
        leaf = output.detach().requires_grad_()
        scale = share / (output.shape[0] * (output.shape[1] - 1))
        for own, dense in self._pieces(leaf, target):
            self._divergence(own, dense).mul(scale).backward()
        output.backward(leaf.grad)

    def _pieces(self, output: torch.Tensor, target: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield the positions that have a next token, some of one row at a time."""
        size = max(1, HEAD_NUMBERS // self._teacher.dimensions.vocabulary)
        for own, dense in zip(output, target, strict=True):
            yield from zip(own[:-1].split(size), dense[:-1].split(size), strict=True)

    def _divergence(self, own: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
        teacher, student = self._teacher, self._student
        with torch.no_grad():
            _, expected = modules.run_head(teacher.meta_model, teacher.adapter, dense[None], self._tuple_lengths[0])
        with mixed_precision(student.device):
            _, logits = modules.run_head(student.meta_model, student.adapter, own[None], self._tuple_lengths[1])
        return forward_divergence(logits, expected)


@contextmanager
def with_head(model: DenseModel, norm_dtype: torch.dtype | None = None) -> Iterator[None]:
    """Fill the final norm and the head of a model for as long as they run.

    Args:
        norm_dtype: Dtype of the norm's weights; `None` takes the model's.
    """
    adapter = model.adapter
    with ExitStack() as stack:
        for path, dtype in ((adapter.final_norm, norm_dtype or model.dtype), (adapter.head.path, model.dtype)):
            module = model.meta_model.get_submodule(path)
            # by name, because a tied head is not listed among the checkpoint's tensors
            weights = {name: model.weights.tensor(f"{path}.{name}") for name, _ in module.named_parameters()}
            modules.fill(module, weights, model.device, dtype)
            stack.callback(modules.clear, module)
        yield
