"""The main job from a model's name to finished folders: refuse early, prepare, pass over the blocks, write.

The command line and the Python API both call this module; it prints nothing and asks nothing.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli import __version__
from slicecli.adapters import AUTO_ADAPTER, Adapter, select_adapter
from slicecli.checkpoint import ShardWriter, check_output, clear_folder, require_disk_space, whole_folder
from slicecli.dimensions import Dimensions
from slicecli.errors import (
    NoAdapterError,
    OutputError,
    PluginError,
    RequestError,
    SourceError,
    UnsupportedModelError,
    reason_of,
)
from slicecli.layouts import custom_code_config, stock_config
from slicecli.memory import available_memory_bytes, peak_memory_bytes
from slicecli.modeling import CONFIG_TYPE
from slicecli.plan import DTYPE_BYTES, Method, SlicePlan, Width
from slicecli.plugins import plugins
from slicecli.processes import Processes
from slicecli.record import Energy, package_versions
from slicecli.schedule import PublishedSizes, Schedule, count, read_schedule, slices_head
from slicecli.source import (
    DenseWeights,
    Source,
    checkpoint_tensors,
    empty_model,
    parameter_shapes,
    quiet_libraries,
    running,
)

if TYPE_CHECKING:
    import torch

    from slicecli.auto.infer import Inference
    from slicecli.calibration import Rows
    from slicecli.slicing.basis import Basis
    from slicecli.slicing.published import Orientation
    from slicecli.slicing.state import Batches, DenseModel, Journal, Progress, Target

__all__ = [
    "ChosenAdapter",
    "Job",
    "SliceOptions",
    "SliceReport",
    "find_adapter",
    "full_fields",
    "open_dense",
    "pick_device",
    "plan_slices",
    "quiet_libraries",
    "read_rows",
    "run_slices",
    "share_work",
]

DEFAULT_SEQUENCE_LENGTH = 2048
# enough tokens per unknown for the refit to be at its best; fewer still work, the ridge sees to that
TOKENS_PER_UNKNOWN = 16
MEMORY_SHARE = 0.6  # of what is free, for streams; the rest is for blocks and statistics
BATCH_TOKENS = {"cpu": 4096, "other": 16384}


@dataclass(frozen=True)
class SliceOptions:
    """Everything about a slice that is not its model and width.

    Attributes:
        method: How the weights are made.
        orientation: Of the published method: `pca`, or `random` to turn the kept directions among themselves.
        slice_head: Of the published method: whether the input of the head is sliced too; `None` leaves it whole
            where that is possible.
        calibration: Name of the calibration text, see `slicecli.text.read_text`.
        samples: Rows of calibration text.
        sequence_length: Tokens per row; `None` takes 2048, or what the model can do if that is less.
        batch_size: Rows per forward pass; `None` chooses by tokens.
        seed: Seed of the draw of rows.
        dtype: Dtype of the written weights; `None` keeps the checkpoint's.
        device: Where to compute: `auto`, `cpu`, `cuda:0`, ...
        max_shard_size: Most bytes of one weight file.
        adapter: Name of the adapter to use instead of the one for the model's type.
        revision: Revision on the Hub.
        token: Hub token.
        trust_remote_code: Whether code from the model's repository may run.
        overwrite: Replace an existing slice.
        resume: Go on with what an interrupted run of the same job has left.
        cache: Whether statistics are taken from and put into the cache.
        cache_folder: Where it lies; `None` takes the usual place.
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
    device: str = "auto"
    max_shard_size: str = "5GB"
    adapter: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False)
    trust_remote_code: bool = False
    overwrite: bool = False
    resume: bool = False
    cache: bool = True
    cache_folder: Path | None = None


@dataclass(frozen=True)
class Job:
    """Slices of one model, decided and found possible, before any weight is read; none where it is only measured.

    Attributes:
        source: The dense model.
        adapter: Its family's declaration.
        inference: How the declaration was inferred, if it was.
        dimensions: Its sizes.
        config: Its transformers config.
        sequence_length: Tokens per calibration row.
        slices: Plan, sliced config and output folder of each slice.
        options: The rest.
    """

    source: Source
    adapter: Adapter
    inference: Inference | None
    dimensions: Dimensions
    config: Any
    sequence_length: int
    slices: tuple[tuple[SlicePlan, Any, Path], ...]
    options: SliceOptions


