"""The record of a slice, `slicecli.json`: where it comes from, how it was made, what it weighs.

Whoever has the record can make the slice again and check that it is the same. It holds no token, no user name
and no local path: a model from a folder is named by the folder's own name, a text file by its file name and as many of
the folders above it as tell it from others.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slicecli.checkpoint.folder import RECORD_FILE
from slicecli.family.slice_plan import SlicePlan
from slicecli.runtime.json import read_json
from slicecli.runtime.versions import __version__, package_versions

if TYPE_CHECKING:
    from slicecli.checkpoint.source import Source
    from slicecli.data.packing import Rows
    from slicecli.linalg.basis import Basis
    from slicecli.slicing.slicegpt import Spectrum

__all__ = [
    "Energy",
    "build_record",
    "calibration_fields",
    "digest_of",
    "known_names",
    "read_record",
    "read_sound_record",
    "record_text",
    "source_fields",
]

ResultKind = Literal["perplexity", "tasks"]
SPECTRUM_POINTS = 64


@dataclass(frozen=True)
class Energy:
    """How much of the stream's energy a slice keeps, and others would."""

    kept: float
    fields: dict[str, Any]

    @classmethod
    def unknown(cls, plan: SlicePlan) -> Energy:
        """Return what stands in a draft until it is known: all of it."""
        if plan.method == "refit":
            return cls(1.0, {"of": "normalised stream", "kept": 1.0, "importance_kept": 1.0, "spectrum": []})
        return cls(1.0, {"of": "stream", "kept": 1.0, "spectrum": []})

    @classmethod
    def of_basis(cls, basis: Basis, plan: SlicePlan) -> Energy:
        """Return that of a basis for all places: of the normalised stream."""
        fields = {
            "of": "normalised stream",
            "kept": basis.energy_kept(plan.dim),
            "importance_kept": basis.importance_kept(plan.dim),
            "spectrum": [
                {"dim": dim, "kept": basis.energy_kept(dim), "importance_kept": basis.importance_kept(dim)}
                for dim in _spectrum_dims(plan)
            ],
        }
        return cls(basis.energy_kept(plan.dim), fields)

    @classmethod
    def of_spectrum(cls, spectrum: Spectrum, plan: SlicePlan) -> Energy:
        """Return that of a basis at every place: of the stream as it is there, the mean over the places."""
        fields = {
            "of": "stream",
            "kept": spectrum.kept,
            "spectrum": [{"dim": dim, "kept": spectrum.energy_kept(dim)} for dim in _spectrum_dims(plan)],
        }
        return cls(spectrum.kept, fields)


def _spectrum_dims(plan: SlicePlan) -> range:
    step = max(1, plan.hidden_size // SPECTRUM_POINTS)
    return range(step, plan.hidden_size + 1, step)


def build_record(
    plan: SlicePlan,
    source: Source,
    rows: Rows,
    seed: int,
    command: str,
    inherited: Mapping[str, Any],
    other_dims: Mapping[int, int],
) -> dict[str, Any]:
    """Put a record together, as far as it is known in planning; energy and weights are entered when they are there."""
    from slicecli.record.schema import RECORD_VERSION

    return {
        "record_version": RECORD_VERSION,
        "slicecli_version": __version__,
        "source": source_fields(source, plan.model_type),
        "ancestry": _ancestry(source),
        "repository": None,
        "command": command,
        "inherited": dict(inherited),
        "adapter": plan.adapter,
        "method": plan.method,
        "layout": plan.layout,
        "written_type": plan.written_type,
        **({"activation": plan.activation} if plan.layout == "stock" else {}),
        "needs_remote_code": plan.layout == "custom-code" or source.needs_remote_code,
        "is_tied": plan.is_tied,
        "hidden_size": plan.hidden_size,
        "dim": plan.dim,
        "sparsity": plan.sparsity,
        "mlp_size": plan.mlp_size,
        "mlp_dim": plan.mlp_dim,
        **({"other_mlp_widths": plan.other_mlp_widths} if plan.other_mlp_widths else {}),
        "schedule": None if plan.schedule is None else dataclasses.asdict(plan.schedule),
        "dtype": plan.dtype,
        "parameters": {"dense": plan.dense_parameters, "sliced": plan.sliced_parameters},
        "bytes": {"dense": plan.dense_bytes, "sliced": plan.sliced_bytes},
        "calibration": calibration_fields(rows, seed),
        "energy": Energy.unknown(plan).fields,
        "results": {},
        "curve": None,
        "predictions": [],
        "other_dims": [{"dim": dim, "parameters": count} for dim, count in other_dims.items()],
        "weights": {"model.safetensors": "0" * 64},
        "files": {},
        "left_out": [one.to_json() for one in source.companions.left_out],
        "versions": package_versions(),
    }


def source_fields(source: Source, model_type: str) -> dict[str, Any]:
    """Return what identifies a model in a record."""
    return {
        "model": source.name,
        "revision": source.revision,
        "commit": source.commit,
        "content": source.content,
        "model_type": model_type,
    }


def _ancestry(source: Source) -> list[dict[str, Any]]:
    """Return the slices that a source is the last of, itself first; nothing where it is no slice."""
    record = read_sound_record(source.folder)
    if record is None:
        return []
    own = {name: record[name] for name in ("method", "hidden_size", "dim", "mlp_size", "mlp_dim", "slicecli_version")}
    trained = sum(one["tokens"] for one in record.get("recovery", ()))
    return [{**record["source"], **own, "trained_tokens": trained}, *record["ancestry"]]


def calibration_fields(rows: Rows, seed: int) -> dict[str, Any]:
    """Return what identifies calibration rows."""
    return {
        "text": rows.name,
        "dataset": rows.dataset,
        "samples": len(rows.ids),
        "sequence_length": rows.sequence_length,
        "tokens": rows.tokens,
        "seed": seed,
        "sha256": rows.digest,
        "text_sha256": rows.text_digest,
    }


def known_names(record: Mapping[str, Any], kind: ResultKind) -> dict[str, str | None]:
    """Return the names of texts from files, or of tasks, in a record, with the digests of those from files."""
    results = record.get("results") or {}
    names = {
        name: digest_of(figure, kind)
        for measured in (results.get("dense") or {}, results)
        for name, figure in (measured.get(kind) or {}).items()
    }
    quantity = "perplexity" if kind == "perplexity" else "accuracy"
    for curve in (record.get("curve") or {}).get("curves", ()):
        if curve["quantity"] == quantity:
            names.setdefault(curve["evaluation"], curve["evaluation_sha256"])
    calibration = record.get("calibration") or {}
    if kind == "perplexity" and calibration.get("text_sha256"):
        names.setdefault(calibration["text"], calibration["text_sha256"])
    return names


def digest_of(figure: Mapping[str, Any], kind: ResultKind) -> str | None:
    """Return the digest that tells a figure's text, or questions, from another file's of the same name."""
    found: str | None = figure.get("text_sha256" if kind == "perplexity" else "questions_sha256")
    return found


def record_text(record: Mapping[str, Any]) -> str:
    """Return a record as its file has it."""
    return json.dumps(record, indent=2) + "\n"


def read_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a folder, or `None` where it has none that can be read."""
    record = read_json(folder / RECORD_FILE)
    return record if isinstance(record, dict) else None


def read_sound_record(folder: Path) -> dict[str, Any] | None:
    """Return the record of a folder, or `None` where it has none whose fields can be relied on."""
    record = read_record(folder)
    if record is None:
        return None
    from slicecli.record.schema import schema_errors

    return None if schema_errors(record) else record
