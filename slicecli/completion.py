"""Everything in a slice's folder but the weights: config, tokenizer, licence, code, and how the slice is described."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.adapters import AUTO_ADAPTER
from slicecli.description import describe_slice
from slicecli.errors import SlicecliError
from slicecli.estimation.estimate import USUAL_SPARSITIES, nearest_dims
from slicecli.hub.metadata import inherited_metadata
from slicecli.modeling import CODE_FILES
from slicecli.plan import SlicePlan, slice_sizes
from slicecli.record import build_record

if TYPE_CHECKING:
    from slicecli.calibration import Rows
    from slicecli.estimation.forecasts import Forecast
    from slicecli.planning import Job
    from slicecli.record import Energy
    from slicecli.source import Source

__all__ = ["complete_folder", "licence_warning", "reproduce_command"]


def complete_folder(
    job: Job, plan: SlicePlan, config: Any, folder: Path, rows: Rows, energy: Energy, weights: Mapping[str, str]
) -> None:
    """Put everything but the weights into a slice's folder.

    Args:
        job: The job.
        plan: Of the slice.
        config: Its transformers config.
        folder: Its folder, with the weights.
        rows: The calibration rows.
        energy: What it keeps of the stream.
        weights: SHA-256 of each weight file.

    Raises:
        OutputError: A file cannot be written.
    """
    source = job.source
    config.save_pretrained(folder)
    own_code = CODE_FILES if plan.layout == "custom-code" else source.code_files()
    for file in (*source.companion_files(), *own_code):
        shutil.copyfile(file, folder / file.name)
    sizes = slice_sizes(job.dimensions, plan.method, job.options.slice_head)
    record = build_record(
        plan,
        source,
        rows,
        job.options.seed,
        energy,
        weights,
        command=reproduce_command(job, plan),
        inherited=inherited_metadata(source.folder),
        other_dims={dim: sizes.parameters(dim) for dim in nearest_dims(sizes, USUAL_SPARSITIES)},
    )
    # what is published is of dense models: it says nothing of a slice that is sliced again
    forecasts = [] if record["ancestry"] else _forecasts(job, plan, rows.name)
    describe_slice(folder, record, forecasts)


def _forecasts(job: Job, plan: SlicePlan, text: str) -> list[Forecast]:
    """Return what can be predicted of slices of a model from what is published and what its card says."""
    from slicecli.estimation.forecasts import Knowledge, find_forecasts

    for name in dict.fromkeys((text, "wikitext2")):
        try:
            found = find_forecasts(job.source, job.dimensions, plan.method, Knowledge(text=name, calibration=text))
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
        f"The card of {source.name} states no licence, so that of the slice says `other`: find out which it is before "
        "you publish.",
    )


def reproduce_command(job: Job, plan: SlicePlan) -> str:
    """Return the command line that makes a slice again; a text file appears by its name only."""
    options = job.options
    words = ["slicecli", "slice", plan.model, *_width_words(plan, options.slice_head)]
    if plan.method != "refit":
        words += ["--method", plan.method, "--final-orientation", options.orientation]
    if job.source.commit:
        words += ["--revision", job.source.commit]
    words += [
        "--calibration",
        Path(options.calibration).name if Path(options.calibration).exists() else options.calibration,
    ]
    words += ["--samples", str(options.samples), "--seq-len", str(job.sequence_length), "--seed", str(options.seed)]
    words += ["--dtype", plan.dtype]
    if plan.adapter == AUTO_ADAPTER:
        words += ["--adapter", AUTO_ADAPTER]
    if job.source.code_files():
        words += ["--trust-remote-code"]
    return shlex.join(words)


def _width_words(plan: SlicePlan, slice_head: bool | None) -> list[str]:
    """Return the options that say how wide a slice is."""
    if plan.schedule is None:
        return ["--dim", str(plan.dim)]
    words = ["--schedule", plan.schedule_name] if plan.schedule_name else ["--dim", str(plan.dim)]
    return [*words, *([] if slice_head is None else ["--slice-head" if slice_head else "--no-slice-head"])]
