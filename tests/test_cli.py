"""The command line as a user meets it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from programs import run_program
from safetensors.torch import load_file

from slicecli.checkpoint.folder import file_digest

SLICE_FIELDS = {
    "output",
    "model",
    "revision",
    "model_type",
    "method",
    "layout",
    "hidden_size",
    "dim",
    "sparsity",
    "parameters",
    "bytes",
    "seconds",
    "peak_memory_bytes",
}


def python(code, *words, **environment):
    """Run code in a fresh interpreter, from a folder without the project."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1", **environment},
        cwd=Path(sys.prefix),
        check=False,
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["slice", "--help"], ["adapters"], ["plugins"]])
def test_light_commands_import_nothing_heavy(words):
    code = (
        "import sys; from slicecli.cli import group\n"
        "try: group(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "heavy = {'torch', 'transformers', 'accelerate', 'datasets', 'lm_eval', 'numpy', 'pydantic'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = python(code, *words)
    assert done.returncode == 0, done.stderr


def test_inspect_imports_no_torch(checkpoints):
    code = (
        "import sys; from slicecli.cli import group\n"
        "try: group(['inspect', sys.argv[1]])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'torch' not in sys.modules"
    )
    assert python(code, checkpoints()).returncode == 0


def test_slice_writes_a_whole_folder_and_reports_it(run, checkpoints, slice_words, tmp_path):
    output = tmp_path / "out"
    done = run("slice", checkpoints(), "--dim", "36", "-o", output, "--format", "json", *slice_words)
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report.keys() >= SLICE_FIELDS
    assert (report["hidden_size"], report["dim"], report["sparsity"]) == (48, 36, 0.25)
    assert (report["method"], report["layout"], report["model_type"]) == ("refit", "stock", "llama")
    tensors = load_file(output / "model.safetensors")
    assert report["parameters"]["sliced"] == sum(tensor.numel() for tensor in tensors.values())
    assert report["bytes"]["sliced"] == sum(tensor.nbytes for tensor in tensors.values())
    assert {path.name for path in output.iterdir()} >= {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
        "chat_template.jinja",
        "LICENSE.txt",
        "README.md",
        "slicecli.json",
    }
    for name in ("tokenizer.json", "generation_config.json", "chat_template.jinja", "LICENSE.txt"):
        assert (output / name).read_bytes() == (checkpoints() / name).read_bytes()
    assert os.listdir(tmp_path) == ["out"]


def test_the_config_says_all_that_changed_and_nothing_else(run, checkpoints, slice_words, tmp_path):
    run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "out", *slice_words)
    before = json.loads((checkpoints() / "config.json").read_text())
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    legacy = {"rope_theta", "torch_dtype"}  # what transformers 4 reads
    assert changed - legacy == {"hidden_size"}
    assert after["hidden_size"] == 36
    assert after["head_dim"] == 12


def test_the_record_tells_where_the_slice_comes_from(run, checkpoints, slice_words, tmp_path):
    output = tmp_path / "out"
    run("slice", checkpoints(), "--dim", "36", "-o", output, *slice_words)
    record = json.loads((output / "slicecli.json").read_text())
    assert record["source"]["model"] == "tiny-llama"
    assert record["weights"] == {"model.safetensors": file_digest(output / "model.safetensors")}
    assert record["calibration"]["tokens"] == 24 * 32
    assert re.fullmatch("[0-9a-f]{64}", record["calibration"]["sha256"])
    assert record["energy"]["spectrum"][-1]["kept"] == pytest.approx(1)


def test_no_local_path_and_no_token_is_written(run, checkpoints, slice_words, tmp_path):
    output = tmp_path / "out"
    done = run("slice", checkpoints(), "--dim", "36", "-o", output, "--token", "hf_secret", *slice_words)
    assert done.exit_code == 0
    for path in output.iterdir():
        content = path.read_bytes()
        for secret in (b"hf_secret", str(tmp_path.parent.parent).encode(), str(Path.home()).encode()):
            assert secret not in content, path.name
    assert "hf_secret" not in done.output


@pytest.mark.parametrize("family", ["llama-tied", "phi3"])
def test_a_slice_loads_and_generates_without_slicecli(run, checkpoints, slice_words, tmp_path, family):
    output = tmp_path / "out"
    assert run("slice", checkpoints(family), "--dim", "36", "-o", output, *slice_words).exit_code == 0
    code = """
import sys
sys.modules["slicecli"] = None  # importing it would fail
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model, report = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False, output_loading_info=True)
assert not any(report.values()), report
assert model.config.hidden_size == 36
ids = AutoTokenizer.from_pretrained(sys.argv[1])("a stream", return_tensors="pt")["input_ids"]
cached, plain = (model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=use) for use in (True, False))
assert torch.equal(cached, plain), (cached, plain)
assert cached.shape[1] > ids.shape[1]
"""
    done = run_program("-c", code, output)
    assert done.returncode == 0, done.stderr


def test_the_same_command_gives_the_same_bytes_and_another_seed_does_not(run, checkpoints, slice_words, tmp_path):
    digests = []
    for name, seed in (("one", 1), ("two", 1), ("three", 2)):
        words = ["slice", checkpoints(), "--dim", "36", "--seed", seed, "-o", tmp_path / name, *slice_words]
        assert run(*words).exit_code == 0
        digests.append(file_digest(tmp_path / name / "model.safetensors"))
    assert digests[0] == digests[1] != digests[2]


def test_shards_hold_the_same_weights_as_one_file(run, checkpoints, slice_words, tmp_path):
    run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "one", *slice_words)
    run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "many", "--max-shard-size", "40kB", *slice_words)
    shards = sorted((tmp_path / "many").glob("model-*.safetensors"))
    assert len(shards) > 2
    whole = load_file(tmp_path / "one" / "model.safetensors")
    parts = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert whole.keys() == parts.keys()
    assert all(bool((whole[name] == parts[name]).all()) for name in whole)


