"""Proving a declaration on a model: the stream is read and written where it says, and nowhere else.

At full width a slice is a rotation, and the refit finds nothing to mend. Neither changes anything that a declaration
describes rightly: what each reader makes of the stream and what enters each writer stay the same number for number,
and the stream itself is turned by the basis. So both models run side by side, and the first value that differs tells
where the declaration is wrong.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers.initialization import no_init_weights

from slicecli.adapters import Adapter
from slicecli.checkpoint.configs import custom_code_config, stock_config
from slicecli.checkpoint.meta_model import parameter_shapes, with_plain_experts
from slicecli.errors import PluginError, reason_of
from slicecli.family.dimensions import Dimensions
from slicecli.family.schedule import Schedule
from slicecli.linalg.basis import Basis, centred_frame, random_rotation
from slicecli.linalg.sliced_maps import projection_of_stream
from slicecli.progress import Silent
from slicecli.proof.float64 import Float64Throughout
from slicecli.proof.tiny import SIZES, random_model, tiny_config
from slicecli.slicing.context import Batches, DenseModel, Target
from slicecli.slicing.modules import first_tensor, persistent_buffers
from slicecli.slicing.refit import collect_statistics, refit
from slicecli.slicing.sliced_tensors import project, tie_of
from slicecli.slicing.slicegpt import Orientation, slice_published

__all__ = [
    "ModelWeights",
    "block_output_length",
    "identity_basis",
    "logits",
    "projected_model",
    "prove_accounting",
    "prove_channels",
    "prove_channels_of_class",
    "prove_embeddings",
    "prove_refit",
    "prove_rotation",
    "prove_shortcuts",
    "prove_tie",
    "published_in_memory",
    "random_basis",
    "relative_error",
    "slice_in_memory",
]

# what rounding leaves of a model in float64
PROOF_TOLERANCE = 1e-9
FACTOR_TOLERANCE = 1e-4


class ModelWeights:
    """Serves the parameters of a model that is in memory (a `slicecli.slicing.sliced_tensors.WeightReader`)."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def tensor(self, name: str) -> torch.Tensor:
        """Return one parameter or persistent buffer."""
        path, _, leaf = name.rpartition(".")
        found: torch.Tensor = getattr(self._model.get_submodule(path), leaf)
        return found.detach()

    def module(self, path: str) -> dict[str, torch.Tensor]:
        """Return all parameters and persistent buffers below a module, by their names inside it."""
        return {name: value.detach() for name, value in self._model.get_submodule(path).state_dict().items()}


def identity_basis(dimensions: Dimensions, device: torch.device | None = None) -> Basis:
    """Return the basis that turns nothing: with it a projection at full width only folds the norms."""
    size, is_centred = dimensions.hidden_size, dimensions.adapter.norm.is_centred
    identity = torch.eye(size, dtype=torch.float64, device=device)
    vectors = centred_frame(size, device) if is_centred else identity
    ones = torch.ones(vectors.shape[1], dtype=torch.float64, device=device)
    return Basis(vectors, ones, ones, is_centred)


def random_basis(dimensions: Dimensions, seed: int, device: torch.device | None = None) -> Basis:
    """Return a basis drawn uniformly from all rotations (a Gaussian matrix made orthonormal)."""
    start = identity_basis(dimensions, device)
    size = start.vectors.shape[1]
    rotation = random_rotation(size, torch.Generator().manual_seed(seed)).to(start.vectors.device)
    return Basis(start.vectors @ rotation, start.energies, start.importances, start.is_centred)


def projected_model(model: Any, dimensions: Dimensions, basis: Basis, dim: int | None = None) -> Any:
    """Return a model of the same class, sliced by projection alone."""
    sliced = _empty_like(model, dimensions, dim)
    tensors: dict[str, torch.Tensor] = {}
    project(dimensions, ModelWeights(model), basis, dim or dimensions.hidden_size, model.dtype, tensors.__setitem__)
    buffers = {name: ModelWeights(model).tensor(name) for name in persistent_buffers(model)}
    _load(sliced, dimensions, buffers | tensors)
    return sliced


