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
from slicecli.linalg.basis import centred_frame
from slicecli.linalg.tied_table import FinalNormSums, Tie, fit_final_norm, gain_of_centred_norm, tie, token_metric
from slicecli.proof.declaration import logits, slice_in_memory
from slicecli.proof.tiny import random_model, tiny_config

WIDTH, DIM, VOCABULARY = 12, 8, 40


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def orthonormal(width, dim, seed=0):
    return torch.linalg.qr(random(width, dim, seed=seed))[0]


GAIN = random(WIDTH, seed=1).abs() + 0.5
BIAS = random(WIDTH, seed=4)
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
    found = tie(orthonormal(WIDTH, WIDTH), GAIN, second_moment=moment, is_scaled_by_width=is_scaled)
    head = TABLE @ found.table_map * found.gain @ found.axes.T
    assert torch.allclose(head, TABLE * GAIN, atol=1e-10)


@pytest.mark.parametrize("is_scaled", [False, True])
def test_the_table_minimises_the_loss_of_both_roles(is_scaled):
    basis, weight = orthonormal(WIDTH, DIM), 7.0
    found = tie(basis, GAIN, second_moment=MOMENT, is_scaled_by_width=is_scaled, head_weight=weight)
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


def centred_basis(dim):
    directions = torch.linalg.qr(random(WIDTH, dim - 1) - random(WIDTH, dim - 1).mean(0))[0]
    return directions @ centred_frame(dim).T


@pytest.mark.parametrize("moment", [None, MOMENT], ids=["projected", "fitted"])
def test_nothing_is_lost_at_full_width_behind_a_layer_norm(moment):
    frame = centred_frame(WIDTH)
    centred = frame @ frame.T
    moment = None if moment is None else centred @ moment @ centred
    found = tie(centred_basis(WIDTH), GAIN, BIAS, moment, is_centred=True)
    tokens = TOKENS @ centred
    logits = (TABLE @ found.table_map) @ ((tokens @ found.axes) * found.gain + found.bias).T
    assert torch.allclose(logits, TABLE @ (tokens * GAIN + BIAS).T, atol=1e-9)