def test_a_sharded_model_slices_like_a_single_file(run, checkpoints, slice_words, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints())
    folder = Path(shutil.copytree(checkpoints(), tmp_path / "tiny-llama"))
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, max_shard_size="40kB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "a", *slice_words)
    assert run("slice", folder, "--dim", "36", "-o", tmp_path / "b", *slice_words).exit_code == 0
    assert file_digest(tmp_path / "a" / "model.safetensors") == file_digest(tmp_path / "b" / "model.safetensors")


def test_the_written_dtype_can_be_chosen(run, checkpoints, slice_words, tmp_path):
    output = tmp_path / "out"
    assert run("slice", checkpoints(), "--dim", "36", "-o", output, "--dtype", "bfloat16", *slice_words).exit_code == 0
    assert {str(tensor.dtype) for tensor in load_file(output / "model.safetensors").values()} == {"torch.bfloat16"}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_slice_can_be_sliced_again(run, checkpoints, slice_words, tmp_path):
    run("slice", checkpoints(), "--dim", "40", "-o", tmp_path / "a", *slice_words)
    assert run("slice", tmp_path / "a", "--dim", "36", "-o", tmp_path / "b", *slice_words).exit_code == 0
    after = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (after["hidden_size"], after["head_dim"]) == (36, 12)


def test_dry_run_decides_and_writes_nothing(run, checkpoints, tmp_path):
    done = run("slice", checkpoints(), "--sparsity", "0.3", "--dry-run", "-o", tmp_path / "out", "--format", "json")
    assert done.exit_code == 0
    assert json.loads(done.stdout)["dim"] == 32
    assert os.listdir(tmp_path) == []


def test_the_default_output_is_named_after_model_and_dim(run, checkpoints, slice_words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("slice", checkpoints(), "--dim", "36", *slice_words).exit_code == 0
    assert (tmp_path / "tiny-llama-dim36" / "config.json").is_file()


def test_overwrite_replaces_a_slice(run, checkpoints, slice_words, tmp_path):
    words = ["slice", checkpoints(), "-o", tmp_path / "out", *slice_words]
    assert run(*words, "--dim", "36").exit_code == 0
    assert run(*words, "--dim", "24").exit_code == 1
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 36
    assert run(*words, "--dim", "24", "--overwrite").exit_code == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["hidden_size"] == 24


def test_results_go_to_stdout_and_all_else_to_stderr(run, checkpoints, slice_words, tmp_path):
    done = run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "a", *slice_words)
    assert "hidden size" in done.stdout
    assert "refit" in done.stderr
    assert "Next: slicecli eval" in done.stderr
    quiet = run("-q", "slice", checkpoints(), "--dim", "36", "-o", tmp_path / "b", *slice_words)
    assert [line for line in quiet.stderr.splitlines() if not line.startswith("Warning")] == []


def test_too_few_tokens_are_said_with_the_number(run, checkpoints, slice_words, tmp_path):
    done = run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "a", *slice_words)
    assert "768 calibration tokens for maps of up to 80 inputs" in done.stderr


def test_a_slice_that_grows_the_model_says_so(run, checkpoints, slice_words, tmp_path):
    done = run("slice", checkpoints("llama-tied"), "--dim", "44", "--untie", "-o", tmp_path / "a", *slice_words)
    assert "more parameters than the dense model" in done.stderr


def test_eval_measures_and_writes_json(run, checkpoints, text_file, tmp_path):
    results = tmp_path / "results.json"
    words = ["eval", checkpoints(), "--perplexity", text_file, "--seq-len", "32", "-o", results, "--format", "json"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document == json.loads(results.read_text())
    assert document.keys() >= {"model", "perplexity", "tasks", "versions"}
    measured = document["perplexity"]["nonsense.jsonl"]
    assert measured.keys() >= {"value", "nll", "stderr", "tokens", "seq_len", "bits_per_byte"}
    assert measured["tokens"] % 31 == 0
    limited = json.loads(run(*words, "--limit", "2").stdout)["perplexity"]["nonsense.jsonl"]
    assert limited["tokens"] == 62


def test_inspect_shows_who_reads_and_writes(run, checkpoints):
    document = json.loads(run("inspect", checkpoints("phi3"), "--format", "json").stdout)
    assert document["adapter"] == "phi3"
    (kind,) = document["declaration"]["block_kinds"]
    assert kind["blocks"] == [0, 1, 2]
    assert [reader["path"] for reader in kind["branches"][0]["readers"]] == ["self_attn.qkv_proj"]
    shown = run("inspect", checkpoints()).stdout
    for word in ("self_attn.q_proj", "mlp.down_proj", "multiples of 4, 4 to 44"):
        assert word in shown


def test_generate_continues_the_prompt(run, checkpoints):
    words = ["generate", checkpoints(), "a stream", "--max-new-tokens", "5", "--format", "json"]
    first, second = (json.loads(run(*words).stdout) for _ in range(2))
    assert first["text"] == second["text"]
    assert first["tokens"] == 5
    sampled = [json.loads(run(*words, "--temperature", "2", "--seed", seed).stdout)["text"] for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_verbose_shows_the_traceback_and_nothing_else_does(run, checkpoints):
    plain = run("slice", checkpoints(), "--dim", "48")
    assert plain.exit_code == 2
    assert "Traceback" not in plain.output
    loud = run("-v", "slice", checkpoints(), "--dim", "48")
    assert type(loud.exception).__name__ == "RequestError"
