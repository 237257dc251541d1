"""Texts and tasks of one name: told apart wherever they are shown, joined by what was measured, and no path said."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from pathlib import Path

import pytest
from test_tasks import YAML, models, write_questions  # noqa: F401

from slicecli.data.names import LONGEST_NAME, Named, distinct_names
from slicecli.data.text import read_text, read_texts
from slicecli.errors import RequestError
from slicecli.evaluation.chance import chance_level
from slicecli.evaluation.tasks import load_tasks
from slicecli.record.record import read_record
from slicecli.testing.checkpoints import nonsense_text
from slicecli.testing.slice_tests import SliceUnderTest

# ----------------------------------------------------------------------------------------------------------------------
# the decision


def digest_of(path):
    return hashlib.sha256(ascii(path).encode()).hexdigest()


def names_of(*paths, taken=None):
    return distinct_names([Named.file(Path(path), digest_of(path)) for path in paths], taken)


def by_digest(path):
    return f"{Path(path).name} ({digest_of(path)[:8]})"


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/data/en/t.txt"], ["t.txt"]),
        (["/data/en/t.txt", "/data/de/t.txt"], ["en/t.txt", "de/t.txt"]),
        (["/data/en/t.txt", "/data/de/t.txt", "/data/de/u.txt"], ["en/t.txt", "de/t.txt", "u.txt"]),
        (["/a/en/t.txt", "/b/en/t.txt", "/c/de/t.txt"], ["a/en/t.txt", "b/en/t.txt", "de/t.txt"]),
        (["/a/en/t.txt", "/a/en/../de/t.txt"], ["en/t.txt", "de/t.txt"]),
        (["/t.txt", "/a/t.txt"], [by_digest("/t.txt"), "a/t.txt"]),
    ],
)
def test_a_name_is_the_shortest_end_of_a_path_that_no_other_has(paths, names):
    assert names_of(*paths) == names


def test_whatever_the_paths_names_are_different_and_no_longer_than_they_must_be():
    generator = random.Random(0)
    for _ in range(200):
        some = {"/" + "/".join(generator.choices("abc", k=generator.randint(1, 4))) for _ in range(6)}
        paths = sorted(some)
        found = names_of(*paths)
        assert len(set(found)) == len(found)
        for path, name in zip(paths, found, strict=True):
            if "(" not in name:
                assert path.endswith(f"/{name}")
                shorter = name.partition("/")[2]
                assert not shorter or sum(f"{other}/".endswith(f"/{shorter}/") for other in paths) > 1


def test_a_name_that_another_has_is_not_given_again():
    digest = digest_of("/data/de/t.txt")
    assert names_of("/data/de/t.txt", taken={"t.txt": "f" * 64}) == ["de/t.txt"]
    assert names_of("/data/de/t.txt", taken={"t.txt": "f" * 64, "de/t.txt": "e" * 64}) == ["data/de/t.txt"]
    assert names_of("/data/de/t.txt", taken={"t.txt": digest}) == ["t.txt"]
    assert distinct_names([Named("t.txt", digest)], {"t.txt": "f" * 64}) == [f"t.txt ({digest[:8]})"]
    # what its name identifies is the same wherever it is
    assert distinct_names([Named("wikitext2")], {"wikitext2": None}) == ["wikitext2"]
    with pytest.raises(RequestError, match="'demo'"):
        distinct_names([Named("demo")], {"demo": digest})


def test_a_name_does_not_say_whose_the_file_is(monkeypatch):
    monkeypatch.setattr("getpass.getuser", lambda: "alice")
    monkeypatch.setenv("HOME", "/srv/people/al")
    for one, other in (
        ("/home/bob/t.txt", "/home/eve/t.txt"),
        ("/srv/people/al/t.txt", "/srv/people/t.txt"),
        ("/data/alice/t.txt", "/data/x/t.txt"),
    ):
        assert names_of(one, other)[0] == by_digest(one)
    assert names_of("/data/alice/en/t.txt", "/srv/people/al/de/t.txt") == ["en/t.txt", "de/t.txt"]


def test_names_fit_a_record_whatever_the_files_are_called():
    long, odd = "x" * 250 + ".txt", "a\nb\u202e\udcff.txt"
    for name in (long, odd):
        for found in names_of(f"/one/{name}", f"/two/{name}"):
            assert found.isprintable()
            assert len(found) <= LONGEST_NAME
    assert names_of(f"/one/{odd}", f"/two/{odd}") == ["one/a?b??.txt", "two/a?b??.txt"]


def test_several_paths_of_one_file_are_one_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nonsense_text(tmp_path / "t.jsonl", documents=3)
    (tmp_path / "link.jsonl").symlink_to("t.jsonl")
    os.link("t.jsonl", "hard.jsonl")
    (tmp_path / "folder").mkdir()
    spellings = ["t.jsonl", "./t.jsonl", "folder/../t.jsonl", str(tmp_path / "t.jsonl"), "link.jsonl", "hard.jsonl"]
    assert [text.name for text in read_texts(spellings, "evaluation")] == ["t.jsonl"]
    assert [text.name for text in read_texts(spellings[::-1], "evaluation")] == ["hard.jsonl"]
    assert [text.name for text in read_texts(["demo", "demo"], "evaluation")] == ["demo"]
    # read in another way it is another text
    (tmp_path / "link.txt").symlink_to("t.jsonl")
    one, other = read_texts(["t.jsonl", "link.txt"], "evaluation")
    assert one.digest != other.digest
    write_questions(tmp_path / "q.jsonl", count=3)
    assert [task.name for task in load_tasks(["q.jsonl", "./q.jsonl", str(tmp_path / "q.jsonl")])] == ["q.jsonl"]


def test_copies_of_a_file_are_two_texts(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        nonsense_text(tmp_path / folder / "t.jsonl", documents=3)
    one, other = read_texts([str(tmp_path / name / "t.jsonl") for name in ("one", "two")], "evaluation")
    assert (one.name, other.name) == ("one/t.jsonl", "two/t.jsonl")
    assert one.digest == other.digest


def test_a_known_name_stands_for_what_it_always_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("wikitext2", "demo"):
        (tmp_path / name).write_text("mine")
    asked = []
    monkeypatch.setattr(
        "slicecli.data.text._read_hub", lambda name, *_rest: asked.append(name) or read_text("demo", "evaluation")
    )
    read_text("wikitext2", "evaluation")
    assert asked == ["wikitext2"]
    assert read_text("demo", "evaluation").documents != ("mine",)


def test_a_file_called_like_a_known_task_has_the_chance_of_its_questions(tmp_path, run, checkpoints):
    names = ("piqa.jsonl", "mmlu_mine.jsonl", "blimp_mine.jsonl")
    for name in names:
        assert chance_level(name) is None
        (tmp_path / name).write_text('{"query": "q", "choices": ["a", "b", "c", "d", "e"], "gold": 0}\n')
    tasks = ",".join(str(tmp_path / name) for name in names)
    document = json.loads(run("eval", checkpoints(), "--tasks", tasks, "--format", "json").stdout)
    assert [document["tasks"][name]["chance"] for name in names] == [pytest.approx(0.2)] * 3


def test_tasks_of_the_user_that_share_a_name_are_told_apart_or_refused(tmp_path, own_defaults):
    questions, folder = write_questions(tmp_path / "q.jsonl", count=3), tmp_path / "yaml"
    folder.mkdir()
    for file, name in (("a", "q.jsonl"), ("b", "demo"), ("c", "twice"), ("d", "twice")):
        (folder / f"{file}.yaml").write_text(YAML.format(name=name, file=questions))
    (folder / "group.yaml").write_text("group: pair\ntask: [q.jsonl, demo]\n")
    found = load_tasks(["q.json*", str(questions)], folder)
    assert [task.name for task in found] == ["q.json*", f"{tmp_path.name}/q.jsonl"]
    with pytest.raises(RequestError, match="named 'demo'"):
        load_tasks(["pair", "demo"], folder)
    with pytest.raises(RequestError, match=r"Two files define the task 'twice': c.yaml and d.yaml"):
        load_tasks(["tw*"], folder)


# ----------------------------------------------------------------------------------------------------------------------
# measuring, recording, fitting

LANGUAGES = ("en", "de")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder for each of two languages, with a text and questions of the same names."""
    folder = tmp_path_factory.mktemp("languages")
    for seed, language in enumerate(LANGUAGES, start=1):
        (folder / language).mkdir()
        nonsense_text(folder / language / "t.jsonl", documents=40, seed=seed)
        write_questions(folder / language / "q.jsonl", count=12, seed=seed)
    return folder


