"""The training of a slice, from a job to a finished folder: train, write only what is better, describe.

What is trained stays what it was: its folder is that of the slice with other weights, a new record and a new card.
"""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from slicecli.checkpoint.config_files import CONFIG_FILE
from slicecli.checkpoint.folder import whole_folder
from slicecli.errors import TextError
from slicecli.jobs.recover_blocks import BlockwiseTraining
from slicecli.jobs.recover_model import ModelTraining
from slicecli.jobs.recovery_plan import RecoveryJob, plan_recovery
from slicecli.jobs.recovery_record import Outcome, draft_recovery
from slicecli.runtime.libraries import running

if TYPE_CHECKING:
    from slicecli.progress import Progress
    from slicecli.recovery.data import TrainingRows

__all__ = ["RecoveryJob", "RecoveryReport", "plan_recovery", "recover_slice"]


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


class Training(Protocol):
    """A way to train a slice."""

    def has_progress(self) -> bool:
        """Say whether an interrupted run left something to go on with."""
        ...

    def take_up(self, folder: Path, rows: TrainingRows) -> None:
        """Refuse to go on with the run of another request; remove what is not to be gone on with."""
        ...

    def train(self, folder: Path | None, rows: TrainingRows, progress: Progress) -> Outcome:
        """Train and write the weights; refuse a result that is no better than the slice was."""
        ...


def recover_slice(job: RecoveryJob, progress: Progress | None = None) -> RecoveryReport:
    """Train a slice, and write the best state as a whole folder if it is better than the slice was."""
    from slicecli.hub.writing import describe_slice
    from slicecli.jobs.preparation import copy_companions
    from slicecli.progress import Silent

    processes, options = job.processes, job.options
    progress = progress if progress is not None and processes.is_main else Silent()
    training: Training = BlockwiseTraining(job) if options.mode == "blocks" else ModelTraining(job)
    has_begun = False

    def is_worth_keeping(error: BaseException) -> bool:
        if not has_begun:  # failed before it could go on with what another run has left: that stays
            return options.resume and training.has_progress()
        return isinstance(error, (KeyboardInterrupt, SystemExit)) and training.has_progress()

    with ExitStack() as stack:
        folder = None
        if processes.is_main:
            folder = stack.enter_context(whole_folder(job.folder, options.overwrite, options.resume, is_worth_keeping))
        rows, warnings = _read_rows(job)
        with processes.main_of_machine_first():
            job.source.fetch_weights()
            job.teacher.fetch_weights()
        if folder is not None:
            training.take_up(folder, rows)
            has_begun = True
            copy_companions(job.source, folder, has_code=job.record["layout"] != "stock")
            shutil.copyfile(job.source.folder / CONFIG_FILE, folder / CONFIG_FILE)
            draft_recovery(job, rows)  # what cannot be recorded is said before it is trained
        stack.enter_context(running(job.source.name))
        outcome = training.train(folder, rows, progress)
        report = RecoveryReport(
            output=job.folder,
            kl_before=outcome.kl_before,
            kl_after=outcome.kl_after,
            best_step=outcome.best_step,
            history=tuple((step * job.tokens_per_step, kl) for step, kl in outcome.history.items()),
            tokens=outcome.steps * job.tokens_per_step,
            seconds=outcome.seconds,
            warnings=warnings + outcome.warnings,
        )
        if folder is not None:
            describe_slice(folder, draft_recovery(job, rows, outcome), job.record["energy"], outcome.weights)
    return processes.from_main(lambda: report)


def _read_rows(job: RecoveryJob) -> tuple[TrainingRows, tuple[str, ...]]:
    """Draw the rows; say where they are fewer than are to be trained on, or monotonous."""
    from slicecli.data.packing import check_vocabulary, monotony
    from slicecli.data.text import read_text
    from slicecli.recovery.data import draw_rows, fitted_rows

    options = job.options
    try:
        text = read_text(options.data, "calibration", options.token)
    except TextError as error:
        raise TextError(error.cause, f"{error.remedy} Pass it with --data.") from error
    steps, tokenizer = job.steps // job.epochs, job.source.tokenizer()
    fitted = fitted_rows(text, tokenizer, job.record["calibration"])
    rows = draw_rows(text, tokenizer, job.sequence_length, steps, job.rows_per_step, options.seed, fitted)
    model = job.source.config().get_text_config(decoder=True)
    for part in (rows.training, rows.held_out):
        check_vocabulary(part, job.source.name, int(model.vocab_size))
    warnings = []
    wanted = job.tokens // job.epochs
    if rows.training.tokens < wanted and options.mode == "blocks":
        warnings.append(f"The text has only {rows.training.tokens:,} of {wanted:,} tokens to train on.")
    elif rows.training.tokens < wanted:
        warnings.append(
            f"The text has {rows.training.tokens:,} tokens to train on, so each is read "
            f"{wanted / rows.training.tokens:.1f} times; a longer text works better."
        )
    if rows.is_fitted_to:
        warnings.append(
            "The slice was calibrated on all of the text, so what it loses on the held-out rows is less than on other "
            "text, and a training that helps there may look like none; use a longer text."
        )
    if reason := monotony(rows.training):
        warnings.append(f"The training text is repetitive: {reason}. Choose another text with --data.")
    return rows, tuple(warnings)
