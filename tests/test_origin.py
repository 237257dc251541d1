"""A slice seen as its dense model: what is told of it is what is told of the dense model itself."""

from __future__ import annotations

import json

import pytest

import slicecli


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llama", "refit"),
        ("llama-tied", "refit"),
        ("llama-tied", "slicegpt"),
        ("gpt2", "refit"),
        ("opt", "refit"),
        ("granite", "refit"),
    ],
)
def test_an_estimate_of_a_slice_is_that_of_its_dense_model(run, tiny_checkpoint, slice_words, tmp_path, family, method):
    if family.startswith("llama"):
        tied = {"tie_word_embeddings": True} if "tied" in family else {}
        dense = tiny_checkpoint("llama", **tied)
    else:
        dense = tiny_checkpoint(family)
    hidden_size = json.loads(run("inspect", dense, "--format", "json").stdout)["hidden_size"]
    dim = 3 * hidden_size // 4
    output = tmp_path / "slice"
    made = run("slice", dense, "--dim", dim, "--method", method, "-o", output, *slice_words)
    assert made.exit_code == 0, made.output
    words = ["--dim", hidden_size // 2, "--method", method, "--dense-perplexity", "10", "--format", "json"]
    of_dense, of_slice = (run("estimate", model, *words) for model in (dense, output))
    assert of_slice.exit_code == 0, of_slice.output
    assert "is a slice of" in of_slice.stderr
    expected, found = json.loads(of_dense.stdout), json.loads(of_slice.stdout)
    for document in (expected, found):
        document.pop("notes")
    assert found == expected


def test_the_curve_of_a_slice_predicts_unless_something_else_is_said(
    run, checkpoints, slice_words, text_file, tmp_path
):
    words = [*slice_words, "--perplexity", text_file, "--limit", "4", "--keep-slices"]
    swept = run("sweep", checkpoints(), "--dims", "40,36,32", "-o", tmp_path / "sweep", *words)
    assert swept.exit_code == 0, swept.output
    folder = tmp_path / "sweep" / "slices" / "dim36"
    document = json.loads(run("estimate", folder, "--dim", "36,24", "--format", "json").stdout)
    curve = json.loads((folder / "slicecli.json").read_text())["curve"]["curves"][0]
    fitted = {point["dim"]: point["fitted"] for point in curve["points"]}
    one, other = (estimate["perplexity"] for estimate in document["estimates"])
    assert one["value"] == pytest.approx(fitted[36], rel=1e-6)
    assert "published with the slice" in one["source"]
    assert other["is_outside"]
    # the table of the card says the same
    (prediction,) = json.loads((folder / "slicecli.json").read_text())["predictions"]
    rows = {row["dim"]: row for row in prediction["estimates"]}
    assert rows[24]["value"] == pytest.approx(other["value"], rel=1e-6)
    assert rows[24]["parameters"] == document["estimates"][1]["parameters"]
    by_relation = run(
        "estimate", folder, "--dim", "24", "--relation", "paper", "--text", text_file.name, "--format", "json"
    )
    assert json.loads(by_relation.stdout)["estimates"][0]["perplexity"]["relation"] == "paper"


def test_a_model_with_a_damaged_record_is_estimated_as_itself(run, checkpoint_copy):
    (checkpoint_copy / "slicecli.json").write_text('{"source": {"model": "x"}}')
    result = run("estimate", checkpoint_copy, "--dim", "24", "--format", "json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["model"] == checkpoint_copy.name
    assert "is a slice of" not in result.stderr


def test_loading_gives_model_and_tokenizer(embedded_model):
    model, tokenizer = slicecli.load(str(embedded_model), device_map="cpu")
    text, count = slicecli.api.generate_text(model, tokenizer, "The", max_new_tokens=5)
    assert count == 5
    assert text
    assert not model.training
    with pytest.raises(slicecli.errors.SourceError):
        slicecli.load("./nothing-here")
