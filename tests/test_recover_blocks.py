"""Training a slice block by block: what it wins, what it leaves as it was, and what an interruption costs."""

from __future__ import annotations

import json
import random
import shlex

import pytest
import torch
from conftest import disturb, tiny_model
from test_recover import Stop, held_out_divergence, slice_maker, tensors
from test_resume import after_lines, in_child

import slicecli
from slicecli.checkpoint.source import Source
from slicecli.errors import OutputError, RequestError, TrainingError
from slicecli.hub.verify import verify_folder
from slicecli.testing.checkpoints import save_checkpoint

BLOCKS = {"mode": "blocks", "tokens": 3072, "sequence_length": 32, "batch_size": 256, "learning_rate": 1e-3}


@pytest.fixture(scope="module")
def slices(tmp_path_factory, text_file):
    def disturb_blocks(folder, kind):
        disturb(folder, only="layers" if kind != "custom-code" else ".h.")

    return slice_maker(tmp_path_factory, text_file, disturb_blocks)


@pytest.fixture
def recover(slices, text_file, tmp_path):
    """Return a function that trains the blocks of the slice of a kind of model."""

    def call(kind="stock", **options):
        dense, folder = slices(kind)
        given = {"teacher": str(dense), "output": tmp_path / "recovered", "data": str(text_file), **BLOCKS, **options}
        return slicecli.recover(str(folder), **given)

    return call


@pytest.mark.parametrize("kind", ["stock", "tied", "custom-code", "experts"])
def test_a_slice_follows_its_teacher_better_and_stays_what_it_was(kind, slices, recover, text_file):
    dense, folder = slices(kind)
    report = recover(kind)
    assert report.kl_after < 0.95 * report.kl_before
    assert held_out_divergence(folder, dense, text_file) == pytest.approx(report.kl_before, rel=1e-4)
    assert held_out_divergence(report.output, dense, text_file) == pytest.approx(report.kl_after, rel=1e-4)
    assert tensors(report.output) == tensors(folder)
    assert (report.output / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert not [one.text for one in verify_folder(report.output) if one.is_error]


def test_a_slice_with_shortcuts_keeps_them_and_trains_them(slices, text_file, tmp_path):
    dense, folder = slices("stock", method="slicegpt")
    report = slicecli.recover(str(folder), str(dense), output=tmp_path / "out", data=str(text_file), **BLOCKS)
    assert report.kl_after < report.kl_before
    assert tensors(report.output) == tensors(folder)
    before, after = (loaded(one) for one in (folder, report.output))
    assert not torch.equal(before["model.layers.1.shortcuts.0.weight"], after["model.layers.1.shortcuts.0.weight"])


def test_a_slice_with_fewer_mlp_channels_keeps_their_number(slices, text_file, tmp_path):
    dense, folder = slices("stock", mlp_dim=48)
    report = slicecli.recover(str(folder), str(dense), output=tmp_path / "out", data=str(text_file), **BLOCKS)
    assert report.kl_after < report.kl_before
    assert tensors(report.output) == tensors(folder)


def loaded(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_embeddings_and_head_stay_as_they_are(slices, recover):
    before, after = loaded(slices()[1]), loaded(recover().output)
    differing = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert {name for name in before if name.startswith(("model.layers.", "model.norm."))} == differing


def test_the_record_says_how_each_block_fared(recover):
    report = recover()
    (entry,) = json.loads((report.output / "slicecli.json").read_text())["recovery"]
    assert entry["mode"] == "blocks" and entry["epochs"] == 4
    assert len(entry["block_errors"]) == 2
    assert all(one["after"] <= one["before"] for one in entry["block_errors"])
    assert entry["tokens"] == 4 * 3072 and "--epochs 4" in entry["command"] and "--tokens 3072" in entry["command"]
    assert "one block after the other" in (report.output / "README.md").read_text()


def test_contradictions_in_its_record_are_found(recover):
    path = recover().output / "slicecli.json"
    record = json.loads(path.read_text())
    (entry,) = record["recovery"]
    path.write_text(json.dumps({**record, "recovery": [{**entry, "epochs": 3}]}))
    (found,) = [one.text for one in verify_folder(path.parent) if one.check == "counts"]
    assert "3 epochs of 3,072 tokens are not 12,288" in found


def test_activations_on_disk_change_nothing(recover, tmp_path):
    held, stored = recover(), recover(activations="disk", output=tmp_path / "stored")
    assert loaded(held.output).keys() == loaded(stored.output).keys()
    for name, value in loaded(held.output).items():
        assert torch.equal(value, loaded(stored.output)[name])


def test_a_result_no_better_than_the_slice_is_not_written(slices, text_file, tmp_path, monkeypatch):
    from slicecli.recovery.blocks import _Run

    dense, folder = slices()
    found = iter([0.1, 0.2])
    monkeypatch.setattr(_Run, "divergence", lambda _run: next(found))
    with pytest.raises(TrainingError, match=r"was 0\.1000 before and is 0\.2000 after") as caught:
        slicecli.recover(str(folder), str(dense), output=tmp_path / "out", data=str(text_file), **BLOCKS)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_no_number_ends_a_block_and_its_best_state_is_kept(recover, monkeypatch):
    from slicecli.recovery.block_training import BlockTraining

    own = BlockTraining._has_finite_gradient
    monkeypatch.setattr(BlockTraining, "_has_finite_gradient", lambda self: self.index != 1 and own(self))
    report = recover()
    (warning,) = report.warnings
    assert "not a number at step 1 of block 2" in warning
    assert report.kl_after < report.kl_before


def test_an_interrupted_run_goes_on_to_the_same_weights(recover, tmp_path, monkeypatch):
    monkeypatch.setenv("SLICECLI_JOURNAL_SECONDS", "0")
    whole = recover(output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        recover(progress=Stop(12, KeyboardInterrupt()))
    assert not (tmp_path / "recovered").exists()
    rest = Stop(0, None)
    resumed = recover(resume=True, progress=rest)
    assert rest.steps.count("done before") == 8
    assert resumed.kl_after == pytest.approx(whole.kl_after, abs=1e-6)
    for name, value in loaded(whole.output).items():
        assert torch.equal(value, loaded(resumed.output)[name])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recovered", "whole"]
    assert {path.name for path in whole.output.iterdir()} == {path.name for path in resumed.output.iterdir()}


def test_an_interrupted_run_does_not_go_on_with_other_options(recover, monkeypatch):
    monkeypatch.setenv("SLICECLI_JOURNAL_SECONDS", "0")
    with pytest.raises(KeyboardInterrupt):
        recover(progress=Stop(12, KeyboardInterrupt()))
    with pytest.raises(OutputError, match="epochs differed"):
        recover(resume=True, epochs=2)


def test_a_teacher_of_other_blocks_is_refused(recover, tmp_path):
    other = save_checkpoint(tiny_model("llama", num_hidden_layers=2), tmp_path / "other")
    with pytest.raises(RequestError, match=r"slice has 3 blocks of width 32, the teacher other 2 of width 48"):
        recover(teacher=str(other))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"eval_every": 3}, "--eval-every"),
        ({"mode": "full", "epochs": 2}, "--epochs"),
        ({"mode": "lora", "activations": "disk"}, "--activations"),
        ({"epochs": 0}, "0 epochs are too few"),
    ],
)
def test_options_of_another_mode_are_refused(recover, options, reason):
    with pytest.raises(RequestError, match=reason):
        recover(**options)