def test_the_axes_behind_a_layer_norm_span_what_the_basis_does():
    basis = centred_basis(DIM)
    axes = tie(basis, GAIN, is_centred=True).axes
    assert torch.allclose(axes @ axes.T, basis @ basis.T, atol=1e-12)
    assert torch.allclose(axes.sum(1), torch.zeros(WIDTH, dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("size", [3, 8, 60])
def test_the_gain_of_a_layer_norm_has_nearly_the_wanted_eigenvalues(size):
    wanted = random(size - 1).sort().values
    gain, vectors = gain_of_centred_norm(wanted)
    frame = centred_frame(size)
    compressed = frame.T @ (gain[:, None] * frame)
    assert torch.allclose(vectors @ torch.diag(torch.linalg.eigvalsh(compressed)) @ vectors.T, compressed, atol=1e-10)
    assert (torch.linalg.eigvalsh(compressed) - wanted).norm() < 0.1 * (wanted - wanted.mean()).norm()


def test_the_axes_do_not_depend_on_the_signs_that_a_library_returns():
    basis = orthonormal(WIDTH, DIM)
    assert torch.allclose(tie(basis, GAIN).axes, tie(-basis, GAIN).axes, atol=1e-10)


def test_the_metric_is_the_covariance_of_the_rows_by_token():
    counts = torch.randint(0, 50, (VOCABULARY,), generator=torch.Generator().manual_seed(0))
    shares = (counts.double() + 0.1) / (counts.double() + 0.1).sum()
    mean = shares @ TABLE
    expected = (TABLE - mean).T @ ((TABLE - mean) * shares[:, None])
    assert torch.allclose(token_metric(TABLE, counts), expected, atol=1e-12)


ONES = torch.ones(DIM, dtype=torch.float64)


def fitted_norm(sliced, dense, bias=None, held_out=slice(40, 60), **options):
    start = None if bias is None else torch.zeros_like(ONES)
    found = Tie(orthonormal(WIDTH, DIM), ONES, start, random(WIDTH, DIM, seed=5))
    sliced, dense = (torch.cat([one, one.new_ones(len(one), 1)], 1) for one in (sliced, dense))
    parts = [slice(0, held_out.start), held_out]
    sums = [FinalNormSums(sliced[part].T @ sliced[part], dense[part].T @ sliced[part]) for part in parts]
    return found, *fit_final_norm(found, GAIN, bias, TABLE.T @ TABLE, sums, **options)


@pytest.mark.parametrize("has_bias", [False, True])
def test_the_fitted_final_norm_is_that_of_least_squares(has_bias):
    sliced, dense = random(60, DIM, seed=6), random(60, WIDTH, seed=7)
    bias = BIAS if has_bias else None
    found, gain, sliced_bias = fitted_norm(sliced, dense, bias, ridges=(1e-12,))
    table = TABLE @ found.table_map
    design = torch.einsum("vk,tk->tvk", table, sliced).reshape(-1, DIM)
    goal = ((dense * GAIN + (BIAS if has_bias else 0)) @ TABLE.T).reshape(-1, 1)
    if has_bias:
        design = torch.cat([design, table.repeat(60, 1)], 1)
    expected = torch.linalg.lstsq(design, goal).solution.squeeze(1)
    assert torch.allclose(torch.cat([gain, sliced_bias]) if has_bias else gain, expected, atol=1e-8)


def test_a_gain_that_is_right_already_stays():
    sliced = random(60, DIM, seed=6)
    dense = sliced @ random(WIDTH, DIM, seed=5).T / GAIN
    found, gain, _ = fitted_norm(sliced, dense)
    assert torch.allclose(gain, found.gain, atol=1e-10)


def test_a_gain_that_does_not_hold_for_held_out_tokens_is_not_taken():
    sliced, table_map = random(60, DIM, seed=6), random(WIDTH, DIM, seed=5)
    gains = torch.where(torch.arange(60) < 40, 1.2, 0.8).double()[:, None]
    found, gain, _ = fitted_norm(sliced, (gains * sliced) @ table_map.T / GAIN)
    assert torch.equal(gain, found.gain)


# which models


def dimensions_of(model, unties=False):
    fields = model.config.to_dict()
    return Dimensions(select_adapter(fields, plugins().adapters), fields, unties)


LAYER_NORMS = {
    "sequential": ("starcoder2", {}),
    "parallel": ("cohere", {}),
    "custom code": ("gpt2", {"has_head_dim": False}),
}


def model_of_layer_norms(kind):
    family, changes = LAYER_NORMS[kind]
    return random_model(tiny_config(family, tie_word_embeddings=True, **changes))


@pytest.mark.parametrize(("family", "keeps"), [("llama-tied", True), ("qwen2", True), ("llama", False)])
def test_tied_models_of_rms_norms_keep_their_tie(family, keeps):
    assert dimensions_of(tiny_model(family)).keeps_tie is keeps


@pytest.mark.parametrize("kind", LAYER_NORMS)
def test_tied_models_of_layer_norms_keep_their_tie(kind):
    assert dimensions_of(model_of_layer_norms(kind)).keeps_tie


@pytest.mark.parametrize(
    ("adapter", "reason"),
    [
        (Adapter("a", ("a",), Block((Branch("n", (), None),)), norm=Norm(has_weight=False)), "no weight"),
        (Adapter("a", ("a",), Block((Branch("n", (), None),)), tie_obstacle="its head is odd"), "odd"),
    ],
    ids=["no weight", "declared"],
)
def test_what_cannot_be_tied_says_why(adapter, reason):
    assert reason in adapter.why_untied({})


@pytest.mark.parametrize("kind", ["rms norms", *LAYER_NORMS])
def test_a_tied_slice_at_full_width_computes_what_the_model_does(kind):
    model = (tiny_model("llama-tied") if kind == "rms norms" else model_of_layer_norms(kind)).double()
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