def _load(sliced: Any, dimensions: Dimensions, tensors: dict[str, torch.Tensor]) -> None:
    """Load all tensors of a slice, of a tied one without its head, which has to be its embedding table."""
    if dimensions.keeps_tie:
        head = f"{dimensions.adapter.head.path}.weight"
        weights = ModelWeights(sliced)
        table = f"{dimensions.adapter.embeddings[0].path}.weight"
        if weights.tensor(head).data_ptr() != weights.tensor(table).data_ptr():
            raise PluginError(
                f"Adapter {dimensions.adapter.name!r} keeps tied models tied, and {type(sliced).__name__} does not "
                f"share {table} with {head}.",
                "Say why not with `tie_obstacle`.",
            )
        tensors = tensors | {head: tensors[table]}
    sliced.load_state_dict(tensors, strict=True)


def _empty_like(
    model: Any,
    dimensions: Dimensions,
    dim: int | None = None,
    on_meta: bool = False,
    schedule: Schedule | None = None,
    block_output_length: int = 0,
) -> Any:
    """Return a model of the same device with weights of no meaning, its head apart from its embeddings."""
    dtype = str(model.dtype).removeprefix("torch.")
    cls = type(model)
    if schedule is not None:
        config = custom_code_config(model.config, dimensions, schedule, True, block_output_length, dtype)
        cls = _sliced_class()
    elif dim is None or dim == dimensions.hidden_size:
        # a class that ties the heads to the hidden size would not know what to do with a width of their own
        fields = {"tie_word_embeddings": dimensions.keeps_tie, **dimensions.mlp_fields()}
        config = type(model.config).from_dict(model.config.to_dict() | fields)
    elif dimensions.layout == "stock":
        config = stock_config(model.config, dimensions, dim, dtype)
    else:
        config = custom_code_config(model.config, dimensions, Schedule.constant(dimensions, dim), False, 0, dtype)
        cls = _sliced_class()
    config._attn_implementation = model.config._attn_implementation
    with init_empty_weights() if on_meta else nullcontext(), no_init_weights():
        made = cls(config)
    made.tie_weights()
    return with_plain_experts(made if on_meta else made.to(device=model.device, dtype=model.dtype)).eval()


def _sliced_class() -> Any:
    from slicecli.modeling.modeling_slicecli import SlicedForCausalLM

    return SlicedForCausalLM


def _exactly(model: Any) -> AbstractContextManager[Any]:
    """Return what lets a float64 model compute all in float64."""
    return Float64Throughout() if model.dtype == torch.float64 else nullcontext()


@torch.no_grad()
def logits(model: Any, token_ids: torch.Tensor) -> torch.Tensor:
    """Return a model's logits, shape (rows, sequence length, vocabulary); a float64 model computes all in float64."""
    with _exactly(model):
        found: torch.Tensor = model(input_ids=token_ids, use_cache=False).logits
    return found


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Return |found - expected| / |expected|, in the Frobenius norm; infinity where `found` is not finite."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().double(), expected.detach().double()
    error = float((found - expected).norm() / expected.norm().clamp_min(1e-300))
    return error if error == error else float("inf")


def prove_accounting(shapes_by_width: dict[int, dict[str, tuple[int, ...]]], dimensions: Dimensions) -> None:
    """Check that exactly the parameters declared to touch the stream grow with the hidden size.

    Args:
        shapes_by_width: Shapes of the same config's parameters by name, for two hidden sizes that leave all other
            sizes alone.
    """
    first, second = shapes_by_width.values()
    grows = {name for name in first if first[name] != second.get(name)}
    touching = set(dimensions.stream_parameters())
    undeclared = sorted(grows - touching)
    if undeclared:
        raise PluginError(
            f"Adapter {dimensions.adapter.name!r} does not declare that {', '.join(undeclared)} touches the residual "
            "stream.",
            "Declare it as a reader, writer, embedding or norm.",
        )
    fixed = sorted(name for name in touching - grows if name in first)
    if fixed:
        raise PluginError(
            f"Adapter {dimensions.adapter.name!r} declares that {', '.join(fixed)} touches the residual stream, but "
            "it has no axis of hidden size.",
            "Declare it as passed through.",
        )


@dataclass(frozen=True)
class _Seen:
    """One value of a run: what it is, whether it is the stream itself, and what to look at where it is wrong."""

    label: str
    is_stream: bool
    hint: str
    value: torch.Tensor


