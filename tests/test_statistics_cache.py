"""Statistics that are kept: the same slices from them, and none where anything is different."""

from __future__ import annotations

import json
import os

import pytest
import torch

from slicecli.checkpoint.folder import file_digest
from slicecli.linalg.basis import reader_basis
from slicecli.slicing.statistics_cache import CACHE_VARIABLE, SIZE_VARIABLE, StatisticsCache, default_folder


@pytest.fixture
def slice_to(run, checkpoint_copy, slice_words, tmp_path):
    """A function that slices with a cache of the test's own, and tells where the statistics came from."""

    def call(dim, *more, model=checkpoint_copy):
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        words = [*slice_words, "--cache-dir", tmp_path / "cache", *more]
        result = run("slice", model, "--dim", dim, "-o", output, "--format", "json", *words)
        assert result.exit_code == 0, result.output
        assert ("from the cache" in result.stderr) == (json.loads(result.stdout)["statistics"] == "cache")
        return json.loads(result.stdout)["statistics"], file_digest(output / "model.safetensors")

    return call


def basis_of(width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(100, width, generator=generator, dtype=torch.float64)
    return reader_basis(rows.T @ rows, torch.eye(width, dtype=torch.float64))


def test_another_dim_starts_at_the_refit_and_gives_the_same_bytes(slice_to):
    assert slice_to(40)[0] == "collected"
    assert slice_to(36)[0] == "cache"
    assert slice_to(36) == ("cache", slice_to(36, "--no-cache")[1])


@pytest.mark.parametrize("more", [["--seed", "7"], ["--samples", "20"], ["--seq-len", "16"], ["--batch-size", "3"]])
def test_what_statistics_depend_on_makes_an_entry_of_its_own(slice_to, more):
    slice_to(36)
    assert slice_to(36, *more)[0] == "collected"
    assert slice_to(40, *more)[0] == "cache"


def test_other_weights_have_other_statistics(slice_to, checkpoint_copy):
    from safetensors.torch import load_file, save_file

    slice_to(36)
    path = checkpoint_copy / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] += 0.5
    save_file(tensors, path, metadata={"format": "pt"})
    assert slice_to(36)[0] == "collected"


def test_without_a_cache_nothing_is_kept(slice_to, tmp_path):
    slice_to(36, "--no-cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_entry_is_collected_again(slice_to, tmp_path):
    _, expected = slice_to(36)
    (entry,) = (tmp_path / "cache").rglob("*.safetensors")
    whole = entry.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"x" * len(whole)):
        entry.write_bytes(content)
        assert slice_to(36) == ("collected", expected)
        assert slice_to(36)[0] == "cache"


def test_the_cache_lies_where_its_variable_says_or_in_the_users_cache_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv(CACHE_VARIABLE, "")
    assert default_folder() == tmp_path / "slicecli"
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"


def test_the_cache_keeps_within_its_bound_and_drops_what_was_used_longest_ago(tmp_path, monkeypatch):
    cache = StatisticsCache(tmp_path)
    for number in range(3):
        cache.store({"number": number}, basis_of(20, number), f"model{number}", "text")
        os.utime(cache._path({"number": number}), (number, number))
    one = max(entry.size for entry in cache.entries())
    monkeypatch.setenv(SIZE_VARIABLE, str(3 * one))
    assert cache.load({"number": 0}, "cpu") is not None  # used last now
    cache.store({"number": 3}, basis_of(20, 3), "model3", "text")
    assert {entry.model for entry in cache.entries()} == {"model0", "model2", "model3"}
    monkeypatch.setenv(SIZE_VARIABLE, "100")
    cache.store({"number": 4}, basis_of(20, 4), "model4", "text")
    assert cache.load({"number": 4}, "cpu") is None


@pytest.mark.parametrize("width", [1, 2, 33])
def test_a_basis_comes_back_bit_by_bit(tmp_path, width):
    cache, basis = StatisticsCache(tmp_path), basis_of(width)
    cache.store({"a": 1}, basis, "model", "text")
    found = cache.load({"a": 1}, "cpu")
    assert torch.equal(found.vectors, basis.vectors)
    assert torch.equal(found.energies, basis.energies)
    assert torch.equal(found.importances, basis.importances)
    assert found.is_centred == basis.is_centred
    assert cache.load({"a": 2}, "cpu") is None


def test_the_command_lists_and_clears(run, slice_to, tmp_path):
    cache = ["--cache-dir", tmp_path / "cache"]
    assert "empty" in run("cache", "ls", *cache).stderr
    slice_to(36)
    (entry,) = json.loads(run("cache", "ls", "--format", "json", *cache).stdout)
    assert entry["hidden_size"] == 48
    assert entry["bytes"] > 8 * 48 * 48
    assert "24 x 32" in run("cache", "ls", *cache).stdout
    assert run("cache", "clear", *cache).exit_code == 0
    assert json.loads(run("cache", "ls", "--format", "json", *cache).stdout) == []
    assert slice_to(36)[0] == "collected"


def test_a_cache_that_cannot_be_written_does_not_stop_a_slice(slice_to, tmp_path):
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
