"""Tasks, measured by EleutherAI's lm-eval on a model that is already loaded.

A task is named as lm-eval names it, by a YAML file of the user's own, as a `.jsonl` file of questions, or `demo`.
What is local is read locally: lm-eval's own list of tasks, which takes seconds to read, is opened only for a name
that is nowhere else, and nothing asks the network for a task whose data lie on this machine.

Loading and measuring are two steps, so that a task that cannot be had is refused before a model is loaded, and so
that many models are measured on tasks loaded once.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import json
import logging
import math
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import lm_eval
import numpy
import torch
import tqdm.std
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from slicecli.data.names import ANOTHER, Named, distinct_names, without_repeats
from slicecli.data.packing import check_embedded
from slicecli.data.questions import Question, read_questions
from slicecli.errors import OutputError, RequestError, SlicecliError, TextError, WeightsError, reason_of, shown
from slicecli.evaluation.answers import NO_ANSWERS, Answers
from slicecli.evaluation.chance import chance_level
from slicecli.evaluation.document import TaskResult
from slicecli.evaluation.options import EvaluationOptions
from slicecli.family.context_length import context_length_of_config
from slicecli.record.schema import Metric
from slicecli.runtime.distributed import ALONE, Processes
from slicecli.runtime.hub_errors import describe_hub_error, is_of_settings, remedy_of_hub_error
from slicecli.runtime.inputs import local_path
from slicecli.runtime.microbatch import MicroBatches, concat
from slicecli.runtime.placement import batch_rows

if TYPE_CHECKING:
    from slicecli.progress import Progress

__all__ = ["LoadedTask", "load_tasks", "measure_tasks", "write_lm_eval_results"]

PREFERRED_METRICS = ("acc_norm", "acc", "exact_match")
CHOICE_METRICS = ("acc_norm", "acc")
_DEFINITION = re.compile(r"""^(task|group):[ \t]*["']?([^\s"'#\[]+)["']?[ \t]*(?:#.*)?$""", re.MULTILINE)
# for the metrics, few, whose standard error has no formula
BOOTSTRAP_SAMPLES = 1000


@dataclass(frozen=True)
class LoadedTask:
    """What one name stands for.

    Attributes:
        name: The name as it was given; of a file, its own, with as many of its folders as tell it from other tasks.
        loaded: The tasks, and groups of tasks, as lm-eval's task manager returns them.
        digest: SHA-256 of a file's questions; `None` of a task that its name identifies.
    """

    name: str
    loaded: Mapping[str, Any]
    digest: str | None = None


def load_tasks(
    names: Sequence[str],
    include_path: Path | None = None,
    num_fewshot: int | None = None,
    seed: int = 1234,
    progress: Progress | None = None,
    taken: Mapping[str, str | None] | None = None,
) -> tuple[LoadedTask, ...]:
    """Find tasks and read their data, each once by however many paths a file is given.

    Args:
        num_fewshot: Solved examples before each question; `None` leaves it to the task. A task that insists on none
            keeps none.
    """
    given = without_repeats(names, _is_file)
    if progress is not None:
        progress.start("tasks", len(given))
    own = {name: questions for name in given if (questions := _own_questions(name)) is not None}
    found: dict[str, LoadedTask] = {}
    with _quiet():
        managers = _Managers(include_path)
        for name in given:
            if name not in own:
                found[name] = _load(name, *managers.find(name), num_fewshot, seed)
                if progress is not None:
                    progress.advance(name)
        taken = dict(taken or {})
        for task in found.values():
            members = [*task.loaded["tasks"], *task.loaded.get("groups", ())]
            managers.check_are_defined_once(members)
            taken |= dict.fromkeys(members, ANOTHER)
        wanted = [_named(name, questions) for name, questions in own.items()]
        for name, one, chosen in zip(own, wanted, distinct_names(wanted, taken), strict=True):
            specs = [_task_of(chosen, own[name])]
            found[name] = _load(chosen, specs, managers.local, num_fewshot, seed, one.digest)
            if progress is not None:
                progress.advance(chosen)
    # two of one name have the same content
    return tuple({found[name].name: found[name] for name in given}.values())


@torch.no_grad()
def measure_tasks(
    model: Any,
    tokenizer: Any,
    tasks: Sequence[LoadedTask],
    options: EvaluationOptions,
    progress: Progress | None = None,
    processes: Processes = ALONE,
    answers: Answers = NO_ANSWERS,
) -> tuple[tuple[TaskResult, ...], tuple[Mapping[str, Any], ...]]:
    """Measure a loaded model on loaded tasks.

    Args:
        options: How; its texts and tasks play no part.
        answers: What was answered before an interruption, and where to store what is.

    Returns:
        The result of each task, and what lm-eval returned, for each name that was given.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if options.apply_chat_template and not has_template:
        raise RequestError("The tokenizer has no chat template.", "Leave out --apply-chat-template.")
    is_plain = has_template and not options.apply_chat_template
    results: dict[str, TaskResult] = {}
    returned: list[Mapping[str, Any]] = []
    with _quiet():
        # a copy, because the harness gives it a padding token
        harness = _Harness(model, copy.deepcopy(tokenizer), options.batch_size, processes, answers)
        for task in tasks:
            members = task.loaded["tasks"]
            if is_plain and progress is not None and _generates(members.values()):
                progress.note(
                    f"{task.name}: the model generates text without its chat template; an instruction-tuned model is "
                    "meant to be asked with --apply-chat-template."
                )
            harness.set_cache_hook(_Counter(task.name, list(members.values()), progress, processes, answers))
            measured = _evaluate(harness, task, options)
            if harness.cut and progress is not None:
                progress.note(
                    f"{task.name}: {harness.cut:,} requests exceed the model's limit of {harness.max_length:,} tokens; "
                    "their beginning was cut off."
                )
            harness.cut = 0
            for name in measured["results"]:
                result = _result(name, members.get(name), measured, task.digest)
                if result is not None:
                    results[name] = result
            returned.append(measured)
    return tuple(results.values()), tuple(returned)


def _evaluate(harness: _Harness, task: LoadedTask, options: EvaluationOptions) -> Mapping[str, Any]:
    """Return what lm-eval says of a task."""
    _seed_everything(options.seed)
    for member in task.loaded["tasks"].values():
        member.set_fewshot_seed(seed=options.seed)
    try:
        measured: Mapping[str, Any] = lm_eval.evaluate(
            lm=harness,
            task_dict=task.loaded,
            limit=options.limit,
            bootstrap_iters=BOOTSTRAP_SAMPLES,
            apply_chat_template=options.apply_chat_template,
            system_instruction=options.system_instruction,
            fewshot_as_multiturn=options.fewshot_as_multiturn,
        )
    except (SlicecliError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a task's own templates and code raise
        raise TextError(
            f"The task {task.name!r} cannot be measured: {type(error).__name__}: {reason_of(error)}.",
            "Check how it is defined and, with --num-fewshot, that it has enough examples.",
        ) from error
    return measured


def write_lm_eval_results(
    folder: Path,
    model: str,
    returned: Sequence[Mapping[str, Any]],
    system_instruction: str | None,
    chat_template: str | None,
    fewshot_as_multiturn: bool,
) -> Path:
    """Write results as lm-eval itself does with `--output_path`, by its own writer; return the file.

    Args:
        returned: As `measure_tasks` returns it.
    """
    tracker = EvaluationTracker(output_path=str(folder))
    about = (system_instruction, chat_template, fewshot_as_multiturn)
    tracker.general_config_tracker.log_experiment_args("hf", {"pretrained": model}, *about)
    merged: dict[str, Any] = {}
    for one in returned:
        for name, value in one.items():
            merged[name] = {**merged.get(name, {}), **value} if isinstance(value, Mapping) else value
    samples = merged.pop("samples", {})
    with _quiet():
        tracker.save_results_aggregated(merged, samples)
    date = getattr(tracker, "date_id", "")
    path = folder / str(tracker.general_config_tracker.model_name_sanitized) / f"results_{date}.json"
    if not path.is_file():  # lm-eval only logs why
        raise OutputError(f"lm-eval cannot write its results below {folder}.", "Pass a folder that can be written to.")
    return path


class _Harness(HFLM):  # type: ignore[misc]
    """lm-eval's own wrapper of a model; batches are chosen by tokens, bad numbers are not ranked but refused.

    To lm-eval there is one process, which has all the answers, so that its metrics are those of one process.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int | None, processes: Processes, stored: Answers
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=tokenizer,
            batch_size=batch_size or 1,
            max_length=context_length_of_config(model.config),
        )
        self._processes = processes
        self._stored = stored
        self._pieces = MicroBatches()
        self._chooses_batches = batch_size is None
        self.cut = 0  # requests that were too long, since somebody asked
        self._vocabulary = model.get_input_embeddings().num_embeddings
        # offloaded: accelerate's hooks move the ids to where they are needed
        self._device = torch.device("cpu") if model.device.type == "meta" else model.device
        if self._chooses_batches:
            self.batch_size_per_gpu = batch_rows(self._device, self.max_length)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Answer requests for the likelihood of one text behind another."""
        return self._answers(super().loglikelihood, requests)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Answer requests for the likelihood of whole texts."""
        return self._answers(super().loglikelihood_rolling, requests)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Answer requests for text."""
        return self._answers(super().generate_until, requests)

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **named: Any) -> torch.Tensor:
        """Return the logits of a batch, in micro_batches where the memory does not take it whole."""
        if arguments or named:
            logits: torch.Tensor = super()._model_call(inps, *arguments, **named)
            return logits
        call = super()._model_call
        return concat([some for _, some in self._pieces.run(call, inps)])

    def _answers(self, answer: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        """Answer this process's share of requests, and return the answers to all."""
        if self._processes.count == 1:
            return self._rest_of_answers(answer, requests)
        # the choices of one question stay together, because lm-eval reads their beginning once
        own = self._processes.deal([request.args[0] for request in requests])
        digest = hashlib.sha256(repr([request.args for request in requests]).encode()).hexdigest()
        self._processes.require_same({"set of requests": digest})
        answers = answer([requests[index] for index in own]) if own else []
        found = [pair for part in self._processes.gather(list(zip(own, answers, strict=True))) for pair in part]
        return [value for _, value in sorted(found, key=lambda pair: pair[0])]

    def _rest_of_answers(self, answer: Callable[[list[Any]], list[Any]], requests: list[Any]) -> list[Any]:
        """Answer the requests whose answers are not stored, and return the answers to all."""
        found = [self._stored.get((request.request_type, request.args)) for request in requests]
        left = [index for index, one in enumerate(found) if one is None]
        for index in set(range(len(found))) - set(left):
            self.cache_hook.count()
            found[index] = tuple(found[index]) if isinstance(found[index], list) else found[index]
        if left:
            for index, one in zip(left, answer([requests[index] for index in left]), strict=True):
                found[index] = one
        return found

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        largest = max(max(context + continuation) for _, context, continuation in requests)
        check_embedded(largest, self._vocabulary)
        self._check_lengths(requests)
        if self._chooses_batches:
            longest = max(len(context) + len(continuation) for _, context, continuation in requests)
            self.batch_size_per_gpu = batch_rows(self._device, min(longest, self.max_length))
        found: list[tuple[float, bool]] = super()._loglikelihood_tokens(requests, disable_tqdm, override_bs)
        if any(math.isnan(value) for value, _ in found):
            raise WeightsError("The model's logits are NaN.", "Try --dtype float32.")
        return found

    def _check_lengths(self, requests: list[tuple[Any, list[int], list[int]]]) -> None:
        """Refuse what does not fit into a row of the model, and count what lm-eval will cut the beginning off."""
        texts, _, longest = max(requests, key=lambda one: len(one[2]))
        if len(longest) > self.max_length:
            raise TextError(
                f"The choice {shown(texts[1])} has {len(longest)} tokens, above the model's limit of "
                f"{self.max_length}.",
                "Shorten it, or remove its question.",
            )
        self.cut += sum(len(context) + len(choice) > self.max_length + 1 for _, context, choice in requests)


