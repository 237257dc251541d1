"""Print what the program makes of seeded models: hashes of weights and configs, and the figures of every command.

A change of structure leaves the output as it is. Compare two versions with

    python tools/reference_outputs.py > before.json
    python tools/reference_outputs.py > after.json
    diff before.json after.json

It takes about two minutes on two cores. Times, memory, paths and versions are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
GPT2_SIZES = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 128, "n_inner": 80}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama (tied)": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "mixtral": EXPERTS,
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": {**EXPERTS, "head_dim": 16},
    "phi3": {},
    "phi": {"partial_rotary_factor": 0.5, "num_key_value_heads": 4},
    "gemma": {"head_dim": 12},
    "granite": {"embedding_multiplier": 2.0, "residual_multiplier": 0.5, "logits_scaling": 4.0},
    "starcoder2": {},
    "cohere": {},
    "opt": {"ffn_dim": 80, "word_embed_proj_dim": 48, "do_layer_norm_before": True},
    "gpt2": GPT2_SIZES,
    "gpt_neox": {},
    "apertus": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},  # declared by nobody: inferred
}
DIM = 36
CALIBRATION = ("--samples", "24", "--seq-len", "32", "--no-cache")
VARYING = frozenset(
    {
        "seconds",
        "phases",
        "peak_memory_bytes",
        "peak_device_memory_bytes",
        "output",
        "versions",
        "slicecli_version",
        "fingerprint",
        "content",
        "placement",
    }
)


def main() -> None:
    """Print the JSON document."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.chdir(folder)
        from slicecli.testing import nonsense_text

        text = nonsense_text(folder / "nonsense.jsonl")
        found: dict[str, Any] = {"slices": {}}
        for name, changes in FAMILIES.items():
            model = make_model(folder / name.replace(" ", "-"), changes.get("model_type", name), changes)
            for method in ("refit", "slicegpt"):
                found["slices"][f"{name}, {method}"] = slice_of(model, method, text)
            print(name, file=sys.stderr)
        found |= figures(folder / "llama", text)
    print(json.dumps(found, indent=1, sort_keys=True))


def make_model(folder: Path, model_type: str, changes: Mapping[str, Any]) -> Path:
    """Write a random model in which every parameter matters."""
    import torch
    import transformers

    from slicecli.testing import save_checkpoint

    known = transformers.AutoConfig.for_model(model_type).to_dict()
    fields = {name: value for name, value in SIZES.items() if name in known} | dict(changes)
    fields.pop("model_type", None)
    config = transformers.AutoConfig.for_model(model_type, **fields)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return save_checkpoint(model, folder)


def call(*words: str | Path, code: int = 0) -> Any:
    """Run a command and return the JSON that it prints."""
    from click.testing import CliRunner

    from slicecli.cli import group

    done = CliRunner().invoke(group, [*map(str, words), "--format", "json"], prog_name="slicecli")
    if done.exit_code:
        return {"exit code": done.exit_code}
    return without_varying(json.loads(done.stdout))


def slice_of(model: Path, method: str, text: Path) -> dict[str, Any]:
    """Slice a model; return the report and hashes of what was written."""
    output = model.with_name(f"{model.name}-{method}")
    words = ("--dim", str(DIM), "--method", method, "--write-as", "own", "-o", output, "--calibration", text)
    report = call("slice", model, *words, *CALIBRATION)
    hashes = {path.name: digest(path) for path in sorted(output.glob("*")) if path.suffix in {".safetensors", ".json"}}
    hashes.pop("slicecli.json", None)
    return {"report": report, "hashes": hashes}


def figures(model: Path, text: Path) -> dict[str, Any]:
    """Return what the commands that measure and predict say of a model and its slice."""
    sliced = model.with_name(f"{model.name}-refit")
    measure = ("--perplexity", text, "--seq-len", "32", "--limit", "8")
    return {
        "sweep": call(
            "sweep", model, "--dims", "40,32,24", "-o", "sweep", "--calibration", text, *CALIBRATION, *measure[:2]
        ),
        "estimate": call("estimate", model, "--dim", "40,32", "--dense-perplexity", "6"),
        "estimate, published": call(
            "estimate", model, "--dim", "40", "--method", "slicegpt", "--dense-perplexity", "6"
        ),
        "spectrum": call("spectrum", model, "--calibration", text, "--samples", "8", "--seq-len", "32"),
        "eval": call("eval", sliced, "--baseline", model, *measure, "--record"),
        "inspect": call("inspect", model),
        "verify": call("verify", sliced),
        "card": numbers_of(sliced / "README.md"),
        "record": without_varying(json.loads((sliced / "slicecli.json").read_text())),
    }


def without_varying(value: Any) -> Any:
    """Return JSON without what differs from run to run or from version to version."""
    if isinstance(value, dict):
        return {name: without_varying(one) for name, one in value.items() if name not in VARYING}
    return [without_varying(one) for one in value] if isinstance(value, list) else value


def numbers_of(card: Path) -> list[str]:
    """Return the figures of a card in their order, whatever the words between them."""
    return re.findall(r"(?<![\w.])\d[\d,]*\.?\d*", card.read_text())


def digest(path: Path) -> str:
    """Return the start of a file's SHA-256; of a config, whatever version wrote it."""
    content = path.read_bytes()
    if path.name == "config.json":
        fields = json.loads(content)
        fields.pop("transformers_version", None)
        content = json.dumps(fields, sort_keys=True).encode()
    return hashlib.sha256(content).hexdigest()[:16]


if __name__ == "__main__":
    main()