@dataclass(frozen=True)
class SliceReport:
    """What came out of one slice.

    Attributes:
        plan: What was decided.
        output: The folder.
        revision: Commit hash of the source, where it has one.
        energy_kept: Share of the stream's energy in the basis (of the normalised stream, by the refit).
        seconds: Wall-clock time, all slices of the job together.
        peak_memory_bytes: Peak resident memory of the process.
        warnings: What the user should know.
        is_from_cache: The statistics were in the cache.
    """

    plan: SlicePlan
    output: Path
    revision: str | None
    energy_kept: float
    seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...] = ()
    is_from_cache: bool = False


def plan_slices(model: str, widths: Sequence[Width], outputs: Sequence[Path | None], options: SliceOptions) -> Job:
    """Decide on slices and refuse what can be refused without weights.

    Args:
        model: Hub id or folder.
        widths: How wide each slice shall be.
        outputs: Where each goes; `None` takes `./<name>-dim<k>`.
        options: The rest.

    Raises:
        SlicecliError: The model or the request is not possible; nothing was downloaded but small files.
    """
    processes = Processes.find()
    if options.resume and processes.count > 1:
        raise RequestError("Many processes leave nothing to go on with.", "Leave out --resume, or start one process.")
    source = Source.find(model, options.revision, options.token, options.trust_remote_code)
    source.check_is_decoder()
    source.check_companions()
    chosen = find_adapter(source, options.adapter)
    adapter, inference = chosen.adapter, chosen.inference
    dimensions = Dimensions(adapter, chosen.fields)
    check_method(options, widths)
    has_own_code = options.method == "slicegpt" or adapter.layout(chosen.fields) == "custom-code"
    if has_own_code and source.code_files():
        raise UnsupportedModelError(
            f"{source.name} runs code of its own, and this slice needs code of ours, which builds on classes of "
            "transformers.",
            "Slice it with --method refit if its family is stock.",
        )
    dense_dtype = source.stored_dtype()
    dtype = options.dtype or dense_dtype
    requests = [resolve(width, dimensions, options, DTYPE_BYTES[dtype]) for width in widths]
    if options.samples <= 0:
        raise RequestError(f"{options.samples} calibration samples are too few.", "Give --samples 1 or more.")
    if options.batch_size is not None and options.batch_size <= 0:
        raise RequestError(f"A batch of {options.batch_size} rows is too small.", "Give --batch-size 1 or more.")
    sequence_length = pick_sequence_length(source, options.sequence_length)
    pick_device(options.device)

    config = source.config()
    dimensions = Dimensions(adapter, full_fields(source, config))
    output_length = 0
    if options.method == "slicegpt":
        from slicecli.proof import prove_shortcuts

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
            check_output(folder, options.overwrite)
        sliced_config = config_of(plan, config, dimensions, output_length, bool(source.code_files()))
        slices.append((plan, sliced_config, folder))
    needed = sum(plan.sliced_bytes for plan, _, _ in slices)
    for _, _, folder in slices:
        if processes.is_main:
            require_disk_space(folder, needed)
    return Job(source, adapter, inference, dimensions, config, sequence_length, tuple(slices), options)


def check_method(options: SliceOptions, widths: Sequence[Width]) -> None:
    """Refuse options of the published method where it is not asked for.

    Raises:
        RequestError: One is given.
    """
    if options.method == "slicegpt":
        return
    given = {
        "--schedule": any(width.schedule is not None for width in widths),
        "--slice-head": options.slice_head is not None,
        "--final-orientation": options.orientation != "pca",
    }
    for name, is_given in given.items():
        if is_given:
            raise RequestError(
                f"{name} is of the published method; the refit has one basis and one width.", "Add --method slicegpt."
            )


def resolve(
    width: Width, dimensions: Dimensions, options: SliceOptions, bytes_per_parameter: int
) -> tuple[int, Schedule | None]:
    """Return the dim that meets a wish, and for the published method the width at every place.

    Raises:
        RequestError: The wish cannot be met.
        UnsupportedModelError: The method cannot slice this model.
    """
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
    """Return the config of a planned slice.

    Args:
        plan: The plan.
        config: The dense model's config.
        dimensions: Its sizes.
        block_output_length: What `slicecli.proof.prove_shortcuts` found.
        has_code: Whether the dense model's own code goes along.
    """
    if plan.layout == "stock":
        return stock_config(config, dimensions, plan.dim, plan.dtype, has_code)
    schedule = plan.schedule or Schedule.constant(dimensions, plan.dim)
    has_shortcuts = plan.schedule is not None
    return custom_code_config(config, dimensions, schedule, has_shortcuts, block_output_length, plan.dtype)


