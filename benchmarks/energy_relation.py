"""Does discarded energy predict the perplexity of a slice better than the removed width alone?

    python benchmarks/energy_relation.py MODEL... --calibration TEXT --evaluation TEXT --output FILE [--group NAME]
    python benchmarks/energy_relation.py --report FILE

The first form slices each model to many dims with both methods, measures the perplexities, and appends one row per
(model, method, dim) to a CSV file, with every candidate predictor beside it. The predictors come from the dense model
alone: one forward pass over calibration text, and one backward pass for the Fisher weights. The second form fits each
predictor's constant on all groups of models but one, predicts the one left out, and prints a table of errors; models
that share a training run belong in one group, or leaving one out would leave its twin in. `docs/energy.md` reports
what came of it.

Legend: d hidden size, k dim kept, s = 1 - k/d, D = ln(PPL / PPL0), x the stream at a norm input, n its normalised
form (what the norm passes on before its weight), Q a basis, g the gradient of the loss with respect to n.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    import torch

    from slicecli.data.packing import Rows
    from slicecli.family.dimensions import Dimensions
    from slicecli.family.slice_plan import Method
    from slicecli.jobs.plan import Job

METHODS: tuple[Method, ...] = ("refit", "slicegpt")
SPARSITIES = (0.06, 0.12, 0.2, 0.3, 0.4, 0.5)
ANCHOR = 0.2
LARGEST_SPARSITY = 0.51
RESAMPLES = 2000
EXPONENTS = tuple(hundredth / 100 for hundredth in range(30, 301, 2))
# below it, D is mostly the noise of the evaluation rows, and no ratio to it means anything
SMALLEST_RATIO_LOSS = 0.02
SMALLEST_VALUE = 1e-6
SEED = 42


@dataclass(frozen=True)
class Measurement:
    """One slice, what it costs, and what the dense model says beforehand.

    "Shared" takes the one basis that the refit slices with, at every norm input; "layer" takes the principal
    directions of each norm input by itself. Quantities "at k" belong to the directions outside the first k.

    Attributes:
        model: Name of the model.
        group: What it is left out with.
        method: `refit` or `slicegpt`.
        norm: Kind of its norms, `rms` or `layer`.
        hidden_size: d.
        dim: k.
        dense_nll: ln PPL0 on the evaluation rows, nats per token.
        nll: ln PPL of the slice on the same rows.
        stderr: Standard error of `nll` from the spread of the rows; that of D is smaller, since the rows are the same.
        unigram_nll: Of the evaluation rows under the calibration rows' token frequencies, one added to each count.
        energy_shared: Share of Σ n nᵀ over all norm inputs, at k.
        energy_layer: Share of each norm input's Σ n nᵀ, at k, the mean over the inputs.
        energy_stream: Share of each norm input's Σ x xᵀ, not normalised, at k, the mean over the inputs.
        importance: Share of what the readers see, at k (`importance_kept` of a record, from 1).
        record_energy: Discarded energy as the slice's record has it; of `slicegpt` that of the slice's own stream.
        stable_rank_shared: Trace over largest eigenvalue of Σ n nᵀ, shared.
        stable_rank_layer: The same of each norm input, the mean.
        participation_shared: Squared trace over trace of the square of Σ n nᵀ, shared.
        participation_layer: The same of each norm input, the mean.
        fisher_shared: ½ Σ over norm inputs of the mean over tokens of (g · δ)², δ the part of n at k, shared basis.
        fisher_layer: The same with each input's own basis.
        coherent_shared: ½ of the mean over rows of (Σ over norm inputs and tokens of g · δ)² per token, shared basis.
        coherent_layer: The same with each input's own basis.
        projected: D of the dense model with n projected on the first k directions on the fly (shared basis for the
            refit, each input's own for `slicegpt`): no slice is made, but it is a measurement at k all the same.
    """

    model: str
    group: str
    method: str
    norm: str
    hidden_size: int
    dim: int
    dense_nll: float
    nll: float
    stderr: float
    unigram_nll: float
    energy_shared: float
    energy_layer: float
    energy_stream: float
    importance: float
    record_energy: float
    stable_rank_shared: float
    stable_rank_layer: float
    participation_shared: float
    participation_layer: float
    fisher_shared: float
    fisher_layer: float
    coherent_shared: float
    coherent_layer: float
    projected: float

    @property
    def sparsity(self) -> float:
        """The width fraction removed, s."""
        return 1 - self.dim / self.hidden_size

    @property
    def loss(self) -> float:
        """D, what slicing costs in nats per token."""
        return self.nll - self.dense_nll

    @property
    def gap(self) -> float:
        """What the dense model knows beyond token frequencies, in nats per token."""
        return self.unigram_nll - self.dense_nll


# ----------------------------------------------------------------------------------------------------------
# Measuring: the dense model.


@dataclass(frozen=True)
class NormInput:
    """A place where the stream is read.

    Attributes:
        path: Path of its norm in the model.
        weight: What the norm multiplies by, float32 of shape (d,); `None` for ones.
        bias: What it adds.
    """

    path: str
    weight: torch.Tensor | None
    bias: torch.Tensor | None


def norm_inputs(model: Any, dimensions: Dimensions) -> list[NormInput]:
    """Return the norms that read a model's stream, in order, the final one last."""
    from slicecli.slicing.sliced_tensors import norm_weight_and_bias

    adapter = dimensions.adapter
    paths = [
        f"{adapter.blocks}.{index}.{path}"
        for index, block in enumerate(dimensions.declared_blocks)
        for path in block.norms
    ]
    found = []
    for path in (*paths, adapter.final_norm):
        tensors = {f"{path}.{name}": value.detach() for name, value in model.get_submodule(path).named_parameters()}
        weight, bias = norm_weight_and_bias(dimensions, path, tensors)
        found.append(NormInput(path, *(None if part is None else part.float() for part in (weight, bias))))
    return found


@contextmanager
def hooked(model: Any, places: Sequence[NormInput], see: Callable[[int, Any, Any], Any]) -> Iterator[None]:
    """Call `see` with the index, the input and the output of each norm that runs; what it returns replaces the output.

    Args:
        model: The dense model.
        places: Its norms.
        see: The observer.
    """

    def hook_for(index: int) -> Callable[..., Any]:
        return lambda _module, inputs, output: see(index, inputs[0], output)

    handles = [
        model.get_submodule(place.path).register_forward_hook(hook_for(index)) for index, place in enumerate(places)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass(frozen=True)
class Bases:
    """The directions to keep, the most important first, and the shares of energy along them.

    Attributes:
        shared: The refit's basis, (d, d), of a LayerNorm model (d, d - 1).
        layer: Principal directions of n at each norm input, (d, d) each.
        energy_shared: Share of Σ n nᵀ along the shared directions.
        importance: Share of what the readers see along them.
        energy_layer: Share of each input's Σ n nᵀ along its own directions, the mean over the inputs.
        energy_stream: The same of Σ x xᵀ.
        stable_rank_shared: See `Measurement`.
        stable_rank_layer: See `Measurement`.
        participation_shared: See `Measurement`.
        participation_layer: See `Measurement`.
    """

    shared: torch.Tensor
    layer: list[torch.Tensor]
    energy_shared: torch.Tensor
    importance: torch.Tensor
    energy_layer: torch.Tensor
    energy_stream: torch.Tensor
    stable_rank_shared: float
    stable_rank_layer: float
    participation_shared: float
    participation_layer: float


def find_bases(model: Any, job: Job, places: Sequence[NormInput], rows: torch.Tensor, batch: int) -> Bases:
    """Run the dense model over the calibration rows and find both kinds of basis.

    Args:
        model: The dense model in memory.
        job: A planned refit of it.
        places: Its norms.
        rows: Token ids, (rows, sequence length).
        batch: Rows per forward pass.
    """
    import torch

    from slicecli.checkpoint.dense_weights import DenseWeights
    from slicecli.checkpoint.meta_model import build_runnable_meta_model
    from slicecli.linalg.basis import principal_basis
    from slicecli.linalg.normal_equations import add_square, normalise
    from slicecli.progress import Silent
    from slicecli.runtime.placement import compute_dtype, pick_device
    from slicecli.slicing.context import Batches, DenseModel
    from slicecli.slicing.refit import collect_statistics

    size, is_centred = job.dimensions.hidden_size, job.dimensions.adapter.norm.is_centred
    normalised = [torch.zeros(size, size, dtype=torch.float64) for _ in places]
    raw = [torch.zeros(size, size, dtype=torch.float64) for _ in places]

    def see(index: int, stream: torch.Tensor, _output: torch.Tensor) -> None:
        flat = stream.flatten(0, -2)
        n = normalise(flat, job.dimensions.epsilon, is_centred)
        x = flat - flat.mean(-1, keepdim=True) if is_centred else flat
        add_square(normalised[index], n)
        add_square(raw[index], x)

    with torch.no_grad(), hooked(model, places, see):
        for some in rows.split(batch):
            model(input_ids=some, use_cache=False)

    device = pick_device("cpu")
    weights = DenseWeights(job.source)
    dense = DenseModel(
        build_runnable_meta_model(job.config), weights, job.dimensions, device, compute_dtype(weights.dtype, device)
    )
    basis = collect_statistics(dense, Batches(rows, batch), Silent()).basis
    own = [principal_basis(moment) for moment in normalised]
    own_raw = [principal_basis(moment)[1] for moment in raw]
    together = principal_basis(torch.stack(normalised).sum(0))[1]
    return Bases(
        shared=basis.vectors.float(),
        layer=[vectors.float() for vectors, _ in own],
        energy_shared=basis.energies / basis.energies.sum(),
        importance=basis.importances / basis.importances.sum(),
        energy_layer=torch.stack([energies / energies.sum() for _, energies in own]).mean(0),
        energy_stream=torch.stack([energies / energies.sum() for energies in own_raw]).mean(0),
        stable_rank_shared=float(together.sum() / together[0]),
        stable_rank_layer=sum(float(energies.sum() / energies[0]) for _, energies in own) / len(own),
        participation_shared=float(together.sum() ** 2 / together.square().sum()),
        participation_layer=sum(float(e.sum() ** 2 / e.square().sum()) for _, e in own) / len(own),
    )


def outside(shares: torch.Tensor, kept: int) -> float:
    """Return the sum of the shares beyond the first `kept`."""
    return float(shares[kept:].sum())


def tails(products: torch.Tensor) -> torch.Tensor:
    """Return for k = 0 ... d the sum over the directions beyond the first k, shape (..., d + 1)."""
    import torch

    summed = products.flip(-1).cumsum(-1).flip(-1)
    return torch.nn.functional.pad(summed, (0, 1))


@dataclass
class Fisher:
    """Sums of squared first-order effects of dropping directions, for every k at once, float64 of shape (d + 1,).

    Attributes:
        token: Σ over norm inputs and tokens of (g · δ)².
        coherent: Σ over rows of (Σ over norm inputs and tokens of g · δ)².
    """

    token: torch.Tensor
    coherent: torch.Tensor


def fisher_weights(
    model: Any, job: Job, places: Sequence[NormInput], bases: Bases, rows: torch.Tensor, batch: int
) -> dict[str, Fisher]:
    """Run the dense model forwards and backwards, with labels drawn from its own predictions.

    To second order, dropping δ changes the predictions by a Kullback-Leibler divergence of ½ E (g · δ)², g the
    gradient of the log-likelihood of labels that the model draws itself (the Fisher information).

    Returns:
        For the shared basis, for the bases per input, and for those without the final norm, whose input the published
        method does not slice: half the sums per token.
    """
    import torch

    from slicecli.linalg.normal_equations import normalise

    size, centred = job.dimensions.hidden_size, job.dimensions.adapter.norm.is_centred
    generator = torch.Generator().manual_seed(SEED)
    model.requires_grad_(False)
    names = ("shared", "layer", "blocks")
    sums = {name: Fisher(*(torch.zeros(size + 1, dtype=torch.float64) for _ in range(2))) for name in names}
    seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def see(index: int, stream: torch.Tensor, output: torch.Tensor) -> None:
        output.retain_grad()
        seen[index] = normalise(stream.detach(), job.dimensions.epsilon, centred), output

    def start_graph(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        return output.detach().requires_grad_()

    handle = model.get_input_embeddings().register_forward_hook(start_graph)
    try:
        with torch.enable_grad(), hooked(model, places, see):
            for some in rows.split(batch):
                logits = model(input_ids=some, use_cache=False).logits.flatten(0, 1)
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
                per_row = {name: torch.zeros(len(some), size + 1, dtype=torch.float64) for name in names}
                for index, place in enumerate(places):
                    n, output = seen[index]
                    assert output.grad is not None
                    g = output.grad if place.weight is None else output.grad * place.weight
                    for name, basis in (("shared", bases.shared), ("layer", bases.layer[index])):
                        effects = tails(((n @ basis) * (g @ basis)).double())
                        # a LayerNorm's shared basis has a direction less
                        effects = torch.nn.functional.pad(effects, (0, size + 1 - effects.shape[-1]))
                        # OPT lays the rows of a batch end to end before its second norm
                        effects = effects.reshape(len(some), -1, size + 1)
                        summed = {name} | ({"blocks"} if name == "layer" and index + 1 < len(places) else set())
                        for key in summed:
                            sums[key].token += effects.square().sum((0, 1))
                            per_row[key] += effects.sum(1)
                for name, effect in per_row.items():
                    sums[name].coherent += effect.square().sum(0)
                seen.clear()
    finally:
        handle.remove()
    scale = 0.5 / rows.numel()
    return {name: Fisher(found.token * scale, found.coherent * scale) for name, found in sums.items()}


def projected_nll(
    model: Any, job: Job, places: Sequence[NormInput], bases: Sequence[torch.Tensor | None], rows: Rows, batch: int
) -> float:
    """Return the nats per token of the dense model with the normalised stream projected at each norm input.

    Args:
        model: The dense model.
        job: A planned slice of it.
        places: Its norms.
        bases: The kept directions at each, (d, k); `None` leaves it alone.
        rows: The evaluation rows.
        batch: Rows per forward pass.
    """
    from slicecli.evaluation.perplexity import measure_perplexity
    from slicecli.linalg.normal_equations import normalise

    centred = job.dimensions.adapter.norm.is_centred

    def see(index: int, stream: torch.Tensor, _output: torch.Tensor) -> torch.Tensor | None:
        basis = bases[index]
        if basis is None:
            return None
        output = normalise(stream, job.dimensions.epsilon, centred) @ basis @ basis.T
        weight, bias = places[index].weight, places[index].bias
        output = output if weight is None else output * weight
        return output if bias is None else output + bias

    with hooked(model, places, see):
        return float(measure_perplexity(model, rows, batch).nll)


def unigram_nll(calibration: torch.Tensor, evaluation: torch.Tensor, vocabulary: int) -> float:
    """Return the nats per token of evaluation rows under the calibration rows' frequencies, one added to each count."""
    counts = calibration.flatten().bincount(minlength=vocabulary).double() + 1
    return -float((counts / counts.sum()).log()[evaluation[:, 1:]].mean())


# ----------------------------------------------------------------------------------------------------------
# Measuring: the slices.


def measure(folder: str, arguments: argparse.Namespace) -> list[Measurement]:
    """Measure one model at all dims with both methods."""
    import torch
    import transformers

    from slicecli.data.packing import calibration_rows, evaluation_rows
    from slicecli.data.text import read_text
    from slicecli.evaluation.perplexity import measure_perplexity
    from slicecli.family.slice_plan import Width
    from slicecli.jobs.options import SliceOptions
    from slicecli.jobs.plan import plan_slices
    from slicecli.jobs.run import run_slices
    from slicecli.record.record import read_record

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    settings: dict[str, Any] = {
        "calibration": arguments.calibration,
        "samples": arguments.samples,
        "sequence_length": arguments.seq_len,
        "seed": SEED,
        "dtype": "float32",
        "device": "cpu",
    }

    def load(path: str | Path) -> Any:
        return transformers.AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        ).eval()

    with tempfile.TemporaryDirectory() as scratch:
        # a narrow model has fewer legal dims than there are sparsities
        first = [
            plan_slices(folder, [Width(sparsity=s)], [Path(scratch) / "x"], SliceOptions(**settings))
            for s in SPARSITIES
        ]
        dims = sorted({job.slices[0].plan.dim for job in first}, reverse=True)
        job = first[0]
        tokenizer = job.source.tokenizer()
        text = read_text(arguments.calibration, "calibration")
        calibration = calibration_rows(text, tokenizer, arguments.samples, job.sequence_length, SEED)
        text = read_text(arguments.evaluation, "evaluation")
        evaluation = evaluation_rows(text, tokenizer, job.sequence_length, arguments.evaluation_rows)
        batch = max(1, 4096 // job.sequence_length)

        dense = load(folder)
        dense_nll = measure_perplexity(dense, evaluation, batch).nll
        places = norm_inputs(dense, job.dimensions)
        bases = find_bases(dense, job, places, calibration.ids, batch)
        fisher = fisher_weights(dense, job, places, bases, calibration.ids[: arguments.fisher_rows], batch)
        unigram = unigram_nll(calibration.ids, evaluation.ids, job.dimensions.vocabulary)

        found = []
        for method in METHODS:
            outputs = [Path(scratch) / f"{method}-{dim}" for dim in dims]
            options = SliceOptions(method=method, **settings)
            run_slices(plan_slices(folder, [Width(dim) for dim in dims], outputs, options))
            for dim, output in zip(dims, outputs, strict=True):
                record = read_record(output)
                assert record is not None
                # the slice of a LayerNorm model in a shared basis has one direction less than its width
                shared = dim - job.dimensions.adapter.norm.is_centred
                own = dim
                kept: list[torch.Tensor | None]
                if method == "refit":
                    own = shared
                    kept = [bases.shared[:, :shared]] * len(places)
                    per_input = fisher["layer"]
                else:
                    kept = [*(basis[:, :dim] for basis in bases.layer[:-1]), None]
                    per_input = fisher["blocks"]
                result = measure_perplexity(load(output), evaluation, batch)
                found.append(
                    Measurement(
                        model=arguments.name or Path(folder).name,
                        group=arguments.group or arguments.name or Path(folder).name,
                        method=method,
                        norm="layer" if job.dimensions.adapter.norm.is_centred else "rms",
                        hidden_size=job.dimensions.hidden_size,
                        dim=dim,
                        dense_nll=dense_nll,
                        nll=result.nll,
                        stderr=result.stderr / result.value,
                        unigram_nll=unigram,
                        energy_shared=outside(bases.energy_shared, shared),
                        energy_layer=outside(bases.energy_layer, own),
                        energy_stream=outside(bases.energy_stream, own),
                        importance=outside(bases.importance, shared),
                        record_energy=1 - record["energy"]["kept"],
                        stable_rank_shared=bases.stable_rank_shared,
                        stable_rank_layer=bases.stable_rank_layer,
                        participation_shared=bases.participation_shared,
                        participation_layer=bases.participation_layer,
                        fisher_shared=float(fisher["shared"].token[shared]),
                        fisher_layer=float(per_input.token[own]),
                        coherent_shared=float(fisher["shared"].coherent[shared]),
                        coherent_layer=float(per_input.coherent[own]),
                        projected=projected_nll(dense, job, places, kept, evaluation, batch) - dense_nll,
                    )
                )
    return found


def append_measurements(path: Path, rows: Sequence[Measurement]) -> None:
    """Add rows to a CSV file, which is begun where there is none."""
    is_new = not path.exists()
    with path.open("a", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Measurement)])
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow(
                {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in asdict(row).items()}
            )


def read_measurements(path: Path) -> list[Measurement]:
    """Read what `append_measurements` wrote."""
    kinds = {"model": str, "group": str, "method": str, "norm": str, "hidden_size": int, "dim": int}
    with path.open(encoding="utf-8", newline="") as file:
        return [
            Measurement(**{name: kinds.get(name, float)(value) for name, value in row.items()})
            for row in csv.DictReader(file)
        ]


# ----------------------------------------------------------------------------------------------------------
# The report.


@dataclass(frozen=True)
class Predictor:
    """A quantity x that D may be proportional to.

    Attributes:
        name: How the table calls it.
        needs: What it is computed from: `width`, `energy`, `gradient`, or `measurement` for one that runs a damaged
            model after all.
        formula: x of a slice.
        is_power: Fit D = c x^b with b shared by all models, not only c.
        is_fixed: No constant is fitted: D = x.
    """

    name: str
    needs: str
    formula: Callable[[Measurement], float]
    is_power: bool = False
    is_fixed: bool = False

    def value(self, row: Measurement) -> float:
        """Return x of a slice; a measured one can come out below zero by chance, where no power of it exists."""
        return max(self.formula(row), SMALLEST_VALUE)


def width_factor(row: Measurement) -> float:
    """Return s / (1 - s)."""
    return row.sparsity / (1 - row.sparsity)


def saturating(value: float, limit: float) -> float:
    """Return what grows like `value` while small and ends at `limit`."""
    return value * limit / (value + limit)


PREDICTORS = (
    Predictor("ln PPL0 · s/(1-s), c = 1 (the paper)", "width", lambda m: m.dense_nll * width_factor(m), is_fixed=True),
    Predictor("s^1.5", "width", lambda m: m.sparsity**1.5),
    Predictor("s/(1-s)", "width", width_factor),
    Predictor("s^b", "width", lambda m: m.sparsity, is_power=True),
    Predictor("ln PPL0 · s/(1-s)", "width", lambda m: m.dense_nll * width_factor(m)),
    Predictor("gap · s^1.5", "width", lambda m: m.gap * m.sparsity**1.5),
    Predictor("energy, shared", "energy", lambda m: m.energy_shared),
    Predictor("energy, layer", "energy", lambda m: m.energy_layer),
    Predictor("energy, stream", "energy", lambda m: m.energy_stream),
    Predictor("importance", "energy", lambda m: m.importance),
    Predictor("(energy, shared)^b", "energy", lambda m: m.energy_shared, is_power=True),
    Predictor("(energy, layer)^b", "energy", lambda m: m.energy_layer, is_power=True),
    Predictor("(energy, stream)^b", "energy", lambda m: m.energy_stream, is_power=True),
    Predictor("(importance)^b", "energy", lambda m: m.importance, is_power=True),
    Predictor("stable rank, shared · s^1.5", "energy", lambda m: m.stable_rank_shared * m.sparsity**1.5),
    Predictor("stable rank, layer · s^1.5", "energy", lambda m: m.stable_rank_layer * m.sparsity**1.5),
    Predictor(
        "stable rank / d, layer · s^1.5", "energy", lambda m: m.stable_rank_layer / m.hidden_size * m.sparsity**1.5
    ),
    Predictor(
        "participation / d, shared · s^1.5",
        "energy",
        lambda m: m.participation_shared / m.hidden_size * m.sparsity**1.5,
    ),
    Predictor(
        "participation / d, layer · s^1.5", "energy", lambda m: m.participation_layer / m.hidden_size * m.sparsity**1.5
    ),
    Predictor("ln PPL0 · energy, shared", "energy", lambda m: m.dense_nll * m.energy_shared),
    Predictor("gap · energy, shared", "energy", lambda m: m.gap * m.energy_shared),
    Predictor("gap · energy, layer", "energy", lambda m: m.gap * m.energy_layer),
    Predictor("gap · importance", "energy", lambda m: m.gap * m.importance),
    Predictor("(gap · energy, shared)^b", "energy", lambda m: m.gap * m.energy_shared, is_power=True),
    Predictor("(gap · energy, layer)^b", "energy", lambda m: m.gap * m.energy_layer, is_power=True),
    Predictor("(gap · importance)^b", "energy", lambda m: m.gap * m.importance, is_power=True),
    Predictor("Fisher, layer, c = 1", "gradient", lambda m: m.fisher_layer, is_fixed=True),
    Predictor("Fisher, shared", "gradient", lambda m: m.fisher_shared),
    Predictor("Fisher, layer", "gradient", lambda m: m.fisher_layer),
    Predictor("(Fisher, shared)^b", "gradient", lambda m: m.fisher_shared, is_power=True),
    Predictor("(Fisher, layer)^b", "gradient", lambda m: m.fisher_layer, is_power=True),
    Predictor("(coherent Fisher, shared)^b", "gradient", lambda m: m.coherent_shared, is_power=True),
    Predictor("(coherent Fisher, layer)^b", "gradient", lambda m: m.coherent_layer, is_power=True),
    Predictor("Fisher, shared, ending at gap", "gradient", lambda m: saturating(m.fisher_shared, m.gap)),
    Predictor("Fisher, layer, ending at gap", "gradient", lambda m: saturating(m.fisher_layer, m.gap)),
    Predictor("projected on the fly at every k", "measurement", lambda m: m.projected),
    Predictor(
        "sqrt(projected · Fisher, layer)",
        "measurement",
        lambda m: math.sqrt(max(m.projected, SMALLEST_VALUE) * m.fisher_layer),
    ),
)
BASELINE = "s^1.5"
PLOTTED = ("s^1.5", "(gap · energy, shared)^b", "Fisher, layer")
PLOT_LIMITS = (0.003, 5.0)


@dataclass(frozen=True)
class Prediction:
    """What was predicted for the slices of one left-out group.

    Attributes:
        predicted: D as predicted.
        measured: D as measured.
        nll: ln PPL as measured.
        exponent: The fitted exponent.
    """

    predicted: numpy.ndarray
    measured: numpy.ndarray
    nll: numpy.ndarray
    exponent: float

    @classmethod
    def of(cls, rows: Sequence[Measurement], predicted: Sequence[float], exponent: float) -> Prediction:
        """Put predictions for slices beside what was measured."""
        measured = numpy.array([row.loss for row in rows])
        return cls(numpy.array(predicted), measured, numpy.array([row.nll for row in rows]), exponent)

    @property
    def nats(self) -> numpy.ndarray:
        """Predicted minus measured ln PPL."""
        error: numpy.ndarray = self.predicted - self.measured
        return error

    @property
    def log_ratios(self) -> numpy.ndarray:
        """The ln of predicted over measured D, of the slices where D is more than noise."""
        clear = self.measured > SMALLEST_RATIO_LOSS
        ratios: numpy.ndarray = numpy.log(self.predicted[clear] / self.measured[clear])
        return ratios


def fit(rows: Sequence[Measurement], predictor: Predictor) -> tuple[float, float]:
    """Return c and b of D = c x^b with the least mean absolute error in nats, every group weighing the same.

    Absolute, because the most fragile model would decide over squares, and the sturdiest, whose D is hardly more than
    noise, over logarithms.
    """
    if predictor.is_fixed:
        return 1.0, 1.0
    x, loss = numpy.array([predictor.value(row) for row in rows]), numpy.array([row.loss for row in rows])
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row.group] = sizes.get(row.group, 0) + 1
    weights = numpy.array([1 / sizes[row.group] for row in rows])

    def constant(exponent: float) -> tuple[float, float]:
        """Return the best c for an exponent, a weighted median of the ratios, and the error that it leaves."""
        power = x**exponent
        order = numpy.argsort(loss / power)
        summed = (weights * power)[order].cumsum()
        chosen = order[int(numpy.searchsorted(summed, summed[-1] / 2))]
        best = float(loss[chosen] / power[chosen])
        return best, float((weights * numpy.abs(best * power - loss)).sum())

    exponent = min(EXPONENTS, key=lambda b: constant(b)[1]) if predictor.is_power else 1.0
    return constant(exponent)[0], exponent


