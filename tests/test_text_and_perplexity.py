"""Documents, packed rows, and the perplexity of them."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch
from conftest import tiny_model

from slicecli.data.packing import calibration_rows, evaluation_rows, monotony
from slicecli.data.text import Text, read_text
from slicecli.errors import TextError, WeightsError
from slicecli.evaluation.perplexity import measure_perplexity
from slicecli.testing import byte_tokenizer

DOCUMENTS = Text("t", tuple(f"document {number} says é and {'x' * number}" for number in range(60)))


def test_rows_are_the_documents_end_to_end_with_their_own_first_token():
    tokenizer = byte_tokenizer()
    rows = evaluation_rows(DOCUMENTS, tokenizer, 16)
    expected = [token for document in DOCUMENTS.documents for token in tokenizer(document)["input_ids"]]
    assert rows.ids.flatten().tolist() == expected[: rows.tokens]
    assert len(expected) - rows.tokens < 16
    assert rows.ids.flatten().tolist().count(0) == 60


def test_documents_without_special_tokens_are_kept_apart_by_a_blank_line():
    rows = evaluation_rows(DOCUMENTS, byte_tokenizer(adds_bos=False), 16)
    text = byte_tokenizer().decode(rows.ids.flatten())
    assert text.startswith("document 0 says é and \n\ndocument 1 says")


def test_calibration_is_a_seeded_draw():
    tokenizer = byte_tokenizer()
    one, same, other = (calibration_rows(DOCUMENTS, tokenizer, 20, 16, seed) for seed in (1, 1, 2))
    assert torch.equal(one.ids, same.ids)
    assert one.digest == same.digest
    assert not torch.equal(one.ids, other.ids)
    assert one.digest != other.digest
    assert one.ids.shape == (20, 16)


def test_rows_of_a_single_text_come_from_all_of_it():
    text = Text("t", ("".join(chr(97 + index // 400) for index in range(26 * 400)),))
    rows = calibration_rows(text, byte_tokenizer(), 60, 16, seed=0)
    assert len(set(rows.ids[:, 0].tolist())) > 15


def test_no_row_is_drawn_twice():
    text = Text("t", (" ".join(str(number) for number in range(3000)),))
    rows = calibration_rows(text, byte_tokenizer(), 200, 16, seed=0)
    assert len({tuple(row) for row in rows.ids.tolist()}) == 200


def test_a_text_shorter_than_a_row_is_refused_with_its_length():
    with pytest.raises(TextError, match="4 tokens, fewer than one row of 16"):
        calibration_rows(Text("t", ("abc",)), byte_tokenizer(), 5, 16, 0)


PARAGRAPH = "It was the best of times, it was the worst of times, it was the age of wisdom. "


@pytest.mark.parametrize(
    ("documents", "length", "reason"),
    [
        (["a" * 3000], 32, "it has 1 different tokens in 768"),
        (["ab" * 3000], 32, "it has 2 different tokens in 768"),
        ([PARAGRAPH[:31]] * 100, 32, "1 of its 24 rows are different"),
        (["a" * 60 + letter for letter in "bcdefghijklmnopqrstuvwxyz"] * 9, 32, "one token makes up"),
        ([PARAGRAPH * 60], 64, "70 of its 1,176 stretches"),
        # shorter rows than the stretches that are compared
        ([PARAGRAPH * 60], 4, "of its"),
        ([PARAGRAPH], 4, ""),
        (["".join(random.Random(0).choices("abcdefghijklm ", k=3000))], 32, ""),
    ],
)
def test_a_monotonous_text_is_noticed(documents, length, reason):
    tokenizer = byte_tokenizer(adds_bos=len(documents) == 100)
    rows = calibration_rows(Text("x", tuple(documents)), tokenizer, 24 if length > 4 else 300, length, seed=0)
    found = monotony(rows)
    assert reason in found if reason else found == ""


def test_a_monotonous_text_is_warned_of(run, checkpoints, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("a" * 2000)
    words = [checkpoints(), "--calibration", text, "--samples", "24", "--seq-len", "32"]
    for command in (["slice", "--dim", "36", "-o", tmp_path / "out"], ["spectrum", "-o", tmp_path / "spectrum.json"]):
        done = run("-q", command[0], *words, *command[1:])
        assert done.exit_code == 0, done.output
        assert "Warning: The calibration text is repetitive: it has 1 different tokens in 768." in done.stderr


def test_files_are_read_as_one_text_or_as_documents(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\ntwo", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "more": 1}\n', encoding="utf-8")
    assert read_text(str(tmp_path / "a.txt"), "calibration") == Text("a.txt", ("one\n\ntwo",))
    assert read_text(str(tmp_path / "b.jsonl"), "evaluation") == Text("b.jsonl", ("one", "two"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"txt": 1}\n', "Line 2"),
        ("a.jsonl", b'{"text": "one"}\n{"text"', "Line 2"),
        ("a.jsonl", b"[1]\n", "Line 1"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt", b" \n", "empty"),
        ("a.jsonl", b"", "empty"),
        ("a.csv", b"text\none\n", "neither .txt nor .jsonl"),
    ],
)
def test_bad_files_are_named_with_what_is_wrong(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(TextError, match=message):
        read_text(str(tmp_path / name), "calibration")


@pytest.mark.parametrize("name", ["missing.txt", "./missing", "/nowhere/x.jsonl"])
def test_a_missing_file_is_not_looked_for_on_the_hub(name):
    with pytest.raises(TextError, match="no text file"):
        read_text(name, "calibration")


def test_perplexity_equals_a_plain_computation_in_float64():
    model = tiny_model("llama")
    rows = evaluation_rows(DOCUMENTS, byte_tokenizer(), 16)
    with torch.no_grad():
        logits = model(rows.ids).logits[:, :-1].double()
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows.ids[:, 1:].flatten(), reduction="none")
    found = measure_perplexity(model, rows, batch_size=3)
    assert found.nll == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found.value == pytest.approx(math.exp(found.nll))
    assert found.tokens == losses.numel()
    row_means = losses.view(len(rows.ids), -1).mean(1)
    assert found.stderr == pytest.approx(found.value * float(row_means.std()) / math.sqrt(len(row_means)), rel=1e-5)


def test_bits_per_byte_count_the_bytes_of_the_text():
    """A byte tokenizer with one more token per document: bits per byte follow from bits per token."""
    model = tiny_model("llama")
    rows = evaluation_rows(DOCUMENTS, byte_tokenizer(), 16)
    size = sum(len(document.encode()) for document in DOCUMENTS.documents)
    found = measure_perplexity(model, rows, batch_size=8)
    assert found.bits_per_byte == pytest.approx(found.nll / math.log(2) * (size + 60) / size)


def test_the_batch_size_does_not_change_the_result():
    model = tiny_model("qwen3")
    rows = evaluation_rows(DOCUMENTS, byte_tokenizer(), 16)
    one, many = measure_perplexity(model, rows, 1), measure_perplexity(model, rows, 50)
    assert one.nll == pytest.approx(many.nll, rel=1e-6)


def test_a_single_row_has_no_standard_error():
    rows = evaluation_rows(DOCUMENTS, byte_tokenizer(), 16, samples=1)
    found = measure_perplexity(tiny_model("llama"), rows, 4)
    assert found.model_dump()["stderr"] is None
    assert json.loads(json.dumps(found.model_dump()))["tokens"] == 15


def test_logits_that_are_not_finite_are_an_error():
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight[0, 0] = math.nan
    with pytest.raises(WeightsError, match="NaN"):
        measure_perplexity(model, evaluation_rows(DOCUMENTS, byte_tokenizer(), 16), 4)