@dataclass(frozen=True)
class ChosenAdapter:
    """The adapter of a model.

    Attributes:
        adapter: The adapter.
        fields: The fields of the config to read it with: of `config.json` alone, unless the config class had to be
            asked anyway.
        inference: How the adapter was inferred, if it was.
    """

    adapter: Adapter
    fields: Mapping[str, Any]
    inference: Inference | None = None


def find_adapter(source: Source, name: str | None = None) -> ChosenAdapter:
    """Choose the adapter for a model, or infer one where no plugin knows its type.

    Args:
        source: The model.
        name: Name of an adapter; `auto` infers in any case; `None` chooses by the model's type.

    Raises:
        RequestError: No adapter has the name.
        UnsupportedModelError: The model cannot be sliced, or no adapter for it could be inferred and proved.
    """
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
    """Return the fields of a model's config, those that config.json leaves out as the config class has them.

    Args:
        source: The model.
        config: Its transformers config.
    """
    return {**source.fields, **{name: value for name, value in config.to_dict().items() if value is not None}}


def _infer_adapter(source: Source, config: Any) -> ChosenAdapter:
    from slicecli.auto.infer import infer_adapter

    with quiet_libraries():
        inference = infer_adapter(config, source.trust_remote_code)
    return ChosenAdapter(inference.adapter, full_fields(source, config), inference)


def run_slices(job: Job, progress: Progress | None = None, resumes_if_possible: bool = False) -> list[SliceReport]:
    """Do a job, and write a whole folder for each of its slices.

    The refit makes one pass for statistics and one for all the slices whose streams fit the memory together; the
    published method a pass for each.

    Args:
        job: The job.
        progress: Hears how far the work has come.
        resumes_if_possible: Go on where an interrupted run of the same job has left something, and start anew where
            another has; `SliceOptions.resume` refuses then.

    Raises:
        SlicecliError: Something failed; no output folder is left behind.
    """
    from slicecli.completion import complete_folder, licence_warning
    from slicecli.journal import FileJournal, seconds_between_snapshots
    from slicecli.slicing.pipeline import refit
    from slicecli.slicing.published import slice_published
    from slicecli.slicing.state import Silent

    started = time.perf_counter()
    processes = Processes.find()
    progress = progress if progress is not None and processes.is_main else Silent()
    options = job.options
    rows, warnings = read_rows(job)
    dense, batches = share_work(job, rows)
    warnings += _idle_warning(processes.count, batches)
    reports: list[SliceReport] = []
    seconds_apart = seconds_between_snapshots()
    fingerprint = _fingerprint(job, rows, batches, dense)
    journal: FileJournal | None = None
    resumes = (options.resume or resumes_if_possible) and processes.count == 1

    def is_worth_keeping(error: BaseException) -> bool:
        if journal is None:  # refused to go on with what another run has left: that stays
            return resumes
        return journal.has_something and isinstance(error, (KeyboardInterrupt, SystemExit))

    with ExitStack() as stack:
        folders = [
            stack.enter_context(whole_folder(folder, options.overwrite, resumes, is_worth_keeping))
            for _, _, folder in job.slices
            if processes.is_main
        ]
        stack.enter_context(running(job.source.name))
        state = _what_was_left(folders, fingerprint, resumes_if_possible) if resumes else None
        targets, writers = [], []
        for number, (plan, config, _) in enumerate(job.slices):
            missing = None if state is None else state["missing"][number]
            folder = folders[number] if processes.is_main else None
            target, writer = _open_target(plan, config, folder, options, missing)
            targets.append(target)
            if writer is not None:
                stack.callback(writer.close)
                writers.append(writer)
        if processes.count == 1:
            journal = FileJournal(folders[0], fingerprint, writers, state, seconds_apart)
        energies: list[Energy]
        is_from_cache = False
        if options.method == "refit":
            basis, is_from_cache = _find_basis(job, rows, dense, batches, progress, journal)
            for group in _groups_in_memory(job, dense, max(processes.gather(batches.tokens))):
                refit(dense, basis, [targets[index] for index in group], batches, progress, journal)
            energies = [Energy.of_basis(basis, plan) for plan, _, _ in job.slices]
        else:
            energies = []
            for (plan, _, _), target in zip(job.slices, targets, strict=True):
                assert plan.schedule is not None
                spectrum = slice_published(
                    dense, target, plan.schedule, options.orientation, options.seed, batches, progress, journal
                )
                energies.append(Energy.of_spectrum(spectrum, plan))
        if not processes.is_main:
            return processes.from_main(lambda: reports)
        if journal is not None:
            journal.remove()
        for (plan, config, _), folder, writer, energy in zip(job.slices, folders, writers, energies, strict=True):
            complete_folder(job, plan, config, folder, rows, energy, writer.finish())
        seconds = time.perf_counter() - started
        for (plan, _, output), energy in zip(job.slices, energies, strict=True):
            reports.append(
                SliceReport(
                    plan=plan,
                    output=output,
                    revision=job.source.commit,
                    energy_kept=energy.kept,
                    seconds=seconds,
                    peak_memory_bytes=peak_memory_bytes(),
                    warnings=warnings + _growth_warning(plan) + licence_warning(job.source),
                    is_from_cache=is_from_cache,
                )
            )
    return processes.from_main(lambda: reports)