def leave_one_group_out(rows: Sequence[Measurement], predictor: Predictor) -> dict[str, Prediction]:
    """Fit on all groups but one, predict that one; return the predictions by group."""
    found = {}
    for group in sorted({row.group for row in rows}):
        constant, exponent = fit([row for row in rows if row.group != group], predictor)
        left_out = [row for row in rows if row.group == group]
        predicted = [constant * predictor.value(row) ** exponent for row in left_out]
        found[group] = Prediction.of(left_out, predicted, exponent)
    return found


def from_anchor(rows: Sequence[Measurement], predictor: Predictor) -> dict[str, Prediction]:
    """Take c of each model from its slice nearest to s = 0.2 and predict its others; return them by group.

    The exponent of a power comes from the other groups.
    """
    found = {}
    for group in sorted({row.group for row in rows}):
        _, exponent = fit([row for row in rows if row.group != group], predictor)
        others, predicted = [], []
        for model in sorted({row.model for row in rows if row.group == group}):
            own = [row for row in rows if row.model == model]
            anchor = min(own, key=lambda row: abs(row.sparsity - ANCHOR))
            for row in own:
                if row is not anchor:
                    others.append(row)
                    predicted.append(anchor.loss * (predictor.value(row) / predictor.value(anchor)) ** exponent)
        found[group] = Prediction.of(others, predicted, exponent)
    return found


