"""What is known of a slice before its weights is written first and loaded: what would fail in the end fails at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers

from slicecli.errors import SourceError
from slicecli.family.slice_plan import Width
from slicecli.jobs.options import SliceOptions
from slicecli.jobs.plan import plan_slices
from slicecli.jobs.preparation import rehearse
from slicecli.proof.tiny import random_model, tiny_config
from slicecli.testing.checkpoints import save_checkpoint

LAYOUTS = {"stock": ("llama", "refit"), "shortcuts": ("llama", "slicegpt"), "blocks": ("gpt2", "refit")}


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    """A function that gives a copy of a tiny model with other fields in its config."""
    made: dict[str, Path] = {}

    def make(family, **changes):
        if family not in made:
            folder = tmp_path_factory.mktemp("dense") / family
            made[family] = save_checkpoint(random_model(tiny_config(family, has_head_dim=False)), folder)
        copy = Path(shutil.copytree(made[family], tmp_path_factory.mktemp("copy") / "model"))
        edit(copy / "config.json", **changes)
        return copy

    return make


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def tokens_generated(folder):
    """Load a model as anybody would, and return how many tokens it writes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    made = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=3, min_new_tokens=3, pad_token_id=0)
    return (made if torch.is_tensor(made) else made.sequences).shape[1] - 3


def generation_config(folder):
    """Return what a generation config sets, as loading the model reads it."""
    try:
        found = transformers.GenerationConfig.from_pretrained(folder)
    except OSError:
        found = transformers.GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        )
    return {name: value for name, value in found.to_dict().items() if value and not name.startswith("_")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "changes",
    [
        {"output_attentions": True},
        {"output_attentions": True, "attn_implementation": "eager"},
        {"output_hidden_states": True, "use_cache": False},
    ],
    ids=lambda changes: "-".join(changes),
)
def test_what_a_model_asks_of_its_runs_is_in_the_slice(run, dense, slice_words, tmp_path, layout, changes):
    family, method = LAYOUTS[layout]
    model = dense(family, **changes)
    done = run("slice", model, "--dim", "36", "--method", method, "-o", tmp_path / "out", *slice_words)
    assert done.exit_code == 0, done.stderr
    assert tokens_generated(model) == tokens_generated(tmp_path / "out") == 3
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("dense_config", config).get("output_attentions", False) == changes.get("output_attentions", False)
    assert run("verify", tmp_path / "out").exit_code == 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_generation_config_that_transformers_would_not_save_goes_along(run, dense, slice_words, tmp_path, layout):
    family, method = LAYOUTS[layout]
    model = dense(family)
    (model / "generation_config.json").write_text('{"do_sample": false,   "temperature": 0.3}')
    done = run("slice", model, "--dim", "36", "--method", method, "-o", tmp_path / "out", *slice_words)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "out" / "generation_config.json").read_text() == '{"do_sample": false,   "temperature": 0.3}'


@pytest.mark.parametrize("layout", LAYOUTS)
def test_how_a_model_generates_is_kept_where_only_its_config_says_it(run, dense, slice_words, tmp_path, layout):
    family, method = LAYOUTS[layout]
    model = dense(family, do_sample=True, temperature=0.3, max_length=33)
    (model / "generation_config.json").unlink()
    done = run("slice", model, "--dim", "36", "--method", method, "-o", tmp_path / "out", *slice_words)
    assert done.exit_code == 0, done.stderr
    found, expected = generation_config(tmp_path / "out"), generation_config(model)
    assert (found["do_sample"], found["temperature"], found["max_length"]) == (True, 0.3, 33)
    assert found == expected


