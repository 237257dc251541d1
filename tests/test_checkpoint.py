"""Output folders that are whole or absent, and shards that other programs read."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from slicecli.checkpoint.folder import (
    check_apart,
    check_results_file,
    file_digest,
    require_disk_space,
    unfinished_folder,
    whole_folder,
)
from slicecli.checkpoint.weight_writer import ShardWriter
from slicecli.errors import OutputError, WeightsError

SHAPES = {"embed.weight": (7, 4), "blocks.0.weight": (4, 4), "blocks.0.bias": (4,), "head.weight": (7, 4)}


def random_tensors(dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def write(folder, tensors, dtype, order=None, max_shard_size=10**9):
    writer = ShardWriter(folder, SHAPES, dtype, max_shard_size)
    for name in order or tensors:
        writer.write(name, tensors[name])
    return writer.finish()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_safetensors_reads_back_what_was_written(tmp_path, dtype):
    tensors = random_tensors(dtype)
    digests = write(tmp_path, tensors, dtype)
    assert digests == {"model.safetensors": file_digest(tmp_path / "model.safetensors")}
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_shards_respect_their_size_and_the_index_names_all(tmp_path):
    tensors = random_tensors(torch.float32)
    write(tmp_path, tensors, torch.float32, max_shard_size=120)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tensors.values())
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    loaded = {name: value for shard in shards for name, value in load_file(shard).items()}
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)


def test_the_order_of_arrival_does_not_change_a_byte(tmp_path):
    tensors = random_tensors(torch.bfloat16)
    digests = []
    for number, order in enumerate([list(tensors), list(tensors)[::-1]]):
        (tmp_path / str(number)).mkdir()
        digests.append(write(tmp_path / str(number), tensors, torch.bfloat16, order))
    assert digests[0] == digests[1]


def test_a_tensor_that_is_missing_wrong_or_doubled_is_refused(tmp_path):
    tensors = random_tensors(torch.float32)
    writer = ShardWriter(tmp_path, SHAPES, torch.float32, 10**9)
    with pytest.raises(ValueError, match="announced"):
        writer.write("head.weight", torch.zeros(7, 5))
    with pytest.raises(ValueError, match="announced"):
        writer.write("head.weight", torch.zeros(7, 4, dtype=torch.float16))
    writer.write("head.weight", tensors["head.weight"])
    with pytest.raises(ValueError, match="already"):
        writer.write("head.weight", tensors["head.weight"])
    with pytest.raises(ValueError, match="never written"):
        writer.finish()
    writer.close()


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    output = tmp_path / "out"
    with whole_folder(output) as partial:
        (partial / "a").write_text("a")
        assert not output.exists()
    assert (output / "a").read_text() == "a"
    assert os.listdir(tmp_path) == ["out"]


def test_an_error_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path):
    with pytest.raises(OutputError, match="disk filled up"), whole_folder(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert os.listdir(tmp_path) == []


def test_an_existing_folder_is_kept(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(OutputError, match="exists"), whole_folder(tmp_path / "out"):
        pass
    # nor does --overwrite remove what is no slice
    with pytest.raises(OutputError, match="not a slice"), whole_folder(tmp_path / "out", overwrite=True):
        pass
    assert (tmp_path / "out" / "mine").read_text() == "mine"


def test_overwrite_replaces_a_slice_in_the_last_step(tmp_path):
    output = tmp_path / "out"
    for content in ("old", "new"):
        with whole_folder(output, overwrite=True) as partial:
            if content == "new":
                assert (output / "slicecli.json").read_text() == "old"
            (partial / "slicecli.json").write_text(content)
    assert (output / "slicecli.json").read_text() == "new"
    assert os.listdir(tmp_path) == ["out"]
    with pytest.raises(RuntimeError), whole_folder(output, overwrite=True):
        raise RuntimeError
    assert (output / "slicecli.json").read_text() == "new"


def test_the_leftover_of_a_killed_run_is_removed_or_gone_on_with(tmp_path):
    script = (
        "import os, sys, pathlib; from slicecli.checkpoint.folder import whole_folder\n"
        "output = pathlib.Path(sys.argv[1])\n"
        "with whole_folder(output) as partial: (partial / 'left').write_text('left'); os.kill(os.getpid(), 9)"
    )
    for resumes in (True, False):
        killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], check=False)
        assert killed.returncode == -9
        assert os.listdir(tmp_path) == [".out.incomplete"]
        with pytest.raises(RuntimeError), whole_folder(tmp_path / "out", resumes=resumes) as partial:
            assert (partial / "left").exists() == resumes
            raise RuntimeError
        assert os.listdir(tmp_path) == []


def test_an_unfinished_folder_is_kept_where_that_is_wanted(tmp_path):
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "out", keeps=lambda _: True) as partial:
        (partial / "a").write_text("a")
        raise KeyboardInterrupt
    assert (unfinished_folder(tmp_path / "out") / "a").read_text() == "a"


def test_a_folder_that_is_being_written_is_not_written_by_another(tmp_path):
    with whole_folder(tmp_path / "out") as partial:
        (partial / "a").write_text("a")
        script = (
            "import sys, pathlib; from slicecli.checkpoint.folder import whole_folder\n"
            "with whole_folder(pathlib.Path(sys.argv[1])): pass"
        )
        other = subprocess.run([sys.executable, "-c", script, str(tmp_path / "out")], capture_output=True, check=False)
        assert other.returncode == 1
        assert b"Another process is writing" in other.stderr
    assert os.listdir(tmp_path / "out") == ["a"]


def test_shards_of_an_interrupted_run_are_completed(tmp_path):
    tensors = random_tensors(torch.float32)
    (tmp_path / "whole").mkdir()
    expected = write(tmp_path / "whole", tensors, torch.float32, max_shard_size=120)
    writer = ShardWriter(tmp_path, SHAPES, torch.float32, 120)
    first, second, *others = tensors
    writer.write(first, tensors[first])
    missing = writer.synchronise()
    assert missing == sorted([second, *others])
    writer.write(second, torch.zeros_like(tensors[second]))  # written after the state was noted, by a run that died
    writer.close()
    resumed = ShardWriter(tmp_path, SHAPES, torch.float32, 120, missing)
    resumed.write(first, torch.zeros_like(tensors[first]))  # it is there, and stays
    for name in missing:
        resumed.write(name, tensors[name])
    assert resumed.finish() == expected


def test_too_little_disk_is_said_before_starting(tmp_path):
    with pytest.raises(OutputError, match="free"):
        require_disk_space(tmp_path / "a" / "b", 10**18)
    require_disk_space(tmp_path / "a" / "b", 1)
    assert not Path(tmp_path / "a").exists()


@pytest.mark.parametrize(
    ("dtype", "value", "message"),
    [
        (torch.float16, math.inf, "head.weight of the slice holds infinity: one of its numbers exceeds 6.55e"),
        (torch.bfloat16, -math.inf, "Use --dtype float32"),
        (torch.float32, math.inf, "The checkpoint is damaged"),
        (torch.float16, math.nan, "head.weight of the slice holds NaN"),
    ],
)
def test_a_tensor_that_is_not_finite_is_not_written(tmp_path, dtype, value, message):
    tensors = random_tensors(dtype)
    writer = ShardWriter(tmp_path, SHAPES, dtype, "5GB")
    tensors["head.weight"][-1, -1] = value
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(WeightsError, match=re.escape(message)):
        writer.write("head.weight", tensors["head.weight"])
    writer.close()
    assert {path: path.read_bytes()[: len(before[path])] for path in before} == before


# an output and what it is made from


@pytest.fixture
def sliced_model(tmp_path):
    """A slice, which may be a model again and which --overwrite may replace."""
    folder = tmp_path / "parent" / "model"
    folder.mkdir(parents=True)
    (folder / "slicecli.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


def by_link(folder):
    link = folder.parent.parent / "link"
    link.symlink_to(folder)
    return link


@pytest.mark.parametrize(
    "output",
    [
        lambda folder: folder,
        by_link,
        lambda folder: folder / ".." / folder.name,
        lambda folder: Path(os.path.relpath(folder)),
        lambda folder: folder.parent,
        lambda folder: folder / "slice",
        lambda folder: folder / "deep" / "slice",
        lambda folder: by_link(folder) / "slice",
    ],
    ids=["itself", "a link", "dots", "relative", "its parent", "inside", "deep inside", "inside, by a link"],
)
def test_an_output_does_not_touch_the_model(sliced_model, output):
    with pytest.raises(OutputError, match=r"would overwrite 'model'|is inside"):
        check_apart(output(sliced_model), sliced_model)
    check_apart(sliced_model.parent / "model2", sliced_model)


def test_an_output_does_not_take_the_place_of_a_model_that_an_unfinished_folder_is(sliced_model):
    for ending in ("incomplete", "replaced"):
        source = sliced_model.rename(sliced_model.with_name(f".out.{ending}"))
        with pytest.raises(OutputError, match="would overwrite"):
            check_apart(source.with_name("out"), source)
        source.rename(sliced_model)


def test_an_output_does_not_take_the_place_of_a_file_that_is_read(sliced_model, tmp_path):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "model.safetensors").symlink_to(sliced_model / "model.safetensors")
    with pytest.raises(OutputError, match=r"would overwrite 'model.safetensors'"):
        check_apart(sliced_model, linked)
    text = sliced_model / "text.jsonl"
    text.write_text("{}")
    (tmp_path / "other").mkdir()
    with pytest.raises(OutputError, match=r"would overwrite 'text.jsonl'"):
        check_apart(sliced_model, tmp_path / "other", [text])


def test_a_slice_that_was_being_replaced_when_the_run_was_killed_comes_back(tmp_path):
    output, aside = tmp_path / "out", tmp_path / ".out.replaced"
    aside.mkdir()
    (aside / "slicecli.json").write_text("old")
    with pytest.raises(OutputError, match="exists"), whole_folder(output):
        pass
    assert (output / "slicecli.json").read_text() == "old"
    # and where the new one has its place already, the old one goes
    aside.mkdir()
    with whole_folder(output, overwrite=True) as partial:
        (partial / "slicecli.json").write_text("new")
    assert os.listdir(tmp_path) == ["out"]
    assert (output / "slicecli.json").read_text() == "new"


def test_an_output_that_is_a_link_stays_one(tmp_path):
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "slice")
    for content in ("old", "new"):
        with whole_folder(link, overwrite=True) as partial:
            (partial / "slicecli.json").write_text(content)
        assert link.is_symlink()
        assert (link / "slicecli.json").read_text() == content
        assert os.listdir(tmp_path / "disk") == ["slice"]


@pytest.mark.parametrize(
    "name", ["config.json", "model.safetensors", "tokenizer.json", "slicecli.json", "adapter_config.json", "own.vocab"]
)
def test_results_do_not_take_the_place_of_a_models_file(sliced_model, name):
    (sliced_model / "own.vocab").write_text("a b c")
    with pytest.raises(OutputError, match="belongs to the model"):
        check_results_file(sliced_model / name, [sliced_model])
    with pytest.raises(OutputError, match="belongs to the model"):
        check_results_file(by_link(sliced_model) / name, [sliced_model])


def test_results_may_lie_beside_a_model_and_replace_older_ones(sliced_model):
    path = sliced_model / "eval.json"
    check_results_file(path, [sliced_model])
    path.write_text('{"perplexity": {}, "versions": {}}')
    check_results_file(path, [sliced_model])
    check_results_file(sliced_model.parent / "config.json", [sliced_model])
    with pytest.raises(OutputError, match="is an input of this command"):
        check_results_file(path, [sliced_model], [path])


def test_an_output_that_is_a_link_in_a_circle_is_one_sentence(sliced_model, tmp_path):
    circle = tmp_path / "circle"
    circle.symlink_to(circle)
    (sliced_model / "circle").symlink_to(circle)
    check_apart(circle, sliced_model)
    with pytest.raises(OutputError, match="cannot be written"), whole_folder(circle):
        pass
    assert sorted(os.listdir(tmp_path)) == ["circle", "parent"]