def test_the_map_of_a_stream_is_found_although_the_slice_loses_some_of_it():
    from slicecli.linalg.stream_map import StreamMap

    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(12, 8, generator=generator, dtype=torch.float64))
    dense = torch.randn(4000, 12, generator=generator) * torch.linspace(1, 3, 12)
    kept = torch.linspace(0.5, 1.0, 8)  # of each direction the slice has lost a share
    sums = StreamMap(12, 8, torch.device("cpu"))
    sums.add(dense, 0.7 * (dense.double() @ basis).float() * kept, torch.ones(4000, 1))
    torch.testing.assert_close(sums.solve(0.7), 0.7 * basis, atol=1e-4, rtol=0)


def test_what_blocks_write_tells_the_map_of_a_refitted_stream():
    from slicecli.linalg.stream_map import StreamMap, WrittenStreamMap

    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    basis, _ = torch.linalg.qr(drawn(12, 8))
    wanted, ones = 0.7 * basis, torch.ones(4000, 1)
    written_sums, plain_sums = WrittenStreamMap(12, 8, torch.device("cpu")), StreamMap(12, 8, torch.device("cpu"))
    dense = drawn(4000, 12)
    sliced = dense @ wanted * 0.8
    for _ in range(8):
        inner = drawn(4000, 10)
        dense = dense + torch.tanh(inner @ drawn(10, 12) + drawn(4000, 12))
        fit = torch.linalg.lstsq(inner, dense @ wanted - sliced).solution  # the slice sees but a part of what enters
        sliced, written = sliced + inner @ fit, inner @ fit
        written_sums.add(dense, sliced, written, ones)
        written_sums.finish_block()
        plain_sums.add(dense, sliced, ones)
    torch.testing.assert_close(written_sums.solve(), wanted, atol=1e-4, rtol=0)
    assert (plain_sums.solve(0.7) - wanted).abs().max() > 1e-2