@pytest.fixture
def measure(run, files):
    """Run `eval` on texts and questions of some languages and return its document."""

    def call(model, languages, *more, limit=6):
        words = [f"--perplexity={files / language / 't.jsonl'}" for language in languages]
        words += ["--tasks", ",".join(str(files / language / "q.jsonl") for language in languages)]
        done = run("-q", "eval", model, *words, "--seq-len", "32", "--limit", str(limit), "--format", "json", *more)
        assert done.exit_code == 0, done.output
        call.warnings = done.stderr
        assert str(files) not in done.stdout
        return json.loads(done.stdout)

    return call


@pytest.fixture
def one_slice(models, tmp_path):  # noqa: F811
    return Path(shutil.copytree(models["stock"], tmp_path / "slice"))


def figures(document):
    """Return all figures of a document by kind and name."""
    return {
        (kind, name): (figure["value"], figure.get("rows_sha256") or figure.get("requests_sha256"))
        for kind in ("perplexity", "tasks")
        for name, figure in (document.get(kind) or {}).items()
    }


def alone(measure, model, language, limit=6):
    """Return the figures on one language measured alone, by kind."""
    return {kind: figure for (kind, _), figure in figures(measure(model, [language], limit=limit)).items()}


def test_texts_and_tasks_of_one_name_are_measured_as_they_are_alone(measure, models):  # noqa: F811
    both = measure(models["stock"], LANGUAGES, "--baseline", models["dense"])
    for model, document in (("stock", both), ("dense", both["baseline"])):
        expected = {
            (kind, f"{language}/{'t' if kind == 'perplexity' else 'q'}.jsonl"): figure
            for language in LANGUAGES
            for kind, figure in alone(measure, models[model], language).items()
        }
        assert figures(document) == expected
    assert len(set(figures(both).values())) == 4
    assert list(both["evaluation"]["rows"]) == ["en/t.jsonl", "de/t.jsonl"]
    for kind, name in figures(both):
        change = both["comparison"][kind][name]
        one, other = both[kind][name]["value"], both["baseline"][kind][name]["value"]
        assert change == {
            **change,
            **({"ratio": pytest.approx(one / other)} if kind == "perplexity" else {"difference": one - other}),
        }


