"""Training a slice in the run that makes it: with the same text, model and devices, into a folder beside it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from slicecli.checkpoint.folder import check_output
from slicecli.jobs.options import RecoverOptions
from slicecli.jobs.recovery_plan import check_mode
from slicecli.runtime.options import options_of, words_of

if TYPE_CHECKING:
    from slicecli.jobs.plan import Job
    from slicecli.jobs.recovery_plan import RecoveryJob
    from slicecli.record.schema import RecoveryMode

__all__ = ["check_recovery", "command_to_resume", "recovery_folder", "recovery_options"]


def recovery_folder(folder: Path) -> Path:
    """Return where a slice goes when it is trained."""
    return folder.with_name(f"{folder.name}-recovered")


def check_recovery(job: Job, mode: RecoveryMode) -> None:
    """Refuse before it is sliced what could not be trained after it."""
    check_mode(mode)
    check_output(recovery_folder(job.slices[0].folder), job.options.overwrite)
    recovery_options(job, mode)


def recovery_options(job: Job, mode: RecoveryMode) -> RecoverOptions:
    """Return the options of a training that belong to the options of a slice."""
    options, length, processes = job.options, job.sequence_length, job.processes.count
    rows = min(options.samples, RecoverOptions().batch_size // length) // processes * processes
    return RecoverOptions(
        # of a model of the Hub the record has the commit
        teacher=None if job.source.commit else str(job.source.folder),
        data=options.calibration,
        tokens=options.samples * length,
        mode=mode,
        sequence_length=length,
        batch_size=max(rows, processes) * length,
        seed=options.seed,
        device_map=options.device_map,
        max_memory=options.max_memory,
        activations=options.activations if mode == "blocks" else "auto",
        max_shard_size=options.max_shard_size,
        token=options.token,
        trust_remote_code=options.trust_remote_code,
        overwrite=options.overwrite,
        resume=options.resume,
    )


def command_to_resume(recovery: RecoveryJob) -> str:
    """Return the command line that goes on with a training that was interrupted, after its slice was finished."""
    options = recovery.options
    given = {name: getattr(options, name) for name, one in options_of(RecoverOptions).items() if not one.is_secret}
    default = RecoverOptions()
    values = {name: value for name, value in given.items() if value != getattr(default, name)} | {"resume": True}
    words = words_of(RecoverOptions, values)
    return shlex.join(["slicecli", "recover", str(recovery.source.folder), *words, "-o", str(recovery.folder)])
