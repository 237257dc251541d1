"""Tasks asked through a chat template, measurements that were interrupted, and results in lm-eval's layout."""

from __future__ import annotations

import json

import pytest
from lm_eval.models.huggingface import HFLM
from test_tasks import load, measured, models, question_file  # noqa: F401

from slicecli.data.demo import MODEL_FOLDER
from slicecli.errors import OutputError, RequestError
from slicecli.evaluation import measure
from slicecli.evaluation.answers import Answers
from slicecli.evaluation.options import EvaluationOptions
from slicecli.evaluation.tasks import load_tasks, measure_tasks, write_lm_eval_results
from slicecli.testing.checkpoints import byte_tokenizer

TEMPLATE = "{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}[assistant]"
GENERATIVE = """
task: copy
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: query
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs:
  max_gen_toks: 4
  until: ["."]
metric_list:
  - metric: exact_match
"""


def chat_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def prompts(monkeypatch):
    """What the model was asked."""
    asked = []
    original = HFLM.loglikelihood

    def record(self, requests, *arguments, **named):
        asked.extend(request.args[0] for request in requests)
        return original(self, requests, *arguments, **named)

    monkeypatch.setattr(HFLM, "loglikelihood", record)
    return asked


def asked_through(models, question_file, prompts, shots=None, **options):  # noqa: F811
    tasks = load_tasks([str(question_file)], num_fewshot=shots)
    measured(load(models["dense"]), chat_tokenizer(), tasks, limit=2, **options)
    return prompts[0]


def test_a_chat_template_stands_around_the_question(models, question_file, prompts):  # noqa: F811
    prompt = asked_through(models, question_file, prompts, apply_chat_template=True, system_instruction="Be brief.")
    assert prompt.startswith("[system]Be brief.[user]")
    assert prompt.endswith("[assistant]")


def test_without_the_option_the_question_is_asked_as_it_is(models, question_file, prompts):  # noqa: F811
    assert "[user]" not in asked_through(models, question_file, prompts)


def test_examples_are_turns_of_the_conversation(models, question_file, prompts):  # noqa: F811
    options = {"apply_chat_template": True, "fewshot_as_multiturn": True}
    prompt = asked_through(models, question_file, prompts, shots=2, **options)
    assert prompt.count("[user]") == 3
    assert prompt.count("[assistant]") == 3


def test_turns_need_a_chat():
    with pytest.raises(RequestError, match="turns"):
        EvaluationOptions(tasks=("demo",), fewshot_as_multiturn=True)


def test_a_template_that_is_not_there_cannot_be_applied(models, question_file):  # noqa: F811
    with pytest.raises(RequestError, match="no chat template"):
        measured(load(models["dense"]), byte_tokenizer(), load_tasks([str(question_file)]), apply_chat_template=True)


class Notes:
    def __init__(self):
        self.said = []

    def note(self, text):
        self.said.append(text)

    def start(self, *_):
        pass

    advance = start


