"""The Python interface: the commands as functions.

Example:
    >>> import slicecli
    >>> report = slicecli.slice_model("meta-llama/Meta-Llama-3-8B-Instruct", dim=3072)  # doctest: +SKIP
    >>> slicecli.perplexity(str(report.output), "wikitext2").value  # doctest: +SKIP
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from slicecli.errors import RequestError, WeightsError
from slicecli.family.context_length import context_length_of_config
from slicecli.family.slice_plan import Method, Width, WidthPair
from slicecli.jobs.options import RecoverOptions, SliceOptions
from slicecli.jobs.plan import plan_slices
from slicecli.jobs.run import SliceReport, run_slices
from slicecli.runtime.inputs import check_sampling, local_path
from slicecli.runtime.libraries import quiet_libraries

if TYPE_CHECKING:
    import torch

    from slicecli.estimation.estimate import Estimate
    from slicecli.evaluation.document import PerplexityResult
    from slicecli.evaluation.measure import Evaluation
    from slicecli.jobs.recover import RecoveryReport
    from slicecli.progress import Progress
    from slicecli.runtime.placement import DeviceMap, MaxMemory

__all__ = ["estimate", "evaluate", "generate_text", "load", "perplexities", "perplexity", "recover", "slice_model"]


def slice_model(
    model: str,
    dim: int | None = None,
    *,
    sparsity: float | None = None,
    target_parameters: int | None = None,
    memory: int | None = None,
    of: Literal["hidden", "parameters"] = "hidden",
    shape: Literal["auto", "width", "mlp"] = "auto",
    multiple_of: int | None = None,
    schedule: str | None = None,
    mlp_dim: int | None = None,
    mlp_sparsity: float | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> SliceReport:
    """Slice a model and write the result to a folder.

    Args:
        model: Hub id or folder.
        dim: The hidden size to keep.
        sparsity: Instead: the fraction of the hidden size to remove.
        target_parameters: Instead: maximum number of parameters of the slice.
        memory: Instead: maximum bytes of its weights.
        of: What the sparsity is a fraction of; of the parameters, it is a target.
        shape: How a target is met: by the hidden size (`width`), by fewer MLP channels (`mlp`), or by the pair of both
            that loses least (`auto`).
        multiple_of: With a sparsity or a target: choose among multiples of this number.
        schedule: Instead, with `method="slicegpt"`: see `slicecli.family.schedule.read_schedule`.
        mlp_dim: How many MLP channels to keep; alone, it leaves the hidden size as it is.
        mlp_sparsity: Instead: the fraction of them to remove.
        output: The folder to write; by default `./<name>-dim<k>`, or `./<name>-dim<k>-mlp<m>`.
        progress: Progress callback.
        **options: Fields of `slicecli.jobs.options.SliceOptions`.

    Returns:
        A report with the plan, the output folder and the warnings.

    Raises:
        SlicecliError: The request cannot be met; the message gives the cause and the remedy.
    """
    width = Width(
        dim=dim,
        sparsity=sparsity,
        target_parameters=target_parameters,
        memory=memory,
        of=of,
        shape=shape,
        multiple_of=multiple_of,
        schedule=schedule,
        mlp_dim=mlp_dim,
        mlp_sparsity=mlp_sparsity,
    )
    folder = None if output is None else local_path(output)
    with quiet_libraries():
        job = plan_slices(model, [width], [folder], SliceOptions(**options))
        return run_slices(job, progress)[0]


def recover(
    model: str,
    teacher: str | None = None,
    *,
    output: str | Path | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> RecoveryReport:
    """Train a slice to predict as its dense model does, and write the result to a folder.

    Args:
        model: The slice: Hub id or folder.
        teacher: The model to learn from; `None` takes the one it was made from, if that is on the Hub.
        output: The folder to write; by default `./<name>-recovered`.
        progress: Progress callback.
        **options: Fields of `slicecli.jobs.options.RecoverOptions`.

    Returns:
        A report with the output folder, the divergence from the teacher before and after, and the warnings.

    Raises:
        TrainingError: The slice did not become better; nothing was written.
        SlicecliError: The request cannot be met; the message gives the cause and the remedy.
    """
    from slicecli.jobs.recover import plan_recovery, recover_slice

    folder = None if output is None else local_path(output)
    with quiet_libraries():
        job = plan_recovery(model, folder, RecoverOptions(teacher=teacher, **options))
        return recover_slice(job, progress)


def load(
    model: str,
    *,
    dtype: str | None = None,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory | None = None,
    revision: str | None = None,
    token: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[Any, Any]:
    """Load a model, sliced or not, to run it.

    A custom-code slice needs no `trust_remote_code` here: the code of this package is used, not the code stored with
    the weights.

    Args:
        model: Hub id or folder.
        dtype: Name of the compute dtype; `None` uses the checkpoint's, or float32 on a CPU.
        device_map: As in transformers; the name of a device is also accepted.
        max_memory: Maximum bytes of weights per device (its number, or `cpu`), for the named maps.
        revision: Revision on the Hub.
        token: Hub token.
        trust_remote_code: Whether code from the model's repository may run.

    Returns:
        The transformers model, in evaluation mode, and its tokenizer.

    Raises:
        SlicecliError: The model does not exist, cannot be reached or loaded, or arrived damaged.

    Example:
        >>> import slicecli
        >>> model, tokenizer = slicecli.load("me/my-slice")  # doctest: +SKIP
    """
    from slicecli.checkpoint.loading import load_model
    from slicecli.checkpoint.source import Source

    source = Source.find(model, revision, token, trust_remote_code)
    with quiet_libraries():
        return load_model(source, dtype, device_map, max_memory), source.tokenizer()


def perplexity(model: str, text: str = "wikitext2", **options: Any) -> PerplexityResult:
    """Measure a model's perplexity on one text.

    Args:
        model: Hub id or folder, dense or sliced.
        text: Name of the text, see `slicecli.data.text.read_text`.
        **options: Keyword arguments of `perplexities`.

    Raises:
        SlicecliError: The request cannot be met; the message gives the cause and the remedy.
    """
    return perplexities(model, [text], **options)[0]


def perplexities(
    model: str,
    texts: Sequence[str],
    *,
    samples: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> list[PerplexityResult]:
    """Load a model once and measure its perplexity on several texts, each once.

    Args:
        model: Hub id or folder, dense or sliced.
        texts: Names of the texts, see `slicecli.data.text.read_text`.
        samples: Number of rows to measure; `None` measures the whole text.
        progress: Progress callback.
        **options: Other fields of `slicecli.evaluation.options.EvaluationOptions`.

    Raises:
        SlicecliError: The request cannot be met; the message gives the cause and the remedy.
    """
    return list(evaluate(model, texts, limit=samples, progress=progress, **options).perplexity.values())


def evaluate(
    model: str,
    texts: Sequence[str] = (),
    tasks: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    **options: Any,
) -> Evaluation:
    """Load a model once and measure it on texts and tasks.

    Args:
        model: Hub id or folder, dense or sliced.
        texts: Names of texts to measure perplexity on, see `slicecli.data.text.read_text`.
        tasks: Tasks of lm-eval, `.jsonl` files of questions, or `demo`.
        progress: Progress callback.
        **options: Other fields of `slicecli.evaluation.options.EvaluationOptions`.

    Raises:
        SlicecliError: The request cannot be met; the message gives the cause and the remedy.
    """
    from slicecli.evaluation.measure import evaluate as measure
    from slicecli.evaluation.options import EvaluationOptions

    return measure(model, EvaluationOptions(texts=tuple(texts), tasks=tuple(tasks), **options), progress)


def estimate(
    model: str,
    dims: Sequence[int],
    *,
    method: Method = "refit",
    slice_head: bool | None = None,
    unties: bool = False,
    write_as: str = "auto",
    mlp_dim: int | None = None,
    dtype: str | None = None,
    batch: int = 1,
    length: int | None = None,
    device: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    **knowledge: Any,
) -> Estimate:
    """Estimate the cost and quality of slices of a model from its config alone.

    Args:
        model: Hub id or folder.
        dims: Hidden sizes of the slices.
        method: Slicing method.
        slice_head: Whether the published method slices the input of the head.
        unties: Whether slices of a tied model get a head of their own.
        write_as: Class that slices are written in: `auto`, `own`, or the model type of a portable class.
        mlp_dim: How many MLP channels the slices keep; `None` keeps all.
        dtype: Dtype of weights and cache; `None` uses the checkpoint's.
        batch: Sequences served at once.
        length: Tokens per sequence; `None` uses 2048, or the model's limit if that is less.
        device: Name of an accelerator to compute speed-ups for, see `slicecli.estimation.devices`.
        revision: Revision on the Hub.
        token: Hub token.
        **knowledge: Fields of `slicecli.estimation.forecasts.ForecastInputs`: known figures of the model.

    Raises:
        SlicecliError: The request cannot be met; the message gives the cause and the remedy.
    """
    from slicecli.estimation import estimate as estimating
    from slicecli.estimation.devices import device_named
    from slicecli.estimation.forecasts import ForecastInputs, find_forecasts

    mlp = None if mlp_dim is None else Width(mlp_dim=mlp_dim)
    subject = estimating.Subject.find(
        model, method, slice_head, dtype, revision=revision, token=token, unties=unties, write_as=write_as, mlp=mlp
    )
    inputs = ForecastInputs(**knowledge)
    cuts_mlp = subject.narrower.mlp_dim is not None
    forecasts = [] if cuts_mlp else find_forecasts(subject.source, subject.dimensions, method, inputs)
    accelerator = None if device is None else device_named(device)
    pairs = [WidthPair(dim, subject.narrower.mlp_dim) for dim in dims]
    return estimating.estimate(subject, pairs, subject.workload(batch, length), accelerator, forecasts)


def generate_text(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0, seed: int = 42
) -> tuple[str, int]:
    """Generate text from a prompt.

    Args:
        model: A loaded model.
        tokenizer: Its tokenizer.
        prompt: The text to continue.
        max_new_tokens: Maximum number of tokens to generate.
        temperature: 0 always takes the likeliest token; above 0 samples.
        seed: Seed for sampling.

    Returns:
        The new text without the prompt, and its number of tokens.

    Raises:
        RequestError: The prompt has no tokens or leaves too little room, or a number is out of range.
        SourceError: The tokenizer does not belong to the model.
        WeightsError: The model's logits are NaN.
    """
    import torch

    from slicecli.data.packing import check_embedded

    check_sampling(max_new_tokens, temperature, seed)
    found = _prompt_ids(model, tokenizer, prompt)
    if not found:
        raise RequestError("The prompt is empty, and the tokenizer adds no start token.", "Pass a prompt.")
    check_embedded(max(found), model.get_input_embeddings().num_embeddings)
    longest = context_length_of_config(model.config)
    # the last token is not read any more
    room = max_new_tokens if longest is None else longest - len(found) + 1
    if room < max_new_tokens:
        raise RequestError(
            f"The prompt has {len(found):,} tokens; with {max_new_tokens:,} more it exceeds the model's limit of "
            f"{longest:,} tokens.",
            f"Use --max-new-tokens {room} or less." if room > 0 else "Use a shorter prompt.",
        )
    ids = torch.tensor([found])
    torch.manual_seed(seed)
    sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
    with torch.no_grad():
        output = model.generate(
            ids.to(model.device),
            attention_mask=torch.ones_like(ids).to(model.device),
            max_new_tokens=max_new_tokens,
            logits_processor=[_refuse_nan],
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
            **sampling,
        )
    new = output[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True), len(new)


def _prompt_ids(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """Return the token ids of a text that is to be continued: without an end that only the tokenizer adds."""
    known = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])} - {None}
    ids: list[int] = tokenizer(prompt)["input_ids"]
    written: list[int] = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    added = max(0, _ending(ids, ends) - _ending(written, ends))
    # many models begin with the token that others end with
    return ids[: max(1, len(ids) - added)]


def _ending(ids: Sequence[int], ends: Container[int]) -> int:
    """Count the tokens at the end that are an end."""
    return sum(1 for _ in itertools.takewhile(lambda token: token in ends, reversed(ids)))


def _refuse_nan(_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Refuse NaN logits, which would rank the first token of the vocabulary as the likeliest."""
    if bool(logits.isnan().any()):
        raise WeightsError("The model's logits are NaN.", "Try --dtype float32, or check the weights.")
    return logits
