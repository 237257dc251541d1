"""Training a slice: what it wins, what it leaves as it was, what it refuses, and what an interruption costs."""

from __future__ import annotations

import errno
import json
import random
import shutil

import pytest
import torch
from conftest import disturb, tiny_config, tiny_model
from test_resume import after_lines, in_child

import slicecli
from slicecli.checkpoint.folder import unfinished_folder
from slicecli.checkpoint.loading import load_model
from slicecli.checkpoint.source import Source
from slicecli.errors import OutputError, RequestError, TextError, TrainingError
from slicecli.hub.verify import verify_folder
from slicecli.proof.tiny import random_model
from slicecli.recovery.block_training import WARM_UP_SHARE
from slicecli.testing.checkpoints import save_checkpoint

GPT2 = {
    "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 300, "bos_token_id": 0,
    "eos_token_id": 1,
}  # fmt: skip
MIXTRAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2}
QUICK = {"tokens": 3072, "sequence_length": 32, "batch_size": 256, "learning_rate": 2e-3}


def dense_model(kind):
    import transformers

    if kind == "custom-code":
        return random_model(transformers.GPT2Config(**GPT2), 0)
    if kind == "experts":
        return random_model(transformers.MixtralConfig(**(tiny_config("llama").to_dict() | MIXTRAL)), 0)
    return tiny_model("llama-tied" if kind == "tied" else "llama")


def slice_maker(tmp_path_factory, text_file, disturbed=lambda folder, kind: disturb(folder)):
    """Return a function that gives the folders of a tiny dense model and of its slice, which is easy to better."""
    made = {}

    def make(kind="stock", **options):
        key = kind, *options.items()
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            dense = save_checkpoint(dense_model(kind), folder / "dense")
            given = {"calibration": str(text_file), "samples": 24, "sequence_length": 32, **options}
            slicecli.slice_model(str(dense), dim=32, output=folder / "slice", **given)
            disturbed(folder / "slice", kind)
            made[key] = dense, folder / "slice"
        return made[key]

    return make


@pytest.fixture(scope="module")
def slices(tmp_path_factory, text_file):
    return slice_maker(tmp_path_factory, text_file)


@pytest.fixture
def recover(slices, text_file, tmp_path):
    """Return a function that trains the slice of a kind of model with a few tokens."""

    def call(kind="stock", **options):
        dense, folder = slices(kind)
        given = {"teacher": str(dense), "output": tmp_path / "recovered", "data": str(text_file), **QUICK, **options}
        return slicecli.recover(str(folder), **given)

    return call


def tensors(folder):
    return {name: (one.dtype, one.shape) for name, one in Source.find(str(folder)).stored_tensors().items()}


@torch.no_grad()
def held_out_divergence(folder, teacher, text_file):
    """Compute the divergence on the held-out rows of a run in float64."""
    from slicecli.data.text import read_text
    from slicecli.recovery.data import draw_rows, fitted_rows

    source = Source.find(str(folder))
    text, record = read_text(str(text_file), "calibration"), json.loads((folder / "slicecli.json").read_text())
    fitted = fitted_rows(text, source.tokenizer(), record["calibration"])
    ids = draw_rows(text, source.tokenizer(), 32, 12, 8, 42, fitted).held_out.ids
    models = [load_model(one) for one in (source, Source.find(str(teacher)))]
    own, other = (torch.log_softmax(model(ids).logits[:, :-1].double(), -1) for model in models)
    return float((other.exp() * (other - own)).sum(-1).mean())


@pytest.mark.parametrize("kind", ["stock", "tied", "custom-code", "experts"])
def test_a_slice_predicts_more_like_its_teacher_and_stays_what_it_was(kind, slices, recover, text_file):
    dense, folder = slices(kind)
    report = recover(kind)
    assert report.kl_after < 0.95 * report.kl_before
    assert held_out_divergence(folder, dense, text_file) == pytest.approx(report.kl_before, rel=1e-4)
    assert held_out_divergence(report.output, dense, text_file) == pytest.approx(report.kl_after, rel=1e-4)
    assert tensors(report.output) == tensors(folder)
    assert (report.output / "config.json").read_bytes() == (folder / "config.json").read_bytes()
    assert {path.name for path in folder.iterdir()} == {path.name for path in report.output.iterdir()} - {"plots"}
    assert not [one.text for one in verify_folder(report.output) if one.is_error]
    model = load_model(Source.find(str(report.output)))
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == (
        kind in {"tied", "custom-code"} and model.config.tie_word_embeddings
    )