@pytest.fixture
def generative(question_file, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "yaml"
    folder.mkdir()
    (folder / "copy.yaml").write_text(GENERATIVE.format(file=question_file))
    return load_tasks(["copy"], folder)


@pytest.mark.parametrize("applies", [False, True])
def test_generating_without_the_template_of_a_chat_model_is_noticed(models, generative, applies):  # noqa: F811
    notes = Notes()
    measured(load(models["dense"]), chat_tokenizer(), generative, progress=notes, limit=1, apply_chat_template=applies)
    assert any("--apply-chat-template" in said for said in notes.said) is not applies


# interruptions


@pytest.fixture
def calls(monkeypatch):
    """Count the forward passes of the demo model."""
    from transformers import LlamaForCausalLM

    class Calls:
        count, most = 0, None

    original = LlamaForCausalLM.forward

    def forward(*arguments, **named):
        if Calls.count == Calls.most:
            raise KeyboardInterrupt
        Calls.count += 1
        return original(*arguments, **named)

    monkeypatch.setattr(LlamaForCausalLM, "forward", forward)
    return Calls


REQUEST = EvaluationOptions(texts=("demo",), tasks=("demo",), limit=24, sequence_length=64, batch_size=2)


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SLICECLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evaluations"


@pytest.mark.parametrize("share", [0.2, 0.8], ids=["in the text", "in the task"])
def test_an_interrupted_measurement_goes_on(calls, own_cache, share):
    whole = measure.evaluate(str(MODEL_FOLDER), REQUEST)
    needed, calls.count = calls.count, 0
    calls.most = int(share * needed)
    with pytest.raises(KeyboardInterrupt):
        measure.evaluate(str(MODEL_FOLDER), REQUEST)
    calls.most, calls.count = None, 0
    resumed = measure.evaluate(str(MODEL_FOLDER), REQUEST)
    assert calls.count < (1.05 - share) * needed + 2
    assert resumed.perplexity == whole.perplexity
    assert {name: task.value for name, task in resumed.tasks.items()} == {
        name: task.value for name, task in whole.tasks.items()
    }


def test_nothing_is_left_of_a_measurement_that_ended(own_cache):
    measure.evaluate(str(MODEL_FOLDER), EvaluationOptions(texts=("demo",), limit=2, sequence_length=64))
    assert list(own_cache.iterdir()) == []


@pytest.mark.parametrize("change", [{"seed": 7}, {"dtype": "bfloat16"}])
def test_answers_of_other_settings_are_not_used(calls, own_cache, change):
    from dataclasses import replace

    calls.most = 3
    with pytest.raises(KeyboardInterrupt):
        measure.evaluate(str(MODEL_FOLDER), REQUEST)
    calls.most, calls.count = None, 0
    other = replace(REQUEST, **change)
    measure.evaluate(str(MODEL_FOLDER), other)
    used, calls.count = calls.count, 0
    measure.evaluate(str(MODEL_FOLDER), other)
    assert used == calls.count


def test_a_line_that_was_cut_off_is_forgotten(own_cache):
    answers = Answers({"model": "m"})
    answers.add("one", 1.5)
    answers.close()
    (file,) = own_cache.iterdir()
    file.write_text(file.read_text() + '["abc", 2.')
    answers = Answers({"model": "m"})
    answers.add("two", [2.5, True])
    answers.close()
    again = Answers({"model": "m"})
    assert (again.get("one"), again.get("two"), len(again)) == (1.5, [2.5, True], 2)


def test_the_answers_of_interrupted_measurements_can_be_cleared(run, own_cache):
    answers = Answers({"model": "m"})
    answers.add("one", 1.5)
    answers.close()
    assert run("cache", "clear").exit_code == 0
    assert list(own_cache.iterdir()) == []


def test_a_drawn_answer_is_drawn_again(models, generative, own_cache):  # noqa: F811
    answers = Answers({"model": "m"})
    for task in generative[0].loaded["tasks"].values():
        task.config.generation_kwargs |= {"do_sample": True, "temperature": 1.0}
    measured(load(models["dense"]), byte_tokenizer(), generative, answers=answers, limit=2)
    assert len(Answers({"model": "m"})) == 0


# lm-eval's layout


def test_lm_eval_results_are_those_of_its_own_writer(models, question_file, tmp_path):  # noqa: F811
    options = EvaluationOptions(limit=6)
    tasks = load_tasks([str(question_file)])
    found, returned = measure_tasks(load(models["dense"]), byte_tokenizer(), tasks, options)
    path = write_lm_eval_results(tmp_path, "lab/model", returned, None, None, False)
    document = json.loads(path.read_text())
    assert path.parent.name == "lab__model"
    assert document["results"]["mine.jsonl"]["acc_norm,none"] == found[0].value
    assert {"configs", "versions", "n-shot", "n-samples", "higher_is_better", "task_hashes"} <= set(document)


def test_the_command_writes_the_layout(run, tmp_path, monkeypatch):
    words = ("eval", MODEL_FOLDER, "--tasks", "demo", "--limit", "4", "--lm-eval-output", tmp_path / "lm")
    done = run(*words)
    assert done.exit_code == 0, done.output
    (file,) = (tmp_path / "lm").glob("*/results_*.json")
    assert json.loads(file.read_text())["results"]["demo"]["alias"] == "demo"


def test_a_folder_that_cannot_be_written_to_is_said(models, question_file, tmp_path):  # noqa: F811
    _, returned = measure_tasks(
        load(models["dense"]), byte_tokenizer(), load_tasks([str(question_file)]), EvaluationOptions(limit=2)
    )
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="lm-eval"):
        write_lm_eval_results(tmp_path / "file" / "below", "m", returned, None, None, False)


def test_the_layout_is_of_tasks(run, tmp_path):
    done = run("eval", MODEL_FOLDER, "--perplexity", "demo", "--lm-eval-output", tmp_path)
    assert done.exit_code != 0
    assert "--tasks" in done.stderr
