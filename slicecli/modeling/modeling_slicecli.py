"""A decoder language model whose residual stream is narrower than its family's own class can say.

The model is the family's own class of transformers, built from the dense config; only what touches the stream is
replaced: embeddings, norms, linears and experts become narrower. Where the basis of the stream changes from step to
step (SliceGPT, arXiv 2401.15024), each block also gets a shortcut matrix per step, and a forward that says what a
pre-norm block does: the stream goes through the shortcut, and what the branches make of the normalised stream is
added. Attention, MLP, caches, masks and positions stay the family's.

This file travels with the slice. It imports torch, transformers and the config beside it, and knows no family.
"""

from __future__ import annotations

import functools
import inspect
from itertools import pairwise
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel

from .configuration_slicecli import SlicedConfig

__all__ = ["SlicedForCausalLM", "SlicedModel"]


class _Derived:
    """A class made here from a family's: copies and pickles cannot find it by its name, so they make it again."""

    made_from: tuple[Any, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        return _blank, self.made_from, self.__dict__


def _blank(make: Any, *bases: Any) -> Any:
    return object.__new__(make(*bases))


class _Sliced(_Derived, PreTrainedModel):
    """Makes the sliced model of whatever family the config names.

    An instance is of a class derived from this one and from the family's, so all that transformers does with a
    model of the family it does with the slice.
    """

    config_class = SlicedConfig
    family_classes: Any = None
    # GPT-2's are patterns that some loaders find in the names of its biases too; a slice has nothing to ignore
    _keys_to_ignore_on_load_unexpected = None

    def __new__(cls, config: SlicedConfig, *args: Any, **kwargs: Any) -> _Sliced:
        """Choose the class by the dense model's config."""
        family, ours = cls.family_classes[type(config.dense_config)], cast("Any", cls)
        return object.__new__(_with_family(ours, family))

    def __init__(self, config: SlicedConfig, *args: Any, **kwargs: Any) -> None:
        """Build the dense model and cut it."""
        if config.slicing is None:
            raise ValueError("The config lacks `slicing`, which describes how the residual stream is sliced.")
        super().__init__(config.dense_config, *args, **kwargs)
        try:
            _slice(self, config.slicing, f"{self.base_model_prefix}." if self.base_model is self else "")
        except (AttributeError, IndexError) as error:
            raise ValueError(
                f"transformers {transformers.__version__} builds a {type(config.dense_config).__name__} model from "
                f"other modules than the version this slice was made with ({error}). Use that version."
            ) from error
        for kind in ("_attn_implementation_internal", "_experts_implementation_internal"):
            # chosen by the library for the config that the family's class was given
            if hasattr(config.dense_config, kind):
                setattr(config, kind, getattr(config.dense_config, kind))
        self.config = config
        if config.tie_word_embeddings:
            self.tie_weights()  # the table and the head were cut apart
        # transformers reads and writes some families' weights under other names than those of their modules, but for
        # custom code; so must it be for the family's model inside ours, or it would depend on what stands around it
        self.base_model.is_custom_code = _is_custom_code


class SlicedModel(_Sliced):
    """The sliced model without its head."""

    family_classes = MODEL_MAPPING


class SlicedForCausalLM(_Sliced):
    """The sliced model with its head."""

    family_classes = MODEL_FOR_CAUSAL_LM_MAPPING


SlicedModel.register_for_auto_class("AutoModel")
SlicedForCausalLM.register_for_auto_class("AutoModelForCausalLM")


@functools.cache
def _with_family(cls: Any, family: Any) -> Any:
    """Return the class derived from one of ours and one of the family's, under our name, by which it is saved."""
    if issubclass(cls, family):
        return cls
    own = {
        "__module__": cls.__module__,
        "__doc__": cls.__doc__,
        "config_class": SlicedConfig,
        "made_from": (_with_family, cls, family),
    }
    return type(cls.__name__, (cls, family), own)


def _is_custom_code() -> bool:
    return True


def _slice(model: Any, slicing: dict[str, Any], own_prefix: str) -> None:
    """Cut a dense model to the widths of a slice.

    Args:
        model: The dense model.
        slicing: `SlicedConfig.slicing`.
        own_prefix: What the declared paths start with beyond this model: it may be a part of the one they are of.
    """
    declared, widths, has_shortcuts = slicing["declaration"], slicing["widths"], slicing["has_shortcuts"]
    head_width = slicing["head_width"]
    norm = declared["norm"]
    divisor = (slicing["hidden_size"], norm["epsilon"]) if has_shortcuts else None
    reader_biases = has_shortcuts and norm["has_bias"]

    def inside(path: str) -> str:
        return path.removeprefix(own_prefix)

    for table in declared["embeddings"]:
        embedding = model.get_submodule(inside(table["path"]))
        embedding.weight = _cut(embedding.weight, 1, widths[0][0])
        embedding.embedding_dim = widths[0][0]

    blocks = model.get_submodule(inside(declared["blocks"]))
    kinds = {index: kind for kind in declared["block_kinds"] for index in kind["blocks"]}
    following = [steps[0] for steps in widths[1:]] + [head_width]
    block: Any
    for index, (block, steps, last) in enumerate(zip(blocks, widths, following, strict=True)):
        branches = kinds[index]["branches"]
        groups = [branches] if kinds[index]["is_parallel"] else [[branch] for branch in branches]
        for group, entering, leaving in zip(groups, steps, [*steps[1:], last], strict=True):
            for branch in group:
                _slice_norm(block, branch["norm"], entering, divisor)
                for reader in branch["readers"]:
                    _slice_linear(block, reader, 1, entering, reader_biases)
                if branch["writer"] is not None:
                    _slice_linear(block, branch["writer"], 0, leaving)
                if branch["experts"] is not None:
                    _slice_parameter(block, branch["experts"]["reader"], 2, entering)
                    _slice_parameter(block, branch["experts"]["writer"], 1, leaving)
                    # the module around them gives its output the shape it thinks its input has
                    _say_width(
                        block.get_submodule(branch["module"]), ("hidden_dim", "hidden_size", "input_size"), leaving
                    )
        if has_shortcuts:
            block.__class__ = _with_shortcuts(block.__class__)
            block.set_steps(groups, [*steps, last], slicing["block_output_length"])

    _slice_norm(model, inside(declared["final_norm"]), head_width, divisor)
    if own_prefix == "":
        _name_head(model, declared["head"]["path"])
        _slice_linear(model, declared["head"], 1, head_width, reader_biases)


def _name_head(model: Any, name: str) -> None:
    """Register the head under the name its weight is stored by; the family's forward may know it by another."""
    if name in model._modules:
        return
    (other,) = (key for key, module in model._modules.items() if module is model.get_output_embeddings())
    head = model._modules.pop(other)
    model.add_module(name, head)
    model.__dict__[other] = head


def _slice_norm(parent: nn.Module, path: str, width: int, divisor: tuple[int, float] | None) -> None:
    """Narrow a norm, or replace it by one that divides by the dense width; twice does no harm."""
    if divisor is not None:
        _, _, name = path.rpartition(".")
        parent.get_submodule(path.removesuffix(name).removesuffix(".")).add_module(name, SlicedNorm(*divisor))
        return
    norm: Any = parent.get_submodule(path)
    for name, parameter in list(norm.named_parameters(recurse=False)):
        setattr(norm, name, _cut(parameter, 0, width))
    if hasattr(norm, "normalized_shape"):
        norm.normalized_shape = (width,)


def _slice_linear(parent: nn.Module, declared: dict[str, Any], axis: int, width: int, needs_bias: bool = False) -> None:
    """Narrow a linear, however it stores its weight.

    Args:
        parent: The module its path starts from.
        declared: Its declaration.
        axis: 0 for its outputs, 1 for its inputs.
        width: What that side becomes.
        needs_bias: It gets a bias if it has none.
    """
    linear: Any = parent.get_submodule(declared["path"])
    linear.weight = _cut(linear.weight, 1 - axis if declared["is_transposed"] else axis, width)
    _say_width(linear, ("out_features", "nf") if axis == 0 else ("in_features", "nx", "hidden_dim"), width)
    if axis == 0 and linear.bias is not None:
        linear.bias = _cut(linear.bias, 0, width)
    if axis == 0 and declared["is_transposed"]:
        linear.register_forward_pre_hook(_separate_tokens)
    if needs_bias and linear.bias is None:
        outputs = linear.weight.shape[1 if declared["is_transposed"] else 0]
        linear.bias = nn.Parameter(linear.weight.new_zeros(outputs))


def _separate_tokens(linear: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Give each token a row again where GPT-2 joined them all: vLLM's attention has already joined the heads."""
    (rows,) = inputs
    width = linear.weight.shape[0]
    return (rows,) if rows.shape[-1] == width else (rows.view(*rows.shape[:-1], -1, width),)


def _slice_parameter(parent: nn.Module, path: str, axis: int, width: int) -> None:
    module_path, _, name = path.rpartition(".")
    module = parent.get_submodule(module_path)
    setattr(module, name, _cut(module.get_parameter(name), axis, width))
    _say_width(module, ("hidden_dim",), width)


def _say_width(module: Any, names: tuple[str, ...], width: int) -> None:
    """Set those of a module's attributes, among the usual ones, that say its width."""
    for name in names:
        if hasattr(module, name):
            setattr(module, name, width)


def _cut(parameter: nn.Parameter, axis: int, width: int) -> nn.Parameter:
    """Return a parameter with memory of its own that is narrower (or, after a wider initial value, as wide)."""
    return nn.Parameter(parameter.detach().narrow(axis, 0, width).clone(), requires_grad=parameter.requires_grad)


class SlicedNorm(nn.Module):
    """What a root-mean-square norm of the dense width makes of a stream of which only some coordinates are left.

    It has no weight: that has moved into the linears behind it. LayerNorms become such norms too once the mean has
    been taken out of everything that writes the stream.

    Args:
        dense_width: Number of coordinates of the dense stream; those that are gone count as zeros.
        epsilon: What the family adds under the root.
    """

    def __init__(self, dense_width: int, epsilon: float) -> None:
        super().__init__()
        self.dense_width = dense_width
        self.epsilon = epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Normalise, at least in float32; shape (..., width)."""
        wide = hidden_states.to(torch.promote_types(hidden_states.dtype, torch.float32))
        mean_square = wide.square().sum(-1, keepdim=True) / self.dense_width
        return (wide * torch.rsqrt(mean_square + self.epsilon)).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        """Describe the norm where the model is printed."""
        return f"dense_width={self.dense_width}, epsilon={self.epsilon}"


class _WithShortcuts(_Derived, nn.Module):
    """A family's block whose stream changes its basis, and may change its width, at every step."""

    family_parameters: dict[str, inspect.Parameter]
    returns_tuple: bool
    shortcuts: nn.ModuleList

    def set_steps(self, groups: list[list[dict[str, Any]]], widths: list[int], output_length: int) -> None:
        """Say what the block does.

        Args:
            groups: The declared branches of each step.
            widths: Width of the stream before each step, and after the last.
            output_length: Length of the tuple that the family's block returns; 0 for a tensor.
        """
        self.steps = groups
        modules = {branch["module"] for branches in groups for branch in branches if branch["module"]}
        self.known_arguments = {path: _known_arguments(self.get_submodule(path)) for path in modules}
        self.output_length = output_length
        self.shortcuts = nn.ModuleList(nn.Linear(before, after, bias=False) for before, after in pairwise(widths))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take each step: the stream through its shortcut, plus what the branches make of the stream.

        The arguments are those of the family's block; each branch's module is given those it knows.
        """
        given = dict(zip(self.family_parameters, args, strict=False)) | kwargs
        stream = given.pop(next(iter(self.family_parameters)))
        others: tuple[Any, ...] = ()
        for branches, shortcut in zip(self.steps, self.shortcuts, strict=True):
            norms = dict.fromkeys(branch["norm"] for branch in branches)
            normalised = {path: self.get_submodule(path)(stream) for path in norms}
            stream = shortcut(stream)
            for branch in branches:
                output = self._run(branch, normalised[branch["norm"]], given)
                if isinstance(output, tuple):
                    output, others = output[0], others or output[1:]
                stream = stream + (output if branch["multiplier"] == 1 else output * branch["multiplier"])
        if not self.output_length:
            return (stream, *others) if self.returns_tuple else stream
        return (stream, *others, *[None] * self.output_length)[: self.output_length]

    def _run(self, branch: dict[str, Any], normalised: torch.Tensor, given: dict[str, Any]) -> Any:
        """Run one branch on the normalised stream."""
        if branch["module"]:
            known = self.known_arguments[branch["module"]]
            arguments = given if known is None else {name: given[name] for name in known if name in given}
            return self.get_submodule(branch["module"])(normalised, **arguments)
        (reader,) = branch["readers"]
        inner = self.get_submodule(branch["activation"])(self.get_submodule(reader["path"])(normalised))
        return self.get_submodule(branch["writer"]["path"])(inner)


def _known_arguments(module: Any) -> list[str] | None:
    """Return the names of the arguments that a module takes beside its input; `None` if it takes any."""
    known = _parameters(module.__class__)
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values()):
        return None
    return list(known)[1:]


def _parameters(cls: Any) -> dict[str, inspect.Parameter]:
    """Return the parameters of a module class's forward but `self`."""
    parameters = inspect.signature(cls.forward).parameters
    return {name: parameter for name, parameter in parameters.items() if name != "self"}


def _returns_tuple(family: Any) -> bool:
    """Say whether a block returns a tuple in transformers 4, where in 5 it returns the stream alone."""
    if not transformers.__version__.startswith("4."):
        return False
    _, _, returned = inspect.getsource(family.forward).rpartition("return ")
    return returned.strip() != "hidden_states"


@functools.cache
def _with_shortcuts(family: Any) -> Any:
    """Return the class of a family's blocks with shortcuts, under its own name, by which devices are assigned."""
    own = {
        "__module__": __name__,
        "__doc__": _WithShortcuts.__doc__,
        "family_parameters": _parameters(family),
        "returns_tuple": _returns_tuple(family),
        "made_from": (_with_shortcuts, family),
    }
    return type(family.__name__, (_WithShortcuts, family), own)
