"""Slices written in another class than their family's own: which one, that it is the same slice, and conversion."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
import transformers
from conftest import BASE, tiny_model
from safetensors.torch import load_file

from slicecli.adapters import PortableClass, select_adapter
from slicecli.checkpoint.weight_writer import ShardWriter
from slicecli.errors import PluginError, RequestError
from slicecli.family import serving
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.serving import NOT_MEASURED, SERVERS, SliceKind, Verdict, verdicts_on
from slicecli.family.slice_plan import Width
from slicecli.family.written_class import SliceClasses, WrittenClass
from slicecli.proof.declaration import logits, relative_error
from slicecli.proof.tiny import random_model
from slicecli.testing.checkpoints import save_checkpoint

IDS = torch.randint(2, 258, (4, 20), generator=torch.Generator().manual_seed(0))


def classes_of(family, wish="auto", **changes):
    fields = tiny_model(family, **changes).config.to_dict()
    return SliceClasses.of(Dimensions(select_adapter(fields, plugins().adapters), fields), fields["model_type"], wish)


# which class


def test_auto_keeps_a_class_that_runs_everywhere():
    assert classes_of("llama").at(36).model_type == "llama"
    assert classes_of("qwen3").at(36).model_type == "qwen3"


def test_auto_takes_a_portable_class_where_the_own_one_fails():
    classes = classes_of("qwen2")
    assert classes.at(36).model_type == "llama"
    assert "qwen2 is wrong in vLLM and refused in llama.cpp" in classes.note(classes.at(36), 36)


def test_auto_takes_the_class_that_can_have_a_dim():
    assert classes_of("llama").at(37).model_type == "mistral"
    assert classes_of("phi3").at(37).model_type == "mistral"


def test_auto_keeps_the_own_class_where_no_other_runs_and_names_the_dims_that_do():
    classes = classes_of("llama", model_type="granite", attention_bias=True)
    assert classes.at(37).model_type == "granite"
    assert "at dim 36 or 40 it can be written as llama" in classes.note(classes.at(37), 37)


def test_own_and_a_name_are_taken_at_their_word():
    assert classes_of("qwen2", "own").at(36).model_type == "qwen2"
    assert classes_of("qwen2", "seed_oss").at(36).model_type == "seed_oss"


@pytest.mark.parametrize("wish", ["gpt2", "qwen2", ""])
def test_a_class_that_is_not_declared_is_refused_with_those_that_are(wish):
    with pytest.raises(RequestError, match="own, llama, seed_oss"):
        classes_of("qwen2", wish)


def test_a_class_that_does_not_compute_the_same_for_a_config_is_refused_with_the_reason():
    with pytest.raises(RequestError, match="biases have no place in Mistral"):
        classes_of("llama-biased", "mistral")


def test_a_model_with_code_of_its_own_keeps_its_class():
    own = classes_of("qwen2").own.own
    assert [one.model_type for one in SliceClasses.of(own, "qwen2", has_own_code=True).available] == ["qwen2"]


def test_a_multiple_is_looked_for_in_every_class_that_runs():
    classes = classes_of("llama", num_attention_heads=12, num_key_value_heads=12)
    dim, written = classes.resolve(Width(sparsity=0.2, multiple_of=10), 4)
    assert (dim, written.model_type) == (40, "mistral")


def test_a_class_that_no_adapter_serves_is_said_to_be():
    with pytest.raises(PluginError, match="which no adapter serves"):
        WrittenClass.of_portable(classes_of("llama").own.own, PortableClass("nobodys"))


def test_other_activations_than_silu_run_in_no_program_as_llama():
    assert classes_of("llama", hidden_act="gelu").own.servers == {"vLLM": "refused", "llama.cpp": "wrong"}


def test_a_program_that_always_ties_is_wrong_for_a_head_apart():
    kinds = [SliceKind("gemma", "stock", "refit", tied, "gelu_pytorch_tanh") for tied in (True, False)]
    assert [verdicts_on(kind)["llama.cpp"].verdict for kind in kinds] == ["correct", "wrong"]


def test_auto_follows_the_table_that_cards_are_written_from(monkeypatch):
    kind = SliceKind("llama", "stock", "refit", False, "silu")
    rows = [Verdict("one", kind, client, "package 1", "wrong", 0.5, "because") for client in SERVERS]
    rows += [dataclasses.replace(one, kind=dataclasses.replace(kind, model_type="mistral")) for one in rows]
    rows = [one if one.kind == kind else dataclasses.replace(one, verdict="correct", reason="") for one in rows]
    monkeypatch.setattr(serving, "all_verdicts", lambda: tuple(rows))
    assert classes_of("llama").at(36).model_type == "mistral"
    assert classes_of("llama").own.misfits == "wrong in vLLM and wrong in llama.cpp"


def test_nothing_measured_is_of_a_class_of_the_models_own():
    own = SliceClasses.of(classes_of("llama").own.own, "llama", has_own_code=True).own
    assert set(own.servers.values()) == {NOT_MEASURED}


# slices


@pytest.fixture(scope="module")
def sliced(checkpoints, tmp_path_factory):
    """Return a function that gives a slice, made once."""
    from click.testing import CliRunner

    from slicecli.cli import group
    from slicecli.testing.checkpoints import nonsense_text

    parent = tmp_path_factory.mktemp("slices")
    text = nonsense_text(parent / "text.jsonl")
    made = {}

    def make(family, dim=36, *words):
        key = (family, dim, *words)
        if key not in made:
            folder = parent / f"slice{len(made)}"
            options = ["--calibration", text, "--samples", "24", "--seq-len", "32", "--dim", dim, "-o", folder, *words]
            given = [str(word) for word in ["slice", checkpoints(family), *options]]
            done = CliRunner().invoke(group, given)
            assert done.exit_code == 0, done.output
            made[key] = folder, done.output
        return made[key]

    return make


def model_of(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def record_of(folder):
    return json.loads((folder / "slicecli.json").read_text())


PAIRS = [
    ("qwen2", "llama"),
    ("qwen2", "seed_oss"),
    ("phi3", "llama"),
    ("phi3", "mistral"),
    ("llama", "mistral"),
    ("llama-tied", "mistral"),
]


@pytest.mark.parametrize(("family", "name"), PAIRS)
def test_a_slice_computes_the_same_in_every_class(sliced, family, name):
    own, other = sliced(family, 36, "--write-as", "own")[0], sliced(family, 36, "--write-as", name)[0]
    assert model_of(other).config.model_type == name
    assert relative_error(logits(model_of(other), IDS), logits(model_of(own), IDS)) < 1e-5


def test_a_slice_says_in_one_line_what_it_is_written_as(sliced):
    output = sliced("qwen2")[1]
    assert output.count("Written as llama, which computes the same as qwen2 and runs in vLLM and llama.cpp") == 1
    assert "Written as" not in sliced("llama")[1]


def test_config_record_and_card_name_the_class(sliced):
    folder, _ = sliced("qwen2")
    config, record = json.loads((folder / "config.json").read_text()), record_of(folder)
    assert (config["model_type"], config["architectures"]) == ("llama", ["LlamaForCausalLM"])
    assert not {"use_sliding_window", "max_window_layers", "layer_types", "sliding_window"} & config.keys()
    assert (record["written_type"], record["source"]["model_type"]) == ("llama", "qwen2")
    assert "--write-as llama" in record["command"]
    assert "stock `llama` checkpoint: its base model is of type `qwen2`" in (folder / "README.md").read_text()


def test_a_tied_slice_stays_tied_in_another_class(sliced):
    folder, _ = sliced("llama-tied", 37)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert model_of(folder).config.model_type == "mistral"


@pytest.mark.parametrize(("family", "dim"), [("qwen2", 36), ("phi3", 36), ("llama", 37), ("llama-tied", 37)])
def test_a_slice_in_another_class_verifies(run, sliced, family, dim):
    done = run("verify", sliced(family, dim)[0])
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize(("family", "dim"), [("qwen2", 36), ("phi3", 36), ("llama", 37)])
def test_an_estimate_counts_what_is_written(run, checkpoints, sliced, family, dim):
    (row,) = json.loads(run("estimate", checkpoints(family), "--dim", dim, "--format", "json").stdout)["estimates"]
    record = record_of(sliced(family, dim)[0])
    assert row["legal"] is True
    assert (row["parameters"], row["written_type"]) == (record["parameters"]["sliced"], record["written_type"])


def test_an_estimate_of_a_slice_is_of_its_dense_model(run, checkpoints, sliced):
    dense, of_slice = (
        json.loads(run("estimate", model, "--dim", "36", "--format", "json").stdout)
        for model in (checkpoints("qwen2"), sliced("qwen2")[0])
    )
    assert of_slice["dense"]["parameters"] == dense["dense"]["parameters"]
    assert of_slice["model_type"] == "qwen2"


def test_a_slice_is_sliced_again_as_what_it_is_written_in(run, sliced, slice_words, tmp_path):
    done = run("slice", sliced("qwen2")[0], "--dim", "24", "-o", tmp_path / "again", *slice_words)
    assert done.exit_code == 0, done.output
    record = record_of(tmp_path / "again")
    assert (record["source"]["model_type"], record["written_type"], record["adapter"]) == ("llama", "llama", "llama")


def test_inspect_lists_the_classes_with_their_dims(run, checkpoints):
    found = json.loads(run("inspect", checkpoints("llama"), "--format", "json").stdout)["classes"]
    assert [(one["model_type"], one["legal_dims"]["multiple_of"]) for one in found] == [("llama", 4), ("mistral", 1)]
    assert "multiples of 4" in run("inspect", checkpoints("llama")).stdout


def test_inspect_says_of_each_dim_where_its_slice_would_run(run, checkpoints):
    done = run("inspect", checkpoints("qwen2"), "--dim", "36,37", "--format", "json")
    found = {one["dim"]: one for one in json.loads(done.stdout)["slices"]}
    assert [one["written_type"] for one in found.values()] == ["llama", "seed_oss"]
    assert {one["clients"][client]["verdict"] for one in found.values() for client in SERVERS} == {"correct"}
    assert all(one["version"] for one in found[36]["clients"].values())
    shown = run("inspect", checkpoints("qwen2"), "--dim", "36,37")
    assert "qwen2 is refused in vLLM" in shown.stderr or "qwen2 is wrong in vLLM" in shown.stderr
    assert found[36]["clients"]["vLLM"]["version"] in shown.stdout


def test_inspect_knows_where_slices_with_code_run(run, tiny_checkpoint):
    (found,) = json.loads(run("inspect", tiny_checkpoint("opt"), "--dim", "36", "--format", "json").stdout)["slices"]
    assert found["written_type"] == "slicecli"
    assert (found["clients"]["vLLM"]["verdict"], found["clients"]["llama.cpp"]["verdict"]) == ("correct", "refused")


def test_inspect_refuses_a_dim_that_no_class_can_have(run, checkpoints):
    done = run("inspect", checkpoints("qwen3"), "--dim", "4800")
    assert done.exit_code != 0 and "47" in done.stderr


def test_a_class_needs_a_slice_without_custom_code(run, checkpoints, slice_words):
    words = ("--dim", "36", "--write-as", "llama", "--method", "slicegpt", "--dry-run")
    done = run("slice", checkpoints("qwen2"), *words, *slice_words)
    assert done.exit_code != 0 and "requires a slice without custom code" in done.output


def test_an_interrupted_slice_in_another_class_is_resumed(run, checkpoints, sliced, slice_words, tmp_path, monkeypatch):
    monkeypatch.setenv("SLICECLI_JOURNAL_SECONDS", "0")
    write = ShardWriter.write

    def interrupted(self, name, tensor):
        if name == "model.layers.2.self_attn.q_proj.weight":
            raise KeyboardInterrupt
        write(self, name, tensor)

    words = ("slice", checkpoints("phi3"), "--dim", "36", "-o", tmp_path / "out", *slice_words)
    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", interrupted)
        assert run(*words).exit_code != 0
    done = run(*words, "--resume")
    assert done.exit_code == 0, done.output
    assert record_of(tmp_path / "out")["weights"] == record_of(sliced("phi3")[0])["weights"]


def test_a_sweep_writes_each_dim_in_the_class_that_can_have_it(run, checkpoints, slice_words, text_file, tmp_path):
    words = ("--dims", "36,37", "--keep-slices", "--perplexity", text_file, "--limit", "4", "-o", tmp_path / "sweep")
    done = run("sweep", checkpoints("llama"), *words, *slice_words)
    assert done.exit_code == 0, done.output
    written = [record_of(tmp_path / "sweep" / "slices" / f"dim{dim}")["written_type"] for dim in (36, 37)]
    assert written == ["llama", "mistral"]


# conversion


@pytest.fixture
def own_slice(sliced, tmp_path):
    """A slice in its family's own class that a test may change."""
    return shutil.copytree(sliced("qwen2", 36, "--write-as", "own")[0], tmp_path / "own")


