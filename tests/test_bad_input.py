"""Every bad input ends in one sentence with cause and remedy, the right exit code, and nothing left behind."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slicecli.testing import byte_tokenizer

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


@pytest.mark.parametrize("dim", ["48", "49", "0", "-4", "37"])
def test_a_dim_that_is_not_legal(refused, checkpoints, dim):
    assert "The nearest legal: " in refused(checkpoints(), dim=dim, code=2)


def test_a_dim_is_refused_before_weights_are_looked_at(refused, checkpoint_copy):
    (checkpoint_copy / WEIGHTS).unlink()
    assert "multiple of num_attention_heads (4)" in refused(checkpoint_copy, dim="37", code=2)


def test_no_width_or_two(refused, checkpoints):
    assert "exactly one of --dim" in refused(checkpoints(), dim=None, code=2)
    assert "exactly one of --dim" in refused(checkpoints(), "--sparsity", "0.5", code=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--sparsity", "1.5"), "Give 0 < F < 1"),
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
    done = subprocess.run(
        [sys.executable, "-m", "slicecli", *words], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "the cache does not have all of it" in done.stderr
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
    assert "the model knows 300" in refused(checkpoint_copy)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("no kept", "does not cover model.layers.0.self_attn.k_norm.weight"),
        ("other blocks", "the model has no model.blocks.0"),
        ("wide kept", "self_attn.q_norm.weight is 16, not 64"),
    ],
)
def test_an_adapter_that_does_not_describe_the_model(refused, checkpoints, monkeypatch, change, message):
    import dataclasses

    from slicecli.plugins import plugins

    qwen3 = plugins().adapters["qwen3"]
    widened = tuple(dataclasses.replace(kept, width="query") for kept in qwen3.block.kept)
    changes = {
        "no kept": {"block": dataclasses.replace(qwen3.block, kept=())},
        "wide kept": {"block": dataclasses.replace(qwen3.block, kept=widened)},
        "other blocks": {"blocks": "model.blocks"},
    }
    monkeypatch.setitem(plugins().adapters, "qwen3", dataclasses.replace(qwen3, **changes[change]))
    assert message in refused(checkpoints("qwen3"))


# the weights


def test_weights_that_are_missing(refused, checkpoint_copy):
    (checkpoint_copy / WEIGHTS).unlink()
    assert "has no weights" in refused(checkpoint_copy)


def test_weights_that_are_pickles_only(refused, checkpoint_copy):
    tensors = load_file(checkpoint_copy / WEIGHTS)
    (checkpoint_copy / WEIGHTS).unlink()
    torch.save(tensors, checkpoint_copy / "pytorch_model.bin")
    assert "only as pickle files" in refused(checkpoint_copy)


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
    assert "not a safetensors file beside it" in refused(checkpoint_copy)


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
    assert "no text file" in refused(checkpoints(), "--calibration", "./missing.txt")
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
        assert "Give another with --output" in done.stderr
    assert contents(tmp_path) == before


def test_a_sweep_does_not_clear_the_slice_it_is_of(run, checkpoints, slice_words, text_file, tmp_path):
    words = ["--perplexity", text_file, "--limit", "1", *slice_words]
    kept = ("sweep", checkpoints(), "--dims", "36", "--keep-slices", "-o", tmp_path / "sweep", *words)
    assert run(*kept).exit_code == 0
    before = contents(tmp_path)
    source = tmp_path / "sweep" / "slices" / "dim36"
    done = run("sweep", source, "--dims", "24", "--overwrite", "-o", tmp_path / "sweep", *words)
    assert done.exit_code == 1
    assert "take the place of 'dim36'" in done.stderr
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
        assert "Give another file." in done.stderr
    assert contents(tmp_path) == before


def test_an_output_below_a_file(run, checkpoints, slice_words, tmp_path):
    (tmp_path / "file").write_text("")
    done = run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "file" / "out", *slice_words)
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr


def test_a_disk_that_is_too_small(refused, checkpoints, monkeypatch):
    import shutil

    from slicecli import checkpoint

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=1000))
    assert "are free" in refused(checkpoints())


def test_a_disk_that_becomes_full(refused, checkpoints, monkeypatch):
    from slicecli.checkpoint import ShardWriter

    def fail(self, name, tensor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ShardWriter, "write", fail)
    assert "disk became full" in refused(checkpoints())


def test_eval_of_bad_input(run, checkpoints, checkpoint_copy, text_file, tmp_path):
    for words, code, message in (
        ((checkpoints(), "--perplexity", "./missing.txt"), 1, "no text file"),
        ((checkpoints(), "--perplexity", text_file, "--seq-len", "999"), 2, "128 or less"),
        ((checkpoints(), "--perplexity", text_file, "--seq-len", "32", "--limit", "0"), 2, "Give 1 or more"),
        ((checkpoints(), "--perplexity", text_file, "-o", tmp_path / "no" / "x.json", "--seq-len", "32"), 1, "x.json"),
        (("./missing", "--perplexity", text_file), 1, "no folder"),
    ):
        done = run("eval", *words)
        assert done.exit_code == code, done.output
        assert message in done.stderr
        assert done.stdout == ""


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_leaves_nothing(checkpoints, text_file, tmp_path, signal_number):
    words = ["slice", checkpoints(), "--dim", "36", "-o", tmp_path / "out", "--calibration", text_file]
    words += ["--samples", "200", "--seq-len", "32", "--batch-size", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "slicecli", *map(str, words)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # a test run in the background of a shell has SIGINT ignored, and its children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("statistics"):
            break
    assert (tmp_path / ".out.incomplete").is_dir()
    process.send_signal(signal_number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode not in (0, None)
    assert "Traceback" not in errors
    assert os.listdir(tmp_path) == []


def test_a_killed_run_leaves_no_folder_of_the_final_name_and_the_next_cleans_up(checkpoints, text_file, tmp_path):
    words = ["slice", checkpoints(), "--dim", "36", "-o", tmp_path / "out", "--calibration", text_file]
    words += ["--samples", "40", "--seq-len", "32"]
    command = [sys.executable, "-m", "slicecli", *map(str, words)]
    process = subprocess.Popen([*command, "--batch-size", "1"], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("refit"):
            break
    process.kill()
    process.wait()
    process.stderr.close()
    time.sleep(0.1)
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0
    assert os.listdir(tmp_path) == ["out"]


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
    assert sentence.startswith(f"Error: {name} of the slice holds infinity: float16 reaches to")
    assert "--dtype bfloat16" in sentence
    assert os.listdir(tmp_path / "out") == []
    done = run(*words, "-o", tmp_path / "out" / "wide", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.stderr
