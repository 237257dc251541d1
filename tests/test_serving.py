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
from slicecli.testing import serving_client

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


# a slice in a program that serves it

FAKE_VLLM = """
import os
from types import SimpleNamespace as Plain

import torch
import transformers


class SamplingParams:
    def __init__(self, **settings):
        assert settings["temperature"] == 0


class LLM:
    def __init__(self, folder, dtype, trust_remote_code, **settings):
        assert (dtype, trust_remote_code) == ("float32", False)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def generate(self, prompts, settings):
        if os.environ["FAULT"] == "refused":
            raise ValueError("no such class")
        with torch.no_grad():
            logits = self.model(torch.tensor([prompts[0]["prompt_token_ids"]])).logits[0]
        values, best = logits.log_softmax(-1).max(-1)
        if os.environ["FAULT"] == "wrong":
            best = (best + (torch.arange(len(best)) % 2)) % logits.shape[-1]
        found = [{token: Plain(logprob=value)} for token, value in zip(best.tolist(), values.tolist())]
        return [Plain(prompt_logprobs=[None, *found[:-1]], outputs=[Plain(logprobs=[found[-1]])])]
"""


@pytest.fixture
def served(checkpoints, run, slice_words, tmp_path, monkeypatch):
    """A function that runs the test of the suite on a slice, in a program that has a fault."""
    from slicecli.testing.slice_tests import SliceTests, SliceUnderTest

    done = run("slice", checkpoints("llama"), "--dim", "36", "-o", tmp_path / "slice", *slice_words)
    assert done.exit_code == 0, done.output
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def test(program="vllm", fault=""):
        monkeypatch.setenv("FAULT", fault)
        subject = SliceUnderTest.find(str(tmp_path / "slice"), program=program)
        SliceTests().test_the_program_that_serves_it_predicts_as_transformers_does(subject, lambda *_: None)

    return test


@pytest.mark.slow
def test_the_suite_runs_a_slice_in_the_program_that_serves_it(served):
    served()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message"), [("wrong", "only 50% of the next tokens"), ("refused", "ValueError: no such class")]
)
def test_a_program_that_does_not_compute_the_same_fails_the_suite(served, fault, message):
    with pytest.raises(AssertionError, match=message):
        served(fault=fault)


def test_a_program_that_is_not_installed_skips_the_suite_with_the_reason(served, monkeypatch):
    monkeypatch.setitem(serving_client.MODULES, "llama.cpp", ("no_such_module",))
    with pytest.raises(pytest.skip.Exception, match=r"llama.cpp is not installed here .* pip install xllamacpp"):
        served("llama.cpp")
