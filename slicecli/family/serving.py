"""In which programs slices run, as `benchmarks/serving.py` measured with small models of each class.

A slice has heads whose width is not hidden_size / heads, which some programs assume. The table in `serving.json` is
the only source: `--write-as auto`, the card, `slicecli inspect` and docs/serving.md all read it.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Literal

from slicecli.family.slice_plan import Layout, Method

__all__ = [
    "NOT_MEASURED",
    "SERVERS",
    "SILU",
    "SliceKind",
    "Verdict",
    "VerdictName",
    "all_verdicts",
    "clients",
    "describe_verdicts",
    "verdicts_on",
]

VerdictName = Literal["correct", "wrong", "refused"]
NOT_MEASURED = "not measured"
SILU = "silu"
SERVERS = ("vLLM", "llama.cpp")  # which `--write-as auto` looks for a class for
_WORST_FIRST: tuple[VerdictName, ...] = ("wrong", "refused", "correct")


@dataclass(frozen=True)
class SliceKind:
    """What decides where a slice runs.

    Attributes:
        model_type: The class it is written in; of a slice with custom code, the type of its source.
        is_tied: Whether its head is its embeddings.
        activation: The activation of its MLPs, as `hidden_act` names it; empty for a slice with custom code.
    """

    model_type: str
    layout: Layout
    method: Method
    is_tied: bool
    activation: str

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> SliceKind:
        """Return the kind of a slice with a record."""
        is_stock = record["layout"] == "stock"
        return cls(
            record["written_type"] if is_stock else record["source"]["model_type"],
            record["layout"],
            record["method"],
            record["is_tied"],
            record.get("activation", SILU) if is_stock else "",
        )


@dataclass(frozen=True)
class Verdict:
    """What a client makes of a slice.

    Attributes:
        slice: What was tried: a type of model, and how it was arranged or sliced.
        kind: What the verdict is about.
        client: The program.
        version: The package that was installed, and its version.
        verdict: `correct` if its logits are those of transformers 5, `wrong` if not, `refused` if it stops with an
            error.
        agreement: Share of equal next tokens, where it ran.
        reason: Why it is not correct.
    """

    slice: str
    kind: SliceKind
    client: str
    version: str
    verdict: VerdictName
    agreement: float | None
    reason: str


@functools.cache
def all_verdicts() -> tuple[Verdict, ...]:
    """Return the table."""
    text = (files("slicecli.family") / "serving.json").read_text(encoding="utf-8")
    return tuple(Verdict(**{**row, "kind": SliceKind(**row["kind"])}) for row in json.loads(text)["verdicts"])


def clients() -> dict[str, str]:
    """Return the programs of the table with their versions."""
    return dict(sorted({one.client: one.version for one in all_verdicts()}.items(), key=lambda one: one[0].lower()))


def verdicts_on(kind: SliceKind) -> dict[str, Verdict]:
    """Return the verdict of each client that was given a slice of a kind: of several the worst."""
    ranked = sorted((one for one in all_verdicts() if one.kind == kind), key=lambda one: _rank(one.verdict))
    worst: dict[str, Verdict] = {}
    for one in ranked:
        worst.setdefault(one.client, one)
    return dict(sorted(worst.items(), key=lambda one: one[0].lower()))


def describe_verdicts(verdicts: Mapping[str, Verdict]) -> dict[str, dict[str, str]]:
    """Return what is known of each program of the table, as plain data."""
    return {
        client: {"version": version, "verdict": NOT_MEASURED, "reason": ""}
        if client not in verdicts
        else {one: getattr(verdicts[client], one) for one in ("version", "verdict", "reason")}
        for client, version in clients().items()
    }


def _rank(verdict: VerdictName) -> int:
    return _WORST_FIRST.index(verdict)