class _Counter:
    """Stands where lm-eval would hand each answer to a cache: stores and counts them."""

    def __init__(
        self, name: str, tasks: Sequence[Any], progress: Progress | None, processes: Processes, answers: Answers
    ) -> None:
        self._name, self._tasks, self._progress, self._is_started = name, tasks, progress, False
        self._processes, self._answers = processes, answers

    def add_partial(self, kind: str, request: Any, answer: Any) -> None:
        """Store and count an answer; one that was drawn at random is not stored."""
        settings = request[1] if kind == "generate_until" else {}
        if not settings.get("do_sample"):
            self._answers.add((kind, tuple(request)), answer)
        self.count()

    def count(self) -> None:
        """Count an answer."""
        if self._progress is None:
            return
        if not self._is_started:
            self._is_started = True
            requests = sum(instance.repeats for task in self._tasks for instance in task.instances)
            self._progress.start(self._name, -(-requests // self._processes.count))
        self._progress.advance()


class _Managers:
    """lm-eval's task managers: that of the user's own tasks, and one with lm-eval's too, made when it is needed."""

    def __init__(self, include_path: Path | None) -> None:
        self._folder = str(local_path(include_path)) if include_path is not None else None
        self.local = TaskManager(include_path=self._folder, include_defaults=False)
        self._all: TaskManager | None = None
        self._files: dict[str, list[str]] | None = None

    def check_are_defined_once(self, names: Sequence[str]) -> None:
        """Refuse tasks that two of the user's files define: lm-eval would take the first."""
        if self._folder is not None and self._files is None:
            self._files = _defining_files(Path(self._folder))
        for name in names:
            files = (self._files or {}).get(name, [])
            if len(files) > 1:
                raise RequestError(f"Two files define the task {name!r}: {files[0]} and {files[1]}.", "Rename one.")

    def find(self, name: str) -> tuple[list[Any], TaskManager]:
        """Return the tasks that a name stands for and the manager that knows them."""
        # a group may have members among lm-eval's own tasks
        local = [found for found in self.local.match_tasks([name]) if found not in self.local.all_groups]
        if local:
            return local, self.local
        if self._all is None:
            self._all = TaskManager(include_path=self._folder)
        matches = self._all.match_tasks([name])
        if not matches:
            near = difflib.get_close_matches(name, ["demo", *self._all.all_tasks], n=3)
            remedy = f"Similar names: {', '.join(near)}." if near else "See `lm_eval ls tasks`."
            raise RequestError(f"There is no task {name!r}.", f"{remedy} For your own questions pass a .jsonl file.")
        return matches, self._all


def _defining_files(folder: Path) -> dict[str, list[str]]:
    """Return the YAML files below a folder that define a task or a group, by its name."""
    found: dict[str, list[str]] = {}
    for path in sorted(folder.rglob("*.yaml")):
        names = dict(_DEFINITION.findall(path.read_text(encoding="utf-8", errors="replace")))
        name = names.get("group") or names.get("task")  # the tasks of a group are defined elsewhere
        if name is not None:
            found.setdefault(name, []).append(path.relative_to(folder).as_posix())
    return found


def _is_file(name: str) -> bool:
    return Path(name).suffix.lower() == ".jsonl"


def _own_questions(name: str) -> tuple[Question, ...] | None:
    """Return the questions of a file or of the demo; `None` for any other name."""
    if name == "demo":
        from slicecli.data.demo.questions import questions

        return questions()
    return read_questions(local_path(name)) if _is_file(name) else None


def _named(given: str, questions: Sequence[Question]) -> Named:
    """Return what the name of questions is decided by."""
    if not _is_file(given):
        return Named(given)
    content = json.dumps([[question.query, question.choices, question.gold] for question in questions])
    return Named.file(local_path(given), hashlib.sha256(content.encode()).hexdigest())


def _task_of(name: str, questions: Sequence[Question]) -> dict[str, Any]:
    """Return lm-eval's definition of a task of questions.

    Where all that is compared is whole texts, as in minimal pairs, the likelier one is meant, whatever its length.
    """
    metrics = ("acc", "acc_norm") if any(question.prompt for question in questions) else ("acc",)
    rows = [
        {"query": question.prompt, "choices": list(question.choices), "gold": question.gold} for question in questions
    ]
    return {
        "task": name,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "output_type": "multiple_choice",
        "test_split": "test",
        "fewshot_split": "test",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
    }


def _load(
    name: str,
    specs: list[Any],
    manager: TaskManager,
    num_fewshot: int | None,
    seed: int,
    digest: str | None = None,
) -> LoadedTask:
    _seed_everything(seed)
    try:
        loaded: Mapping[str, Any] = manager.load(specs)
    except Exception as error:  # a task may run code of its own, and its data set may be anywhere
        usual = "Check its definition and its data source;"
        raise TextError(
            f"The task {name!r} cannot be loaded: {describe_hub_error(error)}.",
            f"{remedy_of_hub_error(error)[:-1] + ';' if is_of_settings(error) else usual} your own .jsonl "
            "file needs no network.",
        ) from error
    if not loaded["tasks"]:
        raise TextError(f"The task {name!r} is empty.", "Check its definition.")
    for task in loaded["tasks"].values():
        _set_fewshot(task, num_fewshot)
    return LoadedTask(name, loaded, digest)


def _set_fewshot(task: Any, num_fewshot: int | None) -> None:
    """Set the number of examples as lm-eval does: a task that says 0 keeps 0, one that says nothing has 0."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own != 0:
        task.set_config(key="num_fewshot", value=num_fewshot)
    elif own is None:
        task.set_config(key="num_fewshot", value=0)


def _result(name: str, task: Any, measured: Mapping[str, Any], digest: str | None) -> TaskResult | None:
    """Return what lm-eval found on a task, or on a group where `task` is none; `None` if the group has no value."""
    fields = measured["results"][name]
    metrics: dict[tuple[str, str], tuple[float, float]] = {}
    for key, value in fields.items():
        metric, comma, filter_name = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            metrics[metric, filter_name] = _number(value), _number(fields.get(f"{metric}_stderr,{filter_name}"))
    if not metrics:
        return None
    order = [*PREFERRED_METRICS, *(task.aggregation() if task is not None else ())]
    chosen = next((key for wanted in order for key in metrics if key[0] == wanted), next(iter(metrics)))
    value, stderr = metrics[chosen]
    samples = measured["samples"].get(name, ())
    scores = tuple(_number(sample.get(chosen[0])) for sample in samples if sample["filter"] == chosen[1])
    return TaskResult(
        task=name,
        metric=_metric_name(chosen),
        value=_finite(value),
        stderr=_finite(stderr),
        chance=chance_level(name, _numbers_of_choices(task)) if chosen[0] in CHOICE_METRICS else chance_level(name),
        samples=int(fields["sample_len"]),
        num_fewshot=int(measured["n-shot"].get(name) or 0),
        metrics={
            _metric_name(key): Metric(value=_finite(value), stderr=_finite(stderr))
            for key, (value, stderr) in metrics.items()
        },
        requests_sha256=_requests_digest(name, measured),
        questions_sha256=digest,
        scores=scores,
    )


def _requests_digest(name: str, measured: Mapping[str, Any]) -> str:
    """Return the digest of what was asked in a task, or in all members of a group."""
    samples = measured["samples"].get(name, ())
    asked: list[Any]
    if samples:
        asked = [(one["arguments"], one["target_hash"]) for one in samples if one["filter"] == samples[0]["filter"]]
    else:
        asked = [_requests_digest(member, measured) for member in sorted(measured["group_subtasks"].get(name, ()))]
    return hashlib.sha256(repr(asked).encode("utf-8", "backslashreplace")).hexdigest()


def _metric_name(key: tuple[str, str]) -> str:
    """Return the name of a metric, with that of the filter where a task has several."""
    return key[0] if key[1] == "none" else ",".join(key)


def _numbers_of_choices(task: Any) -> list[int]:
    """Return the number of choices of each question, for a task in which one of them is right and the rest wrong."""
    if task is None or task.OUTPUT_TYPE != "multiple_choice" or task.config.process_results or task.multiple_target:
        return []
    documents = {instance.doc_id: instance.doc for instance in task.instances}
    return [len(task.doc_to_choice(document)) for document in documents.values()]


def _number(value: Any) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


def _generates(tasks: Iterable[Any]) -> bool:
    return any(task.OUTPUT_TYPE == "generate_until" for task in tasks)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _seed_everything(seed: int) -> None:
    # tasks draw from the global generators
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the bars, logs and prints of lm-eval and datasets out of the output, and datasets from counting loads."""
    original = tqdm.std.tqdm.__init__

    def without_bar(bar: Any, *arguments: Any, **options: Any) -> None:
        original(bar, *arguments, **{**options, "disable": True})

    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    counts_loads = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    had_single_process = os.environ.get("DISABLE_MULTIPROC")
    try:
        tqdm.std.tqdm.__init__ = without_bar
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        # else even a local JSON file makes datasets call its server
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
        # a bootstrap of a thousand samples is not worth a pool of processes that each hold the model
        os.environ["DISABLE_MULTIPROC"] = "1"
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tqdm.std.tqdm.__init__ = original
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts_loads
        if had_single_process is None:
            del os.environ["DISABLE_MULTIPROC"]
