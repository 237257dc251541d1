"""In which programs slices run, as `benchmarks/serving.py` found on small models of each class."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Literal

__all__ = ["Verdict", "all_verdicts", "verdicts_on"]

VerdictName = Literal["correct", "wrong", "refused"]
_WORST_FIRST: tuple[VerdictName, ...] = ("wrong", "refused", "correct")


@dataclass(frozen=True)
class Verdict:
    """What a client makes of a slice.

    Attributes:
        slice: What was tried: a type of model, and how it was arranged or sliced.
        model_type: Its type.
        layout: How it was written.
        method: How it was sliced.
        is_tied: Whether its head is its embeddings.
        client: The program.
        version: The package that was installed, and its version.
        verdict: `correct` if its logits are those of transformers 5, `wrong` if not, `refused` if it stops with an
            error.
        agreement: Share of equal next tokens, where it ran.
        reason: Why it is not correct.
    """

    slice: str
    model_type: str
    layout: str
    method: str
    is_tied: bool
    client: str
    version: str
    verdict: VerdictName
    agreement: float | None
    reason: str


@functools.cache
def all_verdicts() -> tuple[Verdict, ...]:
    """Return the table."""
    text = (files("slicecli.hub") / "serving.json").read_text(encoding="utf-8")
    return tuple(Verdict(**row) for row in json.loads(text)["verdicts"])


def verdicts_on(model_type: str, layout: str, method: str, is_tied: bool) -> dict[str, Verdict]:
    """Return the verdict of each client that was given such a slice: of several the worst."""
    kind = (model_type, layout, method, is_tied)
    found = [one for one in all_verdicts() if (one.model_type, one.layout, one.method, one.is_tied) == kind]
    ranked = sorted(found, key=lambda one: _WORST_FIRST.index(one.verdict))
    worst: dict[str, Verdict] = {}
    for one in ranked:
        worst.setdefault(one.client, one)
    return dict(sorted(worst.items()))
