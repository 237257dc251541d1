"""`slicecli recover`: win back by training what slicing has lost."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show
from slicecli.cli.push_command import publication_of, push_and_report
from slicecli.jobs.options import RecoverOptions
from slicecli.runtime.options import from_chosen

if TYPE_CHECKING:
    from slicecli.jobs.recover import RecoveryReport
    from slicecli.jobs.recovery_plan import RecoveryJob


@click.command("recover")
@click.argument("model", type=shared.MODEL, metavar="SLICE")
@shared.add_options(RecoverOptions, "teacher", "data", "tokens", "mode")
@click.option(
    "-o", "--output", type=shared.LocalPath(), metavar="DIR", help="Output folder.  [default: ./<name>-recovered]"
)
@shared.add_options(RecoverOptions, "overwrite", "resume")
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; no weights are downloaded.")
@shared.add_options(
    RecoverOptions,
    *("epochs", "learning_rate", "sequence_length", "batch_size", "seed", "eval_every"),
    *("store_logits", "cache_folder", "device_map", "max_memory", "activations", "max_shard_size"),
)
@click.option(
    "--push",
    "repository",
    type=shared.REPOSITORY,
    metavar="REPO",
    help="Then publish the result as REPO on the Hub.",
)
@shared.push_options
@shared.add_options(RecoverOptions, "revision", "token", "trust_remote_code")
@shared.format_option
@click.pass_obj
def command(
    context: dict[str, Any],
    /,
    model: str,
    output: Path | None,
    dry_run: bool,
    repository: str | None,
    output_format: str,
    **chosen: Any,
) -> None:
    """Train SLICE to predict the next token as its dense model, the teacher, does.

    The loss is the KL divergence of the slice's predictions from the teacher's; in mode blocks, for all blocks but the
    last, it is the distance of the block's activations from the teacher's. A twentieth of the text is held out; the
    best state there is written to a new folder, if its divergence is lower than before. Layout, dtype, tied embeddings
    and files stay as they are.

    \b
    Examples:
      slicecli recover ./my-slice --teacher ./my-model -o ./my-slice-recovered
      slicecli recover ./my-slice --teacher ./my-model --mode blocks --data texts.jsonl --tokens 256k
      slicecli recover me/my-slice --data c4 --tokens 10M --mode lora --lr 3e-4
    """
    publication = publication_of(chosen, repository)

    from slicecli.jobs.recovery_plan import plan_recovery
    from slicecli.runtime.libraries import quiet_libraries
    from slicecli.runtime.memory import bound_memory_that_is_kept

    bound_memory_that_is_kept()
    settings = from_chosen(RecoverOptions, chosen)
    if repository is not None and not dry_run:
        from slicecli.hub.push import check_can_push

        # hours before it would fail otherwise
        check_can_push(repository, publication)
    with quiet_libraries():
        job = plan_recovery(model, output, settings)
    if not context["quiet"]:
        show.note(job.describe())
    if dry_run:
        _report({**_fields(job), "dry_run": True}, output_format)
        return
    report = run_recovery(job, context["quiet"])
    if not job.processes.is_main:
        return
    fields = {**_fields(job), **result_of(report)}
    report_fields = functools.partial(_report, output_format=output_format)
    published = push_and_report(job.folder, repository, publication, context["quiet"], fields, report_fields)
    if not context["quiet"]:
        show.note(f"{job.folder}: trained on {report.tokens:,} tokens in {report.seconds:.0f} s")
        if published is not None:
            show.note(f"Published: {published.url}")
        show.note(f"Next: slicecli eval {job.folder} --perplexity wikitext2")


def run_recovery(
    job: RecoveryJob, is_quiet: bool, how_to_resume: str = "run the same command with --resume to continue"
) -> RecoveryReport:
    """Train a slice with a progress bar, and print the warnings."""
    from slicecli.checkpoint.folder import unfinished_folder
    from slicecli.jobs.recover import recover_slice
    from slicecli.runtime.libraries import quiet_libraries

    try:
        with quiet_libraries(), show.progress(is_quiet) as watcher:
            report = recover_slice(job, watcher)
    except (KeyboardInterrupt, SystemExit):
        if unfinished_folder(job.folder).exists():
            show.note(f"Interrupted: {how_to_resume}.")
        raise
    if job.processes.is_main:
        for text in report.warnings:
            show.warn(text)
    return report


def result_of(report: RecoveryReport) -> dict[str, Any]:
    """Return what came out of a training as plain data."""
    from slicecli.runtime.memory import peak_memory_bytes

    return {
        "tokens": report.tokens,
        "kl_before": report.kl_before,
        "kl_after": report.kl_after,
        "best_step": report.best_step,
        "history": [{"tokens": tokens, "kl": kl} for tokens, kl in report.history],
        "seconds": round(report.seconds, 3),
        "peak_memory_bytes": peak_memory_bytes(),
    }


def _fields(job: RecoveryJob) -> dict[str, Any]:
    return {
        "output": str(job.folder),
        "slice": job.source.name,
        "revision": job.source.commit,
        "teacher": job.teacher.name,
        "mode": job.options.mode,
        "data": job.options.data,
        "tokens": job.tokens,
        "tokens_per_step": job.tokens_per_step,
        "sequence_length": job.sequence_length,
        "steps": job.steps,
        "parameters": {"slice": job.record["parameters"]["sliced"], "teacher": job.teacher_parameters},
        "left_out": [one.to_json() for one in job.source.companions.left_out],
    }


def _report(fields: dict[str, Any], output_format: str) -> None:
    if output_format == "json":
        show.print_json(fields)
    elif "kl_after" in fields:
        before, after = fields["kl_before"], fields["kl_after"]
        show.print_table(
            ["", "before", "after", "change"],
            [["held-out KL, nats per token", f"{before:.4f}", f"{after:.4f}", f"{after / before - 1:+.1%}"]],
        )