@pytest.fixture
def refused(run, slice_words, tmp_path):
    """Slice a model whose weights are gone, which nobody looks for before the refusal; return the sentence."""

    def call(model, *words):
        (model / "model.safetensors").unlink()
        for mode in (["--dry-run"], []):
            done = run("slice", model, "--dim", "36", "-o", tmp_path / "outputs" / "out", *slice_words, *words, *mode)
            assert done.exit_code == 1, done.output
            assert not (tmp_path / "outputs").exists() or os.listdir(tmp_path / "outputs") == []
        sentence = done.stderr.strip().splitlines()[-1]
        assert sentence.startswith("Error: ")
        assert "Traceback" not in done.output
        return sentence

    return call


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_config_that_cannot_be_written(dense, layout, tmp_path):
    family, method = LAYOUTS[layout]
    job = plan_slices(str(dense(family)), [Width(36)], [tmp_path / "out"], SliceOptions(method=method))
    rehearse(job)
    job.slices[0].config.strange = {1, 2}
    with pytest.raises(SourceError, match="The config of a slice of model cannot be written"):
        rehearse(job)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_attention_heads": 7}, "transformers rejects the config of a slice of model"),
        ({"num_hidden_layers": 1}, "parameters at dim 36, but the model has"),
    ],
)
def test_a_config_that_is_not_read_back_as_it_was_meant(refused, dense, monkeypatch, changes, message):
    written = transformers.LlamaConfig.to_json_string
    model = dense("llama")
    monkeypatch.setattr(
        transformers.LlamaConfig, "to_json_string", lambda self: json.dumps(json.loads(written(self)) | changes)
    )
    assert message in refused(model)


def test_a_generation_config_that_keeps_the_model_from_loading(refused, dense):
    model = dense("llama")
    (model / "generation_config.json").write_text('{"watermarking_config": 3}')
    assert "transformers rejects the generation config of model" in refused(model)


def test_a_name_that_no_record_can_hold_is_refused_before_any_pass(run, dense, text_file, tmp_path):
    text = Path(shutil.copy(text_file, tmp_path / "a\tb.jsonl"))
    words = ["--samples", "24", "--seq-len", "32", "--calibration", text]
    done = run("slice", dense("llama"), "--dim", "36", "-o", tmp_path / "out", *words)
    assert done.exit_code == 1
    assert "statistics" not in done.stderr
    assert "The record of the slice cannot be written: $." in done.stderr
    assert "with control or direction characters" in done.stderr
    assert not list(tmp_path.glob("*out*"))


# what an interrupted run has left


@pytest.fixture
def interrupted(run, dense, slice_words, tmp_path, monkeypatch):
    """A model, the words that go on with its interrupted slice, and the unfinished folder."""
    from slicecli.slicing.journal import FileJournal

    saved = FileJournal.offer

    def offer(journal, phase, position, content):
        saved(journal, phase, position, content)
        if phase.startswith("refit") and position == 1:
            raise KeyboardInterrupt

    model = dense("llama")
    words = ["slice", model, "--dim", "36", "-o", tmp_path / "out", "--no-cache", *slice_words, "--resume"]
    with monkeypatch.context() as patch:
        patch.setenv("SLICECLI_JOURNAL_SECONDS", "0")
        patch.setattr(FileJournal, "offer", offer)
        run(*words)
    assert (tmp_path / ".out.incomplete" / ".journal" / "state.json").is_file()
    return model, words, tmp_path / ".out.incomplete"


def test_a_resumed_run_takes_over_what_the_model_has_now(run, interrupted, tmp_path):
    model, words, partial = interrupted
    (partial / "stray.txt").write_text("of nobody")
    (partial / "tokenizer.json").write_text("half")
    (model / "chat_template.jinja").write_text("{{ messages | length }}")
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "done before" in done.stderr
    assert not (tmp_path / "out" / "stray.txt").exists()
    for file in ("tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / file).read_bytes() == (model / file).read_bytes()
    assert run("verify", tmp_path / "out").exit_code == 0


def test_what_an_interrupted_run_has_computed_survives_a_refusal(run, interrupted):
    model, words, partial = interrupted
    whole = (model / "generation_config.json").read_bytes()
    (model / "generation_config.json").write_text('{"watermarking_config": 3}')
    assert run(*words).exit_code == 1
    assert (partial / ".journal" / "state.json").is_file()
    (model / "generation_config.json").write_bytes(whole)
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "done before" in done.stderr


def test_a_refusal_leaves_nothing_where_there_is_nothing_to_go_on_with(run, dense, slice_words, tmp_path):
    model = dense("llama")
    (model / "generation_config.json").write_text('{"watermarking_config": 3}')
    assert run("slice", model, "--dim", "36", "-o", tmp_path / "out", "--resume", *slice_words).exit_code == 1
    assert [path for path in tmp_path.iterdir() if "out" in path.name] == []
