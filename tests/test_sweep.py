"""`slicecli sweep`: many dims of one model, stopped and gone on with, fitted and drawn."""

from __future__ import annotations

import json
import shutil

import pytest

from slicecli.evaluation import measure
from slicecli.evaluation.options import EvaluationOptions
from slicecli.family.slice_plan import Width
from slicecli.jobs import run as engine
from slicecli.jobs import sweep
from slicecli.jobs.options import SliceOptions
from slicecli.jobs.sweep import PLOT_FILE, RESULTS_FILE, run_sweep
from slicecli.runtime import placement

pytestmark = pytest.mark.slow

DIMS = "44,36,24"


@pytest.fixture
def words(checkpoints, text_file, slice_words):
    return ["-q", "sweep", checkpoints(), "--perplexity", text_file, "--limit", "6", *slice_words]


@pytest.fixture(scope="module")
def whole(checkpoints, text_file, tmp_path_factory):
    """The folder of a sweep over all dims that nothing stopped."""
    from click.testing import CliRunner

    from slicecli.cli import group

    output = tmp_path_factory.mktemp("sweeps") / "whole"
    words = ["-q", "sweep", checkpoints(), "--perplexity", text_file, "--limit", "6", "--calibration", text_file]
    words += ["--samples", "24", "--seq-len", "32", "--dims", DIMS, "-o", output]
    done = CliRunner().invoke(group, [str(word) for word in words], prog_name="slicecli")
    assert done.exit_code == 0, done.output
    return output


@pytest.fixture
def counted(monkeypatch, tmp_path_factory):
    """Count what a sweep does, with no statistics kept from before."""
    monkeypatch.setenv("SLICECLI_CACHE", str(tmp_path_factory.mktemp("empty")))
    counts = {"statistics": 0, "refits": 0, "measured": []}
    from slicecli.slicing import refit as pipeline

    collect, refit, evaluate = pipeline.collect_statistics, pipeline.refit, measure.evaluate

    def counting_collect(*arguments):
        counts["statistics"] += 1
        return collect(*arguments)

    def counting_refit(*arguments):
        counts["refits"] += 1
        return refit(*arguments)

    def counting_evaluate(source, *arguments):
        counts["measured"].append(source.folder.name)
        return evaluate(source, *arguments)

    monkeypatch.setattr(pipeline, "collect_statistics", counting_collect)
    monkeypatch.setattr(pipeline, "refit", counting_refit)
    monkeypatch.setattr(measure, "evaluate", counting_evaluate)
    return counts


def results_of(folder):
    return json.loads((folder / RESULTS_FILE).read_text())


def test_a_sweep_measures_all_dims_after_one_pass_each(run, words, counted, tmp_path):
    output = tmp_path / "sweep"
    result = run(*words, "--dims", DIMS, "-o", output, "--format", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == results_of(output)
    assert counted == {"statistics": 1, "refits": 1, "measured": ["tiny-llama", "dim44", "dim36", "dim24"]}
    assert [point["dim"] for point in document["points"]] == [44, 36, 24]
    assert document["dense"]["dim"] == document["hidden_size"] == 48
    for point in document["points"]:
        assert point["sparsity"] == pytest.approx(1 - point["dim"] / 48)
        assert point["calibration"]["samples"] == 24
        assert 0 < point["energy_kept"] <= 1
    curve = document["curve"]
    assert curve["loo_error"] is not None
    assert curve["valid_sparsity"] == pytest.approx([1 - 44 / 48, 1 - 24 / 48])
    assert (output / PLOT_FILE).read_bytes().startswith(b"\x89PNG")
    # nothing else is left, and nothing local is in it
    assert sorted(path.name for path in output.iterdir()) == sorted([PLOT_FILE, RESULTS_FILE])
    assert str(tmp_path) not in result.stdout


def test_a_point_is_what_slicing_and_measuring_by_hand_gives(run, words, checkpoints, text_file, slice_words, tmp_path):
    assert run(*words, "--dims", "36", "-o", tmp_path / "sweep").exit_code == 0
    (point,) = results_of(tmp_path / "sweep")["points"]
    assert run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "dim36", *slice_words).exit_code == 0
    options = ["--perplexity", text_file, "--limit", "6", "--seq-len", "32"]
    result = run("eval", tmp_path / "dim36", *options, "--format", "json")
    assert result.exit_code == 0, result.output
    by_hand = json.loads(result.stdout)
    assert point["perplexity"] == by_hand["perplexity"]
    assert point["parameters"] == by_hand["parameters"]


def test_added_dims_go_on_from_what_is_measured(run, words, whole, counted, tmp_path):
    parts = tmp_path / "parts"
    assert run(*words, "--dims", "36", "-o", parts).exit_code == 0
    counted["measured"].clear()
    assert run(*words, "--dims", DIMS, "-o", parts).exit_code == 0
    assert counted["measured"] == ["dim44", "dim24"]
    assert (whole / RESULTS_FILE).read_bytes() == (parts / RESULTS_FILE).read_bytes()
    assert (whole / PLOT_FILE).read_bytes() == (parts / PLOT_FILE).read_bytes()
    # and once more there is nothing to do
    counted["measured"].clear()
    assert run(*words, "--dims", DIMS, "-o", parts).exit_code == 0
    assert counted["measured"] == []