@pytest.mark.parametrize("kind", ["stock", "custom-code"])
def test_adapters_are_merged_into_the_weights(kind, slices, recover, text_file):
    pytest.importorskip("peft")
    dense, folder = slices(kind)
    report = recover(kind, mode="lora", learning_rate=5e-3)
    assert report.kl_after < report.kl_before
    assert held_out_divergence(report.output, dense, text_file) == pytest.approx(report.kl_after, rel=1e-4)
    assert tensors(report.output) == tensors(folder)


def test_weights_keep_their_dtype_and_the_figure_is_of_the_rounded_ones(slices, text_file, tmp_path):
    dense, _ = slices()
    options = {"calibration": str(text_file), "samples": 24, "sequence_length": 32, "dtype": "bfloat16"}
    slicecli.slice_model(str(dense), dim=32, output=tmp_path / "slice", **options)
    disturb(tmp_path / "slice")
    report = slicecli.recover(
        str(tmp_path / "slice"), str(dense), output=tmp_path / "recovered", data=str(text_file), **QUICK
    )
    assert {dtype for dtype, _ in tensors(report.output).values()} == {"BF16"}
    assert held_out_divergence(report.output, dense, text_file) == pytest.approx(report.kl_after, rel=1e-3)


def test_the_record_says_what_was_trained_on_what(slices, recover):
    _, folder = slices()
    before = json.loads((folder / "slicecli.json").read_text())
    report = recover()
    record = json.loads((report.output / "slicecli.json").read_text())
    (entry,) = record["recovery"]
    assert entry["slice"]["content"] == Source.find(str(folder)).content
    assert entry["teacher"]["content"] == before["source"]["content"]
    assert entry["tokens"] == entry["steps"] * entry["tokens_per_step"] == 3072
    assert entry["kl_before"] == report.kl_before and entry["kl_after"] == report.kl_after
    assert entry["history"][0] == {"tokens": 0, "kl": report.kl_before}
    assert entry["history"][-1]["tokens"] == 3072
    assert entry["command"].startswith("slicecli recover slice --teacher dense ")
    kept = ("source", "command", "dim", "parameters", "calibration", "energy", "is_tied", "layout")
    assert all(record[name] == before[name] for name in kept)
    assert record["weights"] != before["weights"]


def test_a_recovered_slice_can_be_recovered_again(slices, recover, text_file, tmp_path):
    dense, _ = slices()
    first = recover()
    again = slicecli.recover(
        str(first.output), str(dense), output=tmp_path / "again", data=str(text_file), **{**QUICK, "seed": 7}
    )
    record = json.loads((again.output / "slicecli.json").read_text())
    assert [one["slice"]["model"] for one in record["recovery"]] == ["slice", "recovered"]
    assert not [one.text for one in verify_folder(again.output) if one.is_error]


def test_a_recovered_slice_can_be_sliced_again_and_recovered_again(slices, recover, text_file, tmp_path):
    first = recover()
    options = {"calibration": str(text_file), "samples": 24, "sequence_length": 32}
    slicecli.slice_model(str(first.output), dim=24, output=tmp_path / "narrower", **options)
    disturb(tmp_path / "narrower")
    again = slicecli.recover(
        str(tmp_path / "narrower"), str(slices()[0]), output=tmp_path / "again", data=str(text_file), **QUICK
    )
    records = [json.loads((one / "slicecli.json").read_text()) for one in (tmp_path / "narrower", again.output)]
    assert "recovery" not in records[0] and len(records[1]["recovery"]) == 1
    assert all([one["trained_tokens"] for one in record["ancestry"]] == [3072] for record in records)
    for record, folder in zip(records, (tmp_path / "narrower", again.output), strict=True):
        card = (folder / "README.md").read_text()
        assert "then trained on 3,072 tokens" in card and "nothing was trained" not in card
        assert record["source"]["content"] == Source.find(str(first.output)).content
    assert not [one.text for one in verify_folder(again.output) if one.is_error]