def interval_of_difference(errors: numpy.ndarray, baseline: numpy.ndarray) -> tuple[float, float, float]:
    """Return the mean difference of two errors per group and its 95 % bootstrap interval, groups drawn anew."""
    generator = numpy.random.default_rng(SEED)
    difference = errors - baseline
    drawn = difference[generator.integers(len(difference), size=(RESAMPLES, len(difference)))].mean(1)
    return float(difference.mean()), float(numpy.percentile(drawn, 2.5)), float(numpy.percentile(drawn, 97.5))


def write_table(
    rows: Sequence[Measurement], evaluate: Callable[[Sequence[Measurement], Predictor], dict[str, Prediction]]
) -> list[str]:
    """Return the lines of a Markdown table: a predictor per line, its errors, and how it does against the baseline.

    The columns: mean absolute error of ln PPL in nats, every group weighing the same; mean and median error of ln PPL
    and of PPL over the slices; the factor by which a predicted D typically errs, exp of the mean |ln ratio|; how much
    the mean ln ratio differs between groups (standard deviation); the differences of nats and of |ln ratio| to the
    baseline with their bootstrap intervals; on how many groups the |ln ratio| is smaller.
    """
    found = {predictor.name: evaluate(rows, predictor) for predictor in PREDICTORS}
    # a group whose slices all cost next to nothing has no ratios
    clear = [group for group, prediction in found[BASELINE].items() if len(prediction.log_ratios)]

    def in_nats(name: str) -> numpy.ndarray:
        means: numpy.ndarray = numpy.array([numpy.abs(group.nats).mean() for group in found[name].values()])
        return means

    def in_ratio(name: str) -> numpy.ndarray:
        means: numpy.ndarray = numpy.array([numpy.abs(found[name][group].log_ratios).mean() for group in clear])
        return means

    lines = [
        "| predictor | needs | b | ln PPL, nats | ln PPL, % | PPL, % | D, factor | spread | nats against "
        f"{BASELINE} | ln factor against {BASELINE} | better on |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for predictor in PREDICTORS:
        groups = found[predictor.name].values()
        relative = numpy.concatenate([numpy.abs(group.nats / group.nll) for group in groups]) * 100
        ppl = numpy.concatenate([numpy.abs(numpy.expm1(group.nats)) for group in groups]) * 100
        nats, ratio = in_nats(predictor.name), in_ratio(predictor.name)
        spread = numpy.std([found[predictor.name][group].log_ratios.mean() for group in clear], ddof=1)
        exponent = f"{numpy.mean([group.exponent for group in groups]):.2f}" if predictor.is_power else ""
        against = [
            "{:+.2f} [{:+.2f}, {:+.2f}]".format(*interval_of_difference(errors, baseline))
            for errors, baseline in ((nats, in_nats(BASELINE)), (ratio, in_ratio(BASELINE)))
        ]
        lines.append(
            f"| {predictor.name} | {predictor.needs} | {exponent} | {nats.mean():.3f} "
            f"| {relative.mean():.1f} / {numpy.median(relative):.1f} | {ppl.mean():.1f} / {numpy.median(ppl):.1f} "
            f"| {math.exp(ratio.mean()):.2f} | {spread:.2f} | {against[0]} | {against[1]} "
            f"| {int((ratio < in_ratio(BASELINE)).sum())}/{len(clear)} |"
        )
    return lines


def selected(path: Path, largest: float, without: str | None) -> list[Measurement]:
    """Read the measurements up to a sparsity, without those of the models whose name contains a word."""
    return [
        row
        for row in read_measurements(path)
        if row.sparsity <= largest and not (without is not None and without in row.model)
    ]


def report(everything: Sequence[Measurement], largest: float) -> str:
    """Return the report: for each method the constants, a table without and a table with a measurement of the model."""
    lines = []
    for method in METHODS:
        rows = [row for row in everything if row.method == method]
        groups = len({row.group for row in rows})
        models = len({row.model for row in rows})
        head = f"{method}, s <= {largest}: {len(rows)} slices of {models} models in {groups} groups"
        lines += [f"### {head}; one group left out", "", *write_table(rows, leave_one_group_out), ""]
        lines += [f"### {head}; from the slice nearest to s = {ANCHOR}", "", *write_table(rows, from_anchor), ""]
        lines += ["Fitted to all groups (D = c x^b):", ""]
        for predictor in PREDICTORS:
            constant, exponent = fit(rows, predictor)
            lines.append(f"- {predictor.name}: c = {constant:.3g}" + f", b = {exponent:.2f}" * predictor.is_power)
        lines.append("")
    return "\n".join(lines)


def plot(everything: Sequence[Measurement], output: Path) -> None:
    """Draw predicted against measured D of left-out groups, a column per predictor of `PLOTTED`, a row per method."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(len(METHODS), len(PLOTTED), figsize=(11, 7.2), sharex=True, sharey=True)
    for method, line in zip(METHODS, axes, strict=True):
        rows = [row for row in everything if row.method == method]
        for name, panel in zip(PLOTTED, line, strict=True):
            predictor = next(predictor for predictor in PREDICTORS if predictor.name == name)
            panel.plot(PLOT_LIMITS, PLOT_LIMITS, color="black", linewidth=0.8)
            for index, (group, found) in enumerate(leave_one_group_out(rows, predictor).items()):
                style = {"s": 14, "color": f"C{index % 10}", "marker": "o^s"[index // 10]}
                panel.scatter(found.measured, found.predicted, label=group, **style)
            panel.set(xscale="log", yscale="log", xlim=PLOT_LIMITS, ylim=PLOT_LIMITS, title=f"{method}: {name}")
        line[0].set_ylabel("predicted, nats")
    for panel in axes[-1]:
        panel.set_xlabel("measured ln(PPL/PPL0), nats")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.1, 1, 1))
    figure.savefig(output, dpi=85, metadata={"Software": None})


def main() -> None:
    """Measure, or report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="folders of dense models")
    parser.add_argument("--calibration", default="demo", help="text to calibrate on")
    parser.add_argument("--evaluation", default="demo", help="text to measure perplexity on")
    parser.add_argument("--output", type=Path, help="CSV file to append to")
    parser.add_argument("--name", help="name of the model, if not that of its folder")
    parser.add_argument("--group", help="what the models are left out with; each by itself if not given")
    parser.add_argument("--samples", type=int, default=128, help="calibration rows")
    parser.add_argument("--fisher-rows", type=int, default=64, help="of them for the backward pass")
    parser.add_argument("--evaluation-rows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the tables for a CSV file")
    parser.add_argument("--largest", type=float, default=LARGEST_SPARSITY, help="largest s in the report")
    parser.add_argument("--without", metavar="WORD", help="leave models with this in their name out of the report")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="with --report: draw predicted against measured")
    arguments = parser.parse_args()
    if arguments.report:
        rows = selected(arguments.report, arguments.largest, arguments.without)
        print(report(rows, arguments.largest))
        if arguments.plot:
            plot(rows, arguments.plot)
        return
    if not arguments.models or arguments.output is None:
        parser.error("give models and --output, or --report")
    for folder in arguments.models:
        rows = measure(folder, arguments)
        append_measurements(arguments.output, rows)
        print(
            f"{rows[0].model}: {len(rows)} slices, dense perplexity {math.exp(rows[0].dense_nll):.2f}", file=sys.stderr
        )


if __name__ == "__main__":
    main()