def _find_basis(
    job: Job, rows: Rows, dense: DenseModel, batches: Batches, progress: Progress, journal: Journal | None
) -> tuple[Basis, bool]:
    """Return the basis, from the cache if it is there; say whether it was."""
    from slicecli.slicing.pipeline import STATISTICS, collect_basis
    from slicecli.slicing.together import give_basis
    from slicecli.statistics_cache import StatisticsCache

    if not job.options.cache:
        return collect_basis(dense, batches, progress, journal), False
    cache = StatisticsCache(job.options.cache_folder)
    key = {
        **_identity(job, batches, dense),
        "calibration": rows.digest,
        "declaration": job.dimensions.declaration(),
    }
    found = cache.load(key, dense.device) if dense.processes.is_main else None
    if dense.processes.from_main(lambda: found is not None):
        progress.start(STATISTICS, 1)
        progress.advance("from the cache")
        return give_basis(dense, found), True
    basis = collect_basis(dense, batches, progress, journal)
    if dense.processes.is_main:
        cache.store(key, basis, job.source.name, f"{rows.name}, {len(rows.ids)} x {rows.sequence_length} tokens")
    return basis, False


def _identity(job: Job, batches: Batches, dense: DenseModel) -> dict[str, Any]:
    """Return what numbers depend on, apart from the calibration rows and the slices, as plain data."""
    return {
        "model": [job.source.name, job.source.weights_identity()],
        "config": dict(job.source.fields),
        "versions": {**package_versions(), "slicecli": __version__},
        "computing": [str(dense.dtype), dense.device.type, batches.size],
    }


def _fingerprint(job: Job, rows: Rows, batches: Batches, dense: DenseModel) -> dict[str, Any]:
    """Return what identifies a job to its journal, as JSON gives it back."""
    options = job.options
    content = {
        **_identity(job, batches, dense),
        "calibration": rows.digest,
        "slices": [dataclasses.asdict(plan) for plan, _, _ in job.slices],
        "options": [options.orientation, options.slice_head, options.seed, options.max_shard_size],
    }
    found: dict[str, Any] = json.loads(json.dumps(content, default=str))
    return found


def _what_was_left(folders: Sequence[Path], fingerprint: Mapping[str, Any], is_lenient: bool) -> dict[str, Any] | None:
    """Return the journal's state that an interrupted run has left, or clear the folders and return `None`.

    Raises:
        OutputError: The journal is of another run, and that is not to be overlooked.
    """
    from slicecli.journal import read_state

    try:
        state = read_state(folders[0], fingerprint)
    except OutputError:
        if not is_lenient:
            raise
        state = None
    if state is None or not all(any(folder.glob("*.safetensors")) for folder in folders):
        for folder in folders:
            clear_folder(folder)
        return None
    return state