def test_the_table_has_a_line_for_each_with_its_own_baseline(run, files, models):  # noqa: F811
    words = [f"--perplexity={files / language / 't.jsonl'}" for language in LANGUAGES]
    words += ["--seq-len", "32", "--limit", "6", "--baseline", models["dense"]]
    done = run("-q", "eval", models["stock"], *words)
    document = json.loads(run("-q", "eval", models["stock"], *words, "--format", "json").stdout)
    for name in ("en/t.jsonl", "de/t.jsonl"):
        (line,) = [line for line in done.stdout.splitlines() if name in line]
        for measured in (document["baseline"], document):
            assert f"{measured['perplexity'][name]['value']:.3f}" in line


def test_record_card_and_curve_have_both(run, measure, models, one_slice, files):  # noqa: F811
    document = measure(one_slice, LANGUAGES, "--baseline", models["dense"], "--record")
    record = read_record(one_slice)
    assert figures(record["results"]) == figures(document)
    assert figures(record["results"]["dense"]) == figures(document["baseline"])
    curves = {
        ("perplexity" if one["quantity"] == "perplexity" else "tasks", one["evaluation"]): one["points"][0]["value"]
        for one in record["curve"]["curves"]
    }
    assert curves == {key: pytest.approx(value) for key, (value, _) in figures(document).items()}
    card = (one_slice / "README.md").read_text()
    for name in ("en/t.jsonl", "de/t.jsonl", "en/q.jsonl", "de/q.jsonl"):
        assert f"name: {name}" in card
        assert f"| `{name}` (" in card
        assert f" on `{name}`**" in card
        # the Hub would take a type with a slash for somebody's dataset
        assert f"type: {name}" not in card
    for text in (card, (one_slice / "slicecli.json").read_text()):
        assert str(files) not in text
    done = run("verify", one_slice)
    assert done.exit_code == 0, done.output


