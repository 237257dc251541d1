"""`slicecli eval`: what the document says, comparison with a baseline, and what is refused before measuring."""

from __future__ import annotations

import json
import math
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from test_tasks import models, no_network, write_questions  # noqa: F401

import slicecli.api
from slicecli.checkpoint.loading import load_model
from slicecli.checkpoint.source import Source
from slicecli.errors import RequestError
from slicecli.evaluation.document import EvaluationDocument
from slicecli.evaluation.measure import EvaluationSet, evaluate
from slicecli.evaluation.options import EvaluationOptions
from slicecli.record.record import read_record
from slicecli.testing.checkpoints import byte_tokenizer


@pytest.fixture
def words(text_file, tmp_path):
    """Options that measure a text and a task."""
    questions = write_questions(tmp_path / "mine.jsonl")
    return ["--perplexity", text_file, "--seq-len", "32", "--tasks", questions, "--limit", "20", "--format", "json"]


@pytest.mark.parametrize(
    ("kind", "dim", "method"), [("dense", 48, None), ("stock", 36, "refit"), ("custom-code", 36, "slicegpt")]
)
def test_the_document_says_all_that_identifies_a_point(run, models, words, kind, dim, method, tmp_path):  # noqa: F811
    done = run("eval", models[kind], *words, "-o", tmp_path / "results.json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document == json.loads((tmp_path / "results.json").read_text())
    assert (document["hidden_size"], document["dim"], document["method"]) == (48, dim, method)
    assert document["sparsity"] == 1 - dim / 48
    source = document["source"]
    assert (source["model"], source["commit"]) == ("tiny-llama", None)
    assert source["content"] == Source.find(str(models["dense"])).content
    record = read_record(models[kind]) or {}
    assert document["calibration"] == record.get("calibration")
    loaded = load_model(Source.find(str(models[kind])))
    assert document["parameters"] == sum(parameter.numel() for parameter in loaded.parameters())
    settings = document["evaluation"]
    assert (settings["limit"], settings["num_fewshot"], settings["sequence_length"]) == (20, None, 32)
    assert document["perplexity"]["nonsense.jsonl"]["tokens"] == 20 * 31
    task = document["tasks"]["mine.jsonl"]
    assert (task["metric"], task["samples"], task["num_fewshot"]) == ("acc_norm", 20, 0)
    assert task["metrics"]["acc_norm"] == {"value": task["value"], "stderr": task["stderr"]}
    assert {"slicecli", "torch", "lm_eval"} <= document["versions"].keys()
    for secret in (str(tmp_path), str(models[kind].parent), str(Path.home())):
        assert secret not in done.stdout


def test_a_shared_table_counts_once(run, checkpoints, words):
    document = json.loads(run("eval", checkpoints("llama-tied"), *words).stdout)
    assert document["parameters"] == sum(
        parameter.numel() for parameter in load_model(Source.find(str(checkpoints("llama-tied")))).parameters()
    )


def test_a_baseline_is_measured_as_it_is_alone_and_compared(run, models, words):  # noqa: F811
    alone = {name: json.loads(run("eval", models[name], *words).stdout) for name in ("dense", "stock")}
    both = json.loads(run("eval", models["stock"], *words, "--baseline", models["dense"]).stdout)
    comparison = both.pop("comparison")
    assert {**both.pop("baseline"), "versions": both["versions"]} == alone["dense"]
    assert both == alone["stock"]
    before, after = (alone[name]["perplexity"]["nonsense.jsonl"] for name in ("dense", "stock"))
    change = comparison["perplexity"]["nonsense.jsonl"]
    assert change["ratio"] == pytest.approx(after["value"] / before["value"])
    assert change["ln_ratio"] == pytest.approx(math.log(change["ratio"]))
    assert change["same_rows"] is True
    before, after = (alone[name]["tasks"]["mine.jsonl"] for name in ("dense", "stock"))
    difference = comparison["tasks"]["mine.jsonl"]
    assert difference["difference"] == pytest.approx(after["value"] - before["value"])


def test_a_model_compared_with_itself_differs_in_nothing(run, checkpoints, words):
    document = json.loads(run("eval", checkpoints(), *words, "--baseline", checkpoints()).stdout)
    assert document["comparison"]["perplexity"]["nonsense.jsonl"]["ratio"] == 1
    # question by question there is no difference, so there is no doubt about it either
    assert document["comparison"]["tasks"]["mine.jsonl"] == {"difference": 0, "stderr": 0}


def test_the_error_of_a_difference_is_that_over_questions(checkpoints, models, words):  # noqa: F811
    from slicecli.evaluation.measure import compare

    options = EvaluationOptions(tasks=(str(words[5]),))
    one, other = (evaluate(str(models[name]), options) for name in ("stock", "dense"))
    scores = [measured.tasks["mine.jsonl"].scores for measured in (one, other)]
    differences = [a - b for a, b in zip(*scores, strict=True)]
    assert any(differences)
    expected = float(torch.tensor(differences).std()) / math.sqrt(len(differences))
    assert compare(one, other)["tasks"]["mine.jsonl"]["stderr"] == pytest.approx(expected)


def test_models_with_different_tokenizers_are_said_to_be(run, checkpoints, words, tmp_path):
    other = Path(shutil.copytree(checkpoints(), tmp_path / "other"))
    byte_tokenizer(adds_bos=False).save_pretrained(other)
    document = json.loads(run("eval", checkpoints(), *words, "--baseline", other).stdout)
    assert document["comparison"]["perplexity"]["nonsense.jsonl"]["same_rows"] is False
    shown = run("eval", checkpoints(), *words[:-2], "--baseline", other)
    assert "different tokenizers" in shown.stderr
    assert "bits per byte" in shown.stdout
    assert "acc_norm on mine.jsonl" in shown.stdout


def test_tables_show_both_kinds_and_quiet_is_quiet(run, checkpoints, words):
    shown = run("-q", "eval", checkpoints(), *words[:-2])
    assert shown.exit_code == 0
    for word in ("nonsense.jsonl", "bits per byte", "mine.jsonl", "acc_norm", "chance"):
        assert word in shown.stdout
    assert shown.stderr == ""


def test_what_is_written_is_what_is_read(run, models, words):  # noqa: F811
    document = json.loads(run("eval", models["stock"], *words).stdout)
    assert EvaluationDocument.model_validate(document).model_dump() == {
        name: value for name, value in document.items() if name != "versions"
    }


def test_a_text_of_any_name_is_measured(run, checkpoints, text_file, tmp_path):
    odd = shutil.copy(text_file, tmp_path / "two\nlines\u202e.jsonl")
    document = json.loads(run("eval", checkpoints(), "--perplexity", odd, "--seq-len", "32", "--format", "json").stdout)
    assert list(document["perplexity"]) == ["two?lines?.jsonl"]


def test_with_tasks_alone_no_perplexity_is_measured(run, checkpoints, words, monkeypatch):
    document = json.loads(run("eval", checkpoints(), *words[4:]).stdout)
    assert document["perplexity"] == {}
    assert document["evaluation"]["sequence_length"] is None
    asked = []
    monkeypatch.setattr(
        "slicecli.evaluation.measure.evaluate", lambda _model, options, _progress: asked.append(options)
    )
    run("eval", checkpoints())
    assert (asked[0].texts, asked[0].tasks) == (("wikitext2",), ())


def test_results_are_entered_in_the_record_beside_those_there(run, models, words, tmp_path):  # noqa: F811
    folder = Path(shutil.copytree(models["stock"], tmp_path / "slice"))
    text, task = words[:4], words[4:6]
    for options in (text, task):
        assert run("eval", folder, *options, "--record").exit_code == 0
    results = read_record(folder)["results"]
    assert results["perplexity"].keys() == {"nonsense.jsonl"}
    assert results["tasks"]["mine.jsonl"]["metric"] == "acc_norm"
    assert str(tmp_path) not in (folder / "slicecli.json").read_text()


def test_rows_are_read_once_for_models_that_share_a_tokenizer(models, text_file, monkeypatch):  # noqa: F811
    options = EvaluationOptions(texts=(str(text_file),), sequence_length=32, limit=10)
    source = Source.find(str(models["dense"]))
    prepared = EvaluationSet.prepare(options, source, source.tokenizer())
    alone = evaluate(str(models["stock"]), options)
    monkeypatch.setattr("slicecli.evaluation.measure.read_texts", None)
    assert evaluate(str(models["stock"]), options, prepared=prepared) == alone


def test_the_python_functions_measure_the_same(models, words, text_file):  # noqa: F811
    options = {"limit": 20, "sequence_length": 32}
    found = slicecli.api.evaluate(str(models["stock"]), [str(text_file)], [str(words[5])], **options)
    assert list(found.tasks) == ["mine.jsonl"]
    (alone,) = slicecli.api.perplexities(str(models["stock"]), [str(text_file)], samples=20, sequence_length=32)
    assert [alone] == list(found.perplexity.values())
    assert slicecli.api.perplexity(str(models["stock"]), str(text_file), samples=20, sequence_length=32) == alone


def test_what_cannot_be_measured_is_refused_first(run, checkpoints, words, tmp_path, monkeypatch):
    # no weight is read
    monkeypatch.setattr("slicecli.evaluation.measure.load_model", None)
    for options, code, message in (
        ((*words, "--limit", "0"), 2, "Use 1 or more"),
        ((*words, "--num-fewshot", "-1"), 2, "Use 0 or more"),
        ((*words, "--batch-size", "0"), 2, "Use 1 or more"),
        ((*words, "--include-path", tmp_path / "none"), 2, "no folder"),
        ((*words, "-o", tmp_path / "none" / "x.json"), 1, "x.json"),
        ((*words, "--tasks", tmp_path / "none.jsonl"), 1, "none.jsonl"),
        ((*words, "--baseline", "./missing"), 1, "./missing"),
        ((*words, "--record"), 2, "not the folder of a slice"),
    ):
        done = run("eval", checkpoints(), *options)
        assert done.exit_code == code, done.output
        assert message in done.stderr
        assert done.stdout == ""
    with pytest.raises(RequestError, match="nothing to measure"):
        slicecli.api.evaluate(str(checkpoints()))


def test_a_device_that_is_too_small_is_a_sentence(run, checkpoints, words, monkeypatch):
    def fail(*_arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("slicecli.evaluation.perplexity.measure_perplexity", fail)
    done = run("eval", checkpoints(), *words)
    assert done.exit_code == 2
    assert "--batch-size" in done.stderr


def test_the_commands_of_the_documentation_run(run, models, no_network, tmp_path, monkeypatch):  # noqa: F811
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text()
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)
    for dim in (84, 72, 60):
        shutil.copytree(models["stock"], tmp_path / "slicecli-demo" / f"dim{dim}")
    files = re.findall(r"<!-- (\S+) -->\n```\w+\n(.*?)```", page, flags=re.DOTALL)
    assert [name for name, _ in files] == ["questions.jsonl", "tasks/my_questions.yaml"]
    for name, content in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    commands = re.findall(r"^slicecli (eval .*)$", page, flags=re.MULTILINE)
    assert len(commands) == 5
    for command in commands:
        done = run(*shlex.split(command), *(() if "--limit" in command else ("--limit", "10")))
        assert done.exit_code == 0, done.output
        for name in ("questions.jsonl", "my_questions"):
            assert name not in command or name in done.stdout
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code, {})