def open_dense(job: Job, dtype: str | None = None) -> DenseModel:
    """Fetch the weights of a job's model and make ready to read them.

    Args:
        job: The job.
        dtype: Name of the dtype to compute in, as if the checkpoint had it; `None` takes the checkpoint's.

    Raises:
        SlicecliError: The weights cannot be had, or have parameters that the adapter does not declare.
    """
    import torch

    from slicecli.slicing.state import DenseModel

    with Processes.find().main_of_machine_first():
        job.source.fetch_weights()
    job.source.check_describes_weights()
    device = pick_device(job.options.device)
    weights = DenseWeights(job.source)
    shell = empty_model(job.config, job.options.trust_remote_code)
    job.dimensions.require_declared(parameter_shapes(shell))
    stored = weights.dtype if dtype is None else getattr(torch, dtype)
    return DenseModel(shell, weights, job.dimensions, device, compute_dtype(stored, device))


def share_work(job: Job, rows: Rows, dtype: str | None = None) -> tuple[DenseModel, Batches]:
    """Open a job's model, and divide the rows in batches, and among the processes where there are several.

    Args:
        job: The job.
        rows: The rows.
        dtype: As of `open_dense`.

    Raises:
        SlicecliError: The weights cannot be had, or are not the same everywhere.
    """
    from slicecli.slicing.together import share_rows

    dense = open_dense(job, dtype)
    weights = job.source.weights_identity()
    Processes.find().require_same(
        {
            "config": dict(job.source.fields),
            "checkpoint": weights if isinstance(weights, str) else [[name, size] for name, size, _ in weights],
            "set of rows": rows.digest,
            "set of versions": {**package_versions(), "slicecli": __version__},
            "kind of device": [dense.device.type, str(dense.dtype)],
        }
    )
    return share_rows(dense, rows.ids, job.options.batch_size or batch_rows(dense.device, rows.sequence_length))


def _groups_in_memory(job: Job, dense: DenseModel, tokens: int) -> list[list[int]]:
    """Divide the slices of a job into groups whose streams fit the memory that is free, in order.

    A group shares the dense half of the refit; a slice that is alone too large for it is a group of its own.

    Args:
        job: The job.
        dense: The dense model.
        tokens: Calibration tokens that run here.
    """
    most_steps = max(len(block.steps) for block in job.dimensions.declared_blocks)
    per_number = tokens * dense.dtype.itemsize
    room = MEMORY_SHARE * min(dense.processes.gather(available_memory_bytes(dense.device)))
    # the dense stream, and the dense stream at each step of a block
    room -= per_number * dense.dimensions.hidden_size * (most_steps + 1)
    groups: list[list[int]] = []
    taken = 0.0
    for index, (plan, _, _) in enumerate(job.slices):
        needed = float(per_number * plan.dim)
        if not groups or taken + needed > room:
            groups.append([])
            taken = 0.0
        groups[-1].append(index)
        taken += needed
    return groups


def read_rows(job: Job) -> tuple[Rows, tuple[str, ...]]:
    """Draw the calibration rows; say where they are fewer than asked or than the refit would like.

    Raises:
        TextError: The text cannot be read or is too short.
        SourceError: There is no tokenizer, or it does not belong to the model.
    """
    from slicecli.calibration import calibration_rows
    from slicecli.text import read_text

    options = job.options
    tokenizer = job.source.tokenizer()
    text = read_text(options.calibration, "calibration", options.token)
    rows = calibration_rows(text, tokenizer, options.samples, job.sequence_length, options.seed)
    check_vocabulary(rows, job.source.name, job.dimensions.vocabulary)
    warnings = []
    if len(rows.ids) < options.samples:
        warnings.append(
            f"The calibration text fills {len(rows.ids)} rows of {job.sequence_length} tokens, not {options.samples}."
        )
    unknowns = job.dimensions.largest_regression()
    if job.slices and options.method == "refit" and rows.tokens < TOKENS_PER_UNKNOWN * unknowns:
        warnings.append(
            f"The refit has {rows.tokens:,} calibration tokens for maps of up to {unknowns:,} inputs; it gains up to "
            f"{TOKENS_PER_UNKNOWN * unknowns:,} and more (--samples, --seq-len)."
        )
    return rows, tuple(warnings)


def check_vocabulary(rows: Rows, name: str, vocabulary: int) -> None:
    """Refuse token ids for which the model has no embedding.

    Raises:
        SourceError: The tokenizer has more tokens than the embedding table has rows.
    """
    largest = int(rows.ids.max())
    if largest >= vocabulary:
        raise SourceError(
            f"The tokenizer of {name} gives token {largest}, and the model knows {vocabulary}.",
            "The tokenizer does not belong to this model.",
        )


