"""Shared fixtures: tiny models of every family, built from configs, and checkpoints of them on disk."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from slicecli.proof.tiny import random_model
from slicecli.testing.checkpoints import nonsense_text, save_checkpoint

pytest_plugins = ["pytester"]

# the models are tiny: threads would only wait for each other, badly so where several test runs share a machine
os.environ.setdefault("OMP_NUM_THREADS", "1")
# the Hub's client reads it once
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep the statistics of the tests out of the user's cache, in this process and those it starts."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLICECLI_CACHE", str(folder))
        yield folder


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


# the packages hold millions of objects that never go, and each full collection would go through all of them
gc.set_threshold(200_000, 20, 20)


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--write-faults-page", action="store_true", help="Write docs/faults.md from what tests/test_hub_faults.py sees."
    )


def tiny_config(family: str, **changes: Any) -> Any:
    """Return the transformers config of a tiny model."""
    import transformers

    fields = {**BASE, **FAMILIES[family], **changes}
    return transformers.AutoConfig.for_model(**fields)


def tiny_model(family: str, seed: int = 0, **changes: Any) -> Any:
    """Return a random model in which every parameter matters."""
    return random_model(tiny_config(family, **changes), seed)


def disturb(folder: Path, only: str = "") -> None:
    """Change the matrices of a slice: of random models the refit leaves nothing to be won by training.

    Args:
        only: What the names of those contain that are changed.
    """
    import torch
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(0)
    tensors = load_file(folder / "model.safetensors")
    for name, value in tensors.items():
        if value.ndim == 2 and only in name:
            value += (0.5 * value.float().std() * torch.randn(value.shape, generator=generator)).to(value.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


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
            made[family] = save_checkpoint(tiny_model(family), folder)
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
    return nonsense_text(tmp_path_factory.mktemp("text") / "nonsense.jsonl")


@pytest.fixture
def run() -> Callable[..., Result]:
    """Run the command line in this process."""
    from slicecli.cli import group

    def call(*words: str | Path) -> Result:
        return CliRunner().invoke(group, [str(word) for word in words], prog_name="slicecli")

    return call


@pytest.fixture
def own_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in the place of lm-eval's own tasks, which take seconds to index."""
    folder = tmp_path / "defaults"
    folder.mkdir()
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(folder / "manager.py"))
    return folder


@pytest.fixture
def slice_words(text_file: Path) -> list[str | Path]:
    """The options of a quick slice."""
    return ["--calibration", text_file, "--samples", "24", "--seq-len", "32"]
