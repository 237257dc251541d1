"""The estimate: what slices of a model would cost and how good they would be, from its config and dense figures.

Costs are exact (`slicecli.estimation.cost`); quality is predicted, by a relation and with an interval. Nothing is
loaded and nothing measured, and torch is not imported.

Symbols: docs/notation.md.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from slicecli.adapters import select_adapter
from slicecli.checkpoint.source import Source
from slicecli.errors import RequestError, SlicecliWarning
from slicecli.estimation.cost import Cost, CostModel, SpeedUp, Workload, speed_up
from slicecli.estimation.devices import Device
from slicecli.estimation.forecasts import Forecast
from slicecli.estimation.intervals import FARTHEST, Prediction
from slicecli.estimation.origin import Origin, origin_of
from slicecli.estimation.shape import ShapeLosses
from slicecli.family.context_length import default_length
from slicecli.family.dimensions import Dimensions, name_nearest, nearest_in
from slicecli.family.friendly_dims import formats_of, preferred_dims
from slicecli.family.plugins import plugins
from slicecli.family.shapes import is_met_by_pairs, pairs_within
from slicecli.family.slice_plan import DTYPE_BYTES, Method, SliceSizes, Width, WidthPair, check_method, slice_sizes
from slicecli.family.written_class import AUTO, SliceClasses, WrittenClass
from slicecli.modeling import CONFIG_TYPE

__all__ = [
    "USUAL_SPARSITIES",
    "Estimate",
    "Slice",
    "Subject",
    "estimate",
    "nearest_dims",
    "smallest_dim_surely_within",
    "smallest_dim_within",
]

# the fractions that the published study of the relation went through
USUAL_SPARSITIES = (0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Subject:
    """The model whose slices are estimated, and how they would be made.

    Attributes:
        source: The model; only what describes it has been fetched. Of a slice it is the dense model that it was made
            from.
        narrower: Its sizes with the MLPs of its slices.
        sizes: What a slice of it may be.
        slice_head: Whether the published method slices the input of the head; `None` as it does by default.
        dtype: Of weights and cache.
        origin: The slice that was asked for, if it was one.
        classes: The classes that slices can be written in; `None` where they bring code of their own.
    """

    source: Source
    dimensions: Dimensions
    narrower: Dimensions
    sizes: SliceSizes
    method: Method
    slice_head: bool | None
    dtype: str
    origin: Origin | None = None
    classes: SliceClasses | None = None

    @classmethod
    def find(
        cls,
        model: str,
        method: Method = "refit",
        slice_head: bool | None = None,
        dtype: str | None = None,
        adapter: str | None = None,
        revision: str | None = None,
        token: str | None = None,
        trust_remote_code: bool = False,
        unties: bool = False,
        write_as: str = AUTO,
        mlp: Width | None = None,
    ) -> Subject:
        """Find a model by Hub id or folder, from its config alone.

        Args:
            dtype: Of weights and cache; `None` takes the checkpoint's.
            mlp: The width of the MLPs of slices; `None` leaves it as it is.
        """
        check_method(method, slice_head, changes_mlp=mlp is not None)
        source = Source.find(model, revision, token, trust_remote_code, with_companions=False)
        source.check_is_decoder()
        found = plugins()
        origin = origin_of(source, found.adapters, found.refusals, adapter)
        stored_dtype = source.stored_dtype()
        if origin is not None:
            source = origin.source
        family = select_adapter(source.fields, found.adapters, adapter, found.refusals)
        if origin is None:
            dimensions, comparison = source.dimensions(family, source.fields, unties)
            for text in comparison.remarks(source.name):
                warnings.warn(text, SlicecliWarning, stacklevel=2)
        else:
            dimensions = Dimensions(family, source.fields, unties)  # the weights at hand are the slice's
        model_type, has_code = str(source.fields.get("model_type")), source.has_own_model_code
        classes = SliceClasses.of_method(dimensions, method, model_type, write_as, has_code)
        sizes = classes.at() if classes else slice_sizes(dimensions, method, slice_head)
        subject = cls(source, dimensions, dimensions, sizes, method, slice_head, dtype or stored_dtype, origin, classes)
        return subject if mlp is None else subject.with_mlp_dim(mlp.resolve_mlp(dimensions))

    @property
    def model_type(self) -> str:
        """Its family."""
        return str(self.source.fields.get("model_type"))

    @property
    def layout(self) -> str:
        """How slices would be written."""
        return "custom-code" if self.method == "slicegpt" else self.dimensions.layout

    def written(self, dim: int) -> WrittenClass | None:
        """Return the class that a slice would be written in; `None` where it brings code of its own."""
        return self.classes.at(dim) if self.classes else None

    def costs(self, written: WrittenClass | None) -> CostModel:
        """Return the costs of slices written in a class, or of slices with code of their own."""
        dimensions = self.narrower if written is None else written.dimensions
        return CostModel(dimensions, self.method, self.slice_head)

    def with_mlp_dim(self, mlp_dim: int | None) -> Subject:
        """Return the same model for slices whose MLPs have a width."""
        narrower = self.dimensions.with_mlp_dim(mlp_dim)
        if narrower is self.narrower:
            return self
        wish = self.classes.wish if self.classes else AUTO
        classes = SliceClasses.of_method(narrower, self.method, self.model_type, wish, self.source.has_own_model_code)
        sizes = classes.at() if classes else slice_sizes(narrower, self.method, self.slice_head)
        return dataclasses.replace(self, narrower=narrower, sizes=sizes, classes=classes)

    def untied(self) -> Subject:
        """Return the same model for slices with a head of their own."""
        narrower = self.narrower.untied()
        wish = self.classes.wish if self.classes else AUTO
        classes = SliceClasses.of_method(narrower, self.method, self.model_type, wish, self.source.has_own_model_code)
        return dataclasses.replace(self, narrower=narrower, classes=classes)

    def pairs_within(self, width: Width) -> list[WidthPair]:
        """Return the pairs of widths that meet a target: one, or those that `slice` would choose among."""
        size = DTYPE_BYTES[self.dtype]
        if is_met_by_pairs(width, self.dimensions, self.method):
            return pairs_within(width, self.dimensions, self.classes, size)
        return [WidthPair(width.resolve(self.sizes, size), self.narrower.mlp_dim)]

    def workload(self, batch: int = 1, length: int | None = None) -> Workload:
        """Return what is served: sequences of a length, by default 2048 or the model's longest."""
        return Workload(batch, default_length(self.dimensions.context_length) if length is None else length)


