"""Measuring a model: perplexity on texts and results on tasks, with everything that says what was measured.

Data flow: `EvaluationOptions` say what to measure; `EvaluationSet` is what becomes of them for one tokenizer, read
and packed once for as many models as share it; `Evaluation` is what was found. Reading comes before a model is
loaded, so that what cannot be had is refused early.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from statistics import stdev
from typing import TYPE_CHECKING, Any

from pydantic import Field

from slicecli.checkpoint.loading import load_model
from slicecli.checkpoint.source import Source
from slicecli.data.packing import check_vocabulary
from slicecli.data.text import Text, read_texts
from slicecli.evaluation.answers import NO_ANSWERS, Answers
from slicecli.evaluation.document import EvaluationDocument, PerplexityResult, Settings, SourceIdentity, TaskResult
from slicecli.evaluation.options import EvaluationOptions
from slicecli.family.context_length import pick_sequence_length
from slicecli.record.record import known_names, read_sound_record
from slicecli.record.schema import Calibration
from slicecli.runtime.distributed import Processes
from slicecli.runtime.libraries import quiet_libraries, running
from slicecli.runtime.placement import batch_rows, describe_map
from slicecli.runtime.versions import __version__, package_versions

if TYPE_CHECKING:
    from slicecli.data.packing import Rows
    from slicecli.evaluation.tasks import LoadedTask
    from slicecli.progress import Progress

__all__ = ["Evaluation", "EvaluationSet", "compare", "evaluate", "evaluate_both", "measure_loaded"]


@dataclass(frozen=True)
class EvaluationSet:
    """Texts and tasks, read once; the texts packed for one tokenizer.

    Attributes:
        tasks: The tasks, which are the same for every model.
    """

    texts: tuple[Text, ...]
    rows: tuple[Rows, ...]
    tasks: tuple[LoadedTask, ...]
    sequence_length: int | None

    @classmethod
    def prepare(
        cls,
        options: EvaluationOptions,
        source: Source,
        tokenizer: Any,
        progress: Progress | None = None,
        calibration: str | None = None,
    ) -> EvaluationSet:
        """Read what is to be measured on, and name it so that it is told apart, also from what a slice's record has."""
        options.check()
        length = None
        if options.texts:
            length = pick_sequence_length(source.name, source.config(), options.sequence_length)
        record = read_sound_record(source.folder) or {}
        taken = known_names(record, "perplexity")
        texts = read_texts(options.texts, "evaluation", options.token, taken, calibration)
        tasks: tuple[LoadedTask, ...] = ()
        if options.tasks:
            from slicecli.evaluation.tasks import load_tasks

            taken = known_names(record, "tasks")
            tasks = load_tasks(options.tasks, options.include_path, options.num_fewshot, options.seed, progress, taken)
        return cls(texts, (), tasks, length).packed(options, source, tokenizer)

    def packed(self, options: EvaluationOptions, source: Source, tokenizer: Any) -> EvaluationSet:
        """Return the same texts and tasks for a model with another tokenizer."""
        if self.sequence_length is None:
            return self
        from slicecli.data.packing import evaluation_rows

        rows = tuple(evaluation_rows(text, tokenizer, self.sequence_length, options.limit) for text in self.texts)
        for packed in rows:
            vocabulary = source.size("vocab_size")
            if vocabulary is not None:
                check_vocabulary(packed, source.name, vocabulary)
        return replace(self, rows=rows)


class Evaluation(EvaluationDocument):
    """A measured model.

    Attributes:
        versions: What it was measured with.
        lm_eval_results: What lm-eval returned, for each name of a task that was given.
        chat_template: The template that tasks were asked through.
    """

    perplexity: Mapping[str, PerplexityResult]
    tasks: Mapping[str, TaskResult]
    versions: Mapping[str, str]
    lm_eval_results: tuple[Mapping[str, Any], ...] = Field(default=(), exclude=True, repr=False)
    chat_template: str | None = Field(default=None, exclude=True, repr=False)

    def to_json(self, baseline: Evaluation | None = None) -> dict[str, Any]:
        """Return the document that `eval` prints, with `--baseline` that of the other model and the comparison."""
        document = self.model_dump()
        if baseline is not None:
            versions = document.pop("versions")
            document["baseline"] = baseline.model_dump(exclude={"versions"})
            document |= {"comparison": compare(self, baseline), "versions": versions}
        return document


def evaluate(
    model: str | Source,
    options: EvaluationOptions,
    progress: Progress | None = None,
    prepared: EvaluationSet | None = None,
) -> Evaluation:
    """Load a model once and measure it on texts and tasks."""
    source = model if isinstance(model, Source) else _find(model, options)
    source.check_is_decoder()
    with quiet_libraries():
        tokenizer = source.tokenizer()
        if prepared is None:
            prepared = EvaluationSet.prepare(options, source, tokenizer, progress)
        loaded = load_model(source, options.dtype, options.device_map, options.max_memory)
        places = getattr(loaded, "hf_device_map", {})
        if progress is not None and len(set(places.values())) > 1:
            progress.note(f"{source.name}: {describe_map(places)}")
        identity = None
        if Processes.find().count == 1:
            kind = {"dtype": str(loaded.dtype), "device": loaded.device.type, "batch_size": options.batch_size}
            identity = {**source.identity(), **kind, "seed": options.seed, "versions": _versions()}
        answers = Answers(identity)
        if progress is not None and len(answers):
            progress.note(f"{source.name}: {len(answers):,} answers of an interrupted measurement are used.")
        try:
            found = measure_loaded(loaded, tokenizer, source, prepared, options, progress, answers)
        finally:
            answers.close()
        answers.forget()
        return found


