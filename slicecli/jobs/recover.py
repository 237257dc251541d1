"""The training of a slice, from a request to a finished folder: refuse early, train, write only what is better.

What is trained stays what it was: its folder is that of the slice with other weights, a new record and a new card.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
import shutil
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.config_files import CONFIG_FILE
from slicecli.checkpoint.folder import (
    check_apart,
    check_output,
    clear_folder,
    require_disk_space,
    unfinished_folder,
    whole_folder,
)
from slicecli.checkpoint.source import Source
from slicecli.errors import OutputError, RequestError, TrainingError, WeightsError
from slicecli.family.context_length import pick_sequence_length
from slicecli.family.slice_plan import DTYPE_BYTES
from slicecli.jobs.options import RecoverOptions
from slicecli.record.record import read_sound_record, source_fields
from slicecli.runtime.distributed import Processes
from slicecli.runtime.libraries import running
from slicecli.runtime.options import result_fields, words_of

if TYPE_CHECKING:
    from slicecli.hub.writing import Description
    from slicecli.progress import Progress
    from slicecli.recovery.data import TrainingRows
    from slicecli.recovery.trainer import DistillationTrainer

__all__ = ["RecoveryJob", "RecoveryReport", "plan_recovery", "recover_slice"]

USUAL_LENGTH = 512
USUAL_MEASUREMENTS = 10
LORA_RANK = 32
TRAINING_FOLDER = ".training"
REQUEST_FILE = "request.json"
# float32 weights and gradients and both moments of AdamW; a checkpoint has all but the gradients
BYTES_IN_MEMORY, BYTES_IN_CHECKPOINT = 16, 12
CHECKPOINTS = 3  # the best, the last, and the one that is being written


@dataclass(frozen=True)
class RecoveryJob:
    """A training, decided and found possible before any weight is read.

    Attributes:
        record: The record of the slice.
        folder: Where the result will lie.
    """

    source: Source
    record: Mapping[str, Any]
    teacher: Source
    teacher_parameters: int
    folder: Path
    sequence_length: int
    rows_per_step: int
    steps: int
    eval_every: int
    options: RecoverOptions
    processes: Processes

    @property
    def tokens(self) -> int:
        """The tokens that are trained on."""
        return self.steps * self.tokens_per_step

    @property
    def tokens_per_step(self) -> int:
        """The tokens of one step."""
        return self.rows_per_step * self.sequence_length

    def describe(self) -> str:
        """Say in a line what will be trained, and what that takes."""
        parameters = self.record["parameters"]["sliced"]
        teacher_bytes = self.teacher_parameters * DTYPE_BYTES[self.teacher.stored_dtype()]
        training = f"up to {BYTES_IN_MEMORY * parameters / 1e9:.2f} GB"
        return (
            f"{self.source.name} ({parameters:,} parameters) learns from {self.teacher.name} "
            f"({self.teacher_parameters:,}): {self.tokens:,} tokens in {self.steps:,} steps of "
            f"{self.tokens_per_step:,}, mode {self.options.mode}; {training} of memory for weights, gradients and "
            f"optimiser, {teacher_bytes / 1e9:.2f} GB for the teacher, and activations"
        )


@dataclass(frozen=True)
class RecoveryReport:
    """What came out of a training.

    Attributes:
        kl_before: Mean divergence from the teacher on the held-out rows, in nats per token.
        kl_after: The same of the weights that were written.
        history: Tokens trained on, from none, and the divergence by then.
        seconds: Wall-clock time of the training alone.
        warnings: What the user should know.
    """

    output: Path
    kl_before: float
    kl_after: float
    best_step: int
    history: tuple[tuple[int, float], ...]
    tokens: int
    seconds: float
    warnings: tuple[str, ...] = ()


def plan_recovery(model: str, output: Path | None, options: RecoverOptions) -> RecoveryJob:
    """Decide on a training, and refuse what can be refused without weights."""
    processes = Processes.find()
    if options.mode == "lora" and find_spec("peft") is None:
        raise RequestError("Mode lora requires peft, which is not installed.", "Run pip install 'slicecli[lora]'.")
    source = Source.find(model, options.revision, options.token, options.trust_remote_code)
    source.check_is_decoder()
    source.check_companions()
    record = read_sound_record(source.folder)
    if record is None:
        raise RequestError(
            f"{source.name} has no sound slicecli.json, so it is not known as a slice.",
            "Pass a slice; `slicecli verify` says what is wrong with its record.",
        )
    teacher = _find_teacher(record, options)
    teacher_parameters = _check_teacher(source, teacher)
    longest = pick_sequence_length(source.name, source.config(), options.sequence_length)
    length = options.sequence_length or min(USUAL_LENGTH, longest)
    pick_sequence_length(teacher.name, teacher.config(), length)
    rows_per_step = options.batch_size // length
    if rows_per_step == 0 or rows_per_step % processes.count:
        raise RequestError(
            f"A batch of {options.batch_size:,} tokens has {rows_per_step} rows of {length:,} tokens, which cannot be "
            f"shared by {processes.count} process{'es' if processes.count > 1 else ''}.",
            f"Use --batch-size {processes.count * length} or a multiple of it.",
        )
    steps = options.tokens // (rows_per_step * length)
    if steps == 0:
        raise RequestError(
            f"{options.tokens:,} tokens are less than one step of {rows_per_step * length:,}.",
            "Use more --tokens, or a smaller --batch-size.",
        )
    folder = output or Path(f"{source.name.rpartition('/')[2]}-recovered")
    if processes.is_main:
        _check_folder(source, teacher, record, folder, options)
    eval_every = options.eval_every or max(1, steps // USUAL_MEASUREMENTS)
    return RecoveryJob(
        source,
        record,
        teacher,
        teacher_parameters,
        folder,
        length,
        rows_per_step,
        steps,
        eval_every,
        options,
        processes,
    )


def _find_teacher(record: Mapping[str, Any], options: RecoverOptions) -> Source:
    revision, name = None, options.teacher
    if name is None:
        name, revision = record["source"]["model"], record["source"]["commit"]
        if revision is None:
            raise RequestError(
                f"The slice was made from a local model, of which only the name {name!r} is recorded.",
                "Pass its folder with --teacher.",
            )
    teacher = Source.find(name, revision, options.token, options.trust_remote_code)
    teacher.check_is_decoder()
    return teacher


def _check_teacher(source: Source, teacher: Source) -> int:
    """Refuse a teacher whose predictions are of other tokens; return its number of parameters."""
    from slicecli.checkpoint.meta_model import build_meta_model

    models = [build_meta_model(one.config(), one.trust_remote_code) for one in (source, teacher)]
    own, other = (model.get_input_embeddings().num_embeddings for model in models)
    if own != other:
        raise RequestError(
            f"The vocabularies differ: {source.name} has {own:,} tokens, the teacher {teacher.name} {other:,}.",
            "Use the model that the slice was made from as --teacher.",
        )
    if source.tokenizer().get_vocab() != teacher.tokenizer().get_vocab():
        raise RequestError(
            f"The tokenizers of {source.name} and of the teacher {teacher.name} give different tokens.",
            "Use the model that the slice was made from as --teacher.",
        )
    return sum(parameter.numel() for parameter in models[1].parameters())


def _check_folder(
    source: Source, teacher: Source, record: Mapping[str, Any], folder: Path, options: RecoverOptions
) -> None:
    data = Path(options.data).expanduser()
    for one in (source, teacher):
        check_apart(folder, one.folder, [data] if data.is_file() else [])
    check_output(folder, options.overwrite)
    companion_bytes = sum((source.folder / file).stat().st_size for file in source.companions.files)
    parameters = record["parameters"]["sliced"] if options.mode == "full" else 0  # adapters are small
    needed = record["bytes"]["sliced"] + companion_bytes + CHECKPOINTS * BYTES_IN_CHECKPOINT * parameters
    require_disk_space(folder, needed)


def recover_slice(job: RecoveryJob, progress: Progress | None = None) -> RecoveryReport:
    """Train a slice, and write the best state as a whole folder if it is better than the slice was."""
    from slicecli.hub.writing import describe_slice
    from slicecli.jobs.preparation import copy_companions
    from slicecli.progress import Silent
    from slicecli.recovery.trainer import last_checkpoint

    processes, options = job.processes, job.options
    progress = progress if progress is not None and processes.is_main else Silent()
    training_folder = unfinished_folder(job.folder) / TRAINING_FOLDER
    has_begun = False

    def is_worth_keeping(error: BaseException) -> bool:
        if not has_begun:  # failed before it could go on with what another run has left: that stays
            return options.resume and training_folder.exists()
        return isinstance(error, (KeyboardInterrupt, SystemExit)) and last_checkpoint(training_folder) is not None

    with ExitStack() as stack:
        folder = None
        if processes.is_main:
            folder = stack.enter_context(whole_folder(job.folder, options.overwrite, options.resume, is_worth_keeping))
        rows, warnings = _read_rows(job)
        with processes.main_of_machine_first():
            job.source.fetch_weights()
            job.teacher.fetch_weights()
        checkpoint = None
        if folder is not None:
            checkpoint = _what_was_left(job, rows, folder)
            has_begun = True
            copy_companions(job.source, folder, has_code=job.record["layout"] != "stock")
            shutil.copyfile(job.source.folder / CONFIG_FILE, folder / CONFIG_FILE)
            _draft(job, rows)  # what cannot be recorded is said before it is trained
        checkpoint = processes.from_main(lambda: checkpoint)
        stack.enter_context(running(job.source.name))
        trained = _train(job, rows, training_folder, checkpoint, progress)
        if trained.diverged_at is not None:
            warnings += (
                f"The loss was not a number at step {trained.diverged_at}, where training stopped; the best state "
                f"until then, of step {trained.best_step}, was kept. Use a smaller --lr to go further.",
            )
        report = RecoveryReport(
            output=job.folder,
            kl_before=trained.kl_before,
            kl_after=trained.kl_after,
            best_step=trained.best_step,
            history=tuple((step * job.tokens_per_step, kl) for step, kl in trained.history.items()),
            tokens=trained.steps * job.tokens_per_step,
            seconds=trained.seconds,
            warnings=warnings,
        )
        if folder is not None:
            weights = _write_weights(job, trained.model, folder)
            shutil.rmtree(training_folder)
            description = _draft(job, rows, trained)
            describe_slice(folder, description, job.record["energy"], weights)
    return processes.from_main(lambda: report)


def _read_rows(job: RecoveryJob) -> tuple[TrainingRows, tuple[str, ...]]:
    """Draw the rows; say where they are fewer than are to be trained on, or monotonous."""
    from slicecli.data.packing import check_vocabulary, monotony
    from slicecli.data.text import read_text
    from slicecli.recovery.data import draw_rows

    options = job.options
    text = read_text(options.data, "calibration", options.token)
    rows = draw_rows(text, job.source.tokenizer(), job.sequence_length, job.steps, job.rows_per_step, options.seed)
    model = job.source.config().get_text_config(decoder=True)
    for part in (rows.training, rows.held_out):
        check_vocabulary(part, job.source.name, int(model.vocab_size))
    warnings = []
    if rows.training.tokens < job.tokens:
        warnings.append(
            f"The text has {rows.training.tokens:,} tokens to train on, so each is read "
            f"{job.tokens / rows.training.tokens:.1f} times; a longer text works better."
        )
    if reason := monotony(rows.training):
        warnings.append(f"The training text is repetitive: {reason}. Choose another text with --data.")
    return rows, tuple(warnings)


def _what_was_left(job: RecoveryJob, rows: TrainingRows, folder: Path) -> str | None:
    """Return the checkpoint that an interrupted run of the same request left, and note what this run is asked for."""
    from slicecli.recovery.trainer import last_checkpoint
    from slicecli.runtime.json import read_json

    place = folder / TRAINING_FOLDER
    options = {**result_fields(job.options), "teacher": job.teacher.content, "data": rows.training.digest}
    asked = json.loads(json.dumps({"slice": job.source.content, **options, "eval_every": job.eval_every}, default=str))
    asked["processes"] = job.processes.count
    found = read_json(place / REQUEST_FILE)
    if isinstance(found, dict):
        differing = [name for name in asked if found.get(name) != asked[name]]
        if differing:
            raise OutputError(
                f"The interrupted run cannot be resumed: its {', '.join(differing)} differed.",
                "Use the options of that run, or leave out --resume to start over.",
            )
    clear_folder(folder, lambda path: path.name == TRAINING_FOLDER and isinstance(found, dict))
    place.mkdir(exist_ok=True)
    (place / REQUEST_FILE).write_text(json.dumps(asked), encoding="utf-8")
    checkpoint = last_checkpoint(place)
    return None if checkpoint is None else str(checkpoint)


@dataclass(frozen=True)
class _Trained:
    """A trained model, its weights as they are to be stored, and what is known of its training."""

    model: Any
    kl_before: float
    kl_after: float
    history: Mapping[int, float]
    steps: int
    best_step: int
    seconds: float
    diverged_at: int | None


def _train(job: RecoveryJob, rows: TrainingRows, folder: Path, checkpoint: str | None, progress: Progress) -> _Trained:
    """Train, and return the best state; refuse one that is no better than the slice was."""
    from slicecli.checkpoint.loading import load_model
    from slicecli.recovery.trainer import DistillationTrainer, Schedule, without_dropout
    from slicecli.runtime.placement import batch_rows

    options = job.options
    device = job.processes.device()
    model = without_dropout(load_model(job.source, "float32", str(device)))
    teacher = load_model(job.teacher, None, options.device_map, options.max_memory).requires_grad_(False)
    if options.mode == "lora":
        model = _with_adapters(model)
    own_rows = job.rows_per_step // job.processes.count
    fitting = batch_rows(device, job.sequence_length)
    schedule = Schedule(
        steps=job.steps,
        rows_per_step=own_rows,
        rows_per_pass=max(size for size in range(1, own_rows + 1) if own_rows % size == 0 and size <= fitting),
        learning_rate=options.learning_rate,
        eval_every=job.eval_every,
        seed=options.seed,
    )
    trainer = DistillationTrainer(model, teacher, rows, schedule, folder, progress)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    seconds = time.perf_counter() - started
    history = trainer.history
    before = history.get(0, math.nan)
    if options.mode == "lora":
        trainer.model = trainer.model_wrapped = model = model.merge_and_unload()
    _round(model, job.record["dtype"])
    after = trainer.measure() if trainer.state.best_global_step else math.nan
    if not after < before:
        raise _no_gain(job, trainer, before, after)
    best_step = int(trainer.state.best_global_step)
    steps = trainer.state.global_step
    return _Trained(model, before, after, history, steps, best_step, seconds, trainer.diverged_at)


def _with_adapters(model: Any) -> Any:
    import peft

    config = peft.LoraConfig(r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    return peft.get_peft_model(model, config)


def _round(model: Any, dtype: str) -> None:
    """Give a model's weights the values that they will have on the disk."""
    import torch

    from slicecli.checkpoint.dense_weights import stored_values

    with torch.no_grad():
        for _, value in stored_values(model):
            value.copy_(value.to(getattr(torch, dtype)))