def test_a_converted_slice_has_the_weights_of_one_written_so(run, own_slice, sliced, tmp_path):
    done = run("convert", own_slice, "--write-as", "llama", "-o", tmp_path / "out", "--format", "json")
    assert done.exit_code == 0, done.output
    assert record_of(tmp_path / "out")["weights"] == record_of(sliced("qwen2")[0])["weights"]
    assert json.loads(done.stdout)["difference"] < 1e-6


def test_a_converted_slice_verifies_and_names_its_class(run, own_slice):
    (own_slice / "notes.txt").write_text("mine")
    assert run("convert", own_slice, "--write-as", "llama").exit_code == 0
    done, record = run("verify", own_slice), record_of(own_slice)
    assert done.exit_code == 0, done.output
    assert (record["written_type"], record["parameters"]["sliced"]) == ("llama", 52920)
    assert record["command"].endswith("--write-as llama")
    assert (own_slice / "notes.txt").read_text() == "mine"


def test_a_dim_that_a_class_cannot_have_is_not_converted(run, checkpoints, slice_words, tmp_path):
    run("slice", checkpoints("qwen2"), "--dim", "37", "--write-as", "own", "-o", tmp_path / "odd", *slice_words)
    before = {path.name: path.read_bytes() for path in (tmp_path / "odd").iterdir()}
    done = run("convert", tmp_path / "odd", "--write-as", "llama")
    assert done.exit_code != 0 and "multiples of 4" in done.output
    assert {path.name: path.read_bytes() for path in (tmp_path / "odd").iterdir()} == before