def evaluate_both(
    model: str, baseline: str, options: EvaluationOptions, progress: Progress | None = None
) -> tuple[Evaluation, Evaluation]:
    """Measure two models, one after the other, on the same texts in rows of the same length, and the same tasks."""
    options.check()
    found = (_find(model, options), _find(baseline, replace(options, revision=None)))
    for source in found:
        source.check_is_decoder()
    if options.texts:
        length = min(pick_sequence_length(one.name, one.config(), options.sequence_length) for one in found)
        options = replace(options, sequence_length=length)
    with quiet_libraries():
        first = EvaluationSet.prepare(options, found[0], found[0].tokenizer(), progress)
        second = first.packed(options, found[1], found[1].tokenizer())
    return evaluate(found[0], options, progress, first), evaluate(found[1], options, progress, second)


def measure_loaded(
    model: Any,
    tokenizer: Any,
    source: Source,
    prepared: EvaluationSet,
    options: EvaluationOptions,
    progress: Progress | None = None,
    answers: Answers = NO_ANSWERS,
) -> Evaluation:
    """Measure a model that is loaded already."""
    from slicecli.evaluation.perplexity import measure_perplexity

    for rows in prepared.rows:
        check_vocabulary(rows, source.name, model.get_input_embeddings().num_embeddings)
    tasks: tuple[TaskResult, ...] = ()
    found_by_lm_eval: tuple[Mapping[str, Any], ...] = ()
    processes = Processes.find()
    processes.require_same(
        {
            "set of rows": [rows.digest for rows in prepared.rows],
            "set of versions": _versions(),
            "kind of device": [model.device.type, str(model.dtype)],
        }
    )
    progress = progress if processes.is_main else None
    with running(source.name):
        size = options.batch_size or batch_rows(model.device, prepared.sequence_length or 1)
        perplexities = tuple(
            measure_perplexity(model, rows, size, progress, processes, answers) for rows in prepared.rows
        )
        if prepared.tasks:
            from slicecli.evaluation.tasks import measure_tasks

            tasks, found_by_lm_eval = measure_tasks(
                model, tokenizer, prepared.tasks, options, progress, processes, answers
            )
    record = read_sound_record(source.folder) or {}
    origin = record.get("source") or {"model": source.name, "commit": source.commit, "content": source.content}
    width = int(model.config.hidden_size)
    hidden_size, dim = int(record.get("hidden_size") or width), int(record.get("dim") or width)
    return Evaluation(
        model=source.name,
        model_type=str(origin.get("model_type") or source.fields.get("model_type")),
        revision=source.commit,
        perplexity={result.text: result for result in perplexities},
        tasks={result.task: result for result in tasks},
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        hidden_size=hidden_size,
        dim=dim,
        sparsity=1 - dim / hidden_size,
        mlp_size=record.get("mlp_size"),
        mlp_dim=record.get("mlp_dim"),
        method=record.get("method"),
        source=SourceIdentity(**{name: origin[name] for name in SourceIdentity.model_fields}),
        calibration=Calibration.model_validate(record["calibration"]) if record else None,
        evaluation=Settings(
            limit=options.limit,
            num_fewshot=options.num_fewshot,
            sequence_length=prepared.sequence_length,
            seed=options.seed,
            dtype=str(model.dtype).removeprefix("torch."),
            apply_chat_template=options.apply_chat_template,
            system_instruction=options.system_instruction,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
            rows={result.text: result.rows_sha256 for result in perplexities},
        ),
        is_recovered="recovery" in record,
        versions=_versions() | ({"lm_eval": version("lm_eval")} if tasks else {}),
        lm_eval_results=found_by_lm_eval,
        chat_template=getattr(tokenizer, "chat_template", None) if options.apply_chat_template else None,
    )


def _versions() -> dict[str, str]:
    return {"slicecli": __version__, **package_versions()}


def compare(evaluation: Evaluation, baseline: Evaluation) -> dict[str, Any]:
    """Compare two evaluations on the same texts and tasks.

    Where both models answered the same questions, the standard error of a difference is that of the mean of the
    differences question by question, which is smaller than that of two separate measurements.
    """
    return {
        "perplexity": {
            text: {
                "ratio": math.exp(result.nll - baseline.perplexity[text].nll),
                "ln_ratio": result.nll - baseline.perplexity[text].nll,
                "same_rows": result.rows_sha256 == baseline.perplexity[text].rows_sha256,
            }
            for text, result in evaluation.perplexity.items()
            if text in baseline.perplexity
        },
        "tasks": {
            task: _difference(result, baseline.tasks[task])
            for task, result in evaluation.tasks.items()
            if task in baseline.tasks
        },
    }


def _difference(one: TaskResult, other: TaskResult) -> dict[str, float | None]:
    """Return the difference of two results and its standard error; null where one of them has none."""
    if one.value is None or other.value is None:
        return {"difference": None, "stderr": None}
    difference, count = one.value - other.value, len(one.scores)
    stderr = None if one.stderr is None or other.stderr is None else math.hypot(one.stderr, other.stderr)
    if count == len(other.scores) and count > 1:
        differences = [a - b for a, b in zip(one.scores, other.scores, strict=True)]
        # else the value is not the mean of the scores
        if math.isclose(sum(differences) / count, difference, abs_tol=1e-9):
            stderr = stdev(differences) / math.sqrt(count)
    return {"difference": difference, "stderr": stderr}


def _find(model: str, options: EvaluationOptions) -> Source:
    return Source.find(model, options.revision, options.token, options.trust_remote_code)
