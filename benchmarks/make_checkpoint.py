"""Write a checkpoint of random weights in the shape of any config, block by block, without holding the model.

    python benchmarks/make_checkpoint.py OUT --config config.json
    python benchmarks/make_checkpoint.py OUT --hidden-size 2048 --blocks 28 --intermediate-size 5632

Weights are drawn with a seed and scaled so that activations stay finite. The tokenizer is the embedded one; its
tokens are the first of the vocabulary.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import torch
import transformers

from slicecli.checkpoint import ShardWriter
from slicecli.demo import MODEL_FOLDER
from slicecli.shells import empty_model


def make_checkpoint(folder: Path, config: transformers.PreTrainedConfig, dtype: torch.dtype, seed: int = 0) -> int:
    """Write the checkpoint; return its number of parameters."""
    folder.mkdir(parents=True)
    shapes = {name: tuple(value.shape) for name, value in empty_model(config).named_parameters()}
    if config.tie_word_embeddings:
        del shapes["lm_head.weight"]
    writer = ShardWriter(folder, shapes, dtype, "5GB")
    generator = torch.Generator().manual_seed(seed)
    for name, shape in shapes.items():
        scale = 0.5 if "embed" in name else 1 / math.sqrt(shape[-1])
        value = torch.ones(shape) if "norm" in name else torch.randn(shape, generator=generator) * scale
        writer.write(name, value.to(dtype))
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
    parser.add_argument("--config", type=Path, help="config.json to take all sizes from")
    parser.add_argument("--hidden-size", type=int, default=2048)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--key-value-heads", type=int, default=4)
    parser.add_argument("--intermediate-size", type=int, default=5632)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    if arguments.config:
        config = transformers.AutoConfig.for_model(**json.loads(arguments.config.read_text()))
    else:
        config = transformers.LlamaConfig(
            hidden_size=arguments.hidden_size,
            num_hidden_layers=arguments.blocks,
            num_attention_heads=arguments.heads,
            num_key_value_heads=arguments.key_value_heads,
            intermediate_size=arguments.intermediate_size,
            vocab_size=arguments.vocabulary,
            architectures=["LlamaForCausalLM"],
        )
    count = make_checkpoint(arguments.output, config, getattr(torch, arguments.dtype))
    print(f"{count:,} parameters")


if __name__ == "__main__":
    main()