def test_blocks_that_write_nothing_do_not_tell_the_map():
    from slicecli.linalg.stream_map import WrittenStreamMap

    sums = WrittenStreamMap(6, 4, torch.device("cpu"))
    for _ in range(5):
        sums.add(torch.randn(20, 6), torch.randn(20, 4), torch.zeros(20, 4), torch.ones(20, 1))
        sums.finish_block()
    with pytest.raises(TrainingError, match="write next to nothing"):
        sums.solve()


def test_a_direction_that_nothing_goes_to_stays_empty():
    from slicecli.linalg.stream_map import StreamMap

    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(12, 7, generator=generator, dtype=torch.float64))
    turn, _ = torch.linalg.qr(torch.randn(8, 7, generator=generator, dtype=torch.float64))
    dense = torch.randn(1000, 12, generator=generator, dtype=torch.float64)
    sums = StreamMap(12, 8, torch.device("cpu"))
    sums.add(dense, dense @ basis @ turn.T, torch.ones(1000, 1, dtype=torch.float64))
    torch.testing.assert_close(sums.solve(1.0), basis @ turn.T, atol=1e-5, rtol=0)


@pytest.fixture
def slice_words(slices, text_file):
    dense, _ = slices()
    return ["slice", dense, "--dim", "32", "--calibration", text_file, "--samples", "32", "--seq-len", "32"]


def test_a_slice_is_trained_in_the_run_that_makes_it(run, slice_words, text_file, tmp_path, monkeypatch):
    from slicecli.recovery.blocks import _Run

    found = iter([0.2, 0.1])  # of random models the refit leaves nothing to be won
    monkeypatch.setattr(_Run, "divergence", lambda _run: next(found))
    done = run(*slice_words, "--batch-size", "8", "-o", tmp_path / "out", "--recover", "blocks", "--format", "json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.stdout)
    assert report["recovery"]["output"] == str(tmp_path / "out-recovered")
    records = [json.loads((tmp_path / name / "slicecli.json").read_text()) for name in ("out", "out-recovered")]
    assert "recovery" not in records[0]
    (entry,) = records[1]["recovery"]
    assert entry["slice"]["content"] == Source.find(str(tmp_path / "out")).content
    assert entry["text"] == text_file.name and entry["epochs"] == 4


def test_where_the_trained_slice_would_lie_is_checked_before_it_is_sliced(run, slice_words, tmp_path):
    (tmp_path / "out-recovered").mkdir()
    (tmp_path / "out-recovered" / "mine.txt").write_text("mine")
    done = run(*slice_words, "-o", tmp_path / "out", "--recover", "blocks")
    assert done.exit_code == 1 and "out-recovered" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["out-recovered"]


def test_how_to_go_on_with_the_training_of_a_finished_slice_is_said(run, slice_words, tmp_path, monkeypatch):
    monkeypatch.setenv("SLICECLI_JOURNAL_SECONDS", "0")
    from slicecli.recovery.block_training import BlockTraining

    def interrupted(self, *arguments):
        if self.index == 2:
            raise KeyboardInterrupt
        return own(self, *arguments)

    own = BlockTraining.train
    with monkeypatch.context() as patch:
        patch.setattr(BlockTraining, "train", interrupted)
        done = run(*slice_words, "-o", tmp_path / "out", "--recover", "blocks")
    assert done.exit_code != 0
    (line,) = [one for one in done.stderr.splitlines() if "to continue, run slicecli recover" in one]
    words = shlex.split(line.partition("run slicecli ")[2].rstrip("."))
    again = run(*words)
    assert "done before" in again.stderr


@pytest.mark.slow
def test_a_run_that_was_killed_reaches_the_same_weights(slices, text_file, tmp_path):
    dense, folder = slices()
    log = tmp_path / "log"

    def words(output):
        given = ["recover", folder, "--teacher", dense, "--data", text_file, "-o", output, "--resume"]
        return [*given, "--mode", "blocks", "--lr", "1e-3", "--tokens", "3k", "--seq-len", "32", "--batch-size", "256"]

    assert in_child(words(tmp_path / "whole"), log, SLICECLI_JOURNAL_SECONDS="0") == 0, log.read_text()
    lines = log.read_text().count("\n")
    generator = random.Random(0)
    for _ in range(10):
        moment = after_lines(log, generator.randrange(lines), generator.uniform(0, 0.05))
        in_child(words(tmp_path / "killed"), log, kill_when=moment, SLICECLI_JOURNAL_SECONDS="0")
        if (tmp_path / "killed").exists():
            break
    else:
        assert in_child(words(tmp_path / "killed"), log) == 0, log.read_text()
    for name, value in loaded(tmp_path / "whole").items():
        assert torch.equal(value, loaded(tmp_path / "killed")[name])
    assert not list(tmp_path.glob(".*"))
