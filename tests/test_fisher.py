"""The streamed Fisher weight against a whole model's gradients, and `slicecli spectrum`."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext

import numpy
import pytest
import torch

from slicecli.checkpoint.meta_model import build_runnable_meta_model
from slicecli.errors import WeightsError
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.schedule import slices_head
from slicecli.progress import Silent
from slicecli.proof.declaration import ModelWeights, random_basis
from slicecli.proof.float64 import Float64Throughout
from slicecli.proof.tiny import random_model
from slicecli.slicing.context import Batches, DenseModel
from slicecli.slicing.fisher import collect_fisher, drawn_labels
from slicecli.testing.adapter_tests import tiny_of

pytestmark = pytest.mark.slow

SEED = 7
# model types and config fields, by what each stands for
CASES = {
    "llama": ("llama", {}),
    "tied": ("llama", {"tie_word_embeddings": True}),
    "parallel LayerNorms": ("gpt_neox", {}),
    "one LayerNorm, scaled logits": ("cohere", {}),
    "weights from 1": ("gemma", {}),
    "scaled residuals and logits": ("granite", {"residual_multiplier": 0.22, "logits_scaling": 8.0}),
    "learned positions, tied": ("gpt2", {}),
    "rows laid end to end": ("opt", {}),
    "experts": ("qwen3_moe", {}),
    "experts with a gate": ("qwen2_moe", {}),
}


def tiny(name, **changes):
    """Return a tiny model in float64 and its dimensions."""
    model_type, fields = CASES[name]
    adapter = next(one for one in plugins().adapters.values() if model_type in one.model_types)
    model = random_model(tiny_of(adapter, model_type, **fields, **changes), dtype="float64")
    return model, Dimensions(adapter, model.config.to_dict())


def rows_for(model, rows=5, length=12, seed=3):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, model.config.vocab_size, (rows, length), generator=generator)


def streamed(model, dimensions, basis, rows, batch=2, seed=SEED):
    meta_model = build_runnable_meta_model(model.config).to(model.dtype)  # its rotary frequencies too
    dense = DenseModel(meta_model, ModelWeights(model), dimensions, torch.device("cpu"), model.dtype)
    with Float64Throughout() if model.dtype == torch.float64 else nullcontext():
        return collect_fisher(dense, basis, Batches(rows, batch), seed, Silent())


def whole(model, dimensions, basis, rows, seed=SEED):
    """Return the variants from one backward pass through the whole model."""
    adapter, size = dimensions.adapter, dimensions.hidden_size
    paths = [f"{adapter.blocks}.{i}.{path}" for i, one in enumerate(dimensions.declared_blocks) for path in one.norms]
    seen = {}
    handles = [
        model.get_submodule(path).register_forward_hook(
            lambda _module, inputs, output, path=path: (output.retain_grad(), seen.update({path: (inputs[0], output)}))[
                1
            ]
        )
        for path in (*paths, adapter.final_norm)
    ]
    with Float64Throughout(), torch.enable_grad():
        logits = model(rows, use_cache=False).logits
        probabilities = logits.detach().softmax(-1).flatten(0, 1).numpy()
        draws = torch.rand(rows.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        labels = [
            int(numpy.searchsorted(one.cumsum(), draw * one.sum(), side="right"))
            for one, draw in zip(probabilities, draws.flatten().tolist(), strict=True)
        ]
        chosen = logits.flatten(0, 1).log_softmax(-1)[torch.arange(len(labels)), labels]
        chosen.sum().backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    totals = {name: torch.zeros(size + 1).double() for name in ("shared", "layer", "sites")}
    for path, (stream, output) in seen.items():
        x = stream.detach().reshape(-1, size)
        x = x - x.mean(-1, keepdim=True) if dimensions.adapter.norm.is_centred else x
        n = x / (x.square().mean(-1, keepdim=True) + dimensions.epsilon).sqrt()
        norm = model.get_submodule(path)
        weight = getattr(norm, "weight", None)
        g = output.grad.reshape(-1, size)
        g = g if weight is None else g * (weight.detach() + dimensions.adapter.norm.weight_offset)
        own = torch.linalg.eigh(n.T @ n)[1].flip(1)
        bases = {"shared": basis.vectors, "sites": own}
        if path != adapter.final_norm or slices_head(dimensions, None):
            bases["layer"] = own
        for name, vectors in bases.items():
            for width in range(size + 1):
                first = max(0, width - 1) if name == "shared" and basis.is_centred else width
                outside = vectors[:, first:]
                dropped = n @ outside @ outside.T
                totals[name][width] += 0.5 * (g * dropped).sum(-1).square().mean()
    nll = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
    return totals, float(nll.detach())


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_a_whole_models_gradients_say(name):
    model, dimensions = tiny(name)
    rows = rows_for(model)
    basis = random_basis(dimensions, seed=1)
    found = streamed(model, dimensions, basis, rows)
    totals, nll = whole(model, dimensions, basis, rows)
    assert bool((totals["shared"][:-2] > 0).all())
    for variant, expected in totals.items():
        torch.testing.assert_close(getattr(found, variant), expected, rtol=1e-8, atol=1e-12 * float(expected.max()))
    assert found.nll == pytest.approx(nll, rel=1e-9)
    assert found.tokens == rows.numel()


def test_it_is_the_same_in_batches_of_any_size_and_pieces_of_any_length(monkeypatch):
    model, dimensions = tiny("parallel LayerNorms")
    rows, basis = rows_for(model), random_basis(dimensions, seed=1)
    expected = streamed(model, dimensions, basis, rows, batch=5)
    for batch in (1, 3):
        found = streamed(model, dimensions, basis, rows, batch)
        torch.testing.assert_close(found.shared, expected.shared, rtol=1e-10, atol=0)
        torch.testing.assert_close(found.layer[:-1], expected.layer[:-1], rtol=1e-8, atol=1e-15)
    monkeypatch.setattr("slicecli.slicing.fisher.HEAD_TOKENS", 5)
    monkeypatch.setattr("slicecli.slicing.fisher.EFFECT_TOKENS", 7)
    pieces = streamed(model, dimensions, basis, rows, batch=5)
    torch.testing.assert_close(pieces.shared, expected.shared, rtol=1e-10, atol=0)
    assert pieces.nll == pytest.approx(expected.nll, rel=1e-12)


def test_the_labels_follow_the_seed():
    model, dimensions = tiny("llama")
    rows, basis = rows_for(model), random_basis(dimensions, seed=1)
    first, again, other = (streamed(model, dimensions, basis, rows, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.shared, again.shared)
    assert torch.equal(first.layer, again.layer)
    assert not torch.allclose(first.shared, other.shared, rtol=1e-6)
    assert first.nll == other.nll  # of the text, not of the labels


@pytest.mark.parametrize("name", ["llama", "parallel LayerNorms"])
def test_nothing_is_lost_at_full_width_and_the_basis_does_not_matter_at_none(name):
    model, dimensions = tiny(name)
    rows = rows_for(model)
    found, turned = (streamed(model, dimensions, random_basis(dimensions, seed), rows) for seed in (1, 2))
    assert float(found.shared[-1]) == float(found.layer[-1]) == 0
    assert float(found.shared[0]) == pytest.approx(float(turned.shared[0]), rel=1e-9)
    assert float(found.shared[30]) != pytest.approx(float(turned.shared[30]), rel=1e-3)
    if dimensions.adapter.norm.is_centred:
        assert float(found.shared[1]) == float(found.shared[0])  # the one dim is the mean's


def test_half_precision_is_close():
    model, dimensions = tiny("llama")
    rows, basis = rows_for(model), random_basis(dimensions, seed=1)
    expected = streamed(model, dimensions, basis, rows)
    for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 0.5)):
        found = streamed(model.to(dtype), dimensions, basis, rows)
        torch.testing.assert_close(found.shared[:-8], expected.shared[:-8], rtol=tolerance, atol=0)
        assert found.shared.dtype == torch.float64


def test_labels_are_drawn_in_proportion():
    logits = torch.tensor([[0.0, 1.0, -float("inf"), 2.0]])
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    labels = drawn_labels(logits.expand(4000, 4), draws)
    shares = labels.bincount(minlength=4) / 4000
    torch.testing.assert_close(shares, logits[0].softmax(-1), atol=1e-3, rtol=0)
    assert shares[2] == 0
    assert drawn_labels(logits, torch.tensor([0.0]).double()).tolist() == [0]
    assert drawn_labels(logits, torch.tensor([1 - 2**-53]).double()).tolist() == [3]


def test_infinite_activations_name_the_block():
    model, dimensions = tiny("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(1e308)
    with pytest.raises(WeightsError, match="after block 1"):
        streamed(model, dimensions, random_basis(dimensions, seed=1), rows_for(model))


@pytest.fixture
def words(checkpoints, text_file):
    return ["spectrum", checkpoints(), "--calibration", text_file, "--samples", "8", "--seq-len", "32"]


def test_the_command_writes_what_it_prints(run, words, tmp_path):
    printed = run(*words, "--format", "json", "-o", tmp_path / "first.json", "--token", "hf_secret")
    assert printed.exit_code == 0, printed.output
    document = json.loads(printed.stdout)
    text = (tmp_path / "first.json").read_text()
    assert json.loads(text) == document
    assert "hf_secret" not in text
    assert str(words[1].parent) not in text
    assert str(tmp_path) not in text
    assert (document["model"], document["model_type"], document["hidden_size"]) == ("tiny-llama", "llama", 48)
    assert document["calibration"]["tokens"] == 8 * 32
    assert document["dense"]["nll"] > 0
    assert [point["dim"] for point in document["spectrum"]] == list(range(1, 49))
    for point in document["spectrum"]:
        assert point["fisher"].keys() == {"refit", "slicegpt"}
        assert 0 <= point["kept"] <= 1 + 1e-12
    assert set(document["spectrum"][-1]["fisher"].values()) == {0.0}
    assert document["spectrum"][-1]["kept"] == pytest.approx(1)

    shown = run(*words, "-o", tmp_path / "again.json")
    assert shown.exit_code == 0, shown.output
    assert (tmp_path / "again.json").read_text() == text
    row = next(line.split() for line in shown.stdout.splitlines() if line.split()[:1] == ["36"])
    assert float(row[4]) == pytest.approx(document["spectrum"][35]["fisher"]["refit"], rel=1e-3)
    assert sorted(os.listdir(tmp_path)) == ["again.json", "first.json"]


def test_the_probe_reads_the_first_rows_and_can_be_left_out(run, words):
    probe = json.loads(run(*words, "--format", "json").stdout)["probe"]
    assert probe["tokens"] == 8 * 32
    assert [one["dim"] for one in probe["projected"]] == [45, 42, 39, 36, 30, 24]
    assert all(one["nll"] != probe["dense_nll"] for one in probe["projected"])
    assert json.loads(run(*words, "--format", "json", "--no-probe").stdout)["probe"] is None


def test_the_spectrum_is_of_the_basis_that_a_refit_takes(run, words, tmp_path):
    run(*words, "-o", tmp_path / "spectrum.json")
    run("slice", *words[1:], "--dim", "36", "-o", tmp_path / "slice")
    record = json.loads((tmp_path / "slice" / "slicecli.json").read_text())
    document = json.loads((tmp_path / "spectrum.json").read_text())
    assert document["calibration"] == record["calibration"]
    found = {point["dim"]: point["importance_kept"] for point in document["spectrum"]}
    assert {point["dim"]: point["importance_kept"] for point in record["energy"]["spectrum"]} == found


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ([], "no output for the spectrum"),
        (["-o", "no-such-folder/spectrum.json"], "folder does not exist"),
        (["--format", "json", "--samples", "0"], "calibration samples are too few"),
        (["--format", "json", "--seq-len", "1000"], "exceeds the limit"),
        (["--format", "json", "--adapter", "nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_refused_in_a_sentence(run, words, more, sentence):
    done = run(*words, *more)
    assert done.exit_code in (1, 2)
    assert done.stdout == ""
    assert sentence in done.stderr
    assert "Traceback" not in done.stderr
