"""Prefill and decode speed of slices against the dense model, with the price of shortcut matrices apart.

Usage: python benchmarks/generation_speed.py [--hidden 768 --dim 576 ...] [--device cuda:0 --dtype bfloat16]

Four models of one shape with random weights, at one dtype, timed in turn, round after round, so that whatever else the
machine does meets all of them alike:

* dense;
* stock: the family's own class at the smaller hidden size, as the refit writes Llama;
* custom code: the same widths in the layout with code of its own, without shortcuts, as the refit writes OPT;
* shortcuts: the same widths with two shortcut matrices per block, as the published method writes every family.

So stock against custom code is the price of the layout, and custom code against shortcuts that of the matrices. The
head is sliced in all. Medians of the rounds, and the median of each round's ratio to the dense model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import torch
import transformers

from slicecli.checkpoint.configs import custom_code_config, stock_config
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.schedule import Schedule


def make_models(options: argparse.Namespace) -> dict[str, Any]:
    """Build the four models."""
    dense = transformers.LlamaConfig(
        hidden_size=options.hidden,
        intermediate_size=options.intermediate,
        num_hidden_layers=options.layers,
        num_attention_heads=options.heads,
        num_key_value_heads=options.key_value_heads,
        vocab_size=options.vocabulary,
        max_position_embeddings=options.prompt + options.new_tokens,
    )
    dimensions = Dimensions(plugins().adapters["llama"], dense.to_dict())
    dimensions.check_dim(options.dim)
    schedule = Schedule.constant(dimensions, options.dim)
    configs = {
        "dense": dense,
        "stock": stock_config(dense, dimensions, options.dim, options.dtype),
        "custom code": custom_code_config(dense, dimensions, schedule, False, 0, options.dtype),
        "shortcuts": custom_code_config(dense, dimensions, schedule, True, 0, options.dtype),
    }
    models = {}
    for name, config in configs.items():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options.dtype))
        models[name] = model.to(options.device).eval()
    return models


@torch.no_grad()
def time_once(model: Any, ids: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Return the seconds of one prefill and of decoding after it, token by token with the cache."""
    started = _now(ids.device)
    seen = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefill = _now(ids.device) - started
    started = _now(ids.device)
    for _ in range(new_tokens):
        token = seen.logits[:, -1:].argmax(-1)
        seen = model(input_ids=token, past_key_values=seen.past_key_values, use_cache=True)
    return prefill, _now(ids.device) - started


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main() -> None:
    """Time the models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sizes = {"hidden": 768, "dim": 576, "intermediate": 2048, "layers": 12, "heads": 12, "key_value_heads": 4}
    runs = {"vocabulary": 32000, "batch": 1, "prompt": 512, "new_tokens": 32, "rounds": 7}
    for name, value in {**sizes, **runs}.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--json", action="store_true", help="Print JSON.")
    options = parser.parse_args()

    models = make_models(options)
    shape = (options.batch, options.prompt)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, options.vocabulary, shape, generator=generator).to(options.device)
    for model in models.values():
        time_once(model, ids, 2)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(options.rounds):
        for name, model in models.items():
            times[name].append(time_once(model, ids, options.new_tokens))

    rows = []
    for name, model in models.items():
        row: dict[str, Any] = {"model": name, "parameters": sum(value.numel() for value in model.parameters())}
        for index, (phase, tokens) in enumerate((("prefill", options.prompt), ("decode", options.new_tokens))):
            seconds = [one[index] for one in times[name]]
            ratios = [dense[index] / one[index] for dense, one in zip(times["dense"], times[name], strict=True)]
            row[f"{phase}_tokens_per_second"] = options.batch * tokens / statistics.median(seconds)
            row[f"{phase}_speed_up"] = statistics.median(ratios)
            row[f"{phase}_speed_up_range"] = [min(ratios), max(ratios)]
        rows.append(row)
    if options.json:
        print(json.dumps({"options": vars(options), "rows": rows}, indent=2))
        return
    print(f"{'':12} {'parameters':>13} {'prefill tok/s':>14} {'x dense':>8} {'decode tok/s':>13} {'x dense':>8}")
    for row in rows:
        print(
            f"{row['model']:12} {row['parameters']:13,} {row['prefill_tokens_per_second']:14,.0f} "
            f"{row['prefill_speed_up']:8.2f} {row['decode_tokens_per_second']:13,.1f} {row['decode_speed_up']:8.2f}"
        )


if __name__ == "__main__":
    main()
