"""From a request to a job: which model, which slices of it, how made; and what can be refused without any weight.

The small files of the model are enough for all of it, so that what cannot be done is said before anything large is
downloaded or computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from slicecli.adapters import AUTO_ADAPTER, Adapter, select_adapter
from slicecli.checkpoint.configs import custom_code_config, portable_config, resized_config, stock_config
from slicecli.checkpoint.folder import check_apart, check_output, require_disk_space
from slicecli.checkpoint.meta_model import build_runnable_meta_model, parameter_shapes
from slicecli.checkpoint.source import Source
from slicecli.errors import NoAdapterError, RequestError, SourceError, UnsupportedModelError
from slicecli.family.context_length import pick_sequence_length
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.schedule import PublishedSizes, Schedule, count, read_schedule, slices_head
from slicecli.family.shapes import is_met_by_pairs, pairs_within
from slicecli.family.slice_plan import (
    DTYPE_BYTES,
    Layout,
    Method,
    SlicePlan,
    Width,
    WidthChange,
    WidthPair,
    check_method,
    width_name,
)
from slicecli.family.written_class import SliceClasses, WrittenClass
from slicecli.jobs.options import SliceOptions
from slicecli.modeling import CONFIG_TYPE
from slicecli.runtime.distributed import Processes
from slicecli.runtime.libraries import quiet_libraries, running
from slicecli.runtime.placement import (
    ActivationPlan,
    Placement,
    compute_dtype,
    decide_placement,
    place_activations,
)
from slicecli.slicing.statistics_cache import most_bytes

if TYPE_CHECKING:
    import torch

    from slicecli.infer.inference import Inference

__all__ = [
    "ChosenAdapter",
    "Job",
    "PlannedSlice",
    "find_adapter",
    "full_fields",
    "plan_slices",
    "width_of_dense_activations",
]


@dataclass(frozen=True)
class PlannedSlice:
    """One slice of a job.

    Attributes:
        config: Its config, an object of transformers.
        folder: Where it will lie.
        written: The class it is written in; `None` for custom code.
        running_config: Its config in its family's own class, with the MLPs of the dense model: its blocks run so while
            they are fitted.
        note: Why it is written in that class, where that needs a word.
        output: Where it was asked for; `None` names the folder after the widths.
        pairs: The widths that meet its target, where statistics are to choose among them; the plan is for one of them.
    """

    plan: SlicePlan
    config: Any
    folder: Path
    written: WrittenClass | None
    running_config: Any
    note: str = ""
    output: Path | None = None
    pairs: tuple[WidthPair, ...] = ()

    @property
    def is_portable(self) -> bool:
        """Whether it is written in another class than its family's own."""
        return self.written is not None and self.written.portable is not None

    @property
    def runs_as_written(self) -> bool:
        """Whether its blocks are fitted in the very model that is written."""
        return self.running_config is self.config