def _no_gain(job: RecoveryJob, trainer: DistillationTrainer, before: float, after: float) -> TrainingError:
    remedy = f"Nothing was written. Use a smaller --lr than {job.options.learning_rate:g}, or more --tokens."
    if trainer.diverged_at is not None:
        return TrainingError(
            f"The loss was not a number at step {trainer.diverged_at}, and no earlier state was better than the slice "
            f"(held-out KL {before:.4f}).",
            remedy,
        )
    return TrainingError(
        f"Training made {job.source.name} no better: its held-out KL was {before:.4f} before and is {after:.4f} after.",
        remedy,
    )


def _write_weights(job: RecoveryJob, model: Any, folder: Path) -> dict[str, str]:
    """Write a model's weights as those of the slice are laid out; return the SHA-256 of each file."""
    import torch

    from slicecli.checkpoint.dense_weights import DenseWeights, checkpoint_tensors, stored_values
    from slicecli.checkpoint.weight_writer import ShardWriter

    dtype = getattr(torch, job.record["dtype"])
    values = {name: value.detach().to("cpu", dtype) for name, value in stored_values(model)}
    shapes = {
        stored: tuple(part.shape)
        for name, value in values.items()
        for stored, part in checkpoint_tensors(model, name, value).items()
    }
    writer = ShardWriter(folder, shapes, dtype, job.options.max_shard_size)
    try:
        for name, value in values.items():
            for stored, part in checkpoint_tensors(model, name, value).items():
                writer.write(stored, part)
        digests = writer.finish()
    finally:
        writer.close()
    written = DenseWeights(Source.find(str(folder), trust_remote_code=job.options.trust_remote_code))
    for name, value in values.items():
        if not torch.equal(written.tensor(name), value):
            raise WeightsError(f"{name} is not read back as it was trained.", "Check the disk.")
    return digests


