"""How a new slice is described: what its record, predictions and card say, drafted before its weights are computed."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.adapters import AUTO_ADAPTER
from slicecli.errors import SlicecliError
from slicecli.estimation.estimate import USUAL_SPARSITIES, nearest_dims
from slicecli.family.slice_plan import SlicePlan, Width, slice_sizes
from slicecli.family.written_class import OWN
from slicecli.hub.metadata import inherited_metadata
from slicecli.hub.writing import Description
from slicecli.jobs.options import SliceOptions
from slicecli.record.record import build_record
from slicecli.runtime.options import words_of

if TYPE_CHECKING:
    from slicecli.checkpoint.source import Source
    from slicecli.data.packing import Rows
    from slicecli.estimation.forecasts import Forecast
    from slicecli.jobs.plan import Job, PlannedSlice

__all__ = ["draft_description", "licence_warning", "reproduce_command"]


def draft_description(job: Job, planned: PlannedSlice, rows: Rows) -> Description:
    """Return what is known of a slice before its weights are, found fit to be written."""
    plan = planned.plan
    narrower = job.dimensions.with_mlp_dim(plan.mlp_dim)
    sizes = planned.written or slice_sizes(narrower, plan.method, job.options.slice_head)
    record = build_record(
        plan,
        job.source,
        rows,
        job.options.seed,
        command=reproduce_command(job, plan),
        inherited=inherited_metadata(job.source.folder),
        other_dims={dim: sizes.parameters(dim) for dim in nearest_dims(sizes, USUAL_SPARSITIES)},
    )
    # what is published is of dense models: it says nothing of a slice that is sliced again
    return Description.draft(record, [] if record["ancestry"] else _forecasts(job, plan, rows.name))


def _forecasts(job: Job, plan: SlicePlan, text: str) -> list[Forecast]:
    """Return what can be predicted of slices of a model from what is published and what its card says."""
    from slicecli.estimation.forecasts import ForecastInputs, find_forecasts

    for name in dict.fromkeys((text, "wikitext2")):
        try:
            found = find_forecasts(job.source, job.dimensions, plan.method, ForecastInputs(text=name, calibration=text))
        except SlicecliError:  # a card with figures that cannot be: nothing is predicted then
            return []
        if any(one.quantity == "perplexity" for one in found):
            return found
    return found


def licence_warning(source: Source) -> tuple[str, ...]:
    """Say that a slice's card has no licence, where the dense model's states none."""
    if "license" in inherited_metadata(source.folder):
        return ()
    return (
        f"The card of {source.name} states no licence, so the card of the slice says `other`; check the licence before "
        "you publish.",
    )


def reproduce_command(job: Job, plan: SlicePlan) -> str:
    """Return the command line that makes a slice again; a text file appears by its name only."""
    options = job.options
    calibration = Path(options.calibration)
    values: dict[str, Any] = {}
    if plan.method != "refit":
        values |= {"method": plan.method, "orientation": options.orientation}
    if options.unties:
        values["unties"] = True
    if plan.layout == "stock" and plan.written_type != plan.model_type:
        values["write_as"] = plan.written_type
    elif options.write_as == OWN:
        values["write_as"] = OWN
    if job.source.commit:
        values["revision"] = job.source.commit
    values |= {
        "calibration": calibration.name if calibration.exists() else options.calibration,
        "samples": options.samples,
        "sequence_length": job.sequence_length,
        "seed": options.seed,
        "dtype": plan.dtype,
    }
    if plan.adapter == AUTO_ADAPTER:
        values["adapter"] = AUTO_ADAPTER
    if job.source.needs_remote_code:
        values["trust_remote_code"] = True
    if plan.schedule is not None:
        values = {"slice_head": options.slice_head, **values}
    width: dict[str, Any] = {"schedule": plan.schedule_name} if plan.schedule_name else {"dim": plan.dim}
    if plan.mlp_dim is not None:
        width["mlp_dim"] = plan.mlp_dim
    return shlex.join(["slicecli", "slice", plan.model, *words_of(Width, width), *words_of(SliceOptions, values)])
