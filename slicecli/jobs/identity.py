"""What the numbers of a job depend on: one identity for the cache, the journal, a sweep and the processes of a run."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.folder import file_digest
from slicecli.runtime.cache_folder import digest_of
from slicecli.runtime.inputs import local_path
from slicecli.runtime.options import result_fields
from slicecli.runtime.versions import __version__, package_versions

if TYPE_CHECKING:
    from slicecli.data.packing import Rows
    from slicecli.evaluation.measure import EvaluationSet
    from slicecli.evaluation.options import EvaluationOptions
    from slicecli.jobs.plan import Job
    from slicecli.slicing.context import DenseModel

__all__ = ["Identity", "sweep_digest"]


@dataclass(frozen=True)
class Identity:
    """What identifies the numbers of a job, as plain data; the weights must be at hand.

    Attributes:
        model: As of `Source.identity`.
        calibration: Digest of the calibration rows.
        computing: Dtype and kind of device.
    """

    model: Mapping[str, Any]
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    calibration: str
    computing: tuple[str, str]

    @classmethod
    def of(cls, job: Job, rows: Rows, dense: DenseModel) -> Identity:
        """Return the identity of a job whose model is open."""
        computing = (str(dense.dtype), dense.device.type)
        return cls(job.source.identity(), dict(job.source.fields), _versions(), rows.digest, computing)

    def of_processes(self) -> dict[str, Any]:
        """Return what processes that share a run have in common, by the names that a user knows it by."""
        return {
            "config": self.config,
            "checkpoint": self.model["content"],
            "set of rows": self.calibration,
            "set of versions": self.versions,
            "kind of device": self.computing,
        }

    def of_statistics(self, job: Job, batch_size: int) -> dict[str, Any]:
        """Return what the statistics of the dense model depend on."""
        return {**self._content(batch_size), "declaration": job.dimensions.declaration()}

    def of_run(self, job: Job, batch_size: int) -> dict[str, Any]:
        """Return what a whole run depends on, as JSON gives it back."""
        options = job.options
        content = {
            **self._content(batch_size),
            "slices": [dataclasses.asdict(one.plan) for one in job.slices],
            "options": [options.orientation, options.slice_head, options.seed, options.max_shard_size],
        }
        found: dict[str, Any] = json.loads(json.dumps(content, default=str))
        return found

    def _content(self, batch_size: int) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "batch_size": batch_size}


def sweep_digest(job: Job, evaluation: EvaluationOptions, prepared: EvaluationSet) -> str:
    """Return a digest of all that a measurement of a sweep depends on, but for the dims."""
    options, measured = result_fields(job.options), result_fields(evaluation)
    # of files what is in them counts, not by which path they are given
    measured["texts"] = [(rows.name, rows.digest, rows.text_digest) for rows in prepared.rows]
    measured["tasks"] = [(task.name, task.digest) for task in prepared.tasks]
    text = local_path(options["calibration"])
    if text.is_file():
        options["calibration"] = text.name, file_digest(text)
    content = {
        "version": __version__,
        "model": job.source.identity(),
        "config": dict(job.source.fields),
        "sequence_length": job.sequence_length,
        "options": options,
        "evaluation": measured,
    }
    return digest_of(content)


def _versions() -> dict[str, str]:
    return {**package_versions(), "slicecli": __version__}