@dataclass(frozen=True)
class Slice:
    """What one slice would be.

    Attributes:
        equal_sparsity: That of the slice with all MLP channels that is predicted to lose as much; `None` where it is
            not known.
        mlp_dim: How many MLP channels stay; `None` where they all do.
        nearest_legal: The legal dims next to it, where it is not legal.
        is_tied: It shares one table between embedding and head.
        written_type: The model type of the class it would be written in.
        untied_cost: Of a tied slice: what it would cost with a head of its own.
        speed_up: Against the dense model, on a device.
    """

    dim: int
    sparsity: float
    equal_sparsity: float | None
    mlp_dim: int | None
    is_legal: bool
    nearest_legal: tuple[int, ...]
    is_tied: bool
    written_type: str
    cost: Cost
    untied_cost: Cost | None
    speed_up: SpeedUp | None


@dataclass(frozen=True)
class Estimate:
    """The whole estimate.

    Attributes:
        dtype: Of weights and cache.
    """

    model: str
    model_type: str
    method: Method
    layout: str
    hidden_size: int
    dtype: str
    workload: Workload
    device: Device | None
    dense: Cost
    slices: tuple[Slice, ...]
    forecasts: tuple[Forecast, ...]
    parameters: Callable[[int], int]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as `estimate --format json` prints it."""
        perplexity = [one for one in self.forecasts if one.quantity == "perplexity"]
        tasks = [one for one in self.forecasts if one.quantity == "accuracy"]
        dense: dict[str, Any] = _cost_json(self.dense)
        if perplexity:
            dense["perplexity"] = {
                "value": perplexity[0].dense.value,
                "text": perplexity[0].evaluation,
                "source": perplexity[0].dense.source,
            }
        if tasks:
            dense["accuracy"] = {
                one.evaluation: {"value": one.dense.value, "source": one.dense.source, "chance": one.chance}
                for one in tasks
            }
        return {
            "model": self.model,
            "model_type": self.model_type,
            "method": self.method,
            "layout": self.layout,
            "hidden_size": self.hidden_size,
            "dtype": self.dtype,
            "workload": dataclasses.asdict(self.workload),
            "device": None if self.device is None else dataclasses.asdict(self.device),
            "dense": dense,
            "estimates": [self._slice_json(one, perplexity, tasks) for one in self.slices],
            "notes": list(self.notes),
        }

    def _slice_json(self, one: Slice, perplexity: Sequence[Forecast], tasks: Sequence[Forecast]) -> dict[str, Any]:
        fields: dict[str, Any] = {
            "dim": one.dim,
            "sparsity": one.sparsity,
            "mlp_dim": one.mlp_dim,
            "legal": one.is_legal,
            "nearest_legal": list(one.nearest_legal),
            "formats": formats_of(one.dim),
            "is_tied": one.is_tied,
            "written_type": one.written_type,
            **_cost_json(one.cost),
            "untied": None if one.untied_cost is None else _cost_json(one.untied_cost),
            "speed_up": None if one.speed_up is None else one.speed_up.to_json(),
        }
        sparsity = one.equal_sparsity
        if perplexity and sparsity is not None:
            fields["perplexity"] = perplexity[0].to_json(sparsity)
        if tasks and sparsity is not None:
            fields["accuracy"] = {forecast.evaluation: forecast.to_json(sparsity) for forecast in tasks}
        return fields


def _cost_json(cost: Cost) -> dict[str, Any]:
    fields = cost.to_json()
    by_dtype = {dtype: cost.parameters * DTYPE_BYTES[dtype] for dtype in DTYPES}
    return {
        "parameters": fields.pop("parameters"),
        "bytes": fields.pop("bytes"),
        "bytes_by_dtype": by_dtype,
        "flops_per_token": {
            "prefill": fields.pop("flops_per_token_prefill"),
            "decode": fields.pop("flops_per_token_decode"),
        },
        **fields,
    }


def estimate(
    subject: Subject,
    pairs: Sequence[WidthPair],
    workload: Workload,
    device: Device | None = None,
    forecasts: Sequence[Forecast] = (),
    losses: ShapeLosses | None = None,
) -> Estimate:
    """Put an estimate together.

    Args:
        pairs: The widths of each slice.
        losses: What each width loses; without it, quality is predicted only for slices that keep all MLP channels.
    """
    dimensions, dtype = subject.dimensions, subject.dtype
    dense = CostModel(dimensions, subject.method, subject.slice_head).dense(dtype, workload)
    at = functools.cache(subject.with_mlp_dim)
    slices = [_slice(at(mlp_dim), dim, dense, workload, device, losses) for dim, mlp_dim in pairs]
    return Estimate(
        model=subject.source.name,
        model_type=subject.model_type,
        method=subject.method,
        layout=subject.layout,
        hidden_size=dimensions.hidden_size,
        dtype=dtype,
        workload=workload,
        device=device,
        dense=dense,
        slices=tuple(slices),
        forecasts=tuple(forecasts),
        parameters=at(None).sizes.parameters,
        notes=(
            *(() if subject.origin is None else (subject.origin.note,)),
            *_length_note(subject, workload),
            *_class_notes([at(mlp_dim) for _, mlp_dim in pairs], [dim for dim, _ in pairs]),
            *_channels_note(slices),
            *_notes(slices, forecasts),
            *_growth_note(dense, slices),
        ),
    )


def _slice(
    subject: Subject,
    dim: int,
    dense: Cost,
    workload: Workload,
    device: Device | None,
    losses: ShapeLosses | None,
) -> Slice:
    """Return what one slice would be.

    Args:
        subject: The model, with the MLPs of the slice.
    """
    dimensions, dtype = subject.dimensions, subject.dtype
    written = subject.written(dim)
    legal = written or subject.sizes
    if not 0 < dim < dimensions.hidden_size:
        legal.check_dim(dim)
    cost = subject.costs(written).sliced(dim, dtype, workload)
    is_legal = dim in legal.legal_dims()
    is_tied = subject.method == "refit" and dimensions.keeps_tie
    untied = subject.untied() if is_tied else None
    sparsity = 1 - dim / dimensions.hidden_size
    equal_sparsity: float | None = sparsity
    if subject.narrower.mlp_dim is not None:
        equal_dim = None if losses is None else losses.equal_dim(dim, subject.narrower.mlp_dim)
        equal_sparsity = None if equal_dim is None else 1 - equal_dim / dimensions.hidden_size
    return Slice(
        dim=dim,
        sparsity=sparsity,
        equal_sparsity=equal_sparsity,
        mlp_dim=subject.narrower.mlp_dim,
        is_legal=is_legal,
        nearest_legal=() if is_legal else nearest_in(legal.legal_dims(), dim),
        is_tied=is_tied,
        written_type=written.model_type if written else CONFIG_TYPE,
        cost=cost,
        untied_cost=untied.costs(untied.written(dim)).sliced(dim, dtype, workload) if untied else None,
        speed_up=None if device is None else speed_up(dense, cost, workload, device),
    )


def _length_note(subject: Subject, workload: Workload) -> tuple[str, ...]:
    longest = subject.dimensions.context_length
    if longest is None or workload.length <= longest:
        return ()
    return (f"Sequences of {workload.length:,} tokens exceed the limit of {subject.source.name} ({longest:,}).",)


def _class_notes(subjects: Sequence[Subject], dims: Sequence[int]) -> list[str]:
    """Say in which class slices would be written, where that needs a word."""
    classes = [(one.classes, dim) for one, dim in zip(subjects, dims, strict=True) if one.classes is not None]
    chosen = [(some, some.at(dim), dim) for some, dim in classes]
    notes = [some.note(one, dim) for some, one, dim in chosen if dim in one.legal_dims()]
    return [note for note in dict.fromkeys(notes) if note]


def _channels_note(slices: Sequence[Slice]) -> tuple[str, ...]:
    narrower = [one for one in slices if one.mlp_dim is not None]
    if not narrower:
        return ()
    if any(one.equal_sparsity is not None for one in narrower):
        return ("Slices with fewer MLP channels are predicted as those with all that lose as much by the spectrum.",)
    return ("Quality is predicted only for slices that keep all MLP channels; a --spectrum tells of the others.",)


def _growth_note(dense: Cost, slices: Sequence[Slice]) -> tuple[str, ...]:
    larger = [str(one.dim) for one in slices if one.cost.parameters >= dense.parameters]
    if not larger:
        return ()
    return (f"Slices of dim {', '.join(larger)} have at least as many parameters as the dense model.",)


def _notes(slices: Sequence[Slice], forecasts: Sequence[Forecast]) -> list[str]:
    notes = [note for forecast in forecasts for note in forecast.notes]
    far = [one.dim for one in slices if one.sparsity > FARTHEST]
    if far and forecasts:
        notes.append(
            f"Nothing is published beyond s = {FARTHEST}; predictions for dim {', '.join(map(str, far))} are guesses."
        )
    notes += [
        f"A dim of {one.dim} is not legal for this model. {name_nearest('dim', one.nearest_legal)}"
        for one in slices
        if not one.is_legal
    ]
    return list(dict.fromkeys(notes))


def nearest_dims(sizes: SliceSizes, sparsities: Sequence[float]) -> list[int]:
    """Return the legal dims nearest to fractions removed, each once, from wide to narrow."""
    found = {Width(sparsity=sparsity).resolve(sizes, bytes_per_parameter=1) for sparsity in sparsities}
    return sorted(found, reverse=True)


def smallest_dim_within(sizes: SliceSizes, forecasts: Sequence[Forecast], most: float) -> int:
    """Return the smallest legal dim whose predicted perplexity is within a limit."""
    fitting = _dims_within(sizes, forecasts, most, lambda found: found.value)
    if not fitting:
        raise RequestError(
            f"No slice is predicted to have a perplexity of {most:g} or less; the dense model has "
            f"{forecasts[0].dense.value:.4g}.",
            "Raise --max-perplexity.",
        )
    return fitting[-1]


def smallest_dim_surely_within(sizes: SliceSizes, forecasts: Sequence[Forecast], most: float) -> int | None:
    """Return the smallest legal dim whose whole 90 % interval is within a limit; `None` where no dim's is."""
    fitting = _dims_within(sizes, forecasts, most, lambda found: found.high)
    return fitting[-1] if fitting else None


def _dims_within(
    sizes: SliceSizes, forecasts: Sequence[Forecast], most: float, bound: Callable[[Prediction], float]
) -> list[int]:
    """Return preferred dims from the wide end down to the first that is over."""
    if not 1 <= most < math.inf:
        raise RequestError(f"A perplexity of {most:g} is impossible.", "Use a limit of 1 or more.")
    if not forecasts or forecasts[0].quantity != "perplexity":
        raise RequestError("--max-perplexity needs the dense perplexity, which is unknown.", "Pass --dense-perplexity.")
    limit, predict = math.log(most), forecasts[0].predict
    wide_first = reversed(preferred_dims(sizes))
    return list(itertools.takewhile(lambda dim: bound(predict(1 - dim / sizes.hidden_size)) <= limit, wide_first))
