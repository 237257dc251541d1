"""`slicecli demo`: the whole job on the embedded model, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show

PROMPT = "This function returns"


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=shared.LocalPath(file_okay=False),
    default=Path("slicecli-demo"),
    show_default=True,
    metavar="DIR",
    help="Folder for the slices, one subfolder per dim; slices of an earlier demo are replaced.",
)
@click.option(
    "--dims", type=shared.DimList(), default="84,72,60", show_default=True, metavar="N,N,...", help="Dims to slice to."
)
@shared.format_option
@click.pass_obj
def command(context: dict[str, Any], output: Path, dims: tuple[int, ...], output_format: str) -> None:
    """Slice the bundled demo model to several dims, measure each slice, and generate a sentence with each.

    The model was trained on Python docstrings. Calibration and evaluation text comes from the docstrings of the
    running Python installation. Nothing is downloaded.
    """
    from slicecli.api import generate_text
    from slicecli.checkpoint.loading import load_model
    from slicecli.checkpoint.source import Source
    from slicecli.data.demo import MODEL_FOLDER
    from slicecli.evaluation.measure import EvaluationSet, measure_loaded
    from slicecli.evaluation.options import EvaluationOptions
    from slicecli.family.slice_plan import Width
    from slicecli.jobs.options import SliceOptions
    from slicecli.jobs.plan import plan_slices
    from slicecli.jobs.run import run_slices
    from slicecli.runtime.libraries import quiet_libraries

    settings = SliceOptions(calibration="demo", samples=256, sequence_length=256, overwrite=True)
    folders = [output / f"dim{dim}" for dim in dims]
    job = plan_slices(str(MODEL_FOLDER), [Width(dim) for dim in dims], list(folders), settings)
    with quiet_libraries(), show.progress(context["quiet"]) as watcher:
        reports = run_slices(job, watcher)
        measuring = EvaluationOptions(texts=("demo",), sequence_length=256)
        prepared = EvaluationSet.prepare(measuring, job.source, job.source.tokenizer())
        rows = []
        for dim, folder in [(job.dimensions.hidden_size, MODEL_FOLDER), *zip(dims, folders, strict=True)]:
            source = Source.find(str(folder))
            model, tokenizer = load_model(source), source.tokenizer()
            found = measure_loaded(model, tokenizer, source, prepared, measuring, watcher)
            sentence, _ = generate_text(model, tokenizer, PROMPT, max_new_tokens=32)
            rows.append((dim, folder, found.perplexity["demo"], " ".join((PROMPT + sentence).split())))
    dense = reports[0].plan
    parameters = [dense.dense_parameters, *(report.plan.sliced_parameters for report in reports)]
    weights = [dense.dense_bytes, *(report.plan.sliced_bytes for report in reports)]
    if output_format == "json":
        show.print_json(
            [
                {
                    "dim": dim,
                    "output": str(folder) if index else None,
                    "parameters": parameters[index],
                    "bytes": weights[index],
                    "perplexity": measured.model_dump(),
                    "text": text,
                }
                for index, (dim, folder, measured, text) in enumerate(rows)
            ]
        )
        return
    show.print_table(
        ["", "dim", "parameters", "weights", "perplexity"],
        [
            [
                "slice" if index else "dense",
                f"{dim}",
                f"{parameters[index]:,}",
                show.size(weights[index]),
                show.measured(measured.value, measured.stderr, 2),
            ]
            for index, (dim, _, measured, _) in enumerate(rows)
        ],
    )
    for dim, _, _, text in rows:
        show.result(f"  {dim}  {text}")
    if not context["quiet"]:
        show.note(f"The slices are in {output}. Next: slicecli generate {folders[0]} {PROMPT!r}")
