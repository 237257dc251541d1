"""Write a checkpoint of random weights in the shape of any config, tensor by tensor, without holding the model.

    python benchmarks/make_checkpoint.py OUT --config config.json
    python benchmarks/make_checkpoint.py OUT --hidden-size 2048 --blocks 28 --intermediate-size 5632
    python benchmarks/make_checkpoint.py OUT --preset llama-3-8b [--device cuda]

A size that is given overrides that of the config or the preset. Weights are drawn with a seed and scaled so that
activations stay finite; memory holds the largest tensor in float32. A GPU draws faster, and other numbers than a CPU
from the same seed. The tokenizer is the embedded one; its 2,048 tokens are the first of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers

from slicecli.checkpoint.meta_model import build_runnable_meta_model
from slicecli.checkpoint.weight_writer import ShardWriter
from slicecli.data.demo import MODEL_FOLDER

PRESETS: dict[str, dict[str, Any]] = {
    "random-llama": {
        "hidden_size": 2048,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "intermediate_size": 5632,
        "vocab_size": 32000,
    },
    "llama-3-8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
        "bos_token_id": 0,
        "eos_token_id": 1,
    },
}
SIZES = {
    "hidden_size": "hidden_size",
    "blocks": "num_hidden_layers",
    "heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "intermediate_size": "intermediate_size",
    "vocabulary": "vocab_size",
}


def read_config(path: Path | None, preset: str, sizes: dict[str, int]) -> transformers.PreTrainedConfig:
    """Return a config with some sizes changed.

    Args:
        path: A config.json; `None` takes the preset.
        preset: Name of a preset.
        sizes: What is changed, by the names that Llama's config has for it.
    """
    if path is None:
        fields = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **PRESETS[preset]}
    else:
        fields = json.loads(path.read_text())
    # some families have other names for the same sizes
    names = transformers.CONFIG_MAPPING[fields["model_type"]].attribute_map
    fields |= {names.get(name, name): value for name, value in sizes.items()}
    return transformers.AutoConfig.for_model(**fields)


def make_checkpoint(
    folder: Path, config: transformers.PreTrainedConfig, dtype: torch.dtype, seed: int = 0, device: str = "cpu"
) -> int:
    """Write the checkpoint; return its number of parameters."""
    folder.mkdir(parents=True)
    shapes = {name: tuple(value.shape) for name, value in build_runnable_meta_model(config).named_parameters()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight", None)
    writer = ShardWriter(folder, shapes, dtype, "5GB")
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes.items():
        scale = 0.5 if "embed" in name else 1 / math.sqrt(shape[-1])
        if "norm" in name:
            value = torch.ones(shape)
        else:
            value = torch.randn(shape, generator=generator, device=device).mul_(scale)
        writer.write(name, value.to(dtype).cpu())
    writer.finish()
    config.dtype = dtype
    config.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(MODEL_FOLDER / name, folder / name)
    return sum(math.prod(shape) for shape in shapes.values())


def main() -> None:
    """Read the arguments and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    base = parser.add_mutually_exclusive_group()
    base.add_argument("--config", type=Path, help="config.json to take all sizes from")
    base.add_argument("--preset", choices=list(PRESETS), default="random-llama", help="default %(default)s")
    for name in SIZES:
        parser.add_argument(f"--{name.replace('_', '-')}", type=int)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--device", default="cpu", help="where the numbers are drawn: cpu, cuda, cuda:1")
    arguments = parser.parse_args()
    given = {field: getattr(arguments, name) for name, field in SIZES.items()}
    sizes = {field: value for field, value in given.items() if value is not None}
    config = read_config(arguments.config, arguments.preset, sizes)
    count = make_checkpoint(arguments.output, config, getattr(torch, arguments.dtype), device=arguments.device)
    print(f"{count:,} parameters")


if __name__ == "__main__":
    main()
