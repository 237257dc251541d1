"""Training a slice block by block: mode blocks."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from slicecli.checkpoint.folder import clear_folder, unfinished_folder
from slicecli.jobs.recovery_plan import RecoveryJob
from slicecli.jobs.recovery_record import Outcome, request_of

if TYPE_CHECKING:
    import torch

    from slicecli.checkpoint.weight_writer import ModelWriter
    from slicecli.progress import Progress
    from slicecli.recovery.blocks import BlocksResult
    from slicecli.recovery.data import TrainingRows
    from slicecli.slicing.context import DenseModel
    from slicecli.slicing.journal import FileJournal

__all__ = ["BlockwiseTraining"]


class BlockwiseTraining:
    """Trains the blocks of a slice one after the other."""

    def __init__(self, job: RecoveryJob) -> None:
        self._job = job

    def has_progress(self) -> bool:
        """Say whether an interrupted run left something to go on with."""
        from slicecli.slicing.journal import has_state

        return has_state(unfinished_folder(self._job.folder))

    def take_up(self, folder: Path, rows: TrainingRows) -> None:
        """Refuse to go on with the run of another request; remove what is not to be gone on with."""
        from slicecli.slicing.journal import is_progress, read_state

        state = read_state(folder, request_of(self._job, rows))
        clear_folder(folder, lambda path: state is not None and is_progress(path))

    def train(self, folder: Path | None, rows: TrainingRows, progress: Progress) -> Outcome:
        """Train, and write each block as it is done; refuse a result that is no better than the slice was.

        Args:
            folder: Where the weights go; `None` but in the main process.
        """
        import torch

        from slicecli.checkpoint.dense_weights import DenseWeights
        from slicecli.recovery.block_training import BlockSchedule
        from slicecli.recovery.blocks import Slicing, distil_blocks

        job, plan = self._job, self._job.blocks
        assert plan is not None
        weights = DenseWeights(job.source)
        teacher, student = plan.open(job.teacher, weights, job.processes, folder)
        dtype = getattr(torch, job.record["dtype"])
        schedule = BlockSchedule(
            epochs=job.epochs,
            rows_per_step=job.own_rows_per_step,
            rows_per_pass=job.rows_per_pass(student.device),
            learning_rate=job.learning_rate,
            seed=job.options.seed,
        )
        started = time.perf_counter()
        with _Output(job, rows, student, dtype, folder) as output:
            for name in weights.names:
                if not name.startswith((f"{student.adapter.blocks}.", f"{student.adapter.final_norm}.")):
                    output.take(name, weights.tensor(name).to(dtype))  # it stays as it is
            slicing = Slicing(plan.scale, plan.has_one_basis, dtype)
            result = distil_blocks(teacher, student, rows, schedule, slicing, output.take, progress, output.journal)
            if not result.kl_after < result.kl_before:
                raise job.no_gain(result.kl_before, result.kl_after)
            digests = output.finish()
        steps = job.epochs * (len(rows.training.ids) // job.rows_per_step)
        return Outcome(
            kl_before=result.kl_before,
            kl_after=result.kl_after,
            history={0: result.kl_before, steps: result.kl_after},
            steps=steps,
            best_step=steps,
            seconds=time.perf_counter() - started,
            warnings=_warnings(result),
            weights=digests,
            block_errors=tuple((one.error_before, one.error_after) for one in result.blocks[:-1]),
        )


class _Output:
    """The weight files of the result with the journal of the run; nothing but in the main process."""

    def __init__(
        self, job: RecoveryJob, rows: TrainingRows, student: DenseModel, dtype: torch.dtype, folder: Path | None
    ) -> None:
        from slicecli.checkpoint.weight_writer import ModelWriter
        from slicecli.slicing.journal import FileJournal, read_state, seconds_between_snapshots

        self._writer: ModelWriter | None = None
        self.journal: FileJournal | None = None
        if folder is None:
            return
        request = request_of(job, rows)
        state = read_state(folder, request)
        missing = None if state is None else state["missing"][0]
        self._writer = ModelWriter(folder, student.meta_model, dtype, job.options.max_shard_size, missing)
        if job.processes.count == 1:
            self.journal = FileJournal(folder, request, [self._writer], state, seconds_between_snapshots())

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def take(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor."""
        if self._writer is not None:
            self._writer.take(name, tensor)

    def finish(self) -> dict[str, str]:
        """Close the files and remove the journal; return the SHA-256 of each file."""
        if self.journal is not None:
            self.journal.remove()
        return {} if self._writer is None else self._writer.finish()


def _warnings(result: BlocksResult) -> tuple[str, ...]:
    stopped = [(index + 1, one.diverged_at) for index, one in enumerate(result.blocks) if one.diverged_at is not None]
    if not stopped:
        return ()
    block, step = stopped[0]
    return (
        f"The gradient was not a number at step {step} of block {block}"
        + (f" and in {len(stopped) - 1} other blocks" if len(stopped) > 1 else "")
        + ", where its training stopped; its best state until then was kept. Use a smaller --lr.",
    )
