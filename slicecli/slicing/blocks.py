"""Running a model's own modules piece by piece: blocks one at a time, branches up to their writer.

Nothing here knows a family. A block is called with the arguments the model itself would give it, recorded from
one real forward pass in which the blocks are replaced by stand-ins; a branch is called with the arguments
recorded while its block ran. Whatever the arguments are called, and whatever the forward pass does with them,
stays the business of transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from slicecli.adapters import Branch
from slicecli.errors import PluginError

__all__ = ["Call", "clear", "fill", "first_tensor", "move_buffers", "record_block", "record_calls", "writer_input"]


@dataclass(frozen=True)
class Call:
    """The arguments of one module call, with the place where the hidden states go.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        slot: Position or keyword of the hidden states.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str

    def __call__(self, module: nn.Module, hidden: torch.Tensor) -> Any:
        """Call a module with these arguments and other hidden states."""
        args, kwargs = list(self.args), dict(self.kwargs)
        if isinstance(self.slot, int):
            args[self.slot] = hidden
        else:
            kwargs[self.slot] = hidden
        return module(*args, **kwargs)


class _ReachedEnd(Exception):
    """Leaves a forward pass once all that was wanted of it has been seen."""


def fill(module: nn.Module, tensors: Mapping[str, torch.Tensor], device: torch.device, dtype: torch.dtype) -> None:
    """Give parameters of an empty module their values.

    Args:
        module: A module with parameters on `meta`.
        tensors: Values by parameter name inside the module; floating ones are cast to `dtype`.
        device: Where the values go.
        dtype: Dtype for computing.
    """
    from accelerate.utils import set_module_tensor_to_device

    for name, tensor in tensors.items():
        set_module_tensor_to_device(module, name, device, value=tensor.to(device=device, dtype=dtype), dtype=dtype)


def clear(module: nn.Module) -> None:
    """Free the parameters of a module, leaving its buffers."""
    from accelerate.utils import set_module_tensor_to_device

    for name, _ in list(module.named_parameters()):
        set_module_tensor_to_device(module, name, "meta")


def move_buffers(module: nn.Module, device: torch.device) -> None:
    """Move the buffers of a module (rotary frequencies and the like) to a device."""
    from accelerate.utils import set_module_tensor_to_device

    for name, buffer in list(module.named_buffers()):
        if buffer.device != device:
            set_module_tensor_to_device(module, name, device, value=buffer)


def first_tensor(output: Any) -> torch.Tensor:
    """Return the hidden states out of a module's output, which may be a tuple that starts with them."""
    tensor: Any = output[0] if isinstance(output, (tuple, list)) else output
    if not isinstance(tensor, torch.Tensor):
        raise PluginError(f"A module returned {type(tensor).__name__} where hidden states were expected.")
    return tensor


def record_calls(
    model: nn.Module, blocks: Sequence[nn.Module], token_ids: torch.Tensor
) -> tuple[torch.Tensor, list[Call]]:
    """Run a model up to its blocks: return the stream that enters the first, and the call of each.

    Args:
        model: A causal language model; its embeddings must be filled, its blocks need not be.
        blocks: Its blocks in order.
        token_ids: Shape (rows, sequence length), on the model's device.

    Returns:
        The stream, shape (rows, sequence length, d), and one `Call` per block.
    """
    streams: list[torch.Tensor] = []
    calls: list[Call] = []

    def stand_in(*args: Any, **kwargs: Any) -> torch.Tensor:
        slot: int | str = 0 if args else "hidden_states"
        hidden: torch.Tensor = args[0] if args else kwargs["hidden_states"]
        streams.append(hidden)
        empty_args = (None, *args[1:]) if args else ()
        calls.append(Call(empty_args, {**kwargs, slot: None} if isinstance(slot, str) else kwargs, slot))
        if len(calls) == len(blocks):
            raise _ReachedEnd
        return hidden

    for block in blocks:
        block.forward = stand_in
    try:
        model(input_ids=token_ids, use_cache=False)
    except _ReachedEnd:
        pass
    finally:
        for block in blocks:
            del block.forward
    if len(calls) != len(blocks):
        raise PluginError(f"The model called {len(calls)} of its {len(blocks)} blocks.", "Check the adapter's blocks.")
    return streams[0], calls


def record_block(
    block: nn.Module, call: Call, hidden: torch.Tensor, branches: Sequence[Branch]
) -> tuple[torch.Tensor, list[torch.Tensor], list[Call]]:
    """Run a block and watch its branches.

    Args:
        block: The block, filled.
        call: How the model calls it.
        hidden: The stream that enters it.
        branches: Its branches.

    Returns:
        The stream that leaves it, the input of each branch's norm, and the call of each branch's module.

    Raises:
        PluginError: A branch's module is not called with the output of its norm.
    """
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}
    calls: dict[str, Call] = {}
    handles = []

    def watch(branch: Branch) -> None:
        def after_norm(_module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            inputs[branch.norm], outputs[branch.norm] = args[0], output

        def before_branch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
            slots = [slot for slot, value in given if value is outputs.get(branch.norm)]
            if not slots:
                raise PluginError(
                    f"Module {branch.module!r} is not called with the output of norm {branch.norm!r}.",
                    "Check the adapter's branches.",
                )
            slot = slots[0]
            bare_args = tuple(None if index == slot else value for index, value in enumerate(args))
            calls[branch.module] = Call(bare_args, {k: None if k == slot else v for k, v in kwargs.items()}, slot)

        handles.append(block.get_submodule(branch.norm).register_forward_hook(after_norm))
        handles.append(block.get_submodule(branch.module).register_forward_pre_hook(before_branch, with_kwargs=True))

    for branch in branches:
        watch(branch)
    try:
        result = first_tensor(call(block, hidden))
    finally:
        for handle in handles:
            handle.remove()
    unseen = [branch.module for branch in branches if branch.module not in calls]
    if unseen:
        raise PluginError(f"The block never calls {', '.join(unseen)}.", "Check the adapter's branches.")
    return result, [inputs[branch.norm] for branch in branches], [calls[branch.module] for branch in branches]


def writer_input(block: nn.Module, branch: Branch, call: Call, normalised: torch.Tensor) -> torch.Tensor:
    """Run a branch up to its writer and return z, what would enter the writer; the writer itself is not run."""
    with _stop_before(block.get_submodule(branch.writer.path)) as seen:
        call(block.get_submodule(branch.module), normalised)
    if not seen:
        raise PluginError(f"Branch {branch.module!r} never calls its writer {branch.writer.path!r}.")
    return seen[0]


@contextmanager
def _stop_before(module: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Keep the first input of a module and leave the forward pass there."""
    seen: list[torch.Tensor] = []

    def hook(_module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.append(args[0])
        raise _ReachedEnd

    handle = module.register_forward_pre_hook(hook)
    try:
        yield seen
    except _ReachedEnd:
        pass
    finally:
        handle.remove()