def test_another_file_of_a_recorded_name_is_recorded_beside_it(measure, models, one_slice):  # noqa: F811
    known = {"en": ("t.jsonl", "q.jsonl"), "de": ("de/t.jsonl", "de/q.jsonl")}
    for languages in (["en"], ["en", "de"]):
        own = measure(one_slice, languages[-1:], "--record")
        assert set(figures(own)) == set(zip(("perplexity", "tasks"), known[languages[-1]], strict=True))
        recorded = figures(read_record(one_slice)["results"])
        assert recorded == {
            (kind, name): figure
            for language in languages
            for name, (kind, figure) in zip(
                known[language], alone(measure, models["stock"], language).items(), strict=True
            )
        }
    # and the dense model's figure is that of the text beside which it stands
    measure(one_slice, ["de"], "--baseline", models["dense"], "--record")
    dense = read_record(one_slice)["results"]["dense"]
    assert list(figures(dense).values()) == list(alone(measure, models["dense"], "de").values())
    assert set(figures(dense)) == set(zip(("perplexity", "tasks"), known["de"], strict=True))


def test_a_text_recorded_by_one_name_is_known_by_another(measure, one_slice):
    measure(one_slice, ["en"], "--record")
    first = read_record(one_slice)["results"]
    both = measure(one_slice, LANGUAGES, "--record")
    assert figures(read_record(one_slice)["results"]) == figures(both)
    assert first["perplexity"]["t.jsonl"] == both["perplexity"]["en/t.jsonl"]
    measure(one_slice, ["de"], "--record")
    assert figures(read_record(one_slice)["results"]) == figures(both)


def test_a_dense_figure_of_other_rows_does_not_stay_beside_the_slice_s(measure, models, one_slice):  # noqa: F811
    measure(one_slice, LANGUAGES, "--baseline", models["dense"], "--record")
    before = read_record(one_slice)["results"]["dense"]
    measure(one_slice, ["en"], "--record")
    assert measure.warnings == ""
    assert read_record(one_slice)["results"]["dense"] == before
    measure(one_slice, ["en"], "--record", limit=3)
    for what, name in (("rows", "en/t.jsonl"), ("questions", "en/q.jsonl")):
        assert f"The recorded figure on {name} was measured on different {what}" in measure.warnings
        assert f"dense model's figure on {name} was measured on different {what}" in measure.warnings
    results = read_record(one_slice)["results"]
    assert results["perplexity"]["en/t.jsonl"]["tokens"] == 3 * 31
    assert set(figures(results["dense"])) == {("perplexity", "de/t.jsonl"), ("tasks", "de/q.jsonl")}


def test_a_text_called_like_the_calibration_text_is_told_from_it(run, measure, files, checkpoints, tmp_path):
    folder, text = tmp_path / "slice", tmp_path / "train" / "t.jsonl"
    text.parent.mkdir()
    nonsense_text(text, seed=9)
    words = ["--calibration", text, "--samples", "24", "--seq-len", "32"]
    assert run("slice", checkpoints(), "--dim", "36", "-o", folder, *words).exit_code == 0
    document = measure(folder, ["en"], "--record")
    assert list(document["perplexity"]) == ["en/t.jsonl"]
    assert document["calibration"]["text"] == "t.jsonl"
    assert "on the text it was calibrated on" not in (folder / "README.md").read_text()
    done = run("-q", "eval", folder, "--perplexity", text, "--seq-len", "32", "--limit", "6", "--record")
    assert done.exit_code == 0, done.output
    assert list(read_record(folder)["results"]["perplexity"]) == ["en/t.jsonl", "t.jsonl"]
    (line,) = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("| `t.jsonl`")]
    assert "on the text it was calibrated on" in line


def test_results_of_several_files_are_joined_by_what_was_measured(run, measure, models, one_slice, tmp_path):  # noqa: F811
    documents = {}
    for language in LANGUAGES:
        for name, model in (("dense", models["dense"]), ("slice", one_slice)):
            path = tmp_path / f"{name}-{language}.json"
            documents[name, language] = measure(model, [language], "-o", path)
    done = run("fit", *tmp_path.glob("*.json"), "--format", "json")
    assert done.exit_code == 0, done.output
    curves = json.loads(done.stdout)["curves"]
    found = sorted((one["quantity"], one["dense"], one["points"][0]["value"]) for one in curves)
    assert found == [
        (quantity, pytest.approx(dense), pytest.approx(own))
        for quantity, dense, own in sorted(
            (quantity, *(documents[model, language][kind][name]["value"] for model in ("dense", "slice")))
            for language in LANGUAGES
            for quantity, kind, name in (("perplexity", "perplexity", "t.jsonl"), ("accuracy", "tasks", "q.jsonl"))
        )
    ]
    assert len({(one["quantity"], one["evaluation"]) for one in curves}) == 4
    mixed = run("fit", tmp_path / "dense-de.json", tmp_path / "slice-en.json")
    assert mixed.exit_code == 2
    assert "but not the dense model" in mixed.stderr
    # a curve gets the name that its text has in the record
    measure(one_slice, LANGUAGES, "--record")
    (tmp_path / "curves.json").write_text(done.stdout)
    assert run("card", one_slice, "--curve", tmp_path / "curves.json").exit_code == 0
    record = read_record(one_slice)
    for one in record["curve"]["curves"]:
        kind = "perplexity" if one["quantity"] == "perplexity" else "tasks"
        assert one["points"][0]["value"] == pytest.approx(record["results"][kind][one["evaluation"]]["value"])


