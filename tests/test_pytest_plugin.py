"""The pytest plugin as its users meet it."""

from __future__ import annotations

import json
import shutil

import pytest
from programs import run_program

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("without_cache")]


@pytest.fixture
def without_cache(monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")


@pytest.fixture
def runpytest(pytester):
    """Run pytest in the folder of `pytester`, in a process of its own."""

    def run(*words):
        # a path inside this project would bring its options, and with them processes more
        done = run_program("-m", "pytest", *words, "-n", "0", cwd=pytester.path, kind="warm")
        return pytest.RunResult(done.returncode, done.stdout.splitlines(), done.stderr.splitlines(), 0.0)

    return run


def measured_slice(output, *words):
    """Slice the embedded model and enter its perplexity in the record."""
    from click.testing import CliRunner

    from slicecli.cli import group
    from slicecli.data.demo import MODEL_FOLDER

    sizes = ["--calibration", "demo", "--samples", "16", "--seq-len", "128"]
    for command in (
        ["slice", MODEL_FOLDER, "--dim", "72", "-o", output, *sizes, *words],
        ["eval", output, "--perplexity", "demo", "--seq-len", "128", "--limit", "8", "--record"],
    ):
        done = CliRunner().invoke(group, [str(word) for word in command])
        assert done.exit_code == 0, done.output
    return output


@pytest.fixture(scope="module")
def gated(tmp_path_factory):
    """A slice of the embedded model whose perplexity is in its record."""
    return measured_slice(tmp_path_factory.mktemp("gated") / "slice")


@pytest.fixture
def copy(gated, tmp_path):
    return shutil.copytree(gated, tmp_path / "copy")


def change_record(folder, change):
    path = folder / "slicecli.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


# an unrelated project


def test_an_unrelated_project_pays_nothing(pytester):
    pytester.makepyfile(
        """
        import sys

        def test_nothing_heavy_is_there():
            heavy = {"torch", "transformers", "accelerate", "datasets", "lm_eval", "numpy", "click", "huggingface_hub"}
            assert not heavy & set(sys.modules)
            ours = {name for name in sys.modules if name.startswith("slicecli")}
            assert {name.partition(".")[2] for name in ours} == {
                "", "errors", "family", "family.hookspecs", "modeling", "runtime", "runtime.versions", "testing",
                "testing.plugin",
            }
        """
    )
    result = pytester.runpytest_subprocess()
    result.assert_outcomes(passed=1)
    assert not [line for line in result.outlines if line.startswith("slicecli:")]


def test_the_options_explain_themselves(pytester):
    shown = pytester.runpytest_subprocess("--help").stdout.str()
    for option in ("adapter", "model", "slice", "text", "tolerance", "device", "serve", "report"):
        assert f"--slicecli-{option}" in shown
    markers = pytester.runpytest_subprocess("--markers").stdout.str()
    assert "slicecli_slice(path_or_id" in markers
    assert "slicecli_requires(*capabilities)" in markers


# the conformance suite from anywhere


def test_the_suite_runs_from_anywhere_on_named_adapters(runpytest, pytester):
    words = ["--pyargs", "slicecli.testing", "--slicecli-adapter", "phi,gpt2", "--slicecli-report", "report.json"]
    result = runpytest(*words, "-rs", "-k", "rotation or a_slice_starts")  # the whole of it is in test_families
    outcomes = result.parseoutcomes()
    assert (outcomes["passed"], outcomes["skipped"]) == (7, 1)
    assert "failed" not in outcomes
    result.stdout.fnmatch_lines(["slicecli: adapter phi,gpt2 (slicecli *, torch *, transformers *"])
    result.stdout.fnmatch_lines(["*adapter gpt2 is not stock here"])
    report = json.loads((pytester.path / "report.json").read_text())
    assert report["adapter"] == "phi,gpt2"
    assert report["outcomes"] == {name: outcomes.get(name, 0) for name in ("passed", "failed", "skipped")}
    assert {"torch", "transformers", "slicecli"} <= report["versions"].keys()
    rotation = [test for test in report["tests"] if "rotation_leaves_logits_unchanged_in_float64[phi" in test["name"]]
    assert all(test["measured"]["relative_error"] < 1e-9 for test in rotation)


def test_an_adapter_that_does_not_exist_is_wrong_usage(runpytest, pytester):
    result = runpytest("--pyargs", "slicecli.testing", "--slicecli-adapter", "lama")
    assert result.ret != 0
    result.stdout.fnmatch_lines(["*There is no adapter named 'lama'*llama*"])


def test_the_suite_runs_on_a_real_checkpoint(runpytest, pytester, embedded_model):
    words = ["--pyargs", "slicecli.testing", "--slicecli-model", embedded_model]
    result = runpytest(*words)
    result.assert_outcomes(passed=41, deselected=7)
    result.stdout.fnmatch_lines([f"slicecli: model {embedded_model} *"])


def test_a_suite_without_an_adapter_says_what_is_missing(runpytest, pytester):
    pytester.makepyfile("from slicecli.testing import AdapterTests\nclass TestMine(AdapterTests): pass")
    result = runpytest("-q")
    assert "passed" not in result.parseoutcomes()
    result.stdout.fnmatch_lines(["*TestMine names no adapter: set the attribute `adapter`*"])


# the gate on a slice


def test_a_sound_slice_passes_the_gate(runpytest, pytester, gated):
    words = ["--pyargs", "slicecli.testing", "--slicecli-slice", gated, "--slicecli-report", "report.json"]
    result = runpytest(*words)
    result.assert_outcomes(passed=6, deselected=result.parseoutcomes()["deselected"])
    report = json.loads((pytester.path / "report.json").read_text())
    measured = next(test["measured"] for test in report["tests"] if "perplexity" in test["name"])
    assert measured["perplexity"] <= measured["limit"]


def test_a_slice_with_code_of_its_own_passes_the_gate(runpytest, pytester, tmp_path):
    folder = measured_slice(tmp_path / "slice", "--method", "slicegpt")
    result = runpytest("--pyargs", "slicecli.testing", "--slicecli-slice", folder)
    result.assert_outcomes(passed=6, deselected=result.parseoutcomes()["deselected"])


def lower_perplexity(record):
    record["results"]["perplexity"]["demo"]["value"] *= 0.9


DAMAGES = {
    "a worse perplexity": (
        lambda folder: change_record(folder, lower_perplexity),
        "test_its_perplexity_is_no_worse_than_recorded",
    ),
    "no perplexity": (
        lambda folder: change_record(folder, lambda record: record.update(results={})),
        "test_its_perplexity_is_no_worse_than_recorded",
    ),
    "other weights": (
        lambda folder: change_record(folder, lambda record: record["weights"].update({"model.safetensors": "0" * 64})),
        "test_its_weights_are_those_of_the_record",
    ),
    "a record that lacks a field": (
        lambda folder: change_record(folder, lambda record: record.pop("calibration")),
        "test_its_record_is_complete",
    ),
    "another dim": (
        lambda folder: change_record(folder, lambda record: record.update(dim=71)),
        "test_it_loads_as_the_record_says",
    ),
    "a card without metadata": (
        lambda folder: (folder / "README.md").write_text("# A slice\n"),
        "test_its_card_is_complete",
    ),
    "a card that is missing": (lambda folder: (folder / "README.md").unlink(), "test_its_card_is_complete"),
}


def test_each_damage_to_a_slice_fails_the_gate(runpytest, pytester, gated, tmp_path):
    """All damages in one run: a class for each, gated by the marker."""
    source = ["import pytest", "from slicecli.testing import SliceTests"]
    for number, (damage, _) in enumerate(DAMAGES.values()):
        folder = shutil.copytree(gated, tmp_path / f"damaged{number}")
        damage(folder)
        source.append(f"@pytest.mark.slicecli_slice({str(folder)!r})\nclass Test{number}(SliceTests): pass")
    pytester.makepyfile("\n".join(source))
    result = runpytest("-rf", "--slicecli-report", "report.json")
    report = json.loads((pytester.path / "report.json").read_text())
    for number, (name, (_, test_name)) in enumerate(DAMAGES.items()):
        failed = {
            test["name"].rpartition("::")[2]
            for test in report["tests"]
            if f"::Test{number}::" in test["name"] and test["outcome"] == "failed"
        }
        assert test_name in failed, f"{name}: {failed or result.outlines}"
        assert len(failed) < 6, f"{name} fails everything: {failed}"


def test_a_folder_that_is_no_slice_is_named(runpytest, pytester, embedded_model):
    result = runpytest("--pyargs", "slicecli.testing", "--slicecli-slice", embedded_model)
    assert "passed" not in result.parseoutcomes()
    result.stdout.fnmatch_lines(["*no readable slicecli.json*"])


def test_the_marker_gives_a_slice_to_a_project_s_own_tests(runpytest, pytester, gated):
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.slicecli_slice({str(gated)!r}, text="demo", max_perplexity=1000.0)
        def test_mine(slice_under_test):
            assert slice_under_test.record["dim"] == slice_under_test.model.config.hidden_size == 72
            measured, limit = slice_under_test.perplexity()
            assert measured.value < limit == 1000.0

        @pytest.mark.slicecli_slice({str(gated)!r}, tolerance=0.5)
        def test_tolerance(slice_under_test):
            recorded = slice_under_test.recorded["demo"]["value"]
            assert slice_under_test.perplexity()[1] == pytest.approx(1.5 * recorded)

        def test_no_slice(slice_under_test):
            pass
        """
    )
    runpytest("-q", "-rs").assert_outcomes(passed=2, skipped=1)


def test_eval_enters_results_only_in_a_slice_s_record(run, gated, embedded_model):
    record = json.loads((gated / "slicecli.json").read_text())
    assert record["results"]["perplexity"]["demo"]["tokens"] == 8 * 127
    assert record["results"]["versions"]["torch"]
    done = run("eval", embedded_model, "--perplexity", "demo", "--record")
    assert done.exit_code == 2
    assert "is not the folder of a slice" in done.stderr


# the fixtures


def test_tiny_models_of_every_family_are_at_hand(tiny_model, assert_logits_close):
    import torch

    ids = torch.arange(2, 12)[None]
    for name in ("llama", "gpt2", "mixtral", "cohere2"):
        model, other = tiny_model(name), tiny_model(name, seed=1)
        assert sum(value.numel() for value in model.parameters()) < 1e6
        assert_logits_close(model, tiny_model(name), ids)
        with pytest.raises(AssertionError, match="the logits differ by"):
            assert_logits_close(model, other, ids)
    assert tiny_model("llama", hidden_size=32, dtype="float64").dtype == torch.float64


def test_a_tiny_checkpoint_is_a_folder_like_any_model_s(run, tiny_checkpoint):
    assert run("inspect", tiny_checkpoint("phi")).exit_code == 0


def test_the_hub_cache_is_isolated_for_this_process_and_its_children(isolated_hub_cache, monkeypatch):
    import subprocess
    import sys

    from huggingface_hub import constants, get_token, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    assert constants.HF_HUB_CACHE.startswith(str(isolated_hub_cache))
    assert get_token() is None
    with pytest.raises(CacheNotFound):
        scan_cache_dir()
    code = "from huggingface_hub import constants; print(constants.HF_HUB_CACHE)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith(str(isolated_hub_cache))