def prove_rotation(
    model: Any, dimensions: Dimensions, token_ids: torch.Tensor, tolerance: float, seed: int = 0
) -> float:
    """Check on a model that a rotation of the stream changes nothing, the head of a tied one made separate.

    (A tied one keeps its axes at full width: it is rotated back to where the final norm's weight is diagonal.)

    Args:
        model: The dense model, with weights; use float64 for a tight tolerance.
        token_ids: Shape (rows, sequence length), on the model's device.
    """
    dimensions = dimensions.untied()
    basis = random_basis(dimensions, seed, model.device)
    rotated = projected_model(model, dimensions, basis)
    return _prove_same(model, rotated, dimensions, basis, token_ids, tolerance, "a rotation of the stream")


def prove_tie(model: Any, dimensions: Dimensions, token_ids: torch.Tensor, tolerance: float) -> float:
    """Check on a tied model that one table serves a slice of full width as embedding and as head.

    Args:
        model: See `prove_rotation`.
        token_ids: Likewise.
    """
    basis = random_basis(dimensions, 0, model.device)
    tied = projected_model(model, dimensions, basis)
    return _prove_same(model, tied, dimensions, basis, token_ids, tolerance, "one table for embedding and head")


def prove_embeddings(model: Any, dimensions: Dimensions, token_ids: torch.Tensor, dim: int, tolerance: float) -> float:
    """Check that the stream of a slice starts as the projection of the dense one.

    A rotation cannot show what depends on the hidden size itself: a factor that the model multiplies the embeddings by.

    Args:
        token_ids: Shape (rows, sequence length), on the model's device.
    """
    basis = random_basis(dimensions, 0, model.device)
    dense, sliced = (
        _run(one, dimensions, token_ids)[0].value for one in (model, projected_model(model, dimensions, basis, dim))
    )
    error = _stream_error(sliced, dense, _axes(model, dimensions, basis, dim), dimensions)
    if error > tolerance:
        tables = ", ".join(table.path for table in dimensions.adapter.embeddings)
        raise PluginError(
            f"Adapter {dimensions.adapter.name!r} does not describe this model: at dim {dim} the output of {tables} is "
            f"not the projection of the dense one (relative error {error:.1e}).",
            "Check scales_embeddings_by_width.",
        )
    return error