def test_a_dense_model_asked_other_questions_is_said_to_be(run, measure, models, tmp_path):  # noqa: F811
    for name, more in (("dense", ()), ("stock", ("--seed", "7"))):
        measure(models[name], ["en"], "--num-fewshot", "1", *more, "-o", tmp_path / f"{name}.json")
    done = run("fit", tmp_path / "dense.json", tmp_path / "stock.json")
    assert done.exit_code == 2
    assert "different questions of q.jsonl" in done.stderr


def test_slices_calibrated_on_texts_of_one_name_are_two_series(run, measure, files, checkpoints, tmp_path):
    results = [tmp_path / "dense.json"]
    measure(checkpoints(), ["en"], "-o", results[0])
    for language in LANGUAGES:
        words = ["--calibration", files / language / "t.jsonl", "--samples", "24", "--seq-len", "32"]
        assert run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / language, *words).exit_code == 0
        results.append(tmp_path / f"{language}.json")
        measure(tmp_path / language, ["en"], "-o", results[-1])
    curves = json.loads(run("fit", *results, "--format", "json").stdout)["curves"]
    of_text = [one for one in curves if one["quantity"] == "perplexity"]
    assert len({one["calibration"] for one in of_text}) == len(of_text) == 2


def test_a_sweep_tells_them_apart_and_goes_on_by_other_paths(run, files, checkpoints, tmp_path, monkeypatch):
    words = [
        "-q",
        "sweep",
        checkpoints(),
        "--calibration",
        files / "de" / "t.jsonl",
        "--samples",
        "24",
        "--seq-len",
        "32",
    ]
    words += ["--dims", "36", "--limit", "6", "-o", tmp_path / "sweep", "--keep-slices", "--format", "json"]
    texts = [f"--perplexity={files / language / 't.jsonl'}" for language in LANGUAGES]
    done = run(*words, *texts, "--tasks", ",".join(str(files / language / "q.jsonl") for language in LANGUAGES))
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    for one in (document["dense"], document["points"][0], read_record(tmp_path / "sweep/slices/dim36")["results"]):
        assert list(one["perplexity"]) == ["en/t.jsonl", "de/t.jsonl"]
        assert list(one["tasks"]) == ["en/q.jsonl", "de/q.jsonl"]
    assert [one["evaluation"] for one in document["curves"]] == ["en/t.jsonl", "de/t.jsonl", "en/q.jsonl", "de/q.jsonl"]
    monkeypatch.chdir(files)
    again = run(
        *words, "--perplexity=en/t.jsonl", "--perplexity=./de/t.jsonl", "--tasks", "de/../en/q.jsonl,de/q.jsonl"
    )
    assert again.exit_code == 0, again.output
    assert json.loads(again.stdout) == document


def test_the_gate_measures_on_the_text_that_was_recorded(measure, one_slice, files):
    measure(one_slice, LANGUAGES, "--record")
    recorded = read_record(one_slice)["results"]["perplexity"]
    for language in LANGUAGES:
        found, limit = SliceUnderTest.find(str(one_slice), text=str(files / language / "t.jsonl")).perplexity()
        assert found.value == pytest.approx(recorded[f"{language}/t.jsonl"]["value"])
        assert limit == pytest.approx(1.02 * found.value)


def test_the_gate_does_not_take_another_text_of_a_recorded_name(measure, one_slice, files):
    measure(one_slice, ["en"], "--record")
    assert list(read_record(one_slice)["results"]["perplexity"]) == ["t.jsonl"]
    with pytest.raises(pytest.fail.Exception, match=r"no perplexity on .*de/t.jsonl"):
        SliceUnderTest.find(str(one_slice), text=str(files / "de" / "t.jsonl")).perplexity()
