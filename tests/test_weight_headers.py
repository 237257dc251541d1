"""What identifies, describes and counts a model is what is loaded from its folder."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file, save_file

from slicecli.checkpoint.source import Source
from slicecli.checkpoint.weight_headers import weight_file_names
from slicecli.proof.tiny import random_model, tiny_config
from slicecli.testing import save_checkpoint

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD = "model-00001-of-00001.safetensors"
SIZES = ("--samples", "8", "--seq-len", "32")


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_weights(folder, file=SINGLE, **changes):
    """Save the tensors of a file again: None removes one, a tensor replaces or adds it."""
    tensors = {**load_file(folder / file), **{name.replace("__", "."): value for name, value in changes.items()}}
    tensors = {name: value for name, value in tensors.items() if value is not None}
    save_file(tensors, folder / file, metadata={"format": "pt"})


def add_index(folder):
    """Put an index and its shard beside the single file, as an older save leaves them."""
    tensors = load_file(folder / SINGLE)
    save_file(tensors, folder / SHARD, metadata={"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, SHARD)}))


@pytest.fixture
def tied(checkpoints, tmp_path):
    return shutil.copytree(checkpoints("llama-tied"), tmp_path / "tied")


# which files


def test_the_files_are_those_that_transformers_reads(checkpoint_copy):
    from transformers import modeling_utils

    add_index(checkpoint_copy)
    config = json.loads((checkpoint_copy / "config.json").read_text())
    for named, removed in ((None, None), (INDEX, None), (SHARD, None), (None, SINGLE)):
        if removed:
            (checkpoint_copy / removed).unlink()
        fields = config if named is None else {**config, "transformers_weights": named}
        read, _ = modeling_utils._get_resolved_checkpoint_files(
            str(checkpoint_copy), None, None, True, None, False, named
        )
        names = [file.rpartition("/")[2] for file in ([read] if isinstance(read, str) else read)]
        assert weight_file_names(checkpoint_copy, fields) == names


@pytest.mark.parametrize("name", ["../elsewhere.safetensors", "/model.safetensors", "weights.bin", 3, ""])
def test_a_config_that_names_weights_elsewhere_is_refused(run, checkpoint_copy, text_file, tmp_path, name):
    edit_config(checkpoint_copy, transformers_weights=name)
    done = run("slice", checkpoint_copy, "--dim", "36", "-o", tmp_path / "o", "--calibration", text_file, *SIZES)
    assert done.exit_code == 1
    assert "transformers_weights" in done.stderr


def test_an_index_of_absent_shards_beside_a_whole_file_does_no_harm(run, checkpoint_copy, text_file, tmp_path):
    add_index(checkpoint_copy)
    (checkpoint_copy / SHARD).unlink()
    done = run("slice", checkpoint_copy, "--dim", "36", "-o", tmp_path / "o", "--calibration", text_file, *SIZES)
    assert done.exit_code == 0, done.stderr


def test_statistics_of_replaced_weights_are_collected_anew(run, checkpoint_copy, text_file, tmp_path):
    add_index(checkpoint_copy)
    words = ("slice", checkpoint_copy, "--dim", "36", "--calibration", text_file, *SIZES, "--cache-dir", tmp_path / "c")

    def statistics():
        done = run(*words, "-o", tmp_path / "o", "--overwrite", "--format", "json")
        return json.loads(done.stdout)["statistics"]

    assert statistics() == "collected"
    assert statistics() == "cache"
    save_checkpoint(tiny_model("llama", seed=7), tmp_path / "other")
    shutil.copyfile(tmp_path / "other" / SINGLE, checkpoint_copy / SINGLE)
    assert statistics() == "collected"


def test_changed_code_is_another_model(checkpoint_copy):
    (checkpoint_copy / "modeling_own.py").write_text("scale = 1\n")
    before = Source.find(str(checkpoint_copy), trust_remote_code=True).identity()
    (checkpoint_copy / "modeling_own.py").write_text("scale = 2\n")
    assert Source.find(str(checkpoint_copy), trust_remote_code=True).identity() != before


# what a model is


def test_content_is_the_same_however_a_model_is_named_divided_and_saved(checkpoint_copy, tmp_path):
    other = shutil.copytree(checkpoint_copy, tmp_path / "other")
    tensors = load_file(other / SINGLE)
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, some in files.items():
        save_file({name: tensors[name] for name in some}, other / file, metadata={"format": "pt"})
    places = {name: file for file, some in files.items() for name in some}
    (other / INDEX).write_text(json.dumps({"weight_map": places}))
    (other / SINGLE).unlink()
    edit_config(other, transformers_version="4.0.0")
    assert Source.find(str(other)).content == Source.find(str(checkpoint_copy)).content


@pytest.mark.parametrize("whole_bytes", [64_000_000, 0])
def test_content_tells_a_trained_tensor(checkpoint_copy, monkeypatch, whole_bytes):
    monkeypatch.setattr("slicecli.checkpoint.weight_headers.WHOLE_BYTES", whole_bytes)
    before = Source.find(str(checkpoint_copy)).content
    name = "model.layers.1.mlp.up_proj.weight"
    change_weights(checkpoint_copy, **{name: load_file(checkpoint_copy / SINGLE)[name] * 1.001})
    assert Source.find(str(checkpoint_copy)).content != before


def test_content_tells_another_config(checkpoint_copy):
    before = Source.find(str(checkpoint_copy)).content
    edit_config(checkpoint_copy, rms_norm_eps=1e-3)
    assert Source.find(str(checkpoint_copy)).content != before


def test_a_baseline_of_the_same_folder_name_is_not_the_dense_model(run, text_file, tmp_path):
    for number in (1, 2):
        save_checkpoint(tiny_model("llama", seed=number), tmp_path / f"run{number}" / "model")
    sliced = tmp_path / "slice"
    calibration = ("--calibration", text_file, *SIZES)
    assert run("slice", tmp_path / "run1" / "model", "--dim", "36", "-o", sliced, *calibration).exit_code == 0

    def recorded_dense(baseline):
        words = ("eval", sliced, "--baseline", baseline, "--perplexity", text_file, "--seq-len", "32", "--limit", "4")
        done = run(*words, "--record")
        assert done.exit_code == 0, done.stderr
        return json.loads((sliced / "slicecli.json").read_text())["results"].get("dense"), done.stderr

    dense, message = recorded_dense(tmp_path / "run2" / "model")
    assert dense is None
    assert "not the model the slice was made from (config or weights differ)" in message
    moved = shutil.copytree(tmp_path / "run1" / "model", tmp_path / "renamed")
    assert recorded_dense(moved)[0] is not None


def test_slices_of_two_models_of_one_name_are_two_series(run, text_file, tmp_path):
    files = []
    for number in (1, 2):
        folder = save_checkpoint(tiny_model("llama", seed=number), tmp_path / f"run{number}" / "model")
        sliced = tmp_path / f"slice{number}"
        assert run("slice", folder, "--dim", "36", "-o", sliced, "--calibration", text_file, *SIZES).exit_code == 0
        files.append(tmp_path / f"{number}.json")
        words = ("--perplexity", text_file, "--seq-len", "32", "--limit", "4", "-o", files[-1])
        assert run("eval", sliced, "--baseline", folder, *words).exit_code == 0
    done = run("fit", *files, "--format", "json")
    assert done.exit_code == 0, done.stderr
    assert [len(curve["points"]) for curve in json.loads(done.stdout)["curves"]] == [1, 1]


# what is loaded


def test_a_separate_head_in_a_tied_config_is_counted_everywhere(run, tied, text_file, tmp_path):
    import transformers

    head = torch.randn_like(load_file(tied / SINGLE)["model.embed_tokens.weight"])
    change_weights(tied, lm_head__weight=head)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tied)
    count = sum(parameter.numel() for parameter in loaded.parameters())
    calibration = ("--calibration", text_file, *SIZES)
    texts = ("--perplexity", text_file, "--seq-len", "32", "--limit", "2")
    documents = {
        "inspect": run("inspect", tied, "--format", "json"),
        "estimate": run("estimate", tied, "--dim", "36", "--format", "json"),
        "slice": run("slice", tied, "--dim", "36", "-o", tmp_path / "o", *calibration, "--format", "json"),
        "eval": run("eval", tied, *texts, "--format", "json"),
    }
    for name, done in documents.items():
        assert done.exit_code == 0, done.stderr
        assert name == "eval" or done.stderr.count("a separate head") == 1
    found = {name: json.loads(done.stdout) for name, done in documents.items()}
    assert found["inspect"]["parameters"] == count
    assert found["inspect"]["is_tied"] is False
    assert found["estimate"]["dense"]["parameters"] == count
    assert found["slice"]["parameters"]["dense"] == count
    assert found["eval"]["parameters"] == count
    assert json.loads((tmp_path / "o" / "slicecli.json").read_text())["parameters"]["dense"] == count


def test_a_head_stored_twice_with_the_same_values_is_tied(run, tied):
    before = json.loads(run("inspect", tied, "--format", "json").stdout)
    change_weights(tied, lm_head__weight=load_file(tied / SINGLE)["model.embed_tokens.weight"].clone())
    done = run("inspect", tied, "--format", "json")
    assert json.loads(done.stdout) == before
    assert done.stderr == ""


@pytest.mark.parametrize("command", ["inspect", "estimate", "slice", "eval"])
def test_a_vocabulary_that_is_not_that_of_the_weights_is_refused(run, checkpoint_copy, text_file, tmp_path, command):
    edit_config(checkpoint_copy, vocab_size=310)
    words = {
        "estimate": ("--dim", "36"),
        "slice": ("--dim", "36", "-o", tmp_path / "o", "--calibration", text_file, *SIZES),
        "eval": ("--perplexity", text_file, "--seq-len", "32", "--limit", "1"),
    }
    done = run(command, checkpoint_copy, *words.get(command, ()))
    assert done.exit_code == 1
    assert "(300, 48)" in done.stderr
    assert "(310, 48)" in done.stderr


# what is not used


@pytest.fixture
def with_extras(checkpoint_copy):
    """A checkpoint of three blocks with biases, whose config says two blocks and none."""
    save_checkpoint(tiny_model("llama-biased"), checkpoint_copy)
    edit_config(checkpoint_copy, attention_bias=False, mlp_bias=False, num_hidden_layers=2)
    return checkpoint_copy


def test_tensors_that_are_not_used_stop_a_slice(run, with_extras, text_file, tmp_path):
    done = run("slice", with_extras, "--dim", "36", "-o", tmp_path / "o", "--calibration", text_file, *SIZES)
    assert done.exit_code == 1
    assert "30 unused tensors (model.layers.0.mlp.down_proj.bias, " in done.stderr
    assert "and 27 more)" in done.stderr
    assert not (tmp_path / "o").exists()


def test_tensors_that_are_not_used_are_said_where_a_model_is_measured_and_inspected(run, with_extras, text_file):
    done = run("eval", with_extras, "--perplexity", text_file, "--seq-len", "32", "--limit", "1")
    assert done.exit_code == 0, done.stderr
    assert "Warning: The checkpoint of copy holds 30 unused tensors" in done.stderr
    for words in (("inspect", with_extras), ("estimate", with_extras, "--dim", "36")):
        assert "hold 30 tensors that its config does not account for" in run(*words).stderr


def test_tensors_that_the_class_leaves_aside_are_a_warning(run, checkpoint_copy, text_file, tmp_path):
    change_weights(checkpoint_copy, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(6))
    done = run("slice", checkpoint_copy, "--dim", "36", "-o", tmp_path / "o", "--calibration", text_file, *SIZES)
    assert done.exit_code == 0, done.stderr
    assert "1 unused tensor (model.layers.0.self_attn.rotary_emb.inv_freq)" in done.stderr


def test_masks_that_old_checkpoints_of_a_family_hold_are_a_warning(run, text_file, tmp_path):
    config = tiny_config("gpt2", has_head_dim=False)
    folder = save_checkpoint(random_model(config), tmp_path / "gpt2")
    change_weights(folder, transformer__h__0__attn__masked_bias=torch.tensor(-1e4))
    done = run("slice", folder, "--dim", "48", "-o", tmp_path / "o", "--calibration", text_file, *SIZES)
    assert done.exit_code == 0, done.stderr
    assert "1 unused tensor (transformer.h.0.attn.masked_bias)" in done.stderr


def test_a_table_stored_as_the_head_alone_serves_as_both(run, tied, text_file, tmp_path):
    words = ("slice", tied, "--dim", "36", "--calibration", text_file, *SIZES, "--no-cache", "-o")
    assert run(*words, tmp_path / "before").exit_code == 0
    table = load_file(tied / SINGLE)["model.embed_tokens.weight"]
    change_weights(tied, model__embed_tokens__weight=None, lm_head__weight=table)
    done = run(*words, tmp_path / "after")
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "after" / SINGLE).read_bytes() == (tmp_path / "before" / SINGLE).read_bytes()
    assert "lack" not in run("estimate", tied, "--dim", "36").stderr


def test_a_slice_of_a_slice_has_no_dense_model_to_record(run, checkpoints, text_file, tmp_path):
    words = ("--calibration", text_file, *SIZES)
    assert run("slice", checkpoints(), "--dim", "40", "-o", tmp_path / "one", *words).exit_code == 0
    assert run("slice", tmp_path / "one", "--dim", "36", "-o", tmp_path / "two", *words).exit_code == 0
    texts = ("--perplexity", text_file, "--seq-len", "32", "--limit", "4")
    done = run("eval", tmp_path / "two", "--baseline", tmp_path / "one", *texts, "--record")
    assert done.exit_code == 0, done.stderr
    assert "one is a slice, not" in done.stderr


@pytest.mark.parametrize(
    ("changes", "method"),
    [
        ({"up_proj.SCB": torch.ones(80), "up_proj.weight": torch.ones(80, 48, dtype=torch.int8)}, "bitsandbytes"),
        ({"up_proj.weight.absmax": torch.ones(60), "up_proj.weight": torch.ones(1920, 1, dtype=torch.uint8)}, "bits"),
        ({"up_proj.weight_scale_inv": torch.ones(1, 1)}, "FP8"),
        ({"up_proj.weight": torch.ones(80, 48).to(torch.float8_e4m3fn)}, "stored as F8_E4M3"),
        ({"up_proj.weight": torch.ones(80, 48, dtype=torch.int8)}, "stored as I8"),
        ({"up_proj.scales": torch.ones(80, 1), "up_proj.weight": torch.ones(80, 12, dtype=torch.uint32)}, "MLX"),
    ],
)
@pytest.mark.parametrize("command", ["slice", "eval", "inspect"])
def test_quantised_weights_are_told_by_names_and_types(
    run, checkpoint_copy, text_file, tmp_path, command, changes, method
):
    change_weights(checkpoint_copy, **{f"model.layers.0.mlp.{name}": value for name, value in changes.items()})
    words = {
        "slice": ("--dim", "36", "-o", tmp_path / "o", "--calibration", text_file, *SIZES),
        "eval": ("--perplexity", text_file, "--seq-len", "32", "--limit", "1"),
        "inspect": (),
    }
    done = run(command, checkpoint_copy, *words[command])
    assert done.exit_code == 1
    assert "is quantised" in done.stderr
    assert method in done.stderr


@pytest.mark.parametrize(
    ("rename", "cause"),
    [
        (lambda name: f"_orig_mod.{name}", "torch.compile"),
        (lambda name: f"module.{name}", "DataParallel"),
        (lambda name: f"base_model.model.{name}", "PEFT"),
        (lambda name: f"language_model.{name}", "'language_model.'"),
        (lambda name: name.replace("_proj.weight", "_proj.qweight"), "quantised (GPTQ or AWQ"),
        (lambda name: name.replace("_proj.weight", "_proj.scales"), "quantised (MLX"),
        (lambda name: name.replace("up_proj.weight", "up_proj.lora_A.weight"), "LoRA"),
    ],
)
@pytest.mark.parametrize("command", ["slice", "eval"])
def test_names_of_tensors_tell_why_they_do_not_fit(run, checkpoint_copy, text_file, tmp_path, command, rename, cause):
    tensors = load_file(checkpoint_copy / SINGLE)
    renamed = {rename(name): value for name, value in tensors.items()}
    save_file(renamed, checkpoint_copy / SINGLE, metadata={"format": "pt"})
    words = {
        "slice": ("--dim", "36", "-o", tmp_path / "o", "--calibration", text_file, *SIZES),
        "eval": ("--perplexity", text_file, "--seq-len", "32", "--limit", "1"),
    }
    done = run(command, checkpoint_copy, *words[command])
    assert done.exit_code == 1
    assert cause in done.stderr