def test_a_conversion_that_changes_the_logits_leaves_the_slice_alone(run, own_slice, monkeypatch):
    before = (own_slice / "model.safetensors").read_bytes()
    write = ShardWriter.write
    doubled = "model.layers.0.self_attn.v_proj.weight"
    monkeypatch.setattr(
        ShardWriter, "write", lambda self, name, tensor: write(self, name, tensor * (2 if name == doubled else 1))
    )
    done = run("convert", own_slice, "--write-as", "llama")
    assert done.exit_code != 0 and "does not compute the same" in done.output
    assert (own_slice / "model.safetensors").read_bytes() == before


def test_what_is_no_slice_is_not_converted(run, checkpoints):
    done = run("convert", checkpoints("qwen2"), "--write-as", "llama")
    assert done.exit_code != 0 and "Pass the folder of a slice" in done.output


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_granite_slice_in_half_precision_converts(run, slice_words, tmp_path, dtype):
    config = transformers.AutoConfig.for_model(
        **BASE,
        model_type="granite",
        embedding_multiplier=12.0,
        residual_multiplier=0.22,
        logits_scaling=8.0,
        attention_multiplier=0.1,
    )
    save_checkpoint(random_model(config).to(dtype), tmp_path / "granite")
    words = ("--dim", "36", "--write-as", "own", "-o", tmp_path / "own", *slice_words)
    assert run("slice", tmp_path / "granite", *words).exit_code == 0
    done = run("convert", tmp_path / "own", "--write-as", "mistral", "--format", "json")
    assert done.exit_code == 0, done.output
    assert run("verify", tmp_path / "own").exit_code == 0
