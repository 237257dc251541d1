"""Slices of tied models: one table that serves as embedding and as head."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_model
from safetensors.torch import load_file

from slicecli.adapters import Adapter, Block, Branch, Norm, select_adapter
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.linalg.tied_table import GainSums, Tie, fit_gain, tie, token_metric
from slicecli.proof.declaration import logits, slice_in_memory

WIDTH, DIM, VOCABULARY = 12, 8, 40


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(width, dim, seed=0):
    return torch.linalg.qr(random(width, dim, seed=seed))[0]


GAIN = random(WIDTH, seed=1).abs() + 0.5
TABLE = random(VOCABULARY, WIDTH, seed=2)
TOKENS = random(60, WIDTH, seed=3) * torch.linspace(0.2, 2.0, WIDTH, dtype=torch.float64)
MOMENT = TOKENS.T @ TOKENS


# the formula


def test_the_gain_is_diagonal_along_the_axes():
    found = tie(orthonormal(WIDTH, DIM), GAIN)
    compressed = found.axes.T @ (GAIN[:, None] * found.axes)
    assert torch.allclose(compressed, torch.diag(compressed.diagonal()), atol=1e-12)


def test_the_axes_span_what_the_basis_does():
    basis = orthonormal(WIDTH, DIM)
    axes = tie(basis, GAIN).axes
    assert torch.allclose(axes @ axes.T, basis @ basis.T, atol=1e-12)


@pytest.mark.parametrize("moment", [None, MOMENT], ids=["projected", "fitted"])
@pytest.mark.parametrize("is_scaled", [False, True])
def test_nothing_is_lost_at_full_width(moment, is_scaled):
    found = tie(orthonormal(WIDTH, WIDTH), GAIN, moment, is_scaled)
    head = TABLE @ found.table_map * found.gain @ found.axes.T
    assert torch.allclose(head, TABLE * GAIN, atol=1e-10)


@pytest.mark.parametrize("is_scaled", [False, True])
def test_the_table_minimises_the_loss_of_both_roles(is_scaled):
    basis, weight = orthonormal(WIDTH, DIM), 7.0
    found = tie(basis, GAIN, MOMENT, is_scaled, head_weight=weight)
    shrink = (DIM / WIDTH) ** 0.5
    scale = 1.0 if is_scaled else shrink
    sliced = TOKENS @ (shrink * found.axes) * found.gain
    beta = weight / sliced.square().sum(0).mean()

    def loss(table_map):
        embedding = TABLE @ (table_map - scale * found.axes)
        head = TABLE @ (table_map @ sliced.T - GAIN[:, None] * TOKENS.T)
        return embedding.square().sum() + beta * head.square().sum()

    table_map = found.table_map.clone().requires_grad_()
    loss(table_map).backward()
    assert table_map.grad.abs().max() < 1e-8 * loss(found.table_map)


def test_the_axes_do_not_depend_on_the_signs_that_a_library_returns():
    basis = orthonormal(WIDTH, DIM)
    assert torch.allclose(tie(basis, GAIN).axes, tie(-basis, GAIN).axes, atol=1e-10)


def test_the_metric_is_the_covariance_of_the_rows_by_token():
    counts = torch.randint(0, 50, (VOCABULARY,), generator=torch.Generator().manual_seed(0))
    shares = (counts.double() + 0.1) / (counts.double() + 0.1).sum()
    mean = shares @ TABLE
    expected = (TABLE - mean).T @ ((TABLE - mean) * shares[:, None])
    assert torch.allclose(token_metric(TABLE, counts), expected, atol=1e-12)


def fitted_gain(sliced, dense, held_out=slice(40, 60), **options):
    found = Tie(orthonormal(WIDTH, DIM), torch.ones(DIM, dtype=torch.float64), random(WIDTH, DIM, seed=5))
    metric = TABLE.T @ TABLE
    parts = [slice(0, held_out.start), held_out]
    sums = [GainSums(sliced[part].T @ sliced[part], dense[part].T @ sliced[part]) for part in parts]
    return found, metric, fit_gain(found, GAIN, metric, sums, **options)


def test_the_fitted_gain_is_that_of_least_squares():
    sliced, dense = random(60, DIM, seed=6), random(60, WIDTH, seed=7)
    found, _, gain = fitted_gain(sliced, dense, ridges=(1e-12,))
    design = torch.einsum("vk,tk->tvk", TABLE @ found.table_map, sliced).reshape(-1, DIM)
    goal = (dense * GAIN @ TABLE.T).reshape(-1, 1)
    expected = torch.linalg.lstsq(design, goal).solution.squeeze(1)
    assert torch.allclose(gain, expected, atol=1e-8)


def test_a_gain_that_is_right_already_stays():
    sliced = random(60, DIM, seed=6)
    found = Tie(orthonormal(WIDTH, DIM), torch.ones(DIM, dtype=torch.float64), random(WIDTH, DIM, seed=5))
    dense = sliced @ found.table_map.T / GAIN
    _, _, gain = fitted_gain(sliced, dense)
    assert torch.allclose(gain, found.gain, atol=1e-10)


def test_a_gain_that_does_not_hold_for_held_out_tokens_is_not_taken():
    sliced, table_map = random(60, DIM, seed=6), random(WIDTH, DIM, seed=5)
    gains = torch.where(torch.arange(60) < 40, 1.2, 0.8).double()[:, None]
    found, _, gain = fitted_gain(sliced, (gains * sliced) @ table_map.T / GAIN)
    assert torch.equal(gain, found.gain)


# which models


def dimensions_of(model, unties=False):
    fields = model.config.to_dict()
    return Dimensions(select_adapter(fields, plugins().adapters), fields, unties)


@pytest.mark.parametrize(("family", "keeps"), [("llama-tied", True), ("qwen2", True), ("llama", False)])
def test_tied_models_of_rms_norms_keep_their_tie(family, keeps):
    assert dimensions_of(tiny_model(family)).keeps_tie is keeps


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (Adapter("a", ("a",), Block((Branch("n", (), None),)), norm=Norm("layer")), "subtract the mean"),
        (Adapter("a", ("a",), Block((Branch("n", (), None),)), norm=Norm(has_weight=False)), "no weight"),
        (Adapter("a", ("a",), Block((Branch("n", (), None),)), tie_obstacle="its head is odd"), "odd"),
        (Adapter("a", ("a",), Block((Branch("n", (), None),)), stock_obstacle="no"), "code of its own"),
    ],
    ids=["layer norm", "no weight", "declared", "custom code"],
)
def test_what_cannot_be_tied_says_why(adapter, reason):
    assert reason in adapter.why_untied({})


def test_a_tied_slice_at_full_width_computes_what_the_model_does():
    model = tiny_model("llama-tied").double()
    token_ids = torch.randint(0, 300, (8, 16), generator=torch.Generator().manual_seed(1))
    (sliced,), _ = slice_in_memory(model, dimensions_of(model), token_ids, model.config.hidden_size)
    assert torch.allclose(logits(sliced, token_ids), logits(model, token_ids), atol=1e-9)


# slices


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    from slicecli.testing.checkpoints import nonsense_text

    text = nonsense_text(tmp_path_factory.mktemp("text") / "text.jsonl")
    return ("--calibration", text, "--samples", "24", "--seq-len", "32", "--no-cache")


def test_a_tied_slice_stores_its_table_once(run, checkpoints, words, tmp_path):
    done = run("slice", checkpoints("llama-tied"), "--dim", "36", "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_untie_gives_a_head_and_says_so_in_record_and_command(run, checkpoints, words, tmp_path):
    run("slice", checkpoints("llama-tied"), "--dim", "36", "--untie", "-o", tmp_path / "out", *words)
    record = json.loads((tmp_path / "out" / "slicecli.json").read_text())
    assert "lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")
    assert record["is_tied"] is False and "--untie" in record["command"]


def test_a_tied_slice_can_be_sliced_again(run, checkpoints, words, tmp_path):
    run("slice", checkpoints("llama-tied"), "--dim", "40", "-o", tmp_path / "one", *words)
    done = run("slice", tmp_path / "one", "--dim", "32", "-o", tmp_path / "two", *words)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "two" / "slicecli.json").read_text())["is_tied"] is True


def test_a_tied_slice_verifies(run, checkpoints, words, tmp_path):
    run("slice", checkpoints("qwen2"), "--dim", "36", "-o", tmp_path / "out", *words)
    done = run("verify", tmp_path / "out")
    assert done.exit_code == 0, done.output


def test_the_count_of_an_estimate_is_that_of_the_slice(run, checkpoints, words, tmp_path):
    for untie in ([], ["--untie"]):
        done = run("estimate", checkpoints("llama-tied"), "--dim", "36", *untie, "--format", "json")
        (row,) = json.loads(done.stdout)["estimates"]
        done = run("slice", checkpoints("llama-tied"), "--dim", "36", *untie, "-o", tmp_path / f"{untie}", *words)
        written = sum(tensor.numel() for tensor in load_file(tmp_path / f"{untie}" / "model.safetensors").values())
        assert row["parameters"] == written


def test_an_estimate_counts_the_other_way_too(run, checkpoints):
    (tied,) = json.loads(run("estimate", checkpoints("llama-tied"), "--dim", "36", "--format", "json").stdout)[
        "estimates"
    ]
    done = run("estimate", checkpoints("llama-tied"), "--dim", "36", "--untie", "--format", "json")
    (untied,) = json.loads(done.stdout)["estimates"]
    assert tied["untied"]["parameters"] == untied["parameters"] > tied["parameters"]
