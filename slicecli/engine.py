"""The main job from a model's name to finished folders: refuse early, prepare, pass over the blocks, write.

The command line and the Python API both call this module; it prints nothing and asks nothing.
"""

from __future__ import annotations

import shlex
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.adapters import AUTO_ADAPTER, Adapter, select_adapter
from slicecli.checkpoint import ShardWriter, check_output, require_disk_space, whole_folder
from slicecli.dimensions import Dimensions
from slicecli.errors import NoAdapterError, PluginError, RequestError, SourceError, reason_of
from slicecli.memory import peak_memory_bytes
from slicecli.plan import DTYPE_BYTES, SlicePlan, Width
from slicecli.plugins import plugins
from slicecli.source import DenseWeights, Source, checkpoint_tensors, empty_model, parameter_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from slicecli.auto.infer import Inference
    from slicecli.calibration import Rows
    from slicecli.slicing.basis import Basis
    from slicecli.slicing.state import Progress, Target

__all__ = [
    "ChosenAdapter",
    "Job",
    "SliceOptions",
    "SliceReport",
    "find_adapter",
    "full_fields",
    "pick_device",
    "plan_slices",
    "run_slices",
]

DEFAULT_SEQUENCE_LENGTH = 2048
# enough tokens per unknown for the refit to be at its best; fewer still work, the ridge sees to that
TOKENS_PER_UNKNOWN = 16
BATCH_TOKENS = {"cpu": 4096, "other": 16384}


@dataclass(frozen=True)
class SliceOptions:
    """Everything about a slice that is not its model and width.

    Attributes:
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
    """

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


@dataclass(frozen=True)
class Job:
    """One or more slices of one model, decided and found possible, before any weight is read.

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
        energy_kept: Share of the normalised stream's energy in the basis.
        seconds: Wall-clock time, all slices of the job together.
        peak_memory_bytes: Peak resident memory of the process.
        warnings: What the user should know.
    """

    plan: SlicePlan
    output: Path
    revision: str | None
    energy_kept: float
    seconds: float
    peak_memory_bytes: int
    warnings: tuple[str, ...] = ()


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
    source = Source.find(model, options.revision, options.token, options.trust_remote_code)
    source.check_is_decoder()
    chosen = find_adapter(source, options.adapter)
    adapter, inference = chosen.adapter, chosen.inference
    adapter.require_stock(chosen.fields)
    dimensions = Dimensions(adapter, chosen.fields)
    dense_dtype = source.stored_dtype()
    dtype = options.dtype or dense_dtype
    dims = [width.resolve(dimensions, DTYPE_BYTES[dtype]) for width in widths]
    if options.samples <= 0:
        raise RequestError(f"{options.samples} calibration samples are too few.", "Give --samples 1 or more.")
    if options.batch_size is not None and options.batch_size <= 0:
        raise RequestError(f"A batch of {options.batch_size} rows is too small.", "Give --batch-size 1 or more.")
    sequence_length = pick_sequence_length(source, options.sequence_length)
    pick_device(options.device)

    config = source.config()
    dimensions = Dimensions(adapter, full_fields(source, config))
    slices = []
    for dim, output in zip(dims, outputs, strict=True):
        plan = SlicePlan(
            model=source.name,
            model_type=str(source.fields.get("model_type")),
            adapter=AUTO_ADAPTER if inference else adapter.name,
            hidden_size=dimensions.hidden_size,
            dim=dim,
            dtype=dtype,
            dense_parameters=dimensions.parameters(),
            sliced_parameters=dimensions.parameters(dim),
            dense_dtype=dense_dtype,
        )
        folder = output or Path(f"{source.name.rpartition('/')[2]}-dim{dim}")
        check_output(folder, options.overwrite)
        slices.append((plan, sliced_config(config, dimensions, dim, dtype), folder))
    needed = sum(plan.sliced_bytes for plan, _, _ in slices)
    for _, _, folder in slices:
        require_disk_space(folder, needed)
    return Job(source, adapter, inference, dimensions, config, sequence_length, tuple(slices), options)


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


def run_slices(job: Job, progress: Progress | None = None) -> list[SliceReport]:
    """Do a job: one statistics pass, one refit pass for all its slices, and a whole folder for each.

    Raises:
        SlicecliError: Something failed; no output folder is left behind.
    """
    from slicecli.slicing.pipeline import collect_basis, refit
    from slicecli.slicing.state import Batches, DenseModel, Silent

    started = time.perf_counter()
    progress = progress or Silent()
    options = job.options
    rows, warnings = read_rows(job)
    job.source.fetch_weights()
    device = pick_device(options.device)
    weights = DenseWeights(job.source)
    shell = empty_model(job.config, options.trust_remote_code)
    job.dimensions.require_declared(parameter_shapes(shell))
    dense = DenseModel(shell, weights, job.dimensions, device, compute_dtype(weights.dtype, device))
    batches = Batches(rows.ids, options.batch_size or batch_rows(device, rows.sequence_length))
    reports = []
    with ExitStack() as stack:
        folders = [stack.enter_context(whole_folder(folder, options.overwrite)) for _, _, folder in job.slices]
        targets, writers = [], []
        for (plan, config, _), folder in zip(job.slices, folders, strict=True):
            target, writer = _open_target(plan, config, folder, options)
            stack.callback(writer.close)
            targets.append(target)
            writers.append(writer)
        basis = collect_basis(dense, batches, progress)
        refit(dense, basis, targets, batches, progress)
        for (plan, config, _), folder, writer in zip(job.slices, folders, writers, strict=True):
            _complete_folder(job, plan, config, folder, rows, basis, writer.finish())
        seconds = time.perf_counter() - started
        for plan, _, output in job.slices:
            reports.append(
                SliceReport(
                    plan=plan,
                    output=output,
                    revision=job.source.commit,
                    energy_kept=basis.energy_kept(plan.dim),
                    seconds=seconds,
                    peak_memory_bytes=peak_memory_bytes(),
                    warnings=warnings + _growth_warning(plan),
                )
            )
    return reports