def test_figures_of_the_slice_before_stay_apart(run, slices, text_file, tmp_path):
    dense, folder = slices()
    measured = Source.find(str(shutil.copytree(folder, tmp_path / "measured"))).folder
    quick = ["--perplexity", text_file, "--limit", "4", "--seq-len", "32"]
    assert run("eval", measured, *quick, "--baseline", dense, "--record").exit_code == 0
    report = slicecli.recover(str(measured), str(dense), output=tmp_path / "recovered", data=str(text_file), **QUICK)
    record = json.loads((report.output / "slicecli.json").read_text())
    before = json.loads((measured / "slicecli.json").read_text())["results"]
    (entry,) = record["recovery"]
    assert "perplexity" not in record["results"]
    assert entry["results"]["perplexity"] == before["perplexity"]
    assert record["results"]["dense"] == before["dense"]
    assert record["curve"] is None and record["predictions"] == []
    assert run("eval", report.output, *quick, "--baseline", dense, "--record").exit_code == 0
    record = json.loads((report.output / "slicecli.json").read_text())
    assert record["curve"] is None
    figures = (record["results"]["dense"], before, record["results"])
    cells = " | ".join(f"{one['perplexity'][text_file.name]['value']:.3f}" for one in figures)
    card = (report.output / "README.md").read_text()
    assert "| | dense | sliced | recovered |" in card
    row = next(line for line in card.splitlines() if line.startswith(f"| `{text_file.name}`"))
    assert [cell.split(" ")[0] for cell in row.split(" | ")[1:]] == cells.split(" | ")
    assert not [one.text for one in verify_folder(report.output) if one.is_error]


def test_curves_leave_recovered_slices_out(slices, recover, text_file):
    from slicecli.estimation.results import series_of

    dense, folder = slices()
    report = recover()
    options = {"limit": 4, "sequence_length": 32}
    documents = [
        json.loads(json.dumps(slicecli.evaluate(str(one), [str(text_file)], **options).to_json()))
        for one in (dense, folder, report.output)
    ]
    assert [one["is_recovered"] for one in documents] == [False, False, True]
    (group,) = series_of(documents)
    (alone,) = series_of(documents[:2])
    assert group.series.points == alone.series.points


def test_a_result_no_better_than_the_slice_is_not_written(recover, tmp_path):
    with pytest.raises(TrainingError, match=r"was \d+\.\d{4} before and is \d+\.\d{4} after") as caught:
        recover(learning_rate=0.9)
    assert caught.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def nan_from(monkeypatch, call):
    """Let the loss be NaN from one call on."""
    from slicecli.recovery import teacher

    calls = []

    def loss(student, expected):
        calls.append(None)
        found = divergence(student, expected)
        return found * float("nan") if student.requires_grad and len(calls) >= call else found

    divergence = teacher.next_token_divergence
    monkeypatch.setattr(teacher, "next_token_divergence", loss)


def test_a_loss_that_is_no_number_stops_training_and_the_best_state_is_kept(recover, monkeypatch):
    nan_from(monkeypatch, 15)
    report = recover(eval_every=2)
    (warning,) = report.warnings
    assert "was not a number at step" in warning and f"of step {report.best_step}" in warning
    assert report.best_step % 2 == 0 and report.tokens < 3072
    assert report.kl_after < report.kl_before


def test_a_loss_that_is_no_number_from_the_start_writes_nothing(recover, monkeypatch, tmp_path):
    nan_from(monkeypatch, 0)
    with pytest.raises(TrainingError, match="not a number at step 1"):
        recover()
    assert list(tmp_path.iterdir()) == []


class Stop:
    """A progress that raises at some step of the training."""

    def __init__(self, step, error):
        self.step, self.error, self.steps = step, error, []

    def start(self, phase, total):
        self.total = total

    def advance(self, detail=""):
        self.steps.append(detail)
        if len(self.steps) == self.step:
            raise self.error

    def note(self, text):
        pass


