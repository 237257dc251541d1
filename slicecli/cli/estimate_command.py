"""`slicecli estimate`: costs and predicted quality of slices, from the config alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from slicecli.cli import options as shared
from slicecli.cli import output as show
from slicecli.family.friendly_dims import friendly_multiple, legend
from slicecli.family.slice_plan import Width, WidthPair
from slicecli.jobs.options import SliceOptions

if TYPE_CHECKING:
    from slicecli.estimation.estimate import Estimate

Key = TypeVar("Key", int, str)


@click.command("estimate")
@click.argument("model", type=shared.MODEL)
@click.option("--dim", "dims", type=shared.DimList(), metavar="N,N,...", help="Hidden sizes to keep.")
@click.option("--sweep", type=shared.Sweep(), metavar="LO:HI:STEP", help="Instead: range of fractions to remove.")
@click.option(
    "--target-params",
    type=shared.COUNT,
    metavar="6B",
    help="Instead: the slices with at most this many parameters, see --shape.",
)
@click.option(
    "--memory",
    type=shared.BYTES,
    metavar="12GiB",
    help="Instead: the slices whose weights take at most this many bytes, see --shape.",
)
@click.option(
    "--shape",
    type=click.Choice(["auto", "width", "mlp"]),
    default="auto",
    show_default=True,
    help="How --target-params and --memory are met: by the hidden size (width), by fewer MLP channels (mlp), or by "
    "pairs of both, among which `slice` chooses (auto).",
)
@click.option(
    "--max-perplexity",
    type=float,
    metavar="P",
    help="Instead: the smallest slice predicted to stay within this perplexity.",
)
@shared.add_options(Width, "mlp_dim", "mlp_sparsity")
@click.option(
    "--method", type=click.Choice(["refit", "slicegpt"]), default="refit", show_default=True, help="Slicing method."
)
@click.option("--slice-head/--no-slice-head", default=None, help="slicegpt: slice the input of the head too.")
@shared.add_options(SliceOptions, "unties", "write_as")
@click.option(
    "--text",
    type=shared.TEXT,
    default="wikitext2",
    show_default=True,
    metavar="NAME",
    help="Evaluation text of the perplexity.",
)
@click.option(
    "--calibration",
    type=shared.TEXT,
    default="wikitext2",
    show_default=True,
    metavar="NAME",
    help="Calibration text; slices lose more on other kinds of text.",
)
@shared.add_options(SliceOptions, "samples", "sequence_length")
@click.option(
    "--dense-perplexity",
    type=float,
    metavar="P",
    help="Perplexity of the dense model.  [default: from its card, its slicecli.json, or publications]",
)
@click.option(
    "--dense-accuracy",
    type=shared.Named(),
    multiple=True,
    metavar="TASK=A",
    help="Accuracy of the dense model, between 0 and 1; repeatable.  [default: as above]",
)
@click.option(
    "--chance", type=shared.Named(), multiple=True, metavar="TASK=H", help="Chance level of a task; repeatable."
)
@click.option(
    "--measured",
    type=shared.Named(),
    multiple=True,
    metavar="DIM=P",
    help="Measured perplexity of a slice, to fit the relation to; repeatable.",
)
@click.option(
    "--measured-accuracy",
    type=shared.Named(),
    multiple=True,
    metavar="TASK:DIM=A",
    help="Measured accuracy of a slice, between 0 and 1, to fit the relation to; repeatable.",
)
@click.option(
    "--relation",
    type=shared.TEXT,
    metavar="NAME",
    help="Relation to predict with, such as paper; see `slicecli relations`.",
)
@click.option(
    "--curve", type=shared.TEXT, metavar="FILE|HUB_REPO", help="Predict with curves written by `fit` or `sweep`."
)
@click.option(
    "--spectrum",
    type=shared.LocalPath(dir_okay=False),
    metavar="FILE",
    help="Predict with the relation probe, or fisher, from a file written by `slicecli spectrum`.",
)
@click.option("--batch", type=int, default=1, show_default=True, metavar="N", help="Sequences served at once.")
@click.option("--length", type=int, metavar="N", help="Tokens per sequence.  [default: 2048, or the model's longest]")
@click.option(
    "--device",
    type=shared.TEXT,
    metavar="NAME",
    help="Accelerator to compute speed-ups for, such as h100-sxm; an unknown name lists all.",
)
@click.option(
    "--bandwidth", type=shared.TEXT, metavar="2TB", help="Instead of --device: memory bandwidth in bytes per second."
)
@click.option(
    "--tflops", type=float, metavar="T", help="Instead of --device: peak speed in 10^12 operations per second."
)
@click.option(
    "--dtype",
    type=shared.DTYPE,
    default="auto",
    show_default=True,
    callback=shared.auto_as_none,
    help="Dtype of weights and cache; auto uses the checkpoint's.",
)
@click.option(
    "--adapter", type=shared.TEXT, metavar="NAME", help="Use this adapter instead of the one for the model's type."
)
@click.option(
    "--plot",
    type=shared.LocalPath(dir_okay=False),
    metavar="FILE",
    help="Plot the predictions against the dim (.png, .svg, .pdf).",
)
@shared.model_options
@shared.format_option
@click.pass_obj
def command(
    context: dict[str, Any],
    model: str,
    dims: tuple[int, ...] | None,
    sweep: tuple[float, ...] | None,
    target_params: int | None,
    memory: int | None,
    shape: Any,
    max_perplexity: float | None,
    mlp_dim: int | None,
    mlp_sparsity: float | None,
    method: Any,
    slice_head: bool | None,
    unties: bool,
    write_as: str,
    text: str,
    calibration: str,
    samples: int,
    sequence_length: int | None,
    dense_perplexity: float | None,
    dense_accuracy: tuple[tuple[str, float], ...],
    chance: tuple[tuple[str, float], ...],
    measured: tuple[tuple[str, float], ...],
    measured_accuracy: tuple[tuple[str, float], ...],
    relation: str | None,
    curve: str | None,
    spectrum: Path | None,
    batch: int,
    length: int | None,
    device: str | None,
    bandwidth: str | None,
    tflops: float | None,
    dtype: str | None,
    adapter: str | None,
    plot: Path | None,
    revision: str | None,
    token: str | None,
    trust_remote_code: bool,
    output_format: str,
) -> None:
    """Estimate the cost and quality of slices of MODEL, without loading or measuring anything.

    Costs are exact. Quality is predicted from the dense model's figures, with 90 % intervals from published
    measurements; measured slices (--measured, --curve) make them much narrower.

    \b
    Examples:
      slicecli estimate meta-llama/Meta-Llama-3-8B-Instruct --dim 3584,3072 --dense-perplexity 8.3
      slicecli estimate ./my-model --sweep 0.05:0.5:0.05 --relation paper --plot estimate.png
      slicecli estimate ./my-model --target-params 6B
      slicecli estimate ./my-model --max-perplexity 12 --measured 3264=9.8 --device h100-sxm
    """
    from slicecli.errors import RequestError
    from slicecli.estimation.devices import custom_device, device_named
    from slicecli.estimation.estimate import (
        USUAL_SPARSITIES,
        Subject,
        estimate,
        nearest_dims,
        smallest_dim_surely_within,
        smallest_dim_within,
    )
    from slicecli.estimation.forecasts import ForecastInputs, find_forecasts
    from slicecli.estimation.spectra import read_shape_losses
    from slicecli.family.context_length import row_length
    from slicecli.runtime.inputs import check_count

    wishes = [dims, sweep, target_params, memory, max_perplexity]
    if sum(wish is not None for wish in wishes) > 1:
        raise RequestError(
            "The width was chosen more than once.",
            "Use only one of --dim, --sweep, --target-params, --memory and --max-perplexity.",
        )
    if plot is not None:
        from slicecli.estimation.plot import check_plot_file

        check_plot_file(plot)
    if device is not None and (bandwidth is not None or tflops is not None):
        raise RequestError(
            "--device already sets the bandwidth and speed.", "Leave out --device, or --bandwidth and --tflops."
        )
    accelerator = None
    if device is not None:
        accelerator = device_named(device)
    elif bandwidth is not None or tflops is not None:
        accelerator = custom_device(bandwidth, tflops)
    has_mlp = mlp_dim is not None or mlp_sparsity is not None
    mlp = Width(mlp_dim=mlp_dim, mlp_sparsity=mlp_sparsity) if has_mlp else None
    subject = Subject.find(
        model, method, slice_head, dtype, adapter, revision, token, trust_remote_code, unties, write_as, mlp
    )
    cuts_mlp = subject.narrower.mlp_dim is not None
    if cuts_mlp and max_perplexity is not None:
        raise RequestError(
            "--max-perplexity is for slices that keep all MLP channels.", "Leave out --mlp-dim and --mlp-sparsity."
        )
    check_count(samples, "{} calibration samples are", "Use --samples", words=("too few", "too many"))
    row = row_length(subject.source.name, subject.dimensions.context_length, sequence_length)
    knowledge = ForecastInputs(
        text=text,
        calibration=calibration,
        calibration_tokens=samples * row,
        dense_perplexity=dense_perplexity,
        dense_accuracies=_by_task(dense_accuracy, "dense accuracies on {}"),
        chances=_by_task(chance, "chance levels of {}"),
        measured=_measured(measured),
        measured_accuracies=_measured_accuracies(measured_accuracy),
        relation=relation,
        curve=curve,
        spectrum=spectrum,
    )
    sizes, losses = subject.dimensions, None
    if spectrum is not None and method == "refit" and not sizes.mlp_obstacle:
        losses = read_shape_losses(spectrum, sizes.hidden_size, sizes.mlp_size)
    is_unknown = cuts_mlp and losses is None
    forecasts = [] if is_unknown else find_forecasts(subject.source, sizes, method, knowledge)
    pairs: Sequence[WidthPair] | None = None
    if dims is None:
        if target_params is not None or memory is not None:
            pairs = subject.pairs_within(
                Width(target_parameters=target_params, memory=memory, shape=shape, mlp_dim=subject.narrower.mlp_dim)
            )
        elif max_perplexity is not None:
            expected = smallest_dim_within(subject.sizes, forecasts, max_perplexity)
            certain = smallest_dim_surely_within(subject.sizes, forecasts, max_perplexity)
            dims = (expected,)
        elif cuts_mlp and sweep is None:
            dims = (subject.dimensions.hidden_size,)
        else:
            dims = tuple(nearest_dims(subject.sizes, sweep or USUAL_SPARSITIES))
    if max_perplexity is not None:
        only = "" if certain is None else f"; of dim {certain} the whole 90 % interval does"
        show.note(f"Of dim {expected} the predicted perplexity stays within {max_perplexity:g}{only}.")
    if pairs is None:
        pairs = [WidthPair(dim, subject.narrower.mlp_dim) for dim in dims or ()]
    result = estimate(subject, pairs, subject.workload(batch, length), accelerator, forecasts, losses)
    if plot is not None:
        _draw(result, plot)
    document = result.to_json()
    if output_format == "json":
        show.print_json(document)
    else:
        _print(document)
    if not context["quiet"] or output_format == "human":
        for note in document["notes"]:
            show.note(f"Note: {note}")
    if losses is not None and len(pairs) > 1 and dims is None:
        best = min(pairs, key=lambda pair: losses.predict(*pair))
        show.note(f"Of these widths, {_pair(best)} is predicted to lose least.")
    if not forecasts and not is_unknown and not context["quiet"]:
        show.note(
            "Quality cannot be predicted: no figure of the dense model was passed, is on its card, in its "
            "slicecli.json or published. Pass --dense-perplexity, or measure it with slicecli eval."
        )


def _measured(pairs: Sequence[tuple[str, float]]) -> dict[int, float]:
    """Return by dim the perplexities of options such as 3072=9.8."""
    from slicecli.errors import RequestError

    found: dict[int, float] = {}
    for name, value in pairs:
        if not name.isdecimal():
            raise RequestError(
                f"--measured {name}={value:g} is not a dim and its perplexity.", "Write 3072=9.8, for example."
            )
        _put(found, int(name), value, f"perplexities for dim {name}")
    return found


def _measured_accuracies(pairs: Sequence[tuple[str, float]]) -> dict[str, dict[int, float]]:
    """Return by task and dim the accuracies of options such as piqa:3072=0.69."""
    from slicecli.errors import RequestError

    found: dict[str, dict[int, float]] = {}
    for name, value in pairs:
        task, _, dim = name.rpartition(":")
        if not task or not dim.isdecimal():
            raise RequestError(
                f"--measured-accuracy {name}={value:g} is not a task, a dim and an accuracy.",
                "Write piqa:3072=0.69, for example.",
            )
        _put(found.setdefault(task, {}), int(dim), value, f"accuracies on {task} for dim {dim}")
    return found


def _by_task(pairs: Sequence[tuple[str, float]], what: str) -> dict[str, float]:
    """Return by task the figures of options such as piqa=0.69."""
    found: dict[str, float] = {}
    for task, value in pairs:
        _put(found, task, value, what.format(task))
    return found


def _put(found: dict[Key, float], key: Key, value: float, what: str) -> None:
    """Add a figure; refuse a second one with the same key."""
    from slicecli.errors import RequestError

    if key in found:
        raise RequestError(f"Two {what} are given.", "Give one of them, or the mean of both.")
    found[key] = value


def _print(document: dict[str, Any]) -> None:
    """Print the estimate as tables: what slices cost, and how good they would be."""
    dense, estimates = document["dense"], document["estimates"]
    work = document["workload"]
    show.result(
        f"{document['model']} ({document['model_type']}), sliced by {document['method']} in the {document['layout']} "
        f"layout, {document['dtype']}, serving {work['batch']} x {work['length']} tokens"
    )
    device = document["device"]
    named = [(f"{document['hidden_size']} dense", dense), *((_dim(one), one) for one in estimates)]
    untied = [(f"{_dim(one)} with --untie", {**one, **one["untied"]}) for one in estimates if one["untied"]]
    show.print_table(
        ["dim", "s", "parameters", "weights", "cache/token", "to serve", "÷"],
        [
            [
                name,
                f"{one.get('sparsity', 0):.3f}",
                f"{one['parameters']:,}",
                show.size(one["bytes"]),
                show.size(one["kv_cache_bytes_per_token"]),
                show.size(one["serve_bytes"]),
                str(friendly_multiple(one.get("dim", document["hidden_size"])) or "-"),
            ]
            for name, one in [*named, *untied]
        ],
    )
    show.result(legend())
    columns = ["dim", "prompt FLOPs", "decode FLOPs"]
    rows = [
        [name, show.count(one["flops_per_token"]["prefill"]), show.count(one["flops_per_token"]["decode"])]
        for name, one in named
    ]
    if device is not None:
        columns += ["prompt", "decode", "bound by"]
        rows[0] += ["1.00 x", "1.00 x", ""]
        for row, one in zip(rows[1:], estimates, strict=True):
            speed = one["speed_up"]
            row += [f"{speed['prefill']:.2f} x", f"{speed['decode']:.2f} x", speed["decode_bound"]]
    show.print_table(columns, rows)
    if device is not None:
        show.result(f"Speed-ups are upper bounds for {device['name']} ({device['source']}).")
    predicted = [one for one in estimates if "perplexity" in one or "accuracy" in one]
    if "perplexity" in dense and predicted:
        about = dense["perplexity"]
        show.result(
            f"Perplexity on {about['text']}: dense {about['value']:.4g} ({about['source']}); "
            f"{predicted[0]['perplexity']['source']}"
        )
        _print_forecast([(one, one["perplexity"]) for one in predicted], _perplexity)
    for task, about in (dense.get("accuracy") or {}).items() if predicted else ():
        level = "" if about["chance"] is None else f", chance {about['chance']:.3g}"
        show.result(
            f"Accuracy on {task}: dense {about['value']:.4g} ({about['source']}{level}); "
            f"{predicted[0]['accuracy'][task]['source']}"
        )
        _print_forecast([(one, one["accuracy"][task]) for one in predicted], lambda value: f"{value:.3f}")


def _pair(pair: WidthPair) -> str:
    return f"{pair.dim}" + ("" if pair.mlp_dim is None else f", MLP {pair.mlp_dim}")


def _dim(one: dict[str, Any]) -> str:
    name = _pair(WidthPair(one["dim"], one["mlp_dim"]))
    return name if one["legal"] else f"{name} (not legal)"


def _print_forecast(rows: Sequence[tuple[dict[str, Any], dict[str, Any]]], cell: Any) -> None:
    relations = {forecast["relation"] for _, forecast in rows}
    is_one = len(relations) == 1
    columns = ["dim", "predicted", "90 % interval", *([] if is_one else ["relation"]), "paper's relation"]
    is_any_outside = any(forecast["is_outside"] for _, forecast in rows)
    show.print_table(
        columns + ["note"] * is_any_outside,
        [
            [
                _dim(one),
                cell(forecast["value"]),
                f"{cell(forecast['low'])} to {cell(forecast['high'])}",
                *([] if is_one else [forecast["relation"]]),
                "-" if forecast["paper"] is None else cell(forecast["paper"]),
                *["no data at this s" if forecast["is_outside"] else ""] * is_any_outside,
            ]
            for one, forecast in rows
        ],
    )
    if is_one:
        show.result(f"Predicted by the relation {relations.pop()!r}; see `slicecli relations`.")


def _perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _draw(result: Estimate, path: Path) -> None:
    """Draw every forecast; without one there is nothing to draw."""
    from slicecli.errors import RequestError
    from slicecli.estimation.plot import draw_quality, picture_of_forecast

    if not result.forecasts:
        raise RequestError("There is no prediction to plot.", "Pass --dense-perplexity or --dense-accuracy.")
    widest = max((one.sparsity for one in result.slices), default=0.5)
    title = f"{result.model}, sliced by {result.method}"
    marked = [one.sparsity for one in result.slices]
    pictures = [
        picture_of_forecast(title, forecast, result.hidden_size, marked, widest, result.parameters)
        for forecast in result.forecasts
    ]
    draw_quality(pictures, path)
