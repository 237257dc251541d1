"""`slicecli slice`: the main job."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show
from slicecli.cli.push_command import publication_of, push_and_report
from slicecli.cli.recover_command import result_of, run_recovery
from slicecli.family.slice_plan import Width
from slicecli.jobs.options import RECOVERY_MODES, SliceOptions
from slicecli.runtime.options import from_chosen

if TYPE_CHECKING:
    from slicecli.family.slice_plan import WidthPair
    from slicecli.jobs.plan import Job, PlannedSlice
    from slicecli.jobs.recover import RecoveryReport
    from slicecli.record.schema import RecoveryMode


@click.command("slice")
@click.argument("model", type=shared.MODEL)
@shared.add_options(Width, "dim", "mlp_dim", "target_parameters", "memory", "sparsity", "of", "shape", "multiple_of")
@shared.add_options(Width, "mlp_sparsity")
@click.option(
    "-o", "--output", type=shared.LocalPath(), metavar="DIR", help="Output folder.  [default: ./<name>-dim<N>]"
)
@shared.add_options(SliceOptions, "overwrite", "resume")
@click.option(
    "--recover",
    "recovery_mode",
    type=click.Choice(RECOVERY_MODES),
    help="Then train the slice on the calibration text, as `slicecli recover --mode` does, and write the result to "
    "DIR-recovered.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and stop; no weights are downloaded.")
@shared.method_options
@shared.add_options(Width, "schedule")
@shared.calibration_options
@shared.cache_options
@shared.run_options
@shared.device_options
@shared.activations_option
@shared.add_options(SliceOptions, "max_shard_size")
@shared.adapter_option
@click.option(
    "--push",
    "repository",
    type=shared.REPOSITORY,
    metavar="REPO",
    help="Then publish the slice as REPO on the Hub.",
)
@shared.push_options
@shared.model_options
@shared.format_option
@click.pass_obj
def command(
    context: dict[str, Any],
    /,
    model: str,
    output: Path | None,
    recovery_mode: RecoveryMode | None,
    dry_run: bool,
    repository: str | None,
    output_format: str,
    **chosen: Any,
) -> None:
    """Slice the hidden size of MODEL, its MLPs, or both, and write a checkpoint that loads like any other.

    \b
    Examples:
      slicecli slice meta-llama/Meta-Llama-3-8B-Instruct --dim 3072
      slicecli slice meta-llama/Meta-Llama-3-8B-Instruct --dim 3584 --mlp-dim 11264
      slicecli slice meta-llama/Meta-Llama-3-8B-Instruct --target-params 6B
      slicecli slice ./my-model --sparsity 0.2 --calibration texts.jsonl -o ./my-slice
      slicecli slice ./my-model --dim 3072 --method slicegpt --final-orientation random
      slicecli slice meta-llama/Meta-Llama-3-8B-Instruct --dim 3072 --push me/Llama-3-8B-dim3072 --private
    """
    from slicecli.checkpoint.folder import unfinished_folder

    publication = publication_of(chosen, repository)
    width = from_chosen(Width, chosen)

    from slicecli.jobs.plan import plan_slices
    from slicecli.jobs.run import run_slices
    from slicecli.runtime.distributed import Processes
    from slicecli.runtime.libraries import quiet_libraries
    from slicecli.runtime.memory import bound_memory_that_is_kept

    settings = from_chosen(SliceOptions, chosen)
    is_main = Processes.find().is_main
    if repository is not None and not dry_run and is_main:
        from slicecli.hub.push import check_can_push

        # hours before it would fail otherwise
        check_can_push(repository, publication)
    bound_memory_that_is_kept()
    job = plan_slices(model, [width], [output], settings)
    planned = job.slices[0]
    plan, folder = planned.plan, planned.folder
    if recovery_mode is not None and is_main:
        from slicecli.jobs.slice_and_recover import check_recovery

        check_recovery(job, recovery_mode)
    if not context["quiet"]:
        show.note(f"{plan.model} ({plan.model_type}): {_intention(planned)}, {plan.dtype}, by {plan.method}")
        if job.inference is not None:
            show.note(
                f"No plugin serves type {plan.model_type}: the adapter was inferred and proved on a small model "
                f"(a rotation changes its logits by {job.inference.error:.0e})."
            )
        if job.slices[0].note:
            show.note(job.slices[0].note)
        for one in job.source.companions.left_out:
            show.note(f"Not copied: {one.describe()}")
    if dry_run:
        from slicecli.jobs.preparation import rehearse

        if is_main:
            rehearse(job)
        if not context["quiet"]:
            show.note(job.describe_places())
        fields = {**_fields(planned, job.source), "placement": job.places_to_json(), "dry_run": True}
        _report(fields, output_format)
        return
    try:
        with quiet_libraries(), show.progress(context["quiet"]) as watcher:
            report = run_slices(job, watcher)[0]
    except (KeyboardInterrupt, SystemExit):
        if unfinished_folder(folder).exists():
            show.note("Interrupted: run the same command with --resume to continue.")
        raise
    if is_main:
        for text in report.warnings:
            show.warn(text)
    recovery = None if recovery_mode is None else _recover(job, report.output, recovery_mode, context["quiet"])
    plan, folder = report.plan, report.output
    if not is_main:
        return
    fields = {
        **_fields(dataclasses.replace(planned, plan=plan, folder=folder, pairs=()), job.source),
        "energy_kept": report.energy_kept,
        "statistics": "cache" if report.is_from_cache else "collected",
        "seconds": round(report.seconds, 3),
        "phases": {phase: round(seconds, 3) for phase, seconds in report.phases.items()},
        "peak_memory_bytes": report.peak_memory_bytes,
        "peak_device_memory_bytes": report.peak_device_memory_bytes,
        "placement": job.places_to_json(),
    }
    if not context["quiet"]:
        show.note(
            f"{folder}: {report.energy_kept:.1%} of the energy kept, {report.seconds:.0f} s, "
            f"peak memory {show.size(report.peak_memory_bytes)}"
        )
    if recovery is not None:
        folder = recovery.output
        fields["recovery"] = {"output": str(folder), "mode": recovery_mode, **result_of(recovery)}
        if not context["quiet"]:
            show.note(
                f"{folder}: held-out KL {recovery.kl_before:.4f} -> {recovery.kl_after:.4f}, {recovery.seconds:.0f} s"
            )
    report_fields = functools.partial(_report, output_format=output_format)
    published = push_and_report(folder, repository, publication, context["quiet"], fields, report_fields)
    if not context["quiet"]:
        if published is not None:
            show.note(f"Published: {published.url}")
        if plan.layout == "custom-code":
            show.note("It needs custom code: load it with trust_remote_code=True, or after `import slicecli`.")
        show.note(f"Next: slicecli eval {folder} --perplexity wikitext2")


def _recover(job: Job, folder: Path, mode: RecoveryMode, is_quiet: bool) -> RecoveryReport:
    """Train the slice that a job has made, into a folder beside it."""
    from slicecli.jobs.recovery_plan import plan_recovery
    from slicecli.jobs.slice_and_recover import command_to_resume, recovery_folder, recovery_options
    from slicecli.runtime.libraries import quiet_libraries

    with quiet_libraries():
        recovery = plan_recovery(str(folder), recovery_folder(folder), recovery_options(job, mode))
    if not is_quiet:
        show.note(recovery.describe())
    return run_recovery(recovery, is_quiet, f"the slice is finished; to continue, run {command_to_resume(recovery)}")


def _intention(planned: PlannedSlice) -> str:
    """Say what becomes of the widths, and of the parameters."""
    plan = planned.plan
    if planned.pairs:
        first, last = planned.pairs[0], planned.pairs[-1]
        return (
            f"hidden size and MLP width from {_pair(first)} to {_pair(last)}, one of {len(planned.pairs)} pairs, "
            f"{plan.dense_parameters:,} -> about {plan.sliced_parameters:,} parameters"
        )
    mlp = f"MLP width {plan.mlp_size} -> {plan.mlp_dim}, " if plan.mlp_dim is not None else ""
    return (
        f"hidden size {plan.hidden_size} -> {plan.dim}, {mlp}"
        f"{plan.dense_parameters:,} -> {plan.sliced_parameters:,} parameters"
    )


def _pair(pair: WidthPair) -> str:
    return f"{pair.dim} x {'all' if pair.mlp_dim is None else pair.mlp_dim}"


def _fields(planned: PlannedSlice, source: Any) -> dict[str, Any]:
    """Return what a plan comes to; where widths are still to be chosen, the pairs there are."""
    plan, is_open = planned.plan, bool(planned.pairs)
    return {
        "output": None if is_open and planned.output is None else str(planned.folder),
        "model": plan.model,
        "revision": source.commit,
        "model_type": plan.model_type,
        "method": plan.method,
        "layout": plan.layout,
        "written_type": plan.written_type,
        "schedule": None if plan.schedule is None else dataclasses.asdict(plan.schedule),
        "adapter": plan.adapter,
        "is_tied": plan.is_tied,
        "hidden_size": plan.hidden_size,
        "dim": None if is_open else plan.dim,
        "sparsity": None if is_open else plan.sparsity,
        "mlp_size": plan.mlp_size,
        "mlp_dim": None if is_open else plan.mlp_dim,
        "other_mlp_widths": {} if is_open else plan.other_mlp_widths,
        "pairs": [{"dim": pair.dim, "mlp_dim": pair.mlp_dim} for pair in planned.pairs],
        "parameters": {"dense": plan.dense_parameters, "sliced": plan.sliced_parameters},
        "bytes": {"dense": plan.dense_bytes, "sliced": plan.sliced_bytes},
        "left_out": [one.to_json() for one in source.companions.left_out],
    }


def _change(what: str, before: int, after: int) -> list[str]:
    return [what, f"{before:,}", f"{after:,}", f"{after / before - 1:+.1%}"]


def _report(fields: dict[str, Any], output_format: str) -> None:
    if output_format == "json":
        show.print_json(fields)
        return
    parameters, weights = fields["parameters"], fields["bytes"]
    show.print_table(
        ["", "before", "after", "change"],
        [
            *([] if fields["dim"] is None else [_change("hidden size", fields["hidden_size"], fields["dim"])]),
            *([] if fields["mlp_dim"] is None else [_change("MLP width", fields["mlp_size"], fields["mlp_dim"])]),
            *[_change(name, one["dense"], one["sliced"]) for name, one in fields["other_mlp_widths"].items()],
            [
                "parameters",
                f"{parameters['dense']:,}",
                f"{parameters['sliced']:,}",
                f"{parameters['sliced'] / parameters['dense'] - 1:+.1%}",
            ],
            [
                "weights",
                show.size(weights["dense"]),
                show.size(weights["sliced"]),
                f"{weights['sliced'] / weights['dense'] - 1:+.1%}",
            ],
        ],
    )