def prove_own_class(adapter: Adapter, config: Any, trust_remote_code: bool = False) -> None:
    """Check on a small model of a config's class, which is not transformers' own, that an adapter describes it."""
    small = tiny_config(config, has_head_dim=adapter.layout(config.to_dict()) == "stock", **_ungrouped(config))
    model = random_model(small, dtype="float64", trust_remote_code=trust_remote_code)
    dimensions = Dimensions(adapter, small.to_dict())
    token_ids = torch.randint(2, dimensions.vocabulary, (8, 12), generator=torch.Generator().manual_seed(0))
    try:
        dimensions.require_declared(parameter_shapes(model))
        prove_rotation(model, dimensions, token_ids, PROOF_TOLERANCE)
        prove_refit(model, dimensions, token_ids, PROOF_TOLERANCE)
        if dimensions.layout == "stock":
            # models hold a factor of the embeddings in float32
            dim = dimensions.nearest_legal(dimensions.hidden_size // 2)[0]
            prove_embeddings(model, dimensions, token_ids, dim, FACTOR_TOLERANCE)
    except PluginError as error:
        raise PluginError(
            f"{type(model).__name__} of the model's custom code does not match adapter {adapter.name!r}: {error.cause}",
            "Try --adapter auto, which infers a declaration from the class itself.",
        ) from error


def prove_refit(model: Any, dimensions: Dimensions, token_ids: torch.Tensor, tolerance: float) -> float:
    """Check on a model that the refit at full width finds nothing to mend.

    It does where a declaration hides what the rotation cannot show: what multiplies a branch, and which stream a
    branch reads.

    Args:
        token_ids: Calibration rows, shape (rows, sequence length), on the model's device.
    """
    (sliced,), basis = slice_in_memory(model, dimensions, token_ids, dimensions.hidden_size)
    return _prove_same(model, sliced, dimensions, basis, token_ids, tolerance, "the refit at full width")


def prove_channels(model: Any, dimensions: Dimensions, token_ids: torch.Tensor, tolerance: float) -> float:
    """Check on a model that MLP channels which add nothing can be removed without any loss.

    In each block, and in each expert, a third of them is kept from writing; the refit at full width has to choose the
    same ones, and to cut every parameter that has them.

    Args:
        token_ids: Calibration rows, shape (rows, sequence length), on the model's device.
    """
    size, generator = dimensions.mlp_size, torch.Generator().manual_seed(0)
    model = copy.deepcopy(model)
    for matrix, stays in _channel_writers(model, dimensions, size - size // 3):
        removed = torch.randperm(matrix.shape[1], generator=generator)[stays:]
        matrix[:, removed.to(matrix.device)] = 0
    try:
        (sliced,), _ = slice_in_memory(model, dimensions, token_ids, dimensions.hidden_size, mlp_dim=size - size // 3)
        error = relative_error(logits(sliced, token_ids), logits(model, token_ids))
    except (RuntimeError, ValueError, IndexError) as failure:  # of shapes that do not fit
        raise PluginError(
            f"Adapter {dimensions.adapter.name!r} does not describe the MLPs of this model: without some of their "
            f"channels they fail to run ({reason_of(failure)}).",
            "Check the widths of their readers and writers.",
        ) from failure
    if not error <= tolerance:
        raise PluginError(
            f"Adapter {dimensions.adapter.name!r} does not describe the MLPs of this model: without channels that add "
            f"nothing, the logits change by {error:.1e}.",
            "Check which readers have the width of the MLP, and how they arrange it.",
        )
    return error


def _channel_writers(model: Any, dimensions: Dimensions, mlp_dim: int) -> Iterator[tuple[torch.Tensor, int]]:
    """Yield the writers of MLPs and of experts as (outputs, channels), each with how many of its channels stay."""
    for index, block in enumerate(dimensions.declared_blocks):
        for branch in block.branches:
            writer, experts, prefix = branch.writer, branch.experts, f"{dimensions.adapter.blocks}.{index}"
            if writer is not None and dimensions.has_channels(writer.width):
                weight = model.get_parameter(f"{prefix}.{writer.path}.weight").detach()
                yield weight.mT if writer.is_transposed else weight, dimensions.channels_at(writer.width, mlp_dim)
            if experts is not None and dimensions.has_channels(experts.writer_width):
                for weight in model.get_parameter(f"{prefix}.{experts.writer_path}").detach():
                    yield weight, dimensions.channels_at(experts.writer_width, mlp_dim)


def prove_channels_of_class(adapter: Adapter, config: Any, trust_remote_code: bool = False) -> None:
    """Check on a small model of a config's class that MLP channels can be removed as an adapter describes them."""
    small = tiny_config(config, has_head_dim=adapter.layout(config.to_dict()) == "stock", **_ungrouped(config))
    model = random_model(small, dtype="float64", trust_remote_code=trust_remote_code)
    dimensions = Dimensions(adapter, small.to_dict())
    token_ids = torch.randint(2, dimensions.vocabulary, (8, 12), generator=torch.Generator().manual_seed(0))
    prove_channels(model, dimensions, token_ids, PROOF_TOLERANCE)


def slice_in_memory(
    model: Any,
    dimensions: Dimensions,
    token_ids: torch.Tensor,
    *dims: int,
    batch_rows: int = 8,
    mlp_dim: int | None = None,
) -> tuple[list[Any], Basis]:
    """Slice a model that is in memory, by the refit; nothing is read or written.

    Args:
        token_ids: Calibration rows, shape (rows, sequence length).
        mlp_dim: How many MLP channels stay; `None` leaves them all.

    Returns:
        The slices, in the model's dtype, and their basis.
    """
    tensors: list[dict[str, torch.Tensor]] = [{} for _ in dims]
    made = [_empty_like(model, dimensions.with_mlp_dim(mlp_dim), dim) for dim in dims]
    dense = DenseModel(
        _empty_like(model, dimensions, on_meta=True),
        ModelWeights(model),
        dimensions,
        model.device,
        model.dtype,
    )
    targets = [
        Target(dim, _empty_like(model, dimensions, dim, on_meta=True), model.dtype, found.__setitem__, mlp_dim=mlp_dim)
        for dim, found in zip(dims, tensors, strict=True)
    ]
    batches = Batches(token_ids, batch_rows)
    # only there: a narrower model's weights are rounded on purpose
    with _exactly(model):
        statistics = collect_statistics(dense, batches, Silent())
        refit(dense, statistics, targets, batches, Silent())
    for sliced, found in zip(made, tensors, strict=True):
        _load(sliced, dimensions, found)
    return made, statistics.basis


def published_in_memory(
    model: Any,
    dimensions: Dimensions,
    token_ids: torch.Tensor,
    schedule: Schedule,
    orientation: Orientation = "pca",
    seed: int = 0,
    batch_rows: int = 8,
) -> Any:
    """Slice a model that is in memory by the published method; nothing is read or written.

    Args:
        token_ids: Calibration rows, shape (rows, sequence length).

    Returns:
        The slice, in the model's dtype.
    """
    length = block_output_length(model, dimensions)
    tensors: dict[str, torch.Tensor] = {}
    made = _empty_like(model, dimensions, schedule=schedule, block_output_length=length)
    dense = DenseModel(
        _empty_like(model, dimensions, on_meta=True), ModelWeights(model), dimensions, model.device, model.dtype
    )
    meta_model = _empty_like(model, dimensions, on_meta=True, schedule=schedule, block_output_length=length)
    target = Target(schedule.dim, meta_model, model.dtype, tensors.__setitem__)
    with _exactly(model):
        slice_published(dense, target, schedule, orientation, seed, Batches(token_ids, batch_rows), Silent())
    made.load_state_dict(tensors, strict=True)
    return made


@torch.no_grad()
def block_output_length(model: Any, dimensions: Dimensions) -> int:
    """Return the length of the tuple that a model's blocks return; 0 where they return a tensor."""
    lengths: list[int] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        lengths.append(len(output) if isinstance(output, tuple) else 0)

    handle = model.get_submodule(f"{dimensions.adapter.blocks}.0").register_forward_hook(hook)
    try:
        model(input_ids=torch.zeros(1, 2, dtype=torch.int64, device=model.device), use_cache=False)
    finally:
        handle.remove()
    return lengths[0]


def prove_shortcuts(adapter: Adapter, config: Any, slices_head: bool) -> int:
    """Check on a small model of a config's class that blocks with shortcuts compute what the family's do.

    At full width the published method only turns the stream at every place, which changes nothing; at a smaller one
    the model must run.
    """
    small = tiny_config(config, has_head_dim=adapter.layout(config.to_dict()) == "stock", **_ungrouped(config))
    model = random_model(small, dtype="float64")
    dimensions = Dimensions(adapter, small.to_dict())
    token_ids = torch.randint(2, dimensions.vocabulary, (8, 12), generator=torch.Generator().manual_seed(0))
    width, half = dimensions.hidden_size, dimensions.hidden_size // 2
    remedy = "Use --method refit, which runs the family's own blocks."
    tried = "its blocks with shortcuts fail to run"
    try:
        full = published_in_memory(model, dimensions, token_ids, Schedule.constant(dimensions, width))
        difference = relative_error(logits(full, token_ids), logits(model, token_ids))
        if not difference > PROOF_TOLERANCE:
            tried = f"it fails to run with a narrow stream and a head that {'is' if slices_head else 'is not'} sliced"
            remedy = remedy if slices_head else "Use --slice-head."
            narrow = Schedule.constant(dimensions, half, half if slices_head else width)
            logits(published_in_memory(model, dimensions, token_ids, narrow), token_ids)
    except Exception as error:  # modules of a family raise what they like where a width surprises them
        raise PluginError(f"{type(model).__name__}: {tried} ({reason_of(error)}).", remedy) from error
    if difference > PROOF_TOLERANCE:
        raise PluginError(
            f"{type(model).__name__}: its blocks do more than adapter {adapter.name!r} declares: with shortcuts the "
            f"logits change by {difference:.1e} at full width.",
            remedy,
        )
    return block_output_length(model, dimensions)


def _ungrouped(config: Any) -> dict[str, int]:
    """Return the fields that give a small model a key/value head per query head where the large one has that."""
    names = ("num_key_value_heads", "num_kv_heads")
    return {
        name: SIZES["num_attention_heads"]
        for name in names
        if getattr(config, name, None) == config.num_attention_heads
    }


def _prove_same(
    model: Any,
    sliced: Any,
    dimensions: Dimensions,
    basis: Basis,
    token_ids: torch.Tensor,
    tolerance: float,
    what: str,
) -> float:
    """Compare a model with its slice at full width, step by step."""
    axes = _axes(model, dimensions, basis, dimensions.hidden_size)
    for dense, other in zip(_run(model, dimensions, token_ids), _run(sliced, dimensions, token_ids), strict=True):
        if dense.is_stream:
            error = _stream_error(other.value, dense.value, axes, dimensions)
        else:
            error = relative_error(other.value, dense.value)
        if error > tolerance:
            raise PluginError(
                f"Adapter {dimensions.adapter.name!r} does not describe this model: after {what}, {dense.label} "
                f"differs (relative error {error:.1e}).",
                dense.hint,
            )
    return relative_error(logits(sliced, token_ids), logits(model, token_ids))


def _stream_error(sliced: torch.Tensor, dense: torch.Tensor, axes: torch.Tensor, dimensions: Dimensions) -> float:
    """Return the relative error of a sliced stream against the projection of the dense one."""
    if dimensions.adapter.norm.is_centred:
        # a LayerNorm's stream is known but for its mean
        sliced = sliced - sliced.mean(-1, keepdim=True)
    return relative_error(sliced, dense @ projection_of_stream(axes).to(dense.dtype))


def _axes(model: Any, dimensions: Dimensions, basis: Basis, dim: int) -> torch.Tensor:
    """Return the axes of a slice by projection, float64 of shape (d, dim)."""
    leading = basis.leading(dim)
    return tie_of(dimensions, ModelWeights(model), leading).axes if dimensions.keeps_tie else leading


@torch.no_grad()
def _run(model: Any, dimensions: Dimensions, token_ids: torch.Tensor) -> list[_Seen]:
    """Run a model and note, in the order of the run, what a rotation must leave alone."""
    adapter = dimensions.adapter
    seen: list[_Seen] = []
    handles = []

    def watch(path: str, label: str, hint: str, is_stream: bool = False, is_input: bool = False) -> None:
        def keep(value: Any) -> None:
            tensor = first_tensor(value)
            seen.append(_Seen(label, is_stream, hint, tensor.reshape(-1, tensor.shape[-1]).clone()))

        module = model.get_submodule(path)
        if is_input:
            hook: Callable[..., None] = lambda _module, args, kwargs: keep(args or tuple(kwargs.values()))  # noqa: E731
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        else:
            handles.append(module.register_forward_hook(lambda _module, _args, output: keep(output)))

    for index, block in enumerate(dimensions.declared_blocks):
        path = f"{adapter.blocks}.{index}"
        if index == 0:
            tables = ", ".join(table.path for table in adapter.embeddings)
            hint = f"Check the embeddings ({tables}) and scales_embeddings_by_width."
            watch(path, f"the stream that enters {path}", hint, is_stream=True, is_input=True)
        for branch in block.branches:
            norm_hint = f"Check the norm {branch.norm!r} (declared as {adapter.norm}) and its readers."
            for reader in branch.readers:
                watch(f"{path}.{reader.path}", f"the output of {path}.{reader.path}", norm_hint)
            if branch.writer is not None:
                declared = ", ".join(branch.reader_paths)
                hint = f"An undeclared reader lies between norm and writer; declared: {declared}."
                watch(f"{path}.{branch.writer.path}", f"the input of {path}.{branch.writer.path}", hint, is_input=True)
        writers = [path for branch in block.branches for path in branch.writer_paths]
        hint = f"Check the writers ({', '.join(writers)}), their multipliers, and whether the block is parallel."
        watch(path, f"the stream that leaves {path}", hint, is_stream=True)
    hint = f"Check the final norm ({adapter.final_norm}) and the head ({adapter.head.path})."
    watch(adapter.head.path, f"the output of {adapter.head.path}", hint)
    try:
        with _exactly(model):
            model(input_ids=token_ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return seen
