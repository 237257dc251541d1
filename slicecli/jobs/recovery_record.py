"""What the record and the card of a recovered slice say of its training, drafted before it is trained."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.errors import OutputError
from slicecli.jobs.options import RecoverOptions
from slicecli.jobs.recovery_plan import LORA_RANK, RecoveryJob
from slicecli.record.record import source_fields
from slicecli.runtime.options import result_fields, words_of

if TYPE_CHECKING:
    from slicecli.checkpoint.source import Source
    from slicecli.hub.writing import Description
    from slicecli.recovery.data import TrainingRows

__all__ = ["Outcome", "check_same_request", "draft_recovery", "request_of"]


@dataclass(frozen=True)
class Outcome:
    """What came out of a training that made a slice better.

    Attributes:
        kl_before: Mean divergence from the teacher on the held-out rows, in nats per token.
        kl_after: The same of the weights as they are stored.
        history: The same by step, on the way.
        steps: Steps of the optimiser; of mode blocks, for each block.
        best_step: The step whose weights were kept.
        seconds: Wall-clock time of the training alone.
        warnings: What the user should know of it.
        weights: The SHA-256 of each file that was written; in the main process alone.
        block_errors: Of mode blocks: the error of each block but the last on the held-out rows, before and after its
            training.
    """

    kl_before: float
    kl_after: float
    history: Mapping[int, float]
    steps: int
    best_step: int
    seconds: float = 0.0
    warnings: tuple[str, ...] = ()
    weights: Mapping[str, str] = field(default_factory=dict)
    block_errors: tuple[tuple[float, float], ...] = ()


def draft_recovery(job: RecoveryJob, rows: TrainingRows, outcome: Outcome | None = None) -> Description:
    """Return what is said of the trained slice; before it is trained, with figures that only fill their places."""
    from slicecli.estimation.plot import block_errors_picture, divergence_picture
    from slicecli.hub.card import RECOVERY_PLOT_FILE
    from slicecli.hub.writing import Description
    from slicecli.runtime.versions import __version__, package_versions

    if outcome is None:
        outcome = Outcome(1.0, 0.0, {0: 1.0, job.steps: 0.0}, job.steps, job.steps)
    record, options = job.record, job.options
    results = dict(record["results"])
    dense = {"dense": results.pop("dense")} if "dense" in results else {}
    results.pop("versions", None)
    history = [(step * job.tokens_per_step, kl) for step, kl in outcome.history.items()]
    training, held_out = rows.training, rows.held_out
    entry = {
        "slice": _identity(job.source),
        "teacher": _identity(job.teacher),
        "mode": options.mode,
        "lora_rank": LORA_RANK if options.mode == "lora" else None,
        "epochs": job.epochs if options.mode == "blocks" else None,
        "stored_logits": options.store_logits,
        "text": training.name,
        "dataset": training.dataset,
        "text_sha256": training.text_digest,
        "sequence_length": job.sequence_length,
        "seed": options.seed,
        "training": {"rows": len(training.ids), "tokens": training.tokens, "sha256": training.digest},
        "held_out": {"rows": len(held_out.ids), "tokens": held_out.tokens, "sha256": held_out.digest},
        "tokens": outcome.steps * job.tokens_per_step,
        "tokens_per_step": job.tokens_per_step,
        "steps": outcome.steps,
        "best_step": outcome.best_step,
        "learning_rate": job.learning_rate,
        "kl_before": outcome.kl_before,
        "kl_after": outcome.kl_after,
        "history": [{"tokens": tokens, "kl": kl} for tokens, kl in history],
        "block_errors": [{"before": before, "after": after} for before, after in outcome.block_errors] or None,
        "seconds": outcome.seconds,
        "command": _command(job),
        "results": results,
        "versions": {"slicecli": __version__, **package_versions()},
    }
    plot = b""
    if outcome.weights:
        plot = block_errors_picture(outcome.block_errors) if outcome.block_errors else divergence_picture(history)
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
        "tokens": job.tokens // job.epochs,
        "mode": options.mode,
        "learning_rate": job.learning_rate,
        "sequence_length": job.sequence_length,
        "batch_size": job.tokens_per_step,
        "seed": options.seed,
    }
    values |= {"epochs": job.epochs} if options.mode == "blocks" else {"eval_every": job.eval_every}
    if options.store_logits is not None:
        values["store_logits"] = options.store_logits
    if options.trust_remote_code:
        values["trust_remote_code"] = True
    return shlex.join(["slicecli", "recover", job.source.name, *words_of(RecoverOptions, values)])


def request_of(job: RecoveryJob, rows: TrainingRows) -> dict[str, Any]:
    """Return what an interrupted run must have been asked for to be gone on with, as JSON gives it back."""
    options = {**result_fields(job.options), "teacher": job.teacher.content, "data": rows.training.digest}
    asked = {"slice": job.source.content, **options, "eval_every": job.eval_every, "processes": job.processes.count}
    found: dict[str, Any] = json.loads(json.dumps(asked, default=str))
    return found


def check_same_request(found: Mapping[str, Any], request: Mapping[str, Any]) -> None:
    """Refuse to go on with the run of another request."""
    differing = [name for name in request if found.get(name) != request[name]]
    if differing:
        raise OutputError(
            f"The interrupted run cannot be resumed: its {', '.join(differing)} differed.",
            "Use the options of that run, or leave out --resume to start over.",
        )