def sliced_config(config: Any, dimensions: Dimensions, dim: int, dtype: str) -> Any:
    """Return the config of a stock slice.

    Raises:
        RequestError: The family's config class refuses the dim.
    """
    fields = config.to_dict() | dimensions.sliced_fields(dim) | {"dtype": dtype}
    for local in ("_name_or_path", "transformers_version"):
        fields.pop(local, None)
    try:
        return type(config).from_dict(fields)
    except Exception as error:  # config classes raise what they like
        raise RequestError(f"{type(config).__name__} refuses a hidden size of {dim}: {reason_of(error)}.") from error


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
    if rows.tokens < TOKENS_PER_UNKNOWN * unknowns:
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
    """
    longest = source.fields.get("max_position_embeddings")
    if wanted is None:
        return min(DEFAULT_SEQUENCE_LENGTH, longest) if isinstance(longest, int) else DEFAULT_SEQUENCE_LENGTH
    if wanted < 2:
        raise RequestError(f"A sequence length of {wanted} is too short.", "Give --seq-len 2 or more.")
    if isinstance(longest, int) and wanted > longest:
        raise RequestError(
            f"A sequence length of {wanted} is longer than {source.name} can do.", f"Give --seq-len {longest} or less."
        )
    return wanted


def pick_device(name: str) -> torch.device:
    """Return the device to compute on; `auto` is the first GPU, or the CPU.

    Raises:
        RequestError: There is no such device.
    """
    import torch

    if name == "auto":
        return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
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


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep transformers' own warnings and bars out of the output, which has its own."""
    from transformers.utils import logging

    verbosity, had_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def reproduce_command(job: Job, plan: SlicePlan) -> str:
    """Return the command line that makes a slice again; a text file appears by its name only."""
    options = job.options
    words = ["slicecli", "slice", plan.model, "--dim", str(plan.dim)]
    if job.source.commit:
        words += ["--revision", job.source.commit]
    words += [
        "--calibration",
        Path(options.calibration).name if Path(options.calibration).exists() else options.calibration,
    ]
    words += ["--samples", str(options.samples), "--seq-len", str(job.sequence_length), "--seed", str(options.seed)]
    words += ["--dtype", plan.dtype]
    if plan.adapter == AUTO_ADAPTER:
        words += ["--adapter", AUTO_ADAPTER]
    if job.source.code_files():
        words += ["--trust-remote-code"]
    return shlex.join(words)


def _open_target(plan: SlicePlan, config: Any, folder: Path, options: SliceOptions) -> tuple[Target, ShardWriter]:
    """Make the empty sliced model and lay out its weight files."""
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
    shapes = {
        stored: tuple(tensor.shape)
        for name, value in shell.state_dict().items()
        for stored, tensor in checkpoint_tensors(shell, name, value).items()
    }
    writer = ShardWriter(folder, shapes, dtype, options.max_shard_size)

    def sink(name: str, tensor: torch.Tensor) -> None:
        for stored, part in checkpoint_tensors(shell, name, tensor).items():
            writer.write(stored, part)

    return Target(plan.dim, shell, dtype, sink), writer


def _complete_folder(
    job: Job, plan: SlicePlan, config: Any, folder: Path, rows: Rows, basis: Basis, digests: dict[str, str]
) -> None:
    """Put everything but the weights into a slice's folder."""
    from slicecli.hub.card import render_card
    from slicecli.record import build_record, write_record

    config.architectures = job.config.architectures
    config.save_pretrained(folder)
    for file in (*job.source.companion_files(), *job.source.code_files()):
        shutil.copyfile(file, folder / file.name)
    record = build_record(plan, job.source, rows, job.options.seed, basis, digests)
    write_record(folder, record)
    card = render_card(record, job.source.folder, reproduce_command(job, plan))
    (folder / "README.md").write_text(card, encoding="utf-8")


def _growth_warning(plan: SlicePlan) -> tuple[str, ...]:
    if plan.sliced_parameters < plan.dense_parameters:
        return ()
    return (
        f"This slice has more parameters than the dense model ({plan.sliced_parameters:,} against "
        f"{plan.dense_parameters:,}): its head is refitted, so it no longer shares the embedding table.",
    )
