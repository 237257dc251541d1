"""Tasks against an independent computation, offline, and what is refused."""

from __future__ import annotations

import json
import random
import socket

import pytest
import torch
import transformers
from click.testing import CliRunner

from slicecli.checkpoint.source import Source
from slicecli.data.demo import MODEL_FOLDER
from slicecli.data.demo.questions import questions as demo_questions
from slicecli.data.questions import Question, read_questions
from slicecli.errors import RequestError, SourceError, TextError, WeightsError
from slicecli.evaluation.answers import NO_ANSWERS
from slicecli.evaluation.chance import chance_level
from slicecli.evaluation.options import EvaluationOptions
from slicecli.evaluation.tasks import load_tasks, measure_tasks
from slicecli.testing.checkpoints import WORDS, byte_tokenizer

YAML = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{query}}}}"
doc_to_choice: choices
doc_to_target: gold
target_delimiter: " "
metric_list:
  - metric: acc
"""


def write_questions(path, count=24, seed=0):
    """Questions of random words with two to four choices of different lengths."""
    generator = random.Random(seed)
    lines = []
    for _ in range(count):
        texts = [" ".join(generator.choices(WORDS.split(), k=generator.randint(1, 5))) for _ in range(5)]
        choices = texts[: generator.randint(2, 4)]
        lines.append(json.dumps({"query": texts[4], "choices": choices, "gold": generator.randrange(len(choices))}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def question_file(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "mine.jsonl")


@pytest.fixture(scope="module")
def models(tmp_path_factory, checkpoints, text_file):
    """Folders of a model, a stock slice and one with code of its own."""
    from slicecli.cli import group

    parent, made = tmp_path_factory.mktemp("slices"), {"dense": checkpoints()}
    for name, method in (("stock", "refit"), ("custom-code", "slicegpt")):
        made[name] = parent / name
        words = ["slice", checkpoints(), "--dim", "36", "--method", method, "--calibration", text_file]
        words += ["--samples", "24", "--seq-len", "32", "-o", made[name]]
        done = CliRunner().invoke(group, [str(word) for word in words], prog_name="slicecli")
        assert done.exit_code == 0, done.output
    return made


def measured(model, tokenizer, tasks, answers=NO_ANSWERS, progress=None, **options):
    found, _ = measure_tasks(model, tokenizer, tasks, EvaluationOptions(**options), progress, answers=answers)
    return found


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder).eval()


def scores_by_hand(model, tokenizer, path):
    """The two accuracies of every question, from summed log-probabilities of one choice at a time."""
    plain, normed = [], []
    for line in path.read_text().splitlines():
        question = json.loads(line)
        start = len(tokenizer(question["query"])["input_ids"])
        sums = []
        for choice in question["choices"]:
            ids = torch.tensor([tokenizer(f"{question['query']} {choice}")["input_ids"]])
            with torch.no_grad():
                log_probabilities = model(ids).logits[0].log_softmax(-1)
            sums.append(sum(float(log_probabilities[at - 1, ids[0, at]]) for at in range(start, ids.shape[1])))
        best = max(range(len(sums)), key=sums.__getitem__)
        by_length = [total / len(choice) for total, choice in zip(sums, question["choices"], strict=True)]
        plain.append(float(best == question["gold"]))
        normed.append(float(max(range(len(sums)), key=by_length.__getitem__) == question["gold"]))
    return plain, normed


@pytest.mark.parametrize("kind", ["dense", "stock", "custom-code"])
def test_accuracy_is_that_of_summed_log_probabilities(models, question_file, kind):
    model, tokenizer = load(models[kind]), Source.find(str(models[kind])).tokenizer()
    (found,) = measured(model, tokenizer, load_tasks([str(question_file)]))
    plain, normed = scores_by_hand(model, tokenizer, question_file)
    assert plain != normed
    assert (found.task, found.metric, found.samples, found.num_fewshot) == ("mine.jsonl", "acc_norm", 24, 0)
    assert list(found.scores) == normed
    assert found.metrics["acc"].value == pytest.approx(sum(plain) / 24)
    assert found.value == pytest.approx(sum(normed) / 24)
    assert found.stderr == pytest.approx((found.value * (1 - found.value) / 23) ** 0.5)
    choices = [len(json.loads(line)["choices"]) for line in question_file.read_text().splitlines()]
    assert found.chance == pytest.approx(sum(1 / count for count in choices) / 24)
    assert len(set(choices)) == 3


def test_neither_the_batch_size_nor_the_company_of_other_tasks_matters(models, question_file, tmp_path):
    model, tokenizer = load(models["dense"]), byte_tokenizer()
    other = write_questions(tmp_path / "other.jsonl", seed=1)
    both = load_tasks([str(question_file), str(other)])
    results = [measured(model, tokenizer, both, batch_size=size) for size in (1, 7, None)]
    assert results[0] == results[1] == results[2]
    assert [result.scores for result in results[0]] == [result.scores for result in results[2]]
    assert measured(model, tokenizer, both[1:]) == results[0][1:]
    assert tokenizer.pad_token is None


def test_a_limit_takes_the_first_questions(models, question_file):
    model, tokenizer, tasks = load(models["dense"]), byte_tokenizer(), load_tasks([str(question_file)])
    whole, part = (measured(model, tokenizer, tasks, limit=limit)[0] for limit in (None, 5))
    assert (part.samples, part.scores) == (5, whole.scores[:5])


def test_examples_are_solved_questions_other_than_the_one_asked(models, question_file):
    model, tokenizer = load(models["dense"]), byte_tokenizer()
    questions = read_questions(question_file)
    prompts = {}
    for seed in (1, 1, 2):
        (task,) = load_tasks([str(question_file)], num_fewshot=2)
        (found,) = measured(model, tokenizer, [task], limit=6, seed=seed)
        assert found.num_fewshot == 2
        asked = [instance.args[0] for instance in task.loaded["tasks"]["mine.jsonl"].instances if instance.idx == 0]
        assert prompts.setdefault(seed, asked) == asked
    assert prompts[1] != prompts[2]
    solved = {question.prompt + question.choices[question.gold]: question for question in questions}
    for question, prompt in zip(questions, prompts[1], strict=False):
        first, second, last = prompt.split("\n\n")
        assert last == question.prompt
        assert question not in (solved[first], solved[second])


def test_more_examples_than_there_are_questions_are_refused(models, tmp_path):
    tasks = load_tasks([str(write_questions(tmp_path / "few.jsonl", count=3))], num_fewshot=3)
    with pytest.raises(TextError, match=r"'few.jsonl' cannot be measured"):
        measured(load(models["dense"]), byte_tokenizer(), tasks)


@pytest.mark.parametrize(
    ("query", "choices", "prompt"),
    [
        ("Two is", ("even", "odd"), "Two is "),
        ("Q: two?\nA:", ("even", "odd"), "Q: two?\nA: "),
        ("Two is\n", ("even", "odd"), "Two is\n"),
        ("Two is", (" even", " odd"), "Two is"),
        ("", ("Two is even.", "Two is odd."), ""),
        (" ", ("Two is even.", "Two is odd."), ""),
    ],
)
def test_query_and_choice_are_joined_by_one_space_unless_they_bring_it(query, choices, prompt):
    assert Question(query, choices, 0).prompt == prompt


def test_whole_texts_are_compared_where_the_query_is_empty(models, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"query": "", "choices": ["the stream reads", "a wide norm and a basis"], "gold": 1}))
    model, tokenizer = load(models["dense"]), byte_tokenizer()
    (found,) = measured(model, tokenizer, load_tasks([str(path)]))
    sums = []
    for text in json.loads(path.read_text())["choices"]:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            sums.append(-float(model(ids, labels=ids).loss) * (ids.shape[1] - 1))
    assert (found.metric, found.value) == ("acc", float(sums[1] > sums[0]))
    assert found.metrics.keys() == {"acc"}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        ('{"choices": ["a", "b"], "gold": 0}', "`query`"),
        ('{"query": "q", "choices": ["a"], "gold": 0}', "two or more"),
        ('{"query": "q", "choices": ["a", " "], "gold": 0}', "is empty"),
        ('{"query": "q", "choices": ["a", 2], "gold": 0}', "not a string"),
        ('{"query": "q", "choices": ["a", "b"], "gold": 2}', "0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": -1}', "0 to 1"),
        ('{"query": "q", "choices": ["a", "b"], "gold": true}', "0 to 1"),
        ('{"query": "q", "choices": ["a", "b"]}', "`gold`"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path, line, fault):
    path = tmp_path / "mine.jsonl"
    path.write_text('{"query": "q", "choices": ["a\\u2028", "b"], "gold": 0}\n\n' + line + "\n", encoding="utf-8")
    with pytest.raises(TextError, match=r"Line 3 of 'mine.jsonl'") as refusal:
        read_questions(path)
    assert fault in refusal.value.cause


def test_files_without_questions_are_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    for name, message in (("empty", "no questions"), ("bad", "not UTF-8"), ("missing", "no question file")):
        with pytest.raises(TextError, match=message):
            load_tasks([str(tmp_path / f"{name}.jsonl")])


@pytest.fixture
def no_network(monkeypatch):
    """Fails the test if anything asks the network, even where the answer would not be missed."""
    asked = []

    def refuse(*arguments, **_options):
        asked.append(arguments)
        raise OSError("there is no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert asked == []


def test_yaml_tasks_of_the_user_measure_the_same_without_network(
    models, question_file, tmp_path, no_network, own_defaults, monkeypatch
):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    # lm-eval's own tasks would be found, and are not looked at
    (own_defaults / "mine.yaml").write_text("task: mine\ndataset_path: owner/nowhere\n")
    folder = tmp_path / "yaml"
    folder.mkdir()
    for name in ("mine", "mine_too"):
        (folder / f"{name}.yaml").write_text(YAML.format(name=name, file=question_file))
    model, tokenizer = load(models["dense"]), byte_tokenizer()
    (file,) = measured(model, tokenizer, load_tasks([str(question_file)]))
    (found,) = measured(model, tokenizer, load_tasks(["mine"], folder))
    assert (found.task, found.metric) == ("mine", "acc")
    assert found.metrics["acc"] == file.metrics["acc"]
    assert found.chance == file.chance
    assert [result.task for result in measured(model, tokenizer, load_tasks(["mine*"], folder), limit=2)] == [
        "mine",
        "mine_too",
    ]


def test_a_group_is_reported_with_its_members(models, question_file, tmp_path, own_defaults, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    other = write_questions(tmp_path / "other.jsonl", count=6, seed=3)
    (own_defaults / "one.yaml").write_text(YAML.format(name="one", file=question_file))
    (own_defaults / "two.yaml").write_text(YAML.format(name="two", file=other))
    folder = tmp_path / "yaml"
    folder.mkdir()
    group = "group: pair\ntask: [one, two]\naggregate_metric_list:\n  - metric: acc\n    weight_by_size: true\n"
    (folder / "pair.yaml").write_text(group)
    results = {
        result.task: result
        for result in measured(load(models["dense"]), byte_tokenizer(), load_tasks(["pair"], folder))
    }
    assert results.keys() == {"pair", "one", "two"}
    assert results["pair"].samples == 30
    assert results["pair"].value == pytest.approx((24 * results["one"].value + 6 * results["two"].value) / 30)
    assert results["pair"].chance is None


def test_an_unknown_task_is_refused_with_its_neighbours(own_defaults, question_file):
    (own_defaults / "one.yaml").write_text(YAML.format(name="arc_easy", file=question_file))
    with pytest.raises(RequestError, match=r"no task 'arc_esay'.*arc_easy"):
        load_tasks(["arc_esay"])


def test_data_that_cannot_be_had_are_a_sentence(own_defaults, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (own_defaults / "one.yaml").write_text("task: far\ndataset_path: owner/nowhere\n")
    (own_defaults / "two.yaml").write_text(YAML.format(name="lost", file=tmp_path / "missing.jsonl"))
    for name in ("far", "lost"):
        with pytest.raises(TextError, match=f"'{name}' cannot be loaded") as refusal:
            load_tasks([name])
        assert "\n" not in str(refusal.value)


def test_bad_numbers_are_refused_not_ranked(models, question_file):
    model, tasks = load(models["dense"]), load_tasks([str(question_file)])
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(WeightsError, match="NaN"):
        measured(model, byte_tokenizer(), tasks)
    model = load(models["dense"])
    model.resize_token_embeddings(60)
    with pytest.raises(SourceError, match="the model has only"):
        measured(model, byte_tokenizer(), tasks)


def test_the_embedded_model_knows_more_than_chance_of_the_demo_s_questions():
    questions = demo_questions()
    assert 200 <= len(questions) <= 300
    assert {question.gold for question in questions} == {0, 1, 2, 3}
    assert questions == demo_questions()
    source = Source.find(str(MODEL_FOLDER))
    model = transformers.AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32)
    (found,) = measured(model, source.tokenizer(), load_tasks(["demo"]), limit=120)
    assert found.chance == 0.25
    assert found.value > 0.25 + 2.5 * found.stderr


def test_chance_is_known_by_every_spelling():
    for names, level in (
        (("piqa", "PIQA", "winogrande", "WinoGrande", "BoolQ", "copa", "blimp", "blimp_wh_island"), 0.5),
        (("arc_easy", "ARC-e", "ARC-c", "arc_challenge", "HellaSwag", "mmlu", "MMLU", "mmlu_anatomy", "sciq"), 0.25),
        (("social_iqa", "cb"), 1 / 3),
        (("commonsense_qa",), 0.2),
        (("lambada_openai", "gsm8k", "nq_open"), 0),
        (("truthfulqa_mc1", "mmlu_pro", "mine"), None),
    ):
        assert [chance_level(name) for name in names] == [level] * len(names)
    assert chance_level("mine", [2, 4, 4]) == pytest.approx(1 / 3)
    assert chance_level("piqa", [3]) == 0.5
