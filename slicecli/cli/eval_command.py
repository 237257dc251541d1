"""`slicecli eval`: measure a model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show
from slicecli.evaluation.options import EvaluationOptions

if TYPE_CHECKING:
    from slicecli.evaluation.measure import Evaluation


@click.command("eval")
@click.argument("model", type=shared.MODEL)
@shared.measure_options
@click.option("--baseline", type=shared.MODEL, metavar="MODEL", help="Also measure this model, and compare.")
@shared.add_options(EvaluationOptions, "seed")
@shared.run_options
@shared.device_options
@click.option(
    "-o",
    "--output",
    type=shared.LocalPath(dir_okay=False),
    metavar="FILE",
    help="Also write the result to FILE, as JSON.",
)
@click.option(
    "--lm-eval-output",
    type=shared.LocalPath(file_okay=False),
    metavar="DIR",
    help="Also write the results of --tasks below DIR in lm-eval's own layout.",
)
@click.option(
    "--record",
    "is_recorded",
    is_flag=True,
    help="Add the result to the record and card of MODEL, a slice's folder; with --baseline, also the dense model's "
    "result.",
)
@shared.model_options
@shared.format_option
@click.pass_obj
def command(
    context: dict[str, Any],
    /,
    model: str,
    baseline: str | None,
    output: Path | None,
    lm_eval_output: Path | None,
    is_recorded: bool,
    output_format: str,
    **chosen: Any,
) -> None:
    """Measure MODEL, dense or sliced: perplexity on texts, and task results by lm-eval.

    \b
    Example:
      slicecli eval ./my-slice --perplexity wikitext2 --tasks piqa,arc_easy
      slicecli eval ./my-slice --tasks questions.jsonl --baseline ./my-model
    """
    from slicecli.checkpoint.folder import check_results_file
    from slicecli.checkpoint.source import check_may_change
    from slicecli.errors import RequestError
    from slicecli.evaluation.measure import evaluate, evaluate_both
    from slicecli.record.record import read_sound_record
    from slicecli.runtime.distributed import Processes

    if lm_eval_output is not None and not chosen["tasks"]:
        raise RequestError("--lm-eval-output is about tasks.", "Pass --tasks, or leave it out.")
    if is_recorded and (not Path(model).is_dir() or read_sound_record(Path(model)) is None):
        raise RequestError(f"{model!r} is not the folder of a slice.", "Leave out --record: only a slice has a record.")
    if is_recorded:
        check_may_change(Path(model))
    is_main = Processes.find().is_main
    if is_main and output is not None:
        # said now, not after the measuring
        models = [Path(name).expanduser() for name in (model, baseline) if name is not None]
        check_results_file(output, models, [Path(name).expanduser() for name in (*chosen["texts"], *chosen["tasks"])])
    options = shared.evaluation_request(chosen)
    other = None
    with show.progress(context["quiet"]) as watcher:
        if baseline is None:
            found = evaluate(model, options, watcher)
        else:
            found, other = evaluate_both(model, baseline, options, watcher)
    if not is_main:
        return
    document = found.to_json(other)
    try:
        if output is not None:
            show.write_json(output, document)
        if is_recorded:
            _enter(Path(model), document)
        if lm_eval_output is not None:
            for one in (found, other):
                if one is not None:
                    _write_lm_eval(lm_eval_output, one)
    finally:  # whichever of the places cannot be written, the others have the result
        if output_format == "json":
            show.print_json(document)
        elif other is None:
            _print_one(found)
        else:
            _print_both(found, other, document["comparison"])


def _write_lm_eval(folder: Path, found: Evaluation) -> None:
    from slicecli.evaluation.tasks import write_lm_eval_results

    settings = found.evaluation
    about = (settings.system_instruction, found.chat_template, settings.fewshot_as_multiturn)
    path = write_lm_eval_results(folder, found.model, found.lm_eval_results, *about)
    show.note(f"lm-eval's layout: {path}")


def _enter(folder: Path, document: dict[str, Any]) -> None:
    """Enter results into a slice's record; those of the model it was made from too, and what both say together."""
    from slicecli.estimation.results import fit_results, series_of
    from slicecli.hub.writing import enter_results

    dense = document.get("baseline")
    if dense is not None and (reason := _why_not_its_dense_model(document, dense)):
        show.warn(f"{reason}: its figures are not recorded.")
        dense = None
    curves = [] if dense is None else [one.to_json() for one in fit_results(series_of([dense, document]))]
    measured = (document["perplexity"], document["tasks"])
    dense = dense and {name: dense[name] for name in ("perplexity", "tasks")}
    for remark in enter_results(folder, *measured, dense, curves):
        show.warn(remark)


def _why_not_its_dense_model(document: dict[str, Any], other: dict[str, Any]) -> str:
    """Say why a measured model is not the dense one that a slice was made from: its content tells, not its name."""
    if other["method"] is not None:
        return f"{other['model']} is a slice, not a dense model"
    if document["source"]["content"] != other["source"]["content"]:
        return f"{other['model']} is not the model the slice was made from (config or weights differ)"
    return ""


def _print_one(found: Evaluation) -> None:
    if found.perplexity:
        show.print_table(
            ["text", "perplexity", "± stderr", "bits per byte", "tokens", "row length"],
            [
                [
                    text,
                    f"{result.value:.3f}",
                    show.number(result.stderr, 3),
                    f"{result.bits_per_byte:.4f}",
                    f"{result.tokens:,}",
                    f"{result.seq_len}",
                ]
                for text, result in found.perplexity.items()
            ],
        )
    if found.tasks:
        show.print_table(
            ["task", "metric", "value", "± stderr", "chance", "questions", "examples"],
            [
                [
                    task,
                    result.metric,
                    show.number(result.value, 4),
                    show.number(result.stderr, 4),
                    show.number(result.chance, 4),
                    f"{result.samples:,}",
                    f"{result.num_fewshot}",
                ]
                for task, result in found.tasks.items()
            ],
        )


def _print_both(found: Evaluation, other: Evaluation, comparison: dict[str, Any]) -> None:
    rows = [
        ["parameters", f"{other.parameters:,}", f"{found.parameters:,}", f"x {found.parameters / other.parameters:.3f}"]
    ]
    for text, result in found.perplexity.items():
        change = comparison["perplexity"][text]
        before = other.perplexity[text]
        rows.append(
            [
                f"perplexity on {text}",
                show.measured(before.value, before.stderr, 3),
                show.measured(result.value, result.stderr, 3),
                f"x {change['ratio']:.3f}",
            ]
        )
        if not change["same_rows"]:
            show.warn(f"The models have different tokenizers: on {text}, compare bits per byte instead of perplexity.")
            bits = (before.bits_per_byte, result.bits_per_byte)
            rows.append([f"bits per byte on {text}", *(f"{value:.4f}" for value in bits), f"x {bits[1] / bits[0]:.3f}"])
    for task, answered in found.tasks.items():
        change = comparison["tasks"][task]
        answered_before = other.tasks[task]
        rows.append(
            [
                f"{answered.metric} on {task}",
                show.measured(answered_before.value, answered_before.stderr, 4),
                show.measured(answered.value, answered.stderr, 4),
                show.measured(change["difference"], change["stderr"], 4, sign="+"),
            ]
        )
    show.print_table(["", f"baseline {other.model}", found.model, "change"], rows)