@dataclass(frozen=True)
class Job:
    """Slices of one model, decided and found possible, before any weight is read; none where it is only measured.

    Attributes:
        model: The model as it was asked for.
        inference: How the declaration was inferred, if it was.
        config: The dense model's config, an object of transformers.
        meta_model: The dense model with all parameters on `meta`, ready to be filled block by block.
        placement: Where the dense weights rest, and what computes.
        processes: Those that do it together.
        classes: The classes that slices can be written in; `None` where they bring code of their own.
    """

    model: str
    source: Source
    adapter: Adapter
    inference: Inference | None
    dimensions: Dimensions
    config: Any
    meta_model: Any
    sequence_length: int
    placement: Placement
    activations: ActivationPlan
    slices: tuple[PlannedSlice, ...]
    options: SliceOptions
    processes: Processes
    classes: SliceClasses | None

    def describe_places(self) -> str:
        """Say in a line what computes, and where weights and activations are kept."""
        return f"{self.placement.describe()}; {self.activations.describe()}"

    def places_to_json(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return {**self.placement.to_json(), **self.activations.to_json()}


def plan_slices(model: str, widths: Sequence[Width], outputs: Sequence[Path | None], options: SliceOptions) -> Job:
    """Decide on slices and refuse what can be refused without weights."""
    import torch

    processes = Processes.find()
    _check_environment(options, processes)
    source = _find_source(model, options)
    chosen = find_adapter(source, options.adapter)
    adapter, inference = chosen.adapter, chosen.inference
    check_method(
        options.method,
        options.slice_head,
        has_schedule=any(width.schedule is not None for width in widths),
        has_orientation=options.orientation != "pca",
        changes_mlp=any(width.changes_mlp for width in widths),
    )
    layout = _layout(source, chosen, options.method)
    Dimensions(adapter, chosen.fields)  # names a field that is wrong, where transformers would name its own check
    config = source.config()
    dimensions = Dimensions(adapter, source.loaded_fields(adapter, full_fields(source, config)), options.unties)
    stored_dtype = source.stored_dtype()
    dtype = options.dtype or stored_dtype
    classes = SliceClasses.of_method(
        dimensions, options.method, str(config.model_type), options.write_as, source.has_own_model_code
    )
    requests = [resolve(width, dimensions, classes, options, DTYPE_BYTES[dtype]) for width in widths]
    sequence_length = pick_sequence_length(source.name, config, options.sequence_length)
    config.tie_word_embeddings = dimensions.is_tied  # as the weight files have it
    meta_model = build_runnable_meta_model(config, options.trust_remote_code)
    dimensions.require_declared(parameter_shapes(meta_model))
    stored = getattr(torch, stored_dtype)
    placement = decide_placement(options.device_map, options.max_memory, meta_model, adapter.blocks, stored)
    cuts_mlp = any(one.sizes.mlp_dim is not None for one in requests)
    output_length = _prove(source, chosen, config, dimensions, options, cuts_mlp)
    _prove_portable(source, config, requests)
    slices = []
    for width, (sizes, dim, schedule, written, pairs), output in zip(widths, requests, outputs, strict=True):
        plan = SlicePlan(
            model=source.name,
            model_type=str(config.model_type),
            adapter=AUTO_ADAPTER if inference else adapter.name,
            hidden_size=dimensions.hidden_size,
            dim=dim,
            dtype=dtype,
            dense_parameters=dimensions.parameters(),
            sliced_parameters=(written or sizes).parameters(dim)
            if schedule is None
            else count(schedule.shapes(dimensions)),
            dense_dtype=stored_dtype,
            method=options.method,
            layout=layout,
            is_tied=options.method == "refit" and dimensions.keeps_tie,
            schedule=schedule,
            schedule_name=Path(width.schedule or "").name,
            written_type=written.model_type if written else CONFIG_TYPE,
            activation=dimensions.activation,
            mlp_size=None if sizes.mlp_dim is None else dimensions.mlp_size,
            mlp_dim=sizes.mlp_dim,
            other_mlp_widths={
                name: WidthChange(dense=dimensions.number(name), sliced=width)
                for name, width in [*sizes.sliced_mlp_widths.items()][1:]
            },
        )
        sliced_config = config_of(plan, config, sizes, output_length, source.has_own_model_code, written)
        running_config = sliced_config
        if written is not None and written.portable is not None:
            running_config = resized_config(config, dimensions, dim, dtype)
        elif plan.mlp_dim is not None:
            running_config = config_of(plan, config, dimensions, output_length, source.has_own_model_code)
        if not sliced_config.architectures:  # which others than transformers need
            sliced_config.architectures = [type(meta_model).__name__]
        folder = output or Path(f"{source.name.rpartition('/')[2]}-{width_name(dim, plan.mlp_dim)}")
        note = classes.note(written, dim) if classes and written else ""
        slices.append(PlannedSlice(plan, sliced_config, folder, written, running_config, note, output, pairs))
    if processes.is_main:
        _check_outputs(source, widths, slices, options)
    tokens = options.samples * sequence_length // processes.count
    activations = _place_activations(dimensions, meta_model, placement, stored, tokens, slices, options)
    return Job(
        model,
        source,
        adapter,
        inference,
        dimensions,
        config,
        meta_model,
        sequence_length,
        placement,
        activations,
        tuple(slices),
        options,
        processes,
        classes,
    )


def _check_environment(options: SliceOptions, processes: Processes) -> None:
    """Refuse variables of the environment that would be read only hours later, and what many processes cannot do."""
    from slicecli.slicing.journal import seconds_between_snapshots

    seconds_between_snapshots()
    most_bytes()
    if options.resume and processes.count > 1:
        raise RequestError("--resume requires a single process.", "Leave out --resume, or start one process.")


def _find_source(model: str, options: SliceOptions) -> Source:
    source = Source.find(model, options.revision, options.token, options.trust_remote_code)
    source.check_is_decoder()
    source.check_companions()
    source.check_code_is_here()
    return source


def _layout(source: Source, chosen: ChosenAdapter, method: Method) -> Layout:
    """Return how a slice is written; refuse a slice with code of ours of a model with code of its own."""
    if method == "refit" and chosen.adapter.layout(chosen.fields) == "stock":
        return "stock"
    if source.has_own_model_code:
        raise UnsupportedModelError(
            f"{source.name} has custom code, but this slice needs slicecli's custom code, which only extends classes "
            "of transformers.",
            "Use --method refit if its layout is stock; see slicecli inspect.",
        )
    return "custom-code"


def _prove(
    source: Source,
    chosen: ChosenAdapter,
    config: Any,
    dimensions: Dimensions,
    options: SliceOptions,
    cuts_mlp: bool,
) -> int:
    """Prove on a small model what the declaration alone cannot tell; return how many values a block returns.

    That number is of the published method only, which needs it.
    """
    from slicecli.proof.declaration import prove_channels_of_class, prove_own_class, prove_shortcuts

    with quiet_libraries(), running(source.name):
        if source.has_own_model_code and chosen.inference is None:
            prove_own_class(chosen.adapter, config, source.trust_remote_code)
        if cuts_mlp and source.has_own_model_code:
            prove_channels_of_class(chosen.adapter, config, source.trust_remote_code)
        if options.method == "slicegpt":
            return prove_shortcuts(chosen.adapter, config, slices_head(dimensions, options.slice_head))
    return 0


def _prove_portable(source: Source, config: Any, requests: Sequence[Resolved]) -> None:
    """Prove on a small model that the portable classes to be written compute what the family's own class does."""
    chosen = {one.written.model_type: one.written for one in requests if one.written is not None}
    portable = [one for one in chosen.values() if one.portable is not None]
    if portable:
        from slicecli.proof.portable import prove_portable_class

        with quiet_libraries(), running(source.name):
            for written in portable:
                prove_portable_class(written, config)


def _check_outputs(
    source: Source, widths: Sequence[Width], slices: Sequence[PlannedSlice], options: SliceOptions
) -> None:
    """Refuse output folders that are taken, lie inside of what is read, or have too little room."""
    for width, one in zip(widths, slices, strict=True):
        check_apart(one.folder, source.folder, _input_files(options, width))
        check_output(one.folder, options.overwrite)
    companion_bytes = sum((source.folder / file).stat().st_size for file in source.companions.files)
    needed = sum(one.plan.sliced_bytes + companion_bytes for one in slices)
    for one in slices:
        require_disk_space(one.folder, needed)


def _place_activations(
    dimensions: Dimensions,
    meta_model: Any,
    placement: Placement,
    stored: torch.dtype,
    tokens: int,
    slices: Sequence[PlannedSlice],
    options: SliceOptions,
) -> ActivationPlan:
    """Decide where the activations of the calibration rows are kept."""
    numbers = tokens * _stream_width(dimensions, options.method, [one.plan.dim for one in slices])
    resting_bytes: Counter[str] = Counter()
    for name, value in meta_model.named_parameters():
        resting_bytes[placement.rest_of(name)] += value.numel() * stored.itemsize
    needed_bytes = numbers * compute_dtype(stored, placement.device).itemsize
    return place_activations(options.activations, placement, needed_bytes, resting_bytes)


def _input_files(options: SliceOptions, width: Width) -> list[Path]:
    """Return the files of the user that a slice is made from, besides the model."""
    paths = [Path(name).expanduser() for name in (options.calibration, width.schedule) if name is not None]
    return [path for path in paths if path.is_file()]


def _stream_width(dimensions: Dimensions, method: Method, dims: Sequence[int]) -> int:
    """Return how many numbers per token are held at once, of several slices those of the widest."""
    largest = max(dims, default=0)
    if method == "slicegpt":
        return 2 * dimensions.hidden_size + largest
    return width_of_dense_activations(dimensions) + largest


def width_of_dense_activations(dimensions: Dimensions) -> int:
    """Return how many numbers per token the refit holds of the dense model: its stream, and that at each step."""
    most_steps = max(len(block.sublayers) for block in dimensions.declared_blocks)
    return dimensions.hidden_size * (most_steps + 1)


class Resolved(NamedTuple):
    """What is wished for comes to: sizes with the MLPs of the slice, a dim or a schedule, and the class to write.

    Where statistics are to choose among several pairs of widths, it is one that cuts the MLP.
    """

    sizes: Dimensions
    dim: int
    schedule: Schedule | None
    written: WrittenClass | None
    pairs: tuple[WidthPair, ...] = ()


def resolve(
    width: Width,
    dimensions: Dimensions,
    classes: SliceClasses | None,
    options: SliceOptions,
    bytes_per_parameter: int,
) -> Resolved:
    """Return the widths that meet a wish, and the class of the slice."""
    if is_met_by_pairs(width, dimensions, options.method):
        pairs = tuple(pairs_within(width, dimensions, classes, bytes_per_parameter))
        first = resolve(pairs[0].width, dimensions, classes, options, bytes_per_parameter)
        return first._replace(pairs=pairs if len(pairs) > 1 else ())
    narrower = dimensions.with_mlp_dim(width.resolve_mlp(dimensions))
    if classes is not None:
        dim, written = classes.with_mlp_dim(narrower.mlp_dim).resolve(width, bytes_per_parameter)
        return Resolved(narrower, dim, None, written)
    if options.method == "refit":
        return Resolved(narrower, width.resolve(narrower, bytes_per_parameter), None, None)
    if width.schedule is not None:
        schedule = read_schedule(width.schedule, dimensions, options.slice_head)
        return Resolved(dimensions, schedule.dim, schedule, None)
    sizes = PublishedSizes(dimensions, options.slice_head)
    dim = width.resolve(sizes, bytes_per_parameter)
    schedule = sizes.schedule(dim)
    schedule.check(dimensions)
    return Resolved(dimensions, dim, schedule, None)


def config_of(
    plan: SlicePlan,
    config: Any,
    dimensions: Dimensions,
    block_output_length: int = 0,
    has_code: bool = False,
    written: WrittenClass | None = None,
) -> Any:
    """Return the config of a planned slice.

    Args:
        dimensions: With the MLPs that it shall have.
    """
    if written is not None and written.portable is not None:
        return portable_config(config, written, plan.dim, plan.dtype)
    if plan.layout == "stock":
        return stock_config(config, dimensions, plan.dim, plan.dtype, has_code)
    schedule = plan.schedule or Schedule.constant(dimensions, plan.dim)
    has_shortcuts = plan.schedule is not None
    return custom_code_config(config, dimensions, schedule, has_shortcuts, block_output_length, plan.dtype)


@dataclass(frozen=True)
class ChosenAdapter:
    """The adapter of a model.

    Attributes:
        fields: The fields of the config to read it with: of `config.json` alone, unless the config class had to be
            asked anyway.
        inference: How the adapter was inferred, if it was.
    """

    adapter: Adapter
    fields: Mapping[str, Any]
    inference: Inference | None = None


def find_adapter(source: Source, name: str | None = None) -> ChosenAdapter:
    """Choose the adapter for a model, or infer one where no plugin knows its type."""
    if source.fields.get("model_type") == CONFIG_TYPE:
        raise UnsupportedModelError(
            f"{source.name} is already a slice with custom code, which cannot be sliced again.",
            "Slice the model it was made from.",
        )
    found = plugins()
    if name == AUTO_ADAPTER:
        return _infer_adapter(source, source.config())
    try:
        return ChosenAdapter(select_adapter(source.fields, found.adapters, name, found.refusals), source.fields)
    except NoAdapterError as unknown:
        try:
            config = source.config()
        except SourceError:
            raise unknown from None  # transformers does not know the type either
        return _infer_adapter(source, config)


def full_fields(source: Source, config: Any) -> dict[str, Any]:
    """Return the fields of a model's config, those that config.json leaves out as the config class has them."""
    return {**source.fields, **{name: value for name, value in config.to_dict().items() if value is not None}}


def _infer_adapter(source: Source, config: Any) -> ChosenAdapter:
    from slicecli.infer.inference import infer_adapter

    with quiet_libraries():
        inference = infer_adapter(config, source.trust_remote_code)
    return ChosenAdapter(inference.adapter, full_fields(source, config), inference)
