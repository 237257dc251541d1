"""`slicecli generate`: see what a model writes."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show

if TYPE_CHECKING:
    from slicecli.runtime.placement import DeviceMap, MaxMemory


@click.command("generate")
@click.argument("model", type=shared.MODEL)
@click.argument("prompt", type=shared.PROMPT)
@click.option("--max-new-tokens", type=int, default=64, show_default=True, help="Maximum number of tokens to generate.")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="0 always takes the likeliest token; above 0 samples.",
)
@click.option("--seed", type=int, default=42, show_default=True, metavar="N", help="Seed for sampling.")
@click.option(
    "--dtype",
    type=shared.DTYPE,
    default="auto",
    show_default=True,
    callback=shared.auto_as_none,
    help="Compute dtype; auto uses the checkpoint's (a CPU computes in float32).",
)
@shared.device_options
@shared.model_options
@shared.format_option
def command(
    model: str,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    dtype: str | None,
    device_map: DeviceMap,
    max_memory: MaxMemory | None,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Generate text with MODEL, dense or sliced, from PROMPT."""
    from slicecli.runtime.inputs import check_sampling

    check_sampling(max_new_tokens, temperature, seed)

    from slicecli.api import generate_text
    from slicecli.checkpoint.loading import load_model
    from slicecli.checkpoint.source import Source
    from slicecli.runtime.libraries import quiet_libraries, running

    source = Source.find(model, revision, token, trust_remote_code)
    source.check_is_decoder()
    with quiet_libraries():
        tokenizer = source.tokenizer()
        loaded = load_model(source, dtype, device_map, max_memory)
        started = time.perf_counter()
        with running(source.name):
            text, count = generate_text(loaded, tokenizer, prompt, max_new_tokens, temperature, seed)
    seconds = time.perf_counter() - started
    if output_format == "json":
        show.print_json(
            {
                "model": model,
                "prompt": prompt,
                "text": text,
                "tokens": count,
                "tokens_per_second": round(count / seconds, 3),
            }
        )
        return
    show.result(prompt + text)
