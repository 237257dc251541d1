"""Places of weights and activations change no byte, impossible maps are refused, and memory may run out."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaAttention

from slicecli.checkpoint.dense_weights import OffloadedWeights
from slicecli.checkpoint.folder import file_digest
from slicecli.checkpoint.meta_model import build_meta_model
from slicecli.checkpoint.weight_writer import content_of, write_tensors
from slicecli.errors import RequestError, WeightsError
from slicecli.runtime import placement
from slicecli.runtime.microbatch import MicroBatches, concat
from slicecli.runtime.placement import (
    Placement,
    decide_placement,
    describe_map,
    parse_max_memory,
    place_activations,
    read_device_map,
)
from slicecli.slicing.activations import ActivationStore
from slicecli.slicing.layerwise import read_blocks

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
MAP = {"": "disk", "model.embed_tokens": "cpu", "model.layers.1": "cpu"}


@pytest.fixture
def slice_to(run, checkpoints, slice_words, tmp_path):
    """A function that slices and returns the report, the digest of the weights and what was said."""

    def call(*more, family="llama", dim=36):
        output = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        words = ["--dim", dim, "-o", output, "--format", "json", "--no-cache", *slice_words, *more]
        done = run("slice", checkpoints(family), *words)
        assert done.exit_code == 0, done.output
        assert not [path for path in output.iterdir() if path.name.startswith(".")]
        return json.loads(done.stdout), file_digest(output / "model.safetensors"), done.stderr

    return call


@pytest.fixture(scope="module")
def meta_model():
    from tests.conftest import tiny_config

    return build_meta_model(tiny_config("llama"))


@pytest.mark.parametrize("method", ["refit", "slicegpt"])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_no_place_changes_a_byte(slice_to, family, method, tmp_path):
    path = tmp_path / "map.json"
    path.write_text(json.dumps({"": "disk", "model.layers.1": "cpu"}))
    usual, digest, said = slice_to("--method", method, family=family)
    assert usual["placement"]["weights"] == {"": "disk"}
    assert usual["placement"]["activations"] == "device"
    assert "read from the checkpoint block by block" in said
    for words, place in (
        (["--activations", "disk"], "disk"),
        (["--device-map", path, "--activations", "host"], "host"),
        (["--device-map", "sequential", "--activations", "disk"], "disk"),
    ):
        report, other, said = slice_to("--method", method, *words, family=family)
        assert other == digest
        assert report["placement"]["activations"] == place
        assert ("weights are kept" in said) == ("--device-map" in words)


def test_max_memory_divides_the_model_between_memory_and_disk(slice_to):
    _, digest, _ = slice_to()
    report, other, said = slice_to("--max-memory", "cpu=200KB")
    assert other == digest
    assert set(report["placement"]["weights"].values()) == {"cpu", "disk"}
    assert "on cpu" in said and "on disk" in said


def test_a_dry_run_says_where_everything_would_be(run, checkpoints):
    done = run("slice", checkpoints(), "--dim", 36, "--dry-run", "--max-memory", "cpu=200KB", "--format", "json")
    assert done.exit_code == 0
    assert set(json.loads(done.stdout)["placement"]["weights"].values()) == {"cpu", "disk"}
    assert "weights are kept: " in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "not a device map"),
        ("{}", "not a device map"),
        ('{"": [1]}', "not a device map"),
        ('{"": true}', "not a device map"),
        ('{"": "moon"}', "no device 'moon'"),
        ('{"": 99}', "no device 'cuda:99'"),
        ('{"": "meta"}', "no device 'meta'"),
        ('{"": "disk", "model.layers.0.mlp": "cpu"}', "splits a block"),
        ('{"": "disk", "model.layers.7": "cpu"}', "does not have"),
        ('{"model": "cpu"}', "leaves out lm_head.weight"),
        ("{", "cannot be read"),
    ],
)
def test_maps_that_cannot_be_are_refused(run, checkpoints, tmp_path, content, message):
    path = tmp_path / "map.json"
    path.write_text(content)
    done = run("slice", checkpoints(), "--dim", 36, "--dry-run", "--device-map", path)
    assert done.exit_code == 2, done.output
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("text", ["", "cpu", "cpu=", "moon=1GB", "0=1GB,0=2GB", "-1=1GB", "cpu=lots"])
def test_sizes_that_cannot_be_are_refused(text):
    with pytest.raises(RequestError):
        parse_max_memory(text)


def test_sizes_belong_to_a_map_of_several_places(run, checkpoints, text_file):
    for words in (
        ("slice", checkpoints(), "--dim", 36, "--dry-run"),
        ("eval", checkpoints(), "--perplexity", text_file),
    ):
        done = run(*words, "--device-map", "cpu", "--max-memory", "cpu=1GB")
        assert done.exit_code == 2
        assert "--max-memory" in done.stderr
    assert parse_max_memory("0=20GiB, cpu=64GB") == {0: 20 * 2**30, "cpu": 64 * 10**9}


def test_a_map_without_a_file_is_the_name_of_one():
    assert read_device_map("cuda:1") == "cuda:1"
    with pytest.raises(RequestError, match="cannot be read"):
        read_device_map("missing.json")


def test_the_longest_name_that_fits_says_where_a_tensor_rests():
    places = Placement(CPU, {"": "disk", "model": "cpu", "model.layers.1": "disk"})
    assert places.rest_of("lm_head.weight") == "disk"
    assert places.rest_of("model.layers.0.mlp.up_proj.weight") == "cpu"
    assert places.rest_of("model.layers.1") == places.rest_of("model.layers.1.mlp.up_proj.weight") == "disk"
    assert places.rest_of("model.layers.11.x") == "cpu"


def test_a_map_in_a_line():
    places = {"a": 0, **{f"m.{number}": 0 if number < 3 else "disk" for number in range(5)}, "n": "cpu"}
    assert describe_map(places) == "a on cuda:0, m.0-2 on cuda:0, m.3-4 on disk, n on cpu"
    assert describe_map({"": "disk"}) == "everything on disk"


def test_the_first_gpu_of_a_map_computes(meta_model, monkeypatch):
    monkeypatch.setattr(placement, "pick_device", torch.device)
    places = {"model.embed_tokens": "cpu", "model.layers": 1, "model.norm": 0, "lm_head": "disk", "model.rotary_emb": 1}
    found = decide_placement(places, None, meta_model, "model.layers", torch.float32)
    assert found.device == torch.device("cuda:1")
    assert found.rest_of("model.layers.0.mlp.up_proj.weight") == "cuda:1"
    assert found.rest_of("model.norm.weight") == "cuda:0"


@pytest.mark.parametrize(
    ("device", "needed", "kept", "place"),
    [
        ("cuda:0", 50, 0, "device"),
        ("cuda:0", 50, 30, "host"),
        ("cuda:0", 70, 0, "host"),
        ("cuda:0", 700, 0, "disk"),
        ("cpu", 500, 0, "device"),
        ("cpu", 700, 0, "disk"),
    ],
)
def test_activations_are_kept_in_the_first_place_that_has_room(monkeypatch, device, needed, kept, place):
    free = {"cuda": 100, "cpu": 1000}
    monkeypatch.setattr(placement, "available_memory_bytes", lambda device: free[device.type])
    monkeypatch.setattr(placement, "MEMORY_SHARE", 0.6)
    places = Placement(torch.device(device))
    assert place_activations("auto", places, needed, {device: kept}).place == place
    assert place_activations("disk", places, needed, {}).place == "disk"


class Reader:
    """Weights that count how often each was read."""

    def __init__(self):
        self.read = []

    def names_in(self, path):
        return ["a", "b"]

    def tensor(self, name):
        self.read.append(name)
        return torch.full((2,), float(len(name)))


def test_what_rests_in_memory_is_read_once():
    reader = Reader()
    resting = OffloadedWeights(reader, Placement(CPU, {"": "disk", "x.1": "cpu"}).rest_of)
    for _ in range(3):
        assert resting.module("x.1")["a"].tolist() == [5.0, 5.0]
        resting.tensor("y")
    assert reader.read == ["x.1.a", "x.1.b", "y", "y", "y"]


@pytest.mark.parametrize("place", ["device", "host", "disk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_activations_hold_what_they_are_given(place, dtype, tmp_path):
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(rows, 3, 4, generator=generator).to(dtype) for rows in (2, 2, 1)]
    stream = ActivationStore(CPU, place, tmp_path).filled(iter(batches))
    assert len(stream) == 3
    for number, batch in enumerate(stream):
        assert torch.equal(batch, batches[number])
        stream[number] = batch + 1 if number else torch.cat([batch, batch])  # also one that is larger than before
    assert torch.equal(stream[0], torch.cat([batches[0]] * 2))
    assert torch.equal(stream[2], batches[2] + 1) and torch.equal(stream[-1], stream[2])
    del stream[1]
    assert [len(batch) for batch in stream] == [4, 1]
    stream.clear()
    assert len(stream) == 0 and list(stream) == []
    stream.append(batches[0].transpose(0, 1))
    assert torch.equal(stream[0], batches[0].transpose(0, 1))
    assert list(tmp_path.iterdir()) == []  # a file without a name


def test_tensors_are_written_one_by_one_into_a_file_that_anybody_reads(tmp_path):
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "wide": torch.randn(3, 5, generator=generator, dtype=torch.float64),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "state": generator.get_state(),
        "number": torch.tensor(2.5),
        "turned": torch.randn(4, 6, generator=generator).T,
    }
    path = tmp_path / "tensors.safetensors"
    write_tensors(path, tensors.items(), len(tensors))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, value in tensors.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)
    assert bytes(content_of(torch.ones(1))) == b"\x00\x00\x80\x3f"


def limited(most, error):
    """Work that takes only so many rows."""

    def work(piece):
        if len(piece) > most:
            raise error
        return piece * 2

    return work


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 5 bytes"),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_batches_go_in_halves_when_the_memory_runs_out(most, error):
    pieces, batch = MicroBatches(), torch.arange(22.0).reshape(11, 2)
    for _ in range(2):
        found = list(pieces.run(limited(most, error), batch))
        assert [rows.start for rows, _ in found] == [0, *(rows.stop for rows, _ in found)][:-1]
        assert torch.equal(concat([result for _, result in found]), batch * 2)
        assert max(len(result) for _, result in found) <= most
        assert 0 < pieces.most <= most


def test_a_batch_that_fits_is_not_divided():
    pieces, batch = MicroBatches(), torch.ones(5, 1)
    ((rows, result),) = pieces.run(lambda piece: piece, batch)
    assert result.data_ptr() == batch.data_ptr()
    assert concat([result]) is result
    assert (rows.start, rows.stop, pieces.most) == (0, 5, None)


def test_what_no_smaller_batch_helps_against_is_raised():
    with pytest.raises(torch.OutOfMemoryError):
        list(MicroBatches().run(limited(0, OUT_OF_MEMORY[0]), torch.ones(4, 1)))
    with pytest.raises(RuntimeError, match="something else"):
        list(MicroBatches().run(limited(0, RuntimeError("something else")), torch.ones(4, 1)))


@pytest.fixture
def little_memory(monkeypatch):
    """Let attention run out of memory with more than two rows."""
    forward = LlamaAttention.forward

    def limited_forward(self, hidden_states, *arguments, **named):
        if len(hidden_states) > 2 and hidden_states.shape[1] >= 30:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
        return forward(self, hidden_states, *arguments, **named)

    monkeypatch.setattr(LlamaAttention, "forward", limited_forward)


@pytest.mark.parametrize("method", ["refit", "slicegpt"])
def test_slicing_goes_on_in_halves_when_the_memory_runs_out(slice_to, request, tmp_path, method):
    slice_to("--method", method, "--batch-size", "7")
    request.getfixturevalue("little_memory")
    _, _, said = slice_to("--method", method, "--batch-size", "7")
    assert "ran out with 7 rows per batch; the run continued with 1" in said
    usual, divided = (load_file(tmp_path / name / "model.safetensors") for name in ("out0", "out1"))
    for name, value in usual.items():
        assert float((divided[name] - value).norm()) <= 5e-3 * float(value.norm()), name


def test_measuring_goes_on_in_halves_when_the_memory_runs_out(run, checkpoints, text_file, request):
    words = ["--perplexity", text_file, "--tasks", "demo", "--limit", "6", "--seq-len", "32", "--format", "json"]
    found = [json.loads(run("eval", checkpoints(), *words, "--batch-size", "6").stdout)]
    request.getfixturevalue("little_memory")
    found.append(json.loads(run("eval", checkpoints(), *words, "--batch-size", "6").stdout))
    values = [document["perplexity"][text_file.name]["value"] for document in found]
    assert values[1] == pytest.approx(values[0], rel=1e-5)
    tasks = [document["tasks"] for document in found]
    assert tasks[0].keys() == tasks[1].keys() and tasks[0]


def test_a_spectrum_goes_on_in_halves_when_the_memory_runs_out(run, checkpoints, text_file, request):
    words = ["--calibration", text_file, "--samples", "7", "--seq-len", "32", "--batch-size", "7", "--format", "json"]
    found = [json.loads(run("spectrum", checkpoints(), *words).stdout)]
    request.getfixturevalue("little_memory")
    found.append(json.loads(run("spectrum", checkpoints(), *words).stdout))
    assert found[1]["dense"]["nll"] == pytest.approx(found[0]["dense"]["nll"], rel=1e-6)
    for usual, divided in zip(*(document["spectrum"] for document in found), strict=True):
        assert divided["fisher"] == pytest.approx(usual["fisher"], rel=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_is_partly_on_disk_is_measured_alike(run, checkpoints, text_file, tmp_path, dtype):
    from slicecli.api import load

    model, _ = load(str(checkpoints()))
    folder = tmp_path / "model"
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((checkpoints() / name).read_bytes())
    words = [folder, "--perplexity", text_file, "--limit", "6", "--seq-len", "32", "--format", "json"]
    usual = run("eval", *words)
    assert usual.exit_code == 0, usual.output
    path = tmp_path / "map.json"
    path.write_text(json.dumps(MAP))
    for more in (["--max-memory", "cpu=200KB"], ["--device-map", path]):
        spread = run("eval", *words, *more)
        assert spread.exit_code == 0, spread.output
        assert "on disk" in spread.stderr
        values = [json.loads(done.stdout)["perplexity"][text_file.name]["value"] for done in (usual, spread)]
        assert values[1] == pytest.approx(values[0], rel=1e-6)


def fake_dense(module):
    return SimpleNamespace(
        device=CPU, weights=SimpleNamespace(module=module), block_name=lambda index: f"blocks.{index}"
    )


def test_blocks_are_read_while_the_one_before_is_worked_on():
    begun = {name: threading.Event() for name in ("blocks.3", "blocks.2", "blocks.1")}

    def module(name):
        begun[name].set()
        return {"weight": torch.tensor(float(name[-1]))}

    seen = []
    for index, weights in read_blocks(fake_dense(module), [3, 2, 1]):
        if index > 1:
            assert begun[f"blocks.{index - 1}"].wait(10)
        seen.append((index, float(weights["weight"])))
    assert seen == [(3, 3.0), (2, 2.0), (1, 1.0)]
    assert list(read_blocks(fake_dense(module), [])) == []


def test_a_block_that_cannot_be_read_ends_the_pass_when_it_is_its_turn():
    def module(name):
        if name == "blocks.1":
            raise WeightsError("damaged", "")
        return {}

    seen = []
    with pytest.raises(WeightsError, match="damaged"):
        for index, _ in read_blocks(fake_dense(module), range(3)):
            seen.append(index)
    assert seen == [0]
    assert not any(thread.name.startswith("slicecli-block") for thread in threading.enumerate())