@pytest.mark.parametrize("fails_at", ["tiny-llama", "dim44", "dim24", "refit"])
def test_a_sweep_that_is_stopped_goes_on_where_it_stopped(run, words, whole, counted, monkeypatch, tmp_path, fails_at):
    stopped = tmp_path / "stopped"
    evaluate, run_slices = measure.evaluate, sweep.run_slices

    def failing_evaluate(source, *arguments):
        if source.folder.name == fails_at:
            raise KeyboardInterrupt
        return evaluate(source, *arguments)

    def failing_slices(*_arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if fails_at == "refit":
            patch.setattr(sweep, "run_slices", failing_slices)
        else:
            patch.setattr(measure, "evaluate", failing_evaluate)
        assert run(*words, "--dims", DIMS, "-o", stopped).exit_code != 0
    assert sweep.run_slices is run_slices
    refits, measured = counted["refits"], len(counted["measured"])
    assert run(*words, "--dims", DIMS, "-o", stopped).exit_code == 0
    # slices that were whole are not made again, and what was measured is not measured again
    assert counted["refits"] - refits == (0 if fails_at in {"dim44", "dim24"} else 1)
    left = {"tiny-llama": 4, "refit": 3, "dim44": 3, "dim24": 1}
    assert len(counted["measured"]) - measured == left[fails_at]
    assert (whole / RESULTS_FILE).read_bytes() == (stopped / RESULTS_FILE).read_bytes()
    assert sorted(path.name for path in stopped.iterdir()) == sorted([PLOT_FILE, RESULTS_FILE])


def test_another_sweeps_results_are_left_alone_unless_overwritten(run, words, text_file, tmp_path):
    output = tmp_path / "sweep"
    assert run(*words, "--dims", "36", "-o", output).exit_code == 0
    before = (output / RESULTS_FILE).read_bytes()
    for more in ("--seed 7", "--samples 20", "--limit 5", "--method slicegpt", "--dtype bfloat16"):
        result = run(*words, "--dims", "36", "-o", output, *more.split())
        assert result.exit_code == 1
        assert "another sweep" in result.stderr
        assert (output / RESULTS_FILE).read_bytes() == before
    assert run(*words, "--dims", "36", "-o", output, "--seed", "7", "--overwrite").exit_code == 0
    assert (output / RESULTS_FILE).read_bytes() != before
    other = tmp_path / "letters"
    other.mkdir()
    (other / "dear.txt").write_text("dear all")
    result = run(*words, "--dims", "36", "-o", other)
    assert result.exit_code == 1
    assert "will not be changed" in result.stderr
    assert [path.name for path in other.iterdir()] == ["dear.txt"]


def test_a_changed_text_or_model_is_another_sweep(run, words, checkpoint_copy, text_file, slice_words, tmp_path):
    text = tmp_path / "mine.jsonl"
    shutil.copyfile(text_file, text)
    mine = ["-q", "sweep", checkpoint_copy, "--perplexity", text, "--limit", "6", *slice_words, "--dims", "36"]
    output = tmp_path / "sweep"
    assert run(*mine, "-o", output).exit_code == 0
    with text.open("a") as file:
        file.write('{"text": "one more"}\n')
    assert "another sweep" in run(*mine, "-o", output).stderr
    shutil.copyfile(text_file, text)
    assert run(*mine, "-o", output).exit_code == 0
    weights = checkpoint_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes())
    assert "another sweep" in run(*mine, "-o", output).stderr


def test_slices_are_kept_on_request(run, words, tmp_path):
    output = tmp_path / "sweep"
    assert run(*words, "--dims", "44,36", "-o", output, "--keep-slices").exit_code == 0
    for dim in (44, 36):
        folder = output / "slices" / f"dim{dim}"
        assert (folder / "model.safetensors").is_file()
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    # each has what was found in its record, from where estimate takes the curve
    for point in results_of(output)["points"]:
        record = json.loads((output / "slices" / f"dim{point['dim']}" / "slicecli.json").read_text())
        assert record["results"]["perplexity"] == point["perplexity"]
        assert record["curve"]["curves"] == results_of(output)["curves"]
    curve = ["--curve", output / "slices" / "dim36", "--format", "json", "--dim", "40"]
    (one,) = json.loads(run("-q", "estimate", words[2], *curve).stdout)["estimates"]
    assert one["perplexity"]["source"].startswith("2 measured slices (dim36)")


def test_the_published_method_sweeps_too_and_both_fit_together(run, words, whole, tmp_path):
    done = run(*words, "--dims", DIMS, "--method", "slicegpt", "-o", tmp_path / "published")
    assert done.exit_code == 0, done.output
    files = [folder / RESULTS_FILE for folder in (whole, tmp_path / "published")]
    curves = json.loads(run("fit", *files, "--format", "json").stdout)["curves"]
    assert [one["method"] for one in curves] == ["refit", "slicegpt"]