def pick_sequence_length(source: Source, wanted: int | None) -> int:
    """Return the tokens per row: as wanted, else 2048 or the model's longest.

    Raises:
        RequestError: The wish is too short to predict anything, or longer than the model can do.
        SourceError: The config says nonsense of the model's longest.
    """
    longest = source.size("max_position_embeddings", least=2)
    if wanted is None:
        return DEFAULT_SEQUENCE_LENGTH if longest is None else min(DEFAULT_SEQUENCE_LENGTH, longest)
    if wanted < 2:
        raise RequestError(f"A sequence length of {wanted} is too short.", "Give --seq-len 2 or more.")
    if longest is not None and wanted > longest:
        raise RequestError(
            f"A sequence length of {wanted} is longer than {source.name} can do.", f"Give --seq-len {longest} or less."
        )
    return wanted


def pick_device(name: str) -> torch.device:
    """Return the device to compute on; `auto` is the first GPU, or that of the process, or the CPU.

    Raises:
        RequestError: There is no such device.
    """
    import torch

    if name == "auto":
        return Processes.find().device()
    if Processes.find().count > 1 and name != "cpu":
        raise RequestError(f"Many processes cannot all be on {name}.", "Give --device-map auto: each has its own.")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise RequestError(
            f"There is no device {name!r} here: {reason_of(error)}.", "Give auto, cpu or cuda:N."
        ) from None
    return device


def compute_dtype(stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Return the dtype to compute in: the checkpoint's own, but float32 on a CPU, where half precision is slow."""
    import torch

    if device.type == "cpu" and stored in {torch.bfloat16, torch.float16}:
        return torch.float32
    return stored


def batch_rows(device: torch.device, sequence_length: int) -> int:
    """Return how many rows make a batch of a good size for the device."""
    tokens = BATCH_TOKENS["cpu" if device.type == "cpu" else "other"]
    return max(1, tokens // sequence_length)


def _open_target(
    plan: SlicePlan, config: Any, folder: Path | None, options: SliceOptions, missing: Sequence[str] | None
) -> tuple[Target, ShardWriter | None]:
    """Make the empty sliced model and lay out its weight files, or open those of an interrupted run.

    Without a folder nothing is written.
    """
    import torch

    from slicecli.slicing.state import Target

    shell = empty_model(config, options.trust_remote_code)
    count = sum(parameter.numel() for parameter in shell.parameters())
    if count != plan.sliced_parameters:
        raise PluginError(
            f"Adapter {plan.adapter!r} counts {plan.sliced_parameters:,} parameters at dim {plan.dim}, and the model "
            f"has {count:,}.",
            "Mend the widths and biases it declares.",
        )
    dtype = getattr(torch, plan.dtype)
    if folder is None:
        return Target(plan.dim, shell, dtype, lambda _name, _tensor: None), None
    shapes = {
        stored: tuple(tensor.shape)
        for name, value in shell.state_dict().items()
        for stored, tensor in checkpoint_tensors(shell, name, value).items()
    }
    writer = ShardWriter(folder, shapes, dtype, options.max_shard_size, missing)

    def sink(name: str, tensor: torch.Tensor) -> None:
        for stored, part in checkpoint_tensors(shell, name, tensor).items():
            writer.write(stored, part)

    return Target(plan.dim, shell, dtype, sink), writer


def _idle_warning(processes: int, batches: Batches) -> tuple[str, ...]:
    rows, size = len(batches.rows), batches.size
    busy = -(-rows // size)
    if busy >= processes:
        return ()
    more = f"--batch-size {max(1, rows // processes)}" if size > 1 else "--samples"
    return (f"{rows} rows in batches of {size} occupy {busy} of {processes} processes; {more} would occupy more.",)


def _growth_warning(plan: SlicePlan) -> tuple[str, ...]:
    if plan.sliced_parameters < plan.dense_parameters:
        return ()
    return (
        f"This slice has more parameters than the dense model ({plan.sliced_parameters:,} against "
        f"{plan.dense_parameters:,}): "
        + (
            "its head is refitted, so it no longer shares the embedding table."
            if plan.method == "refit"
            else "its shortcut matrices, and a head of its own, weigh more than the slicing saves."
        ),
    )
