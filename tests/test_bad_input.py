"""Every bad input ends in one sentence with cause and remedy, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import math
import os
import signal
import time

import pytest
import torch
import transformers
from programs import SLICECLI, run_command, run_program, start_program
from safetensors.torch import load_file, save_file

from slicecli.proof.tiny import random_model, tiny_config
from slicecli.testing import byte_tokenizer
from slicecli.testing.checkpoints import save_checkpoint

pytestmark = pytest.mark.slow

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def refused(run, text_file, tmp_path):
    """Run a slice that must fail; return its message after checking its form."""
    output = tmp_path / "out" / "slice"

    def check(model, *words, code=1, dim="36"):
        width = ["--dim", dim] if dim else []
        calibration = [] if "--calibration" in words else ["--calibration", text_file]
        sizes = [] if "--samples" in words else ["--samples", "8", "--seq-len", "32"]
        done = run("slice", model, *width, "-o", output, *calibration, *sizes, *words)
        assert done.exit_code == code, done.output
        assert done.stdout == ""
        assert "Traceback" not in done.output
        assert isinstance(done.exception, SystemExit), done.exception
        left = list(output.parent.rglob("*")) if output.parent.exists() else []
        assert left == []
        message = done.stderr.strip().splitlines()[-1]
        assert message.startswith("Error: ")
        assert message.endswith((".", ")"))
        return message

    return check


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


# the request


@pytest.mark.parametrize(
    ("dim", "nearest"), [("48", ": 44"), ("49", ": 44"), ("0", ": 4"), ("-4", ": 4"), ("37", "s: 36 and 40")]
)
def test_a_dim_that_is_not_legal(refused, checkpoints, dim, nearest):
    message = refused(checkpoints(), "--write-as", "own", dim=dim, code=2)
    assert f"The nearest legal dim{nearest}." in message


def test_a_dim_is_refused_before_weights_are_looked_at(refused, checkpoint_copy):
    (checkpoint_copy / WEIGHTS).unlink()
    assert "multiple of num_attention_heads (4)" in refused(checkpoint_copy, "--write-as", "own", dim="37", code=2)


def test_no_width_or_two(refused, checkpoints):
    assert "exactly one of --dim" in refused(checkpoints(), dim=None, code=2)
    assert "exactly one of --dim" in refused(checkpoints(), "--sparsity", "0.5", code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sparsity", "1.5"), "Use 0 < F < 1"),
        (("--target-params", "10"), "The smallest"),
        (("--memory", "1kB"), "The smallest"),
    ],
)
def test_a_width_that_cannot_be_met(refused, checkpoints, words, message):
    assert message in refused(checkpoints(), *words, dim=None, code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--samples", "0"), "--samples 1"),
        (("--samples", "8", "--seq-len", "1"), "--seq-len 2"),
        (("--samples", "8", "--seq-len", "999"), "--seq-len 128 or less"),
        (("--batch-size", "0"), "--batch-size 1"),
        (("--max-shard-size", "big"), "12GiB"),
        (("--device-map", "cuda:99"), "no device 'cuda:99'"),
        (("--device-map", "moon"), "no device 'moon'"),
        (("--device-map", "meta"), "no device 'meta'"),
        (("--adapter", "lama"), "Did you mean 'llama'"),
    ],
)
def test_an_option_that_makes_no_sense(refused, checkpoints, words, message):
    assert message in refused(checkpoints(), *words, code=2)


@pytest.mark.parametrize(
    "words", [["slice"], ["slice", "m", "--dim", "x"], ["nonsense"], ["slice", "m", "--dtype", "int3"]]
)
def test_wrong_usage_has_exit_code_2(run, words):
    done = run(*words)
    assert done.exit_code == 2
    assert done.stdout == ""


# the model


def test_a_model_that_does_not_exist(refused, tmp_path):
    assert "no folder" in refused("./missing")
    (tmp_path / "file").write_text("")
    assert "is a file" in refused(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert "has no config.json" in refused(tmp_path / "empty")


def test_the_hub_out_of_reach(checkpoints, text_file, tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    words = ["slice", "owner/name", "--dim", "36", "-o", str(tmp_path / "out"), "--calibration", str(text_file)]
    done = run_command(*words, env=environment)
    assert done.returncode == 1
    assert "the cache is incomplete" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00", '"config"', "[" * 20000])
def test_a_config_that_is_no_config(refused, checkpoint_copy, content):
    (checkpoint_copy / CONFIG).write_text(content)
    assert "config.json" in refused(checkpoint_copy)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "lama"}, "'lama' are not supported. Did you mean 'llama'"),
        ({"model_type": None}, "not supported"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "not a decoder language model"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "encoder-decoder"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised (gptq)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "quantised (bitsandbytes)"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised (fp8)"),
        ({"hidden_size": "48"}, "hidden_size = '48'"),
        ({"num_hidden_layers": None}, "num_hidden_layers"),
        ({"num_attention_heads": -4}, "num_attention_heads"),
    ],
)
def test_a_model_that_cannot_be_sliced(refused, checkpoint_copy, changes, message):
    edit_config(checkpoint_copy, **changes)
    assert message in refused(checkpoint_copy)


@pytest.mark.parametrize("architectures", [None, [], ["MineForConditionalGeneration"]])
@pytest.mark.parametrize(
    "kind", ["gemma3", "llava", "qwen2_vl", "qwen2_audio", "mllama", "llama4", "qwen2_5_omni", "csm"]
)
def test_a_multimodal_model_is_called_that_whatever_its_class(run, checkpoint_copy, text_file, kind, architectures):
    config = transformers.CONFIG_MAPPING[kind]().to_dict() | {"architectures": architectures}
    (checkpoint_copy / CONFIG).write_text(json.dumps(config, default=str))
    for words in (("inspect",), ("slice", "--dim", "36"), ("estimate",), ("eval", "--perplexity", text_file)):
        done = run(words[0], checkpoint_copy, *words[1:])
        assert done.exit_code == 1
        assert f"({kind}) is a multimodal model: its config has " in done.stderr


@pytest.mark.parametrize("architectures", [None, []])
def test_a_slice_says_its_class_where_the_model_does_not(run, checkpoint_copy, slice_words, tmp_path, architectures):
    edit_config(checkpoint_copy, architectures=architectures)
    done = run("slice", checkpoint_copy, "--dim", "36", "-o", tmp_path / "out", *slice_words)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / CONFIG).read_text())["architectures"] == ["LlamaForCausalLM"]


def test_a_tokenizer_that_is_missing_or_of_another_model(refused, checkpoint_copy):
    tokenizer = checkpoint_copy / "tokenizer.json"
    content = tokenizer.read_text()
    tokenizer.write_text("{}")
    assert "tokenizer" in refused(checkpoint_copy)
    tokenizer.write_text(content)
    larger = byte_tokenizer()
    larger.add_tokens([f"<{number}>" for number in range(100)] + ["the"])
    larger.save_pretrained(checkpoint_copy)
    assert "the model has only 300" in refused(checkpoint_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("none passed through", "does not cover model.layers.0.self_attn.k_norm.weight"),
        ("other blocks", "the model has no model.blocks.0"),
        ("wide", "self_attn.q_norm.weight is 16, not 64"),
    ],
)
def test_an_adapter_that_does_not_describe_the_model(refused, checkpoints, monkeypatch, change, message):
    import dataclasses

    from slicecli.family.plugins import plugins

    qwen3 = plugins().adapters["qwen3"]
    widened = tuple(dataclasses.replace(one, width="query") for one in qwen3.block.passed_through)
    changes = {
        "none passed through": {"block": dataclasses.replace(qwen3.block, passed_through=())},
        "wide": {"block": dataclasses.replace(qwen3.block, passed_through=widened)},
        "other blocks": {"blocks": "model.blocks"},
    }
    monkeypatch.setitem(plugins().adapters, "qwen3", dataclasses.replace(qwen3, **changes[change]))
    assert message in refused(checkpoints("qwen3"))


# models that are something else


@pytest.mark.parametrize(
    ("file", "says"),
    [("quantize_config.json", "GPTQ"), ("quant_config.json", "AWQ"), ("hf_quant_config.json", "ModelOpt")],
)
def test_a_model_quantised_by_an_older_tool(refused, checkpoint_copy, file, says):
    (checkpoint_copy / file).write_text("{}")
    message = refused(checkpoint_copy)
    assert f"quantised ({says}: it has a {file})" in message
    assert f"remove {file}" in message


@pytest.mark.parametrize("also", [{}, {"quantization_config": {"group_size": 64, "bits": 4}}])
def test_a_model_quantised_by_mlx(refused, checkpoint_copy, also):
    edit_config(checkpoint_copy, quantization={"group_size": 64, "bits": 4}, **also)
    assert "quantised (MLX: config.json has `quantization`)" in refused(checkpoint_copy)


def test_a_field_of_a_quantiser_that_says_nothing_is_no_quantisation(run, checkpoint_copy):
    edit_config(checkpoint_copy, quantization=None, quantization_config={}, compression_config={})
    assert run("inspect", checkpoint_copy).exit_code == 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (
            '{"base_model_name_or_path": "meta-llama/Llama-2-7b-hf"}',
            "changes to another model, meta-llama/Llama-2-7b-hf.",
        ),
        ('{"base_model_name_or_path": "/home/joe/base"}', "changes to another model."),
        ('{"base_model_name_or_path": "copy"}', "changes to another model."),
        ('{"base_model_name_or_path": ["a"]}', "changes to another model."),
        ("{}", "changes to another model."),
        ("{", "changes to another model."),
    ],
)
def test_an_adapter_is_to_be_merged_first(refused, checkpoint_copy, monkeypatch, content, says):
    monkeypatch.chdir(checkpoint_copy.parent)
    (checkpoint_copy / "adapter_config.json").write_text(content)
    with_config = refused(checkpoint_copy)
    (checkpoint_copy / CONFIG).unlink()
    without = refused(checkpoint_copy)
    for message in (with_config, without):
        assert says in message
        assert "Merge them" in message
        assert "joe" not in message
    assert "remove the file" in with_config
    assert "remove the file" not in without


@pytest.mark.parametrize(
    ("file", "says"),
    [
        ("model-Q4.gguf", "the format of llama.cpp"),
        ("params.json", "first released"),
        ("model_index.json", "part of a diffusers pipeline"),
        ("hyperparams.json", "has no config.json. Pass the folder of a transformers model"),
        ("checkpoint-500/config.json", "Pass one of its subfolders that has one: checkpoint-500"),
    ],
)
def test_a_folder_without_a_config_is_told_by_what_is_in_it(refused, checkpoint_copy, file, says):
    (checkpoint_copy / CONFIG).unlink()
    (checkpoint_copy / file).parent.mkdir(exist_ok=True)
    (checkpoint_copy / file).write_text("{}")
    message = refused(checkpoint_copy)
    assert "has no config.json" in message
    assert says in message


def test_a_folder_that_hides_a_model_of_the_hub(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai-community" / "gpt2").mkdir(parents=True)
    said = "openai-community/gpt2 is a folder here, and local folders come first; for openai-community/gpt2 on the Hub,"
    for words in ((), ("--revision", "main")):
        assert said in run("inspect", "openai-community/gpt2", *words).stderr
    assert said not in run("inspect", "./openai-community/gpt2").stderr


def test_a_folder_has_no_revisions(run, checkpoints):
    done = run("inspect", checkpoints(), "--revision", "main")
    assert done.exit_code == 2
    assert "a local folder, which has no revisions" in done.stderr


# tokenizers


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "gpt2"])
@pytest.mark.parametrize("kept", [(), ("tokenizer_config.json",)])
def test_a_model_without_a_tokenizer(run, text_file, tmp_path, family, kept):
    """Of some families transformers makes a tokenizer without a vocabulary, which reads every text as nothing."""
    config = tiny_config(family, has_head_dim=family != "gpt2")
    model = save_checkpoint(random_model(config), tmp_path / "model")
    for path in model.glob("*token*"):
        if path.name not in kept:
            path.unlink()
        else:
            path.write_text("{}")
    words = ("--calibration", text_file, "--samples", "8", "--seq-len", "32")
    for command in (("slice", model, "--sparsity", "0.3", *words), ("eval", model, "--perplexity", text_file)):
        done = run(*command)
        assert done.exit_code == 1, done.output
        assert "model has no tokenizer, such as tokenizer.json" in done.stderr.splitlines()[-1]


def test_a_tokenizer_of_which_a_part_is_missing(refused, checkpoint_copy):
    (checkpoint_copy / "tokenizer.json").unlink()
    (checkpoint_copy / "merges.txt").write_text("#version: 0.2\n")
    assert "its files are incomplete" in refused(checkpoint_copy)


def test_a_prompt_with_a_token_that_the_model_does_not_know(run, checkpoint_copy):
    larger = byte_tokenizer()
    larger.add_tokens([f"<{number}>" for number in range(100)] + ["the"])
    larger.save_pretrained(checkpoint_copy)
    done = run("generate", checkpoint_copy, "the")
    assert done.exit_code == 1
    assert "gives token" in done.stderr
    assert "the model has only 300" in done.stderr


# byte order marks


def mark(path):
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


@pytest.mark.parametrize("name", [CONFIG, "tokenizer.json", "tokenizer_config.json"])
def test_a_byte_order_mark_where_transformers_reads_none(refused, checkpoint_copy, name):
    mark(checkpoint_copy / name)
    message = refused(checkpoint_copy)
    assert name in message
    assert "byte order mark" in message


def test_a_byte_order_mark_in_an_index(refused, checkpoint_copy):
    (checkpoint_copy / WEIGHTS).rename(checkpoint_copy / "model-1.safetensors")
    (checkpoint_copy / INDEX).write_text(json.dumps({"weight_map": {"a": "model-1.safetensors"}}))
    mark(checkpoint_copy / INDEX)
    assert "byte order mark" in refused(checkpoint_copy)


def test_a_byte_order_mark_in_what_only_we_read_does_no_harm(run, checkpoints, text_file, tmp_path):
    text, questions, places = tmp_path / "T.JSONL", tmp_path / "Q.JSONL", tmp_path / "M.JSON"
    text.write_bytes(text_file.read_bytes())
    questions.write_text('{"query": "2 + 2 =", "choices": ["3", "4"], "gold": 1}\n')
    places.write_text('{"": "cpu"}')
    for path in (text, questions, places):
        mark(path)
    words = ("--calibration", text, "--samples", "8", "--seq-len", "32", "--device-map", places)
    with_mark = run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "a", *words)
    assert with_mark.exit_code == 0, with_mark.output
    without = ("--calibration", text_file, "--samples", "8", "--seq-len", "32")
    assert run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "b", *without).exit_code == 0
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()
    measured = ("--tasks", questions, "--perplexity", text, "--seq-len", "32", "--limit", "2")
    assert run("eval", checkpoints(), *measured).exit_code == 0


def test_a_text_in_another_encoding(refused, checkpoints, tmp_path):
    (tmp_path / "wide.txt").write_text("Once upon a time", encoding="utf-16")
    assert "UTF-16" in refused(checkpoints(), "--calibration", tmp_path / "wide.txt")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("https://huggingface.co/datasets/me/x", "valid Hub id. Use me/x."),
        ("me/a--b", "nor a valid Hub id"),
        ("me/x:config", "offline mode is on (HF_HUB_OFFLINE). Unset HF_HUB_OFFLINE."),
        ("wikitext2", "offline mode is on (HF_HUB_OFFLINE). Unset HF_HUB_OFFLINE."),
    ],
)
def test_a_dataset_that_cannot_be_had(checkpoints, tmp_path, text, says):
    words = ("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "out", "--calibration", text)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    done = run_program(*SLICECLI, *words, env=environment, cwd=tmp_path)
    assert done.returncode == 1
    assert says in done.stderr.strip().splitlines()[-1]


def test_a_folder_is_no_text(refused, checkpoints, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "me" / "text").mkdir(parents=True)
    message = refused(checkpoints(), "--calibration", "me/text")
    assert "is a folder, not a text" in message
    assert "for me/text on the Hub, run the command elsewhere" in message


# the weights


def test_weights_that_are_missing(refused, checkpoint_copy):
    (checkpoint_copy / WEIGHTS).unlink()
    assert "has no weights" in refused(checkpoint_copy)


def test_weights_that_are_pickles_only(refused, checkpoint_copy):
    tensors = load_file(checkpoint_copy / WEIGHTS)
    (checkpoint_copy / WEIGHTS).unlink()
    torch.save(tensors, checkpoint_copy / "pytorch_model.bin")
    assert "only pickle weight files" in refused(checkpoint_copy)


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_weights_that_are_truncated(refused, checkpoint_copy, keep):
    path = checkpoint_copy / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged" in refused(checkpoint_copy)


def test_a_tensor_that_is_missing(refused, checkpoint_copy):
    tensors = load_file(checkpoint_copy / WEIGHTS)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, checkpoint_copy / WEIGHTS, metadata={"format": "pt"})
    assert "lacks 1 tensor (model.layers.1.mlp.up_proj.weight)" in refused(checkpoint_copy)


def test_a_tensor_of_the_wrong_shape(refused, checkpoint_copy):
    tensors = load_file(checkpoint_copy / WEIGHTS)
    tensors["model.norm.weight"] = torch.ones(47)
    save_file(tensors, checkpoint_copy / WEIGHTS, metadata={"format": "pt"})
    assert "Error: " in refused(checkpoint_copy)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_weight_that_is_not_finite_is_named(refused, checkpoint_copy, value):
    tensors = load_file(checkpoint_copy / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"][3, 3] = value
    save_file(tensors, checkpoint_copy / WEIGHTS, metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refused(checkpoint_copy)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "a/b.safetensors", "weights.bin", ""])
def test_an_index_that_points_elsewhere(refused, checkpoint_copy, file):
    (checkpoint_copy / WEIGHTS).unlink()
    (checkpoint_copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    assert "not a safetensors file next to it" in refused(checkpoint_copy)


@pytest.mark.parametrize(
    "content", ["", "{}", '{"weight_map": {}}', '{"weight_map": 3}', "[]", '{"weight_map": {"a": 1}}']
)
def test_an_index_that_is_damaged(refused, checkpoint_copy, content):
    (checkpoint_copy / WEIGHTS).unlink()
    (checkpoint_copy / INDEX).write_text(content)
    assert "index" in refused(checkpoint_copy)


def test_a_shard_that_is_missing(refused, checkpoint_copy):
    (checkpoint_copy / WEIGHTS).unlink()
    (checkpoint_copy / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-9.safetensors"}}))
    assert "model-9.safetensors of copy is missing" in refused(checkpoint_copy)


# text and output


def test_a_calibration_text_that_is_missing_or_short(refused, checkpoints, tmp_path):
    assert "There is no text file" in refused(checkpoints(), "--calibration", "./missing.txt")
    (tmp_path / "short.txt").write_text("abc")
    assert "4 tokens, fewer than one row" in refused(checkpoints(), "--calibration", tmp_path / "short.txt")


def test_an_output_that_is_taken(run, checkpoints, slice_words, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    for words, message in (((), "--overwrite"), (("--overwrite",), "not a slice")):
        done = run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "out", *words, *slice_words)
        assert done.exit_code == 1
        assert message in done.stderr
    assert os.listdir(tmp_path) == ["out"]
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("where", [".", "..", "inside"])
def test_no_command_writes_over_the_model_it_reads(run, checkpoints, slice_words, text_file, tmp_path, where):
    folder = tmp_path / "models" / "slice"
    assert run("slice", checkpoints(), "--dim", "36", "-o", folder, *slice_words).exit_code == 0
    before = contents(tmp_path)
    output = folder / where
    for words in (
        ("slice", folder, "--dim", "24", "--overwrite", "-o", output, *slice_words),
        ("sweep", folder, "--dims", "24", "--overwrite", "-o", output, "--perplexity", text_file, *slice_words),
    ):
        done = run(*words)
        assert done.exit_code == 1, done.output
        assert "Choose another with --output" in done.stderr
    assert contents(tmp_path) == before


def test_a_sweep_does_not_clear_the_slice_it_is_of(run, checkpoints, slice_words, text_file, tmp_path):
    words = ["--perplexity", text_file, "--limit", "1", *slice_words]
    kept = ("sweep", checkpoints(), "--dims", "36", "--keep-slices", "-o", tmp_path / "sweep", *words)
    assert run(*kept).exit_code == 0
    before = contents(tmp_path)
    source = tmp_path / "sweep" / "slices" / "dim36"
    done = run("sweep", source, "--dims", "24", "--overwrite", "-o", tmp_path / "sweep", *words)
    assert done.exit_code == 1
    assert "would overwrite 'dim36'" in done.stderr
    assert contents(tmp_path) == before


def test_results_do_not_go_over_what_they_come_from(run, checkpoint_copy, text_file, tmp_path):
    text = tmp_path / "text.jsonl"
    text.write_bytes(text_file.read_bytes())
    results = tmp_path / "results.json"
    results.write_text("{}")
    before = contents(tmp_path)
    for words in (
        ("eval", checkpoint_copy, "--perplexity", text, "-o", checkpoint_copy / "config.json"),
        ("eval", checkpoint_copy, "--perplexity", text, "-o", text),
        ("spectrum", checkpoint_copy, "--calibration", text, "-o", checkpoint_copy / "model.safetensors"),
        ("spectrum", checkpoint_copy, "--calibration", text, "-o", text),
        ("fit", results, "-o", results),
    ):
        done = run(*words)
        assert done.exit_code == 1, done.output
        assert "Choose another file." in done.stderr
    assert contents(tmp_path) == before


def test_an_output_below_a_file(run, checkpoints, slice_words, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "file" / "out", *slice_words)
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr


def test_a_disk_that_is_too_small(refused, checkpoints, monkeypatch):
    import shutil

    from slicecli.checkpoint import folder as checkpoint

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "are free" in refused(checkpoints())


def test_a_disk_that_becomes_full(refused, checkpoints, monkeypatch):
    from slicecli.checkpoint.weight_writer import ShardWriter

    def fail(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", fail)
    assert "disk filled up" in refused(checkpoints())


def test_eval_of_bad_input(run, checkpoints, checkpoint_copy, text_file, tmp_path):
    for words, code, message in (
        ((checkpoints(), "--perplexity", "./missing.txt"), 1, "no text file"),
        ((checkpoints(), "--perplexity", text_file, "--seq-len", "999"), 2, "128 or less"),
        ((checkpoints(), "--perplexity", text_file, "--seq-len", "32", "--limit", "0"), 2, "Use 1 or more"),
        ((checkpoints(), "--perplexity", text_file, "-o", tmp_path / "no" / "x.json", "--seq-len", "32"), 1, "x.json"),
        (("./missing", "--perplexity", text_file), 1, "no folder"),
    ):
        done = run("eval", *words)
        assert done.exit_code == code, done.output
        assert message in done.stderr
        assert done.stdout == ""


def started_until(words, word, log):
    """Start the command line, and wait for a line that begins with a word."""
    process = start_program((*SLICECLI, *words), log, log, kind="warm")
    while process.is_alive() and f"\n{word}" not in f"\n{log.read_text() if log.exists() else ''}":
        time.sleep(0.001)
    assert process.is_alive(), log.read_text()
    return process


@pytest.fixture
def long_slice(checkpoints, text_file, tmp_path):
    words = ["slice", checkpoints(), "--dim", "36", "-o", tmp_path / "work" / "out", "--calibration", text_file]
    (tmp_path / "work").mkdir()
    return [*words, "--samples", "100", "--seq-len", "32", "--no-cache", "--batch-size", "1"]


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_nothing(long_slice, tmp_path, signal_number):
    process = started_until(long_slice, "statistics", tmp_path / "log")
    assert (tmp_path / "work" / ".out.incomplete").is_dir()
    os.kill(process.pid, signal_number)
    process.join(60)
    assert process.exitcode not in (0, None)
    assert "Traceback" not in (tmp_path / "log").read_text()
    assert os.listdir(tmp_path / "work") == []


def test_a_killed_run_leaves_no_folder_of_the_final_name_and_the_next_cleans_up(run, long_slice, tmp_path):
    process = started_until(long_slice, "refit", tmp_path / "log")
    process.kill()
    process.join()
    assert os.listdir(tmp_path / "work") == [".out.incomplete"]
    assert run(*long_slice).exit_code == 0
    assert os.listdir(tmp_path / "work") == ["out"]


@pytest.mark.parametrize("method", ["refit", "slicegpt"])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_number_that_the_dtype_of_the_slice_cannot_hold(run, checkpoint_copy, slice_words, tmp_path, name, method):
    tensors = {key: value.half() for key, value in load_file(checkpoint_copy / WEIGHTS).items()}
    tensors[name][299] = 60000.0  # of a token that no text has
    save_file(tensors, checkpoint_copy / WEIGHTS, metadata={"format": "pt"})
    edit_config(checkpoint_copy, dtype="float16")
    words = ["slice", checkpoint_copy, "--dim", "36", "--method", method, "--no-cache", *slice_words]
    done = run(*words, "-o", tmp_path / "out" / "half")
    assert done.exit_code == 1
    sentence = done.stderr.strip().splitlines()[-1]
    assert sentence.startswith(f"Error: {name} of the slice holds infinity: one of its numbers exceeds")
    assert "--dtype bfloat16" in sentence
    assert os.listdir(tmp_path / "out") == []
    done = run(*words, "-o", tmp_path / "out" / "wide", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.stderr