def test_estimate_takes_a_sweeps_results_as_a_curve(run, whole, checkpoints, text_file):
    curve = ["--curve", whole / RESULTS_FILE, "--text", text_file.name]
    result = run("-q", "estimate", checkpoints(), *curve, "--dim", "40,36", "--format", "json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    measured = results_of(whole)
    assert document["dense"]["perplexity"]["value"] == measured["dense"]["perplexity"][text_file.name]["value"]
    at_36 = next(one for one in document["estimates"] if one["dim"] == 36)["perplexity"]
    known = next(point for point in measured["points"] if point["dim"] == 36)["perplexity"][text_file.name]["value"]
    assert at_36["low"] <= known <= at_36["high"]


def test_without_memory_for_all_activations_slices_are_refitted_in_groups(
    checkpoints, text_file, monkeypatch, counted, tmp_path
):
    def sweep_into(folder):
        options = SliceOptions(calibration=str(text_file), samples=24, sequence_length=32, cache=False)
        evaluation = EvaluationOptions(texts=(str(text_file),), limit=6, sequence_length=32)
        return run_sweep(str(checkpoints()), [Width(dim) for dim in (44, 36, 24)], folder, options, evaluation)

    together = sweep_into(tmp_path / "concat")
    assert counted["refits"] == 1
    tokens, size = 24 * 32, 4
    # the dense stream at three places, and one sliced stream of up to 60
    room = tokens * size * (48 * 3 + 60)
    for module in (engine, placement):
        monkeypatch.setattr(module, "available_memory_bytes", lambda _device: room / placement.MEMORY_SHARE)
    apart = sweep_into(tmp_path / "apart")
    assert counted == {**counted, "statistics": 2, "refits": 1 + 2}
    assert together.document == apart.document


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--dims", "37", "--write-as", "own"), "not legal"),
        (("--dims", "48"), "is not below"),
        (("--relation", "hearsay", "--dims", "36"), "Available: paper"),
        (("--limit", "0", "--dims", "36"), "too small"),
        (("--tasks", "no-such-task", "--dims", "36"), "no-such-task"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(run, words, own_defaults, more, message, tmp_path):
    result = run(*words, "-o", tmp_path / "sweep", *more)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert not (tmp_path / "sweep").exists()


def test_the_usual_dims_are_those_of_the_published_study(run, words, tmp_path):
    result = run(*words, "-o", tmp_path / "sweep", "--format", "json")
    assert result.exit_code == 0, result.output
    dims = [point["dim"] for point in json.loads(result.stdout)["points"]]
    assert dims == [44, 40, 36, 32, 28, 24]


def test_the_gate_takes_the_curve_where_nothing_is_recorded(run, words, text_file, tmp_path):
    from slicecli.testing.slice_tests import SliceUnderTest

    output = tmp_path / "sweep"
    assert run(*words, "--dims", "44,36", "-o", output, "--keep-slices").exit_code == 0
    folder = output / "slices" / "dim36"
    record = json.loads((folder / "slicecli.json").read_text())
    known = record["results"].pop("perplexity")[text_file.name]["value"]
    (folder / "slicecli.json").write_text(json.dumps(record))
    measured, limit = SliceUnderTest.find(str(folder), text=str(text_file)).perplexity()
    assert measured.value == pytest.approx(known)
    curve = json.loads((output / RESULTS_FILE).read_text())["curve"]
    assert curve["points"][1]["value"] == pytest.approx(known)
    assert measured.value <= limit


def test_a_sweep_over_targets_chooses_widths_after_one_pass(run, words, counted, tmp_path):
    from test_mlp_widths import dimensions

    targets = [int(share * dimensions().parameters()) for share in (0.85, 0.7)]
    more = ("--target-params", ",".join(map(str, targets)), "--write-as", "own", "-o", tmp_path / "out")
    done = run(*words, *more, "--format", "json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (counted["statistics"], counted["refits"]) == (1, 1)
    assert all(point["parameters"] <= target for point, target in zip(document["points"], targets, strict=True))
    assert any(point["mlp_dim"] for point in document["points"])
    assert run(*words, *more).exit_code == 0  # all is there
    assert (counted["statistics"], counted["refits"]) == (1, 1)


def test_slices_with_fewer_channels_are_measured_beside_the_curve(run, words, counted, tmp_path):
    more = ("--dims", "44,36,24", "-o", tmp_path / "out")
    assert run(*words, *more).exit_code == 0
    done = run(*words, *more, "--mlp-dim", "40")
    assert done.exit_code == 0, done.output
    points = results_of(tmp_path / "out")["points"]
    assert [(point["dim"], point["mlp_dim"]) for point in points] == [
        (44, None), (44, 40), (36, None), (36, 40), (24, None), (24, 40)
    ]  # fmt: skip
    assert (counted["statistics"], counted["refits"]) == (1, 2)
