"""Training a whole slice by transformers' trainer: modes full and lora."""

from __future__ import annotations

import json
import math
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.folder import clear_folder, require_disk_space, unfinished_folder
from slicecli.checkpoint.source import Source
from slicecli.errors import TrainingError, WeightsError
from slicecli.jobs.recovery_plan import LORA_RANK, RecoveryJob
from slicecli.jobs.recovery_record import Outcome, check_same_request, request_of
from slicecli.runtime.json import read_json

if TYPE_CHECKING:
    from slicecli.progress import Progress
    from slicecli.recovery.data import TrainingRows
    from slicecli.recovery.teacher import Teacher
    from slicecli.recovery.trainer import DistillationTrainer

__all__ = ["ModelTraining"]

TRAINING_FOLDER = ".training"
REQUEST_FILE = "request.json"


class ModelTraining:
    """Trains all weights of a slice, or adapters of them, at once."""

    def __init__(self, job: RecoveryJob) -> None:
        self._job = job
        self._folder = unfinished_folder(job.folder) / TRAINING_FOLDER

    def has_progress(self) -> bool:
        """Say whether an interrupted run left something to go on with."""
        from slicecli.recovery.trainer import last_checkpoint

        return last_checkpoint(self._folder) is not None

    def take_up(self, folder: Path, rows: TrainingRows) -> None:
        """Refuse to go on with the run of another request; remove what is not to be gone on with."""
        request = request_of(self._job, rows)
        found = read_json(self._folder / REQUEST_FILE)
        if isinstance(found, dict):
            check_same_request(found, request)
        clear_folder(folder, lambda path: path.name == TRAINING_FOLDER and isinstance(found, dict))
        self._folder.mkdir(exist_ok=True)
        (self._folder / REQUEST_FILE).write_text(json.dumps(request), encoding="utf-8")

    def train(self, folder: Path | None, rows: TrainingRows, progress: Progress) -> Outcome:
        """Train, and write the best state; refuse one that is no better than the slice was.

        Args:
            folder: Where the weights go; `None` but in the main process.
        """
        from slicecli.recovery.trainer import last_checkpoint

        job = self._job
        checkpoint = job.processes.from_main(lambda: last_checkpoint(self._folder))
        trainer = _open_trainer(job, rows, self._folder, progress)
        started = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        seconds = time.perf_counter() - started
        history = trainer.history
        model, before = trainer.model, history.get(0, math.nan)
        if job.options.mode == "lora":
            trainer.model = trainer.model_wrapped = model = model.merge_and_unload()
        _round(model, job.record["dtype"])
        after = trainer.measure() if trainer.state.best_global_step else math.nan
        if not after < before:
            raise _no_gain(job, trainer, before, after)
        best_step = int(trainer.state.best_global_step)
        warnings: tuple[str, ...] = ()
        if trainer.diverged_at is not None:
            warnings = (
                f"The loss was not a number at step {trainer.diverged_at}, where training stopped; the best state "
                f"until then, of step {best_step}, was kept. Use a smaller --lr to go further.",
            )
        weights = {} if folder is None else _write_weights(job, model, folder)
        if folder is not None:
            shutil.rmtree(self._folder)
        return Outcome(before, after, history, trainer.state.global_step, best_step, seconds, warnings, weights)


def _open_trainer(job: RecoveryJob, rows: TrainingRows, folder: Path, progress: Progress) -> DistillationTrainer:
    """Load the slice and its teacher, and put them before the trainer."""
    from slicecli.checkpoint.loading import load_model
    from slicecli.recovery.trainer import DistillationTrainer, Schedule, without_dropout

    options = job.options
    device = job.processes.device()
    teacher = _open_teacher(job, rows, progress)
    model = without_dropout(load_model(job.source, "float32", str(device)))
    if options.mode == "lora":
        model = _with_adapters(model)
    schedule = Schedule(
        steps=job.steps,
        rows_per_step=job.own_rows_per_step,
        rows_per_pass=job.rows_per_pass(device),
        learning_rate=job.learning_rate,
        eval_every=job.eval_every,
        seed=options.seed,
    )
    return DistillationTrainer(model, teacher, rows, schedule, folder, progress)


def _open_teacher(job: RecoveryJob, rows: TrainingRows, progress: Progress) -> Teacher:
    """Load the teacher, or store what it predicts unless that is stored already."""
    from slicecli.checkpoint.loading import load_model
    from slicecli.recovery.teacher import ModelTeacher, StoredTeacher, logits_path, store_logits

    options, count = job.options, job.options.store_logits

    def load() -> Any:
        return load_model(job.teacher, None, options.device_map, options.max_memory).requires_grad_(False)

    if count is None:
        return ModelTeacher(load())
    identity = {"teacher": job.teacher.content, "rows": [rows.training.digest, rows.held_out.digest], "tokens": count}
    path = logits_path(job.logits_folder, identity)
    with job.processes.main_of_machine_first():
        if not path.exists():
            require_disk_space(path, job.logits_bytes)
            store_logits(load(), rows, count, job.rows_per_pass(job.processes.device()), path, progress)
    return StoredTeacher(path)


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
    if trainer.diverged_at is None:
        return job.no_gain(before, after)
    return TrainingError(
        f"The loss was not a number at step {trainer.diverged_at}, and no earlier state was better than the slice "
        f"(held-out KL {before:.4f}).",
        job.remedy,
    )


def _write_weights(job: RecoveryJob, model: Any, folder: Path) -> dict[str, str]:
    """Write a model's weights as those of the slice are laid out; return the SHA-256 of each file."""
    import torch

    from slicecli.checkpoint.dense_weights import DenseWeights, stored_values
    from slicecli.checkpoint.weight_writer import ModelWriter

    dtype = getattr(torch, job.record["dtype"])
    values = {name: value.detach().to("cpu", dtype) for name, value in stored_values(model)}
    writer = ModelWriter(folder, model, dtype, job.options.max_shard_size)
    try:
        for name, value in values.items():
            writer.take(name, value)
        digests = writer.finish()
    finally:
        writer.close()
    written = DenseWeights(Source.find(str(folder), trust_remote_code=job.options.trust_remote_code))
    for name, value in values.items():
        if not torch.equal(written.tensor(name), value):
            raise WeightsError(f"{name} is not read back as it was trained.", "Check the disk.")
    return digests
