"""Statistics that are kept: the same slices from them, and none where anything is different."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch

from slicecli.checkpoint.folder import file_digest
from slicecli.linalg.basis import reader_basis
from slicecli.runtime.cache_folder import CACHE_VARIABLE, cache_folder
from slicecli.slicing.context import DenseStatistics
from slicecli.slicing.statistics_cache import SIZE_VARIABLE, StatisticsCache

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def kept(checkpoints, text_file, tmp_path_factory):
    """A cache with the statistics of a slice, and the digest of its weights."""
    from click.testing import CliRunner

    from slicecli.cli import group

    folder = tmp_path_factory.mktemp("kept")
    words = ["slice", checkpoints(), "--dim", "36", "-o", folder / "out", "--cache-dir", folder / "cache"]
    words += ["--calibration", text_file, "--samples", "24", "--seq-len", "32", "--format", "json"]
    done = CliRunner().invoke(group, [str(word) for word in words], prog_name="slicecli")
    assert json.loads(done.stdout)["statistics"] == "collected"
    return folder / "cache", file_digest(folder / "out" / "model.safetensors")


@pytest.fixture
def slice_to(run, kept, checkpoints, slice_words, tmp_path):
    """A function that slices with a copy of that cache, and tells where the statistics came from."""
    shutil.copytree(kept[0], tmp_path / "cache")

    def call(dim, *more, model=None):
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        words = [*slice_words, "--cache-dir", tmp_path / "cache", *more]
        result = run("slice", model or checkpoints(), "--dim", dim, "-o", output, "--format", "json", *words)
        assert result.exit_code == 0, result.output
        assert ("from the cache" in result.stderr) == (json.loads(result.stdout)["statistics"] == "cache")
        return json.loads(result.stdout)["statistics"], file_digest(output / "model.safetensors")

    return call


def statistics_of(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(100, width, generator=generator, dtype=torch.float64)
    basis = reader_basis(rows.T @ rows, torch.eye(width, dtype=torch.float64))
    return DenseStatistics(basis, rows.T @ rows)


def test_another_dim_starts_at_the_refit_and_gives_the_same_bytes(slice_to):
    assert slice_to(40) == ("cache", slice_to(40, "--no-cache")[1])


def test_the_same_dim_gives_the_same_bytes(slice_to, kept):
    assert slice_to(36) == ("cache", kept[1])


@pytest.mark.parametrize("more", [["--seed", "7"], ["--samples", "20"], ["--seq-len", "16"], ["--batch-size", "3"]])
def test_what_statistics_depend_on_makes_an_entry_of_its_own(slice_to, more):
    assert slice_to(36, *more)[0] == "collected"
    assert slice_to(40, *more)[0] == "cache"


def test_other_weights_have_other_statistics(slice_to, checkpoint_copy):
    from safetensors.torch import load_file, save_file

    assert [slice_to(36, model=checkpoint_copy)[0] for _ in range(2)] == ["collected", "cache"]
    path = checkpoint_copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert slice_to(36, model=checkpoint_copy)[0] == "collected"


def test_without_a_cache_nothing_is_kept(slice_to, tmp_path):
    shutil.rmtree(tmp_path / "cache")
    slice_to(36, "--no-cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "damage", [lambda _: b"", lambda whole: whole[: len(whole) // 2], lambda whole: b"x" * len(whole)]
)
def test_a_damaged_entry_is_collected_again(slice_to, kept, tmp_path, damage):
    (entry,) = (tmp_path / "cache").rglob("*.safetensors")
    entry.write_bytes(damage(entry.read_bytes()))
    assert slice_to(36) == ("collected", kept[1])
    assert slice_to(36)[0] == "cache"


def test_the_cache_lies_where_its_variable_says_or_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert cache_folder() == tmp_path / "slicecli"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"


def test_the_cache_keeps_within_its_bound_and_drops_what_was_used_longest_ago(tmp_path, monkeypatch):
    cache = StatisticsCache(tmp_path)
    for number in range(3):
        cache.store({"number": number}, statistics_of(20, number), f"model{number}", "text")
        os.utime(cache._path({"number": number}), (number, number))
    one = max(entry.size for entry in cache.entries())
    monkeypatch.setenv(SIZE_VARIABLE, str(3 * one))
    assert cache.load({"number": 0}, "cpu") is not None  # used last now
    cache.store({"number": 3}, statistics_of(20, 3), "model3", "text")
    assert {entry.model for entry in cache.entries()} == {"model0", "model2", "model3"}
    monkeypatch.setenv(SIZE_VARIABLE, "100")
    cache.store({"number": 4}, statistics_of(20, 4), "model4", "text")
    assert cache.load({"number": 4}, "cpu") is None


@pytest.mark.parametrize("width", [1, 2, 33])
def test_statistics_come_back_bit_by_bit(tmp_path, width):
    cache, statistics = StatisticsCache(tmp_path), statistics_of(width)
    cache.store({"a": 1}, statistics, "model", "text")
    found = cache.load({"a": 1}, "cpu")
    assert torch.equal(found.basis.vectors, statistics.basis.vectors)
    assert torch.equal(found.basis.energies, statistics.basis.energies)
    assert torch.equal(found.basis.importances, statistics.basis.importances)
    assert found.basis.is_centred == statistics.basis.is_centred
    assert torch.equal(found.final_moment, statistics.final_moment)
    assert cache.load({"a": 2}, "cpu") is None


def test_the_command_lists_and_clears(run, slice_to, tmp_path):
    cache = ["--cache-dir", tmp_path / "cache"]
    assert "empty" in run("cache", "ls", "--cache-dir", tmp_path / "none").stderr
    (entry,) = json.loads(run("cache", "ls", "--format", "json", *cache).stdout)
    assert entry["hidden_size"] == 48
    assert entry["bytes"] > 8 * 48 * 48
    assert "24 x 32" in run("cache", "ls", *cache).stdout
    assert run("cache", "clear", *cache).exit_code == 0
    assert json.loads(run("cache", "ls", "--format", "json", *cache).stdout) == []
    assert slice_to(36)[0] == "collected"


def test_a_cache_that_cannot_be_written_does_not_stop_a_slice(slice_to, tmp_path):
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "statistics").write_text("not a folder")
    assert slice_to(36)[0] == "collected"


def test_the_commands_on_the_page_of_long_runs_run_as_written(tmp_path, monkeypatch, embedded_model):
    import re
    import shlex
    from pathlib import Path

    from click.testing import CliRunner

    from slicecli.cli import group

    page = (Path(__file__).parent.parent / "docs" / "scale.md").read_text()
    (tmp_path / "slicecli" / "data" / "demo").mkdir(parents=True)
    (tmp_path / "slicecli" / "data" / "demo" / "model").symlink_to(embedded_model)
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in re.findall(r"```\n(.*?)```", page, flags=re.DOTALL) if "slicecli" in block]
    printed = []
    for command in "".join(blocks).splitlines():
        # less text, which changes nothing but the time
        words = shlex.split(command.replace("--samples 32", "--samples 4"))[1:]
        result = CliRunner().invoke(group, words, prog_name="slicecli")
        assert result.exit_code == 0, result.output
        printed.append(result.output)
    assert "weights are kept" in printed[1]
    assert "from the cache" not in printed[2]
    assert "statistics 1/1 from the cache" in printed[3]