def write_long(path, query, choice):
    path.write_text(json.dumps({"query": query, "choices": [choice, "x"], "gold": 0}) + "\n")
    return path


def test_a_choice_that_is_longer_than_the_model_can_do_is_named(run, checkpoints, tmp_path):
    questions = write_long(tmp_path / "long.jsonl", "a", "of a list " * 20)
    done = run("eval", checkpoints(), "--tasks", questions)
    assert done.exit_code == 1
    assert re.search(r"The choice 'of a list .*' has \d+ tokens, above the model's limit of 128", done.stderr)


def test_a_question_whose_beginning_is_cut_off_is_said(run, checkpoints, tmp_path):
    done = run("eval", checkpoints(), "--tasks", write_long(tmp_path / "long.jsonl", "of a list " * 20, "y"))
    assert done.exit_code == 0, done.output
    assert "long.jsonl: 2 requests exceed the model's limit of 128 tokens" in done.stderr
    assert "longer than" not in run("eval", checkpoints(), "--tasks", write_long(tmp_path / "s.jsonl", "a", "y")).stderr


def test_a_token_that_a_slice_with_code_of_its_own_does_not_know(run, models, tmp_path):  # noqa: F811
    """Its config.json has no `vocab_size` at the top."""
    model = shutil.copytree(models["custom-code"], tmp_path / "copy")
    larger = byte_tokenizer()
    larger.add_tokens([f"<{number}>" for number in range(100)] + ["the"])
    larger.save_pretrained(model)
    (tmp_path / "text.txt").write_text("the cat and the dog " * 50)
    done = run("eval", model, "--perplexity", tmp_path / "text.txt", "--seq-len", "32")
    assert done.exit_code == 1
    assert "the model has only 300" in done.stderr