def test_an_interrupted_training_goes_on_to_the_same_divergence(recover, tmp_path):
    whole = recover(output=tmp_path / "whole", eval_every=3)
    with pytest.raises(KeyboardInterrupt):
        recover(progress=Stop(8, KeyboardInterrupt()), eval_every=3)
    assert not (tmp_path / "recovered").exists()
    rest = Stop(0, None)
    resumed = recover(resume=True, progress=rest, eval_every=3)
    assert rest.total == len(rest.steps) == 6
    assert resumed.kl_after == pytest.approx(whole.kl_after, abs=1e-5)
    assert dict(resumed.history) == pytest.approx(dict(whole.history))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["recovered", "whole"]
    assert not list(resumed.output.rglob("*checkpoint*"))


def test_an_interrupted_training_does_not_go_on_with_other_options(recover, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        recover(progress=Stop(8, KeyboardInterrupt()), eval_every=3)
    with pytest.raises(OutputError, match="learning_rate differed"):
        recover(resume=True, learning_rate=1e-3, eval_every=3)
    assert recover(resume=True, eval_every=3).kl_after > 0


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_with(recover, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        recover(progress=Stop(8, KeyboardInterrupt()), eval_every=3)
    training = unfinished_folder(tmp_path / "recovered") / ".training"
    cut = training / "checkpoint-9"
    cut.mkdir()
    (cut / "trained.safetensors").write_bytes(b"half")
    rest = Stop(0, None)
    recover(resume=True, progress=rest, eval_every=3)
    assert rest.total == 6


def test_a_failure_leaves_nothing_behind(recover, tmp_path):
    with pytest.raises(slicecli.SlicecliError):
        recover(progress=Stop(8, RuntimeError("out of luck")), eval_every=3)
    assert list(tmp_path.iterdir()) == []


def test_a_teacher_of_another_vocabulary_is_refused(recover, tmp_path):
    other = save_checkpoint(tiny_model("llama", vocab_size=310), tmp_path / "other")
    with pytest.raises(RequestError, match="slice has 300 tokens, the teacher other 310"):
        recover(teacher=str(other))
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_a_teacher_with_another_tokenizer_is_refused(recover, slices, tmp_path):
    dense, _ = slices()
    other = shutil.copytree(dense, tmp_path / "other")
    path = other / "tokenizer.json"
    fields = json.loads(path.read_text())
    vocabulary = fields["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(fields))
    with pytest.raises(RequestError, match="slice and of the teacher other give different tokens"):
        recover(teacher=str(other))


def test_a_model_without_a_record_is_no_slice(slices, tmp_path):
    dense, _ = slices()
    with pytest.raises(RequestError, match="not known as a slice"):
        slicecli.recover(str(dense), str(dense), output=tmp_path / "recovered")


def test_a_teacher_of_which_only_the_name_is_known_has_to_be_passed(recover):
    with pytest.raises(RequestError, match=r"only the name 'dense' is recorded.*--teacher"):
        recover(teacher=None)


def test_a_text_that_is_too_short_says_how_many_tokens_it_has(recover, tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("A few words. " * 10)
    with pytest.raises(TextError, match=r"has 128 tokens .* take 288"):
        recover(data=str(short))


def test_a_short_text_is_read_again(recover):
    report = recover(tokens=40_000, eval_every=60, learning_rate=5e-4)
    assert report.tokens == 39_936
    (warning,) = report.warnings
    assert "each is read" in warning


def test_all_logits_stored_train_as_the_teacher_itself_does(recover, tmp_path):
    live = recover(output=tmp_path / "live")
    stored = recover(output=tmp_path / "stored", store_logits=300, cache_folder=tmp_path / "cache")
    assert dict(stored.history) == pytest.approx(dict(live.history), rel=1e-4)
    assert json.loads((stored.output / "slicecli.json").read_text())["recovery"][0]["stored_logits"] == 300


def test_stored_logits_are_a_lower_bound_and_are_used_again(recover, tmp_path, monkeypatch):
    live = recover(output=tmp_path / "live")
    options = {"store_logits": 8, "cache_folder": tmp_path / "cache"}
    first = recover(output=tmp_path / "first", **options)
    assert first.kl_before < live.kl_before
    (path,) = (tmp_path / "cache").iterdir()
    # 96 rows to train on and 5 held out, of each 31 predictions of 8 tokens and one sum
    assert 0 < path.stat().st_size - (96 + 5) * 31 * (8 * 8 + 4) < 1000
    monkeypatch.setattr("slicecli.recovery.teacher.store_logits", None)
    assert recover(output=tmp_path / "second", **options).kl_after == first.kl_after


def test_logits_that_do_not_fit_the_disk_leave_nothing_behind(recover, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(OutputError, match=r"predictions cannot be stored .*: No space left on device"):
        recover(store_logits=8, cache_folder=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_what_stored_logits_take_is_said_before(run, slices, text_file, tmp_path):
    dense, folder = slices()
    words = ["recover", folder, "--teacher", dense, "--data", text_file, "--tokens", "3k", "--seq-len", "32"]
    found = run(*words, "--batch-size", "256", "--store-logits", "100", "--cache-dir", tmp_path, "--dry-run")
    assert "GB on disk for 100 of the teacher's logits" in found.stderr
    too_many = run(*words, "--store-logits", "301", "--cache-dir", tmp_path, "--dry-run")
    assert too_many.exit_code == 2 and "301 logits are more than the 300 tokens" in too_many.stderr


def test_adapters_need_peft(recover, monkeypatch):
    monkeypatch.setattr("slicecli.jobs.recovery_plan.find_spec", lambda _name: None)
    with pytest.raises(RequestError, match=r"requires peft.*slicecli\[lora\]"):
        recover(mode="lora")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch_size": 16}, "has 0 rows of 32 tokens"),
        ({"tokens": 100}, "less than one step"),
        ({"sequence_length": 4096}, "exceeds the limit"),
        ({"learning_rate": 0.0}, "out of range"),
        ({"mode": "half"}, "not a mode"),
    ],
)
def test_numbers_that_cannot_be_are_refused(recover, options, reason):
    with pytest.raises(RequestError, match=reason):
        recover(**options)


def test_the_output_may_not_replace_what_it_is_made_from(recover, slices):
    dense, folder = slices()
    for output in (dense, folder):
        with pytest.raises(OutputError, match="would overwrite"):
            recover(output=output, overwrite=True)


def test_the_command_reports_in_json_and_a_rehearsal_writes_nothing(run, slices, text_file, tmp_path):
    dense, folder = slices()
    quick = ["--data", text_file, "--tokens", "3k", "--seq-len", "32", "--batch-size", "256", "--lr", "2e-3"]
    words = ["recover", folder, "--teacher", dense, *quick, "-o", tmp_path / "recovered", "--format", "json"]
    planned = run(*words, "--dry-run")
    assert json.loads(planned.stdout)["steps"] == 11
    assert "GB of memory" in planned.stderr
    assert list(tmp_path.iterdir()) == []
    done = run(*words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["kl_after"] < found["kl_before"]
    assert [one.name for one in tmp_path.iterdir()] == ["recovered"]


def test_contradictions_in_the_record_of_a_training_are_found(recover):
    report = recover()
    path = report.output / "slicecli.json"
    record = json.loads(path.read_text())
    changes = {"tokens": 1, "best_step": 99, "kl_after": 10.0, "training": {"rows": 1, "tokens": 1, "sha256": "0" * 64}}
    for name, value in changes.items():
        (entry,) = record["recovery"]
        path.write_text(json.dumps({**record, "recovery": [{**entry, name: value}]}))
        assert any(one.check == "counts" and one.is_error for one in verify_folder(report.output)), name


def test_a_model_in_training_predicts_as_it_does_in_use():
    import transformers

    from slicecli.recovery.trainer import without_dropout

    model = without_dropout(random_model(transformers.GPT2Config(**GPT2, attn_pdrop=0.5, resid_pdrop=0.5), 0))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(model.train()(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["stock", "custom-code"])
def test_recomputed_activations_give_the_same_gradient(kind, slices):
    from slicecli.recovery.trainer import recompute_activations, without_dropout

    model = without_dropout(load_model(Source.find(str(slices(kind)[1])))).train()
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model(torch.arange(20)[None], use_cache=False).logits.square().mean().backward()
        gradients.append([value.grad.clone() for value in model.parameters()])
        recompute_activations(model)
    calls = []
    model.get_submodule("model.layers.0.mlp" if kind == "stock" else "transformer.h.0.mlp").register_forward_pre_hook(
        lambda *_: calls.append(None)
    )
    model(torch.arange(20)[None], use_cache=False).logits.mean().backward()
    assert len(calls) == 2
    torch.testing.assert_close(gradients[0], gradients[1])


def test_the_command_names_the_share_of_the_steps_in_which_the_learning_rate_rises(run):
    share = f"{WARM_UP_SHARE * 100:g} %"
    assert f"rises for {share} of the steps" in " ".join(run("recover", "--help").output.split())


def test_held_out_rows_are_a_twentieth_and_none_is_trained_on(text_file):
    from slicecli.data.text import read_text
    from slicecli.recovery.data import draw_rows
    from slicecli.testing.checkpoints import byte_tokenizer

    drawn = draw_rows(read_text(str(text_file), "calibration"), byte_tokenizer(), 32, 20, 8, 0)
    assert len(drawn.training.ids) == 160 and len(drawn.held_out.ids) == 8
    trained = {tuple(row) for row in drawn.training.ids.tolist()}
    assert not trained & {tuple(row) for row in drawn.held_out.ids.tolist()}


def test_rows_that_a_slice_was_fitted_to_are_not_held_out(text_file):
    from slicecli.data.packing import calibration_rows, rows_unlike
    from slicecli.data.text import read_text
    from slicecli.recovery.data import draw_rows
    from slicecli.testing.checkpoints import byte_tokenizer

    text, tokenizer = read_text(str(text_file), "calibration"), byte_tokenizer()
    fitted = calibration_rows(text, tokenizer, 24, 48, 0)
    drawn = draw_rows(text, tokenizer, 32, 20, 8, 0, fitted)
    assert not drawn.is_fitted_to
    assert len(rows_unlike(drawn.held_out, fitted)) == len(drawn.held_out.ids) == 8
    assert len(rows_unlike(drawn.training, fitted)) < len(drawn.training.ids) == 160


def test_a_text_without_other_rows_than_those_fitted_to_is_said_to_have_none(text_file, tmp_path):
    from slicecli.data.packing import calibration_rows
    from slicecli.data.text import read_text
    from slicecli.recovery.data import draw_rows
    from slicecli.testing.checkpoints import byte_tokenizer

    text, tokenizer = read_text(str(text_file), "calibration"), byte_tokenizer()
    everything = calibration_rows(text, tokenizer, 10**6, 32, 0)
    assert draw_rows(text, tokenizer, 32, 4, 8, 0, everything).is_fitted_to


@pytest.mark.slow
def test_a_training_that_was_killed_reaches_the_same_divergence(slices, text_file, tmp_path):
    dense, folder = slices()
    log = tmp_path / "log"

    def words(output):
        given = ["recover", folder, "--teacher", dense, "--data", text_file, "-o", output, "--resume"]
        return [*given, "--tokens", "5k", "--seq-len", "32", "--batch-size", "256", "--lr", "2e-3", "--eval-every", "3"]

    def final(output):
        return json.loads((output / "slicecli.json").read_text())["recovery"][0]["kl_after"]

    assert in_child(words(tmp_path / "whole"), log) == 0, log.read_text()
    lines = log.read_text().count("\n")
    generator = random.Random(0)
    for _ in range(10):
        moment = after_lines(log, generator.randrange(lines), generator.uniform(0, 0.05))
        in_child(words(tmp_path / "killed"), log, kill_when=moment)
        if (tmp_path / "killed").exists():
            break
    else:
        assert in_child(words(tmp_path / "killed"), log) == 0, log.read_text()
    assert final(tmp_path / "killed") == pytest.approx(final(tmp_path / "whole"), abs=1e-3)
    assert not [one.text for one in verify_folder(tmp_path / "killed") if one.is_error]
    assert not list(tmp_path.glob(".*"))
