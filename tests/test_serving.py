"""What is said of programs that serve slices is what was found in them."""

from __future__ import annotations

import dataclasses

import pytest

from slicecli.family import serving
from slicecli.family.serving import (
    NOT_MEASURED,
    SliceKind,
    Verdict,
    all_verdicts,
    describe_verdicts,
    verdicts_on,
)

LLAMA = SliceKind("llama", "stock", "refit", False, "silu")


@pytest.fixture
def found(monkeypatch):
    """A function that replaces the table by verdicts on Llama, each in one client."""

    def put(*verdicts):
        rows = [Verdict("llama", LLAMA, client, "package 1", verdict, None, "because") for client, verdict in verdicts]
        monkeypatch.setattr(serving, "all_verdicts", lambda: tuple(rows))

    return put


def test_of_several_arrangements_the_worst_counts(found):
    found(("a", "correct"), ("a", "wrong"), ("a", "refused"), ("b", "correct"), ("b", "refused"))
    assert {client: one.verdict for client, one in verdicts_on(LLAMA).items()} == {"a": "wrong", "b": "refused"}


@pytest.mark.parametrize("other", [{"model_type": "qwen2"}, {"is_tied": True}, {"activation": "relu"}])
def test_a_kind_that_was_not_tried_has_no_verdict(found, other):
    found(("a", "correct"))
    kind = dataclasses.replace(LLAMA, **other)
    assert verdicts_on(kind) == {}
    assert {one["verdict"] for one in describe_verdicts(verdicts_on(kind)).values()} == {NOT_MEASURED}


def test_every_verdict_of_the_table_is_sound():
    for one in all_verdicts():
        assert one.verdict in ("correct", "wrong", "refused")
        assert (one.agreement is None) == (one.verdict == "refused")
        assert bool(one.reason) == (one.verdict != "correct")
        assert one.version.split()[1][0].isdigit()


def test_no_slice_has_two_verdicts_of_one_client():
    pairs = [(one.slice, one.client) for one in all_verdicts()]
    assert len(pairs) == len(set(pairs)) > 0
