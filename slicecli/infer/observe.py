"""Watching a small model run: which module was called with what, and what it made of it.

Nothing is concluded here. The model is run once in float64, so that equality of values can stand for identity, and
every module's first call is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slicecli.proof.float64 import Float64Throughout

__all__ = ["Call", "Observation", "observe"]


@dataclass(frozen=True, eq=False)
class Call:
    """The first call of one module.

    Attributes:
        order: Place in the order in which calls ended.
        entering: The first floating tensor it was given, as (tokens, width); empty without one.
        leaving: The first floating tensor it returned, likewise.
    """

    path: str
    module: nn.Module
    order: int
    entering: torch.Tensor
    leaving: torch.Tensor

    @property
    def has_parameters(self) -> bool:
        """Whether the module holds parameters itself, not only in modules inside it."""
        return any(True for _ in self.module.parameters(recurse=False))


@dataclass(frozen=True)
class Observation:
    """One run of a model.

    Attributes:
        calls: First call of each module that was called, by path, in the order in which they ended.
    """

    model: Any
    calls: dict[str, Call]

    def below(self, path: str) -> list[Call]:
        """Return the calls of modules below a path, in order."""
        return [call for name, call in self.calls.items() if name.startswith(f"{path}.")]

    def outside(self, path: str) -> list[Call]:
        """Return the calls of modules that are not below a path, in order."""
        return [call for name, call in self.calls.items() if not name.startswith(f"{path}.")]


@torch.no_grad()
def observe(model: Any, token_ids: torch.Tensor) -> Observation:
    """Run a model once and keep every module's first call.

    Args:
        model: A small model, in float64.
        token_ids: Shape (rows, sequence length).
    """
    calls: dict[str, Call] = {}
    handles = []

    def watch(path: str, module: nn.Module) -> None:
        def hook(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if path not in calls:
                given, made = _first_floating((*args, *kwargs.values())), _first_floating(output)
                calls[path] = Call(path, module, len(calls), given, made)

        handles.append(module.register_forward_hook(hook, with_kwargs=True))

    for path, module in model.named_modules():
        if path:
            watch(path, module)
    try:
        with Float64Throughout():
            model(input_ids=token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return Observation(model, calls)


def _first_floating(values: Any) -> torch.Tensor:
    """Return the first floating tensor among values, as (tokens, width); an empty one where there is none."""
    for value in values if isinstance(values, (tuple, list)) else (values,):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.dim() > 1:
            return value.detach().reshape(-1, value.shape[-1]).clone()
    return torch.empty(0, 0, dtype=torch.float64)
