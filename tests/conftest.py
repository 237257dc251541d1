"""Shared fixtures: tiny models of every family, built from configs, and checkpoints of them on disk."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

# the models are tiny: threads would only wait for each other, badly so where several test runs share a machine
os.environ.setdefault("OMP_NUM_THREADS", "1")

VOCABULARY = 300
BASE = {
    "vocab_size": VOCABULARY,
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
LLAMA_3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-1": {"model_type": "llama", "num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "llama-3": {"model_type": "llama", "rope_parameters": LLAMA_3_ROPE, "rms_norm_eps": 1e-5},
    "llama-tied": {"model_type": "llama", "tie_word_embeddings": True},
    "llama-biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "llama-wide-heads": {"model_type": "llama", "head_dim": 20},
    "mistral": {"model_type": "mistral", "sliding_window": 16},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16, "attention_bias": True},
    "phi3": {"model_type": "phi3"},
}


def tiny_config(family: str, **changes: Any) -> Any:
    """Return the transformers config of a tiny model."""
    import transformers

    fields = {**BASE, **FAMILIES[family], **changes}
    return transformers.AutoConfig.for_model(**fields)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a random model in which every parameter matters: no bias is zero and no norm weight is one."""
    import torch
    import transformers

    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(family, **changes)).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1 + 0.3 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.2 * noise)
            else:
                parameter.copy_(noise * (0.5 if "embed" in name else 1.5 / parameter.shape[-1] ** 0.5))
    return model


def byte_tokenizer(adds_bos: bool = True) -> Any:
    """Return a tokenizer of single bytes with `<s>` first, so that no tokenizer has to be shipped."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Return a function that gives a folder with a tiny checkpoint, made once per family."""
    made: dict[str, Path] = {}

    def make(family: str = "llama") -> Path:
        if family not in made:
            folder = tmp_path_factory.mktemp("models") / f"tiny-{family}"
            model = tiny_model(family)
            model.save_pretrained(folder)
            byte_tokenizer().save_pretrained(folder)
            (folder / "LICENSE.txt").write_text("Do as you please.\n")
            (folder / "chat_template.jinja").write_text("{{ messages }}\n")
            made[family] = folder
        return made[family]

    return make


@pytest.fixture
def checkpoint_copy(checkpoints: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    import shutil

    return Path(shutil.copytree(checkpoints(), tmp_path / "copy"))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of readable nonsense, enough for a few hundred rows of 32 bytes."""
    import random

    generator = random.Random(0)
    words = "the a stream block norm head basis reads writes keeps small wide of and to"
    path = tmp_path_factory.mktemp("text") / "nonsense.jsonl"
    lines = [
        json.dumps({"text": " ".join(generator.choices(words.split(), k=generator.randint(10, 40))) + "."})
        for _ in range(120)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command line in this process."""
    from slicecli.cli import group

    def call(*words: str | Path) -> Result:
        return CliRunner().invoke(group, [str(word) for word in words], prog_name="slicecli")

    return call


@pytest.fixture
def slice_words(text_file: Path) -> list[str | Path]:
    """The options of a quick slice."""
    return ["--calibration", text_file, "--samples", "24", "--seq-len", "32"]
