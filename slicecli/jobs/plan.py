"""From a request to a job: which model, which slices of it, how made; and what can be refused without any weight.

The small files of the model are enough for all of it, so that what cannot be done is said before anything large is
downloaded or computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slicecli.adapters import AUTO_ADAPTER, Adapter, select_adapter
from slicecli.checkpoint.configs import custom_code_config, stock_config
from slicecli.checkpoint.folder import check_apart, check_output, require_disk_space
from slicecli.checkpoint.meta_model import build_meta_model, parameter_shapes
from slicecli.checkpoint.source import Source
from slicecli.errors import NoAdapterError, RequestError, SourceError, UnsupportedModelError
from slicecli.family.context_length import pick_sequence_length
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.schedule import PublishedSizes, Schedule, count, read_schedule, slices_head
from slicecli.family.slice_plan import DTYPE_BYTES, Method, SlicePlan, Width, check_method
from slicecli.modeling import CONFIG_TYPE
from slicecli.runtime.distributed import Processes
from slicecli.runtime.inputs import check_count, check_seed, parse_bytes
from slicecli.runtime.libraries import quiet_libraries, running
from slicecli.runtime.placement import (
    ActivationPlan,
    DeviceMap,
    MaxMemory,
    Placement,
    compute_dtype,
    decide_placement,
    place_activations,
)
from slicecli.slicing.statistics_cache import most_bytes

if TYPE_CHECKING:
    from slicecli.infer.inference import Inference
    from slicecli.slicing.slicegpt import Orientation

__all__ = [
    "ChosenAdapter",
    "Job",
    "SliceOptions",
    "find_adapter",
    "full_fields",
    "plan_slices",
    "width_of_dense_activations",
]


@dataclass(frozen=True)
class SliceOptions:
    """Everything about a slice that is not its model and width.

    Attributes:
        method: How the weights are made.
        orientation: Of the published method: `pca`, or `random` to turn the kept directions among themselves.
        slice_head: Of the published method: whether the input of the head is sliced too; `None` leaves it whole
            where that is possible.
        calibration: Name of the calibration text, see `slicecli.data.text.read_text`.
        samples: Rows of calibration text.
        sequence_length: Tokens per row; `None` takes 2048, or what the model can do if that is less.
        batch_size: Rows per forward pass; `None` chooses by tokens.
        seed: Seed of the draw of rows.
        dtype: Dtype of the written weights; `None` keeps the checkpoint's.
        device_map: What computes and where the dense weights rest, see `slicecli.runtime.placement.decide_placement`.
        max_memory: The most bytes of weights that rest on a device, by its number or `cpu`.
        streams: Where the streams are kept: `auto`, `device`, `host` or `disk`.
        max_shard_size: Most bytes of one weight file; a text such as `5GB` becomes a number.
        adapter: Name of the adapter to use instead of the one for the model's type.
        revision: Revision on the Hub.
        token: Hub token.
        trust_remote_code: Whether code from the model's repository may run.
        overwrite: Replace an existing slice.
        resume: Go on with what an interrupted run of the same job has left.
        cache: Whether statistics are taken from and put into the cache.
        cache_folder: Where it lies; `None` takes the usual place.

    Raises:
        RequestError: A number is out of range.
    """

    method: Method = "refit"
    orientation: Orientation = "pca"
    slice_head: bool | None = None
    calibration: str = "wikitext2"
    samples: int = 128
    sequence_length: int | None = None
    batch_size: int | None = None
    seed: int = 42
    dtype: str | None = None
    device_map: DeviceMap = "auto"
    max_memory: MaxMemory | None = None
    streams: Literal["auto", "device", "host", "disk"] = "auto"
    max_shard_size: int = 5_000_000_000
    adapter: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    overwrite: bool = False
    resume: bool = False
    cache: bool = True
    cache_folder: Path | None = None

    def __post_init__(self) -> None:
        check_count(self.samples, "{} calibration samples are", "Give --samples", words=("too few", "too many"))
        check_count(self.sequence_length, "A sequence length of {} is", "Give --seq-len", least=2)
        check_count(self.batch_size, "A batch of {} rows is", "Give --batch-size")
        check_seed(self.seed)
        if isinstance(self.max_shard_size, str):
            object.__setattr__(self, "max_shard_size", parse_bytes(self.max_shard_size))


@dataclass(frozen=True)
class Job:
    """Slices of one model, decided and found possible, before any weight is read; none where it is only measured.

    Attributes:
        inference: How the declaration was inferred, if it was.
        placement: Where the dense weights rest, and what computes.
        slices: Plan, sliced config and output folder of each slice.
        processes: Those that do it together.
    """

    source: Source
    adapter: Adapter
    inference: Inference | None
    dimensions: Dimensions
    config: Any
    sequence_length: int
    placement: Placement
    streams: ActivationPlan
    slices: tuple[tuple[SlicePlan, Any, Path], ...]
    options: SliceOptions
    processes: Processes

    def describe_places(self) -> str:
        """Say in a line what computes, and where weights and streams are kept."""
        return f"{self.placement.describe()}; {self.streams.describe()}"

    def places_to_json(self) -> dict[str, Any]:
        """Return the same as plain data."""
        return {**self.placement.to_json(), **self.streams.to_json()}


def plan_slices(model: str, widths: Sequence[Width], outputs: Sequence[Path | None], options: SliceOptions) -> Job:
    """Decide on slices and refuse what can be refused without weights."""
    import torch

    from slicecli.slicing.journal import seconds_between_snapshots

    # variables of the environment that are read only hours later
    seconds_between_snapshots()
    most_bytes()
    processes = Processes.find()
    if options.resume and processes.count > 1:
        raise RequestError("--resume requires a single process.", "Leave out --resume, or start one process.")
    source = Source.find(model, options.revision, options.token, options.trust_remote_code)
    source.check_is_decoder()
    source.check_companions()
    source.check_code_is_here()
    chosen = find_adapter(source, options.adapter)
    adapter, inference = chosen.adapter, chosen.inference
    dimensions = Dimensions(adapter, source.loaded_fields(adapter, chosen.fields))
    check_method(
        options.method,
        options.slice_head,
        has_schedule=any(width.schedule is not None for width in widths),
        has_orientation=options.orientation != "pca",
    )
    has_own_code = options.method == "slicegpt" or adapter.layout(chosen.fields) == "custom-code"
    if has_own_code and source.has_own_model_code:
        raise UnsupportedModelError(
            f"{source.name} runs code of its own, and this slice needs code of ours, which builds on classes of "
            "transformers.",
            "Slice it with --method refit if its family is stock.",
        )
    dense_dtype = source.stored_dtype()
    dtype = options.dtype or dense_dtype
    requests = [resolve(width, dimensions, options, DTYPE_BYTES[dtype]) for width in widths]
    config = source.config()
    sequence_length = pick_sequence_length(source.name, config, options.sequence_length)
    dimensions = Dimensions(adapter, source.loaded_fields(adapter, full_fields(source, config)))
    meta_model = build_meta_model(config, options.trust_remote_code)
    dimensions.require_declared(parameter_shapes(meta_model))
    stored = getattr(torch, dense_dtype)
    placement = decide_placement(options.device_map, options.max_memory, meta_model, adapter.blocks, stored)
    if source.has_own_model_code and inference is None:
        from slicecli.proof.declaration import prove_own_class

        with quiet_libraries(), running(source.name):
            prove_own_class(adapter, config, source.trust_remote_code)
    output_length = 0
    if options.method == "slicegpt":
        from slicecli.proof.declaration import prove_shortcuts

        with quiet_libraries(), running(source.name):
            output_length = prove_shortcuts(adapter, config, slices_head(dimensions, options.slice_head))
    slices = []
    for width, (dim, schedule), output in zip(widths, requests, outputs, strict=True):
        sliced_parameters = dimensions.parameters(dim) if schedule is None else count(schedule.shapes(dimensions))
        plan = SlicePlan(
            model=source.name,
            model_type=str(config.model_type),
            adapter=AUTO_ADAPTER if inference else adapter.name,
            hidden_size=dimensions.hidden_size,
            dim=dim,
            dtype=dtype,
            dense_parameters=dimensions.parameters(),
            sliced_parameters=sliced_parameters,
            dense_dtype=dense_dtype,
            method=options.method,
            layout="custom-code" if has_own_code else "stock",
            schedule=schedule,
            schedule_name=Path(width.schedule or "").name,
        )
        folder = output or Path(f"{source.name.rpartition('/')[2]}-dim{dim}")
        if processes.is_main:
            check_apart(folder, source.folder, _input_files(options, width))
            check_output(folder, options.overwrite)
        sliced_config = config_of(plan, config, dimensions, output_length, source.has_own_model_code)
        if not sliced_config.architectures:  # which others than transformers need
            sliced_config.architectures = [type(meta_model).__name__]
        slices.append((plan, sliced_config, folder))
    companion_bytes = sum((source.folder / file).stat().st_size for file in source.companions.files)
    needed = sum(plan.sliced_bytes + companion_bytes for plan, _, _ in slices)
    for _, _, folder in slices:
        if processes.is_main:
            require_disk_space(folder, needed)
    tokens = options.samples * sequence_length // processes.count
    numbers = tokens * _stream_width(dimensions, options.method, [plan.dim for plan, _, _ in slices])
    kept_bytes: Counter[str] = Counter()
    for name, value in meta_model.named_parameters():
        kept_bytes[placement.rest_of(name)] += value.numel() * stored.itemsize
    needed_bytes = numbers * compute_dtype(stored, placement.device).itemsize
    streams = place_activations(options.streams, placement, needed_bytes, kept_bytes)
    return Job(
        source, adapter, inference, dimensions, config, sequence_length, placement, streams, tuple(slices), options,
        processes,
    )  # fmt: skip


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


def resolve(
    width: Width, dimensions: Dimensions, options: SliceOptions, bytes_per_parameter: int
) -> tuple[int, Schedule | None]:
    """Return the dim that meets a wish, and for the published method the width at every place."""
    if options.method == "refit":
        return width.resolve(dimensions, bytes_per_parameter), None
    if width.schedule is not None:
        schedule = read_schedule(width.schedule, dimensions, options.slice_head)
        return schedule.dim, schedule
    sizes = PublishedSizes(dimensions, options.slice_head)
    dim = width.resolve(sizes, bytes_per_parameter)
    schedule = sizes.schedule(dim)
    schedule.check(dimensions)
    return dim, schedule


def config_of(
    plan: SlicePlan, config: Any, dimensions: Dimensions, block_output_length: int = 0, has_code: bool = False
) -> Any:
    """Return the config of a planned slice."""
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
            f"{source.name} is a slice already, with code of its own, which is not sliced again.",
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