def _draft(job: RecoveryJob, rows: TrainingRows, trained: _Trained | None = None) -> Description:
    """Return what is said of the trained slice; before it is trained, with figures that only fill their places."""
    from slicecli.estimation.plot import divergence_picture
    from slicecli.hub.card import RECOVERY_PLOT_FILE
    from slicecli.hub.writing import Description
    from slicecli.runtime.versions import __version__, package_versions

    if trained is None:
        trained = _Trained(None, 1.0, 0.0, {0: 1.0, job.steps: 0.0}, job.steps, job.steps, 0.0, None)
    record, options = job.record, job.options
    results = dict(record["results"])
    dense = {"dense": results.pop("dense")} if "dense" in results else {}
    results.pop("versions", None)
    history = [(step * job.tokens_per_step, kl) for step, kl in trained.history.items()]
    training, held_out = rows.training, rows.held_out
    entry = {
        "slice": _identity(job.source),
        "teacher": _identity(job.teacher),
        "mode": options.mode,
        "lora_rank": LORA_RANK if options.mode == "lora" else None,
        "text": training.name,
        "dataset": training.dataset,
        "text_sha256": training.text_digest,
        "sequence_length": job.sequence_length,
        "seed": options.seed,
        "training": {"rows": len(training.ids), "tokens": training.tokens, "sha256": training.digest},
        "held_out": {"rows": len(held_out.ids), "tokens": held_out.tokens, "sha256": held_out.digest},
        "tokens": trained.steps * job.tokens_per_step,
        "tokens_per_step": job.tokens_per_step,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "learning_rate": options.learning_rate,
        "kl_before": trained.kl_before,
        "kl_after": trained.kl_after,
        "history": [{"tokens": tokens, "kl": kl} for tokens, kl in history],
        "seconds": trained.seconds,
        "command": _command(job),
        "results": results,
        "versions": {"slicecli": __version__, **package_versions()},
    }
    plot = divergence_picture(history)
    new = {
        **record,
        "recovery": [*record.get("recovery", ()), entry],
        "repository": None,
        "results": dense,
        # what is known of slices to other dims is of such as were not trained
        "curve": None,
        "predictions": [],
        "weights": {"model.safetensors": "0" * 64},
        "files": {RECOVERY_PLOT_FILE: hashlib.sha256(plot).hexdigest()},
    }
    return dataclasses.replace(Description.draft(new, []), plots={RECOVERY_PLOT_FILE: plot})


def _identity(source: Source) -> dict[str, Any]:
    return source_fields(source, str(source.fields.get("model_type")))


def _command(job: RecoveryJob) -> str:
    """Return the command line that trains a slice again; folders and text files appear by their names only."""
    options = job.options
    data = Path(options.data)
    values: dict[str, Any] = {"teacher": job.teacher.name}
    if job.source.commit:
        values["revision"] = job.source.commit
    values |= {
        "data": data.name if data.exists() else options.data,
        "tokens": job.tokens,
        "mode": options.mode,
        "learning_rate": options.learning_rate,
        "sequence_length": job.sequence_length,
        "batch_size": job.tokens_per_step,
        "seed": options.seed,
        "eval_every": job.eval_every,
    }
    if options.trust_remote_code:
        values["trust_remote_code"] = True
    return shlex.join(["slicecli", "recover", job.source.name, *words_of(RecoverOptions, values)])
