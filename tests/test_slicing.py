"""The refit as a whole, on real transformers models of every family held in memory."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import VOCABULARY, tiny_config, tiny_model

from slicecli.adapters import select_adapter
from slicecli.checkpoint.configs import stock_config
from slicecli.checkpoint.meta_model import build_runnable_meta_model
from slicecli.errors import WeightsError
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.progress import Silent
from slicecli.proof import declaration as proof
from slicecli.proof.declaration import ModelWeights, relative_error
from slicecli.slicing.context import Batches, DenseModel, Target
from slicecli.slicing.refit import collect_statistics, refit


def random_rows(rows=40, length=24, seed=1):
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def slice_in_memory(model, *dims, rows=None, batch=8):
    """Slice a model at several dims in one pass; return the sliced models and the basis."""
    rows = random_rows() if rows is None else rows
    return proof.slice_in_memory(model, dimensions_of(model.config), rows, *dims, batch_rows=batch)


def dimensions_of(config):
    fields = config.to_dict()
    return Dimensions(select_adapter(fields, plugins().adapters), fields)


@torch.no_grad()
def logits(model, rows=None):
    return model(random_rows(seed=7) if rows is None else rows).logits


def test_full_dim_gives_the_dense_logits(family):
    model = tiny_model(family)
    (rotated,), _ = slice_in_memory(model, 48)
    torch.testing.assert_close(logits(rotated), logits(model), atol=1e-4, rtol=1e-4)


def test_full_dim_really_rotates(family):
    model = tiny_model(family)
    (rotated,), _ = slice_in_memory(model, 48)
    before = model.get_input_embeddings().weight
    assert relative_error(rotated.get_input_embeddings().weight, before) > 0.5


def test_a_stream_of_lower_rank_is_sliced_without_loss():
    """A narrow model put into a wider one by an orthonormal map loses nothing when sliced back."""
    narrow = tiny_model("llama", hidden_size=32, head_dim=12)
    wide = tiny_model("llama", head_dim=12, rms_norm_eps=narrow.config.rms_norm_eps * 32 / 48)
    embedding, _ = torch.linalg.qr(torch.randn(48, 32, generator=torch.Generator().manual_seed(3)))
    shrink = math.sqrt(32 / 48)
    with torch.no_grad():
        for (name, target), (_, given) in zip(wide.named_parameters(), narrow.named_parameters(), strict=True):
            if "norm" in name:
                target.fill_(1.0)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                target.copy_(embedding @ given)
            elif "embed" in name:
                target.copy_(given @ embedding.T)
            else:
                target.copy_(given @ embedding.T * shrink)
        for name, parameter in narrow.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
    torch.testing.assert_close(logits(wide), logits(narrow), atol=2e-4, rtol=1e-3)
    (sliced,), basis = slice_in_memory(wide, 32)
    assert basis.energy_kept(32) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(logits(sliced), logits(wide), atol=2e-4, rtol=1e-3)


def test_slices_made_together_equal_slices_made_alone():
    model = tiny_model("llama")
    (first, second), _ = slice_in_memory(model, 40, 24)
    (alone,), _ = slice_in_memory(model, 24)
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), second.parameters(), strict=True))
    assert first.config.hidden_size == 40


def test_a_wider_slice_is_closer_to_the_dense_model(family):
    model = tiny_model(family)
    rows = random_rows(rows=160)
    slices, _ = slice_in_memory(model, 24, 36, 44, rows=rows)
    errors = [relative_error(logits(sliced), logits(model)) for sliced in slices]
    assert errors == sorted(errors, reverse=True)


def test_the_refit_beats_the_plain_projection(monkeypatch):
    """Random tokens repeat in calibration and check only in distribution, so this is no memorising."""
    from slicecli.linalg import ridge
    from slicecli.linalg.ridge import solve_ridge

    model = tiny_model("llama")
    rows = random_rows(rows=400)
    (fitted,), _ = slice_in_memory(model, 36, rows=rows)
    monkeypatch.setattr(ridge, "solve_ridge", lambda equations, **_: solve_ridge(equations, ridges=()))
    (projected,), _ = slice_in_memory(model, 36, rows=rows)
    assert relative_error(logits(fitted), logits(model)) < 0.9 * relative_error(logits(projected), logits(model))


def test_what_shares_the_epsilon_of_the_stream_is_untouched():
    """The query norm of Qwen3 shares the epsilon; a large one would show any change of it."""
    model = tiny_model("qwen3", rms_norm_eps=0.5)
    (rotated,), _ = slice_in_memory(model, 48)
    torch.testing.assert_close(logits(rotated), logits(model), atol=1e-4, rtol=1e-4)
    (sliced,), _ = slice_in_memory(model, 44, rows=random_rows(rows=160))
    assert sliced.config.rms_norm_eps == model.config.rms_norm_eps
    block, dense_block = sliced.model.layers[0].self_attn, model.model.layers[0].self_attn
    for name in ("q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias", "v_proj.bias"):
        assert torch.equal(block.get_parameter(name), dense_block.get_parameter(name)), name


def test_bfloat16_weights_are_fitted_as_they_are_stored():
    model = tiny_model("llama").to(torch.bfloat16).float()
    config = model.config
    dimensions = dimensions_of(config)
    dense = DenseModel(
        build_runnable_meta_model(config), ModelWeights(model), dimensions, torch.device("cpu"), torch.float32
    )
    batches = Batches(random_rows(), 8)
    found = {}
    target = Target(
        40,
        build_runnable_meta_model(stock_config(config, dimensions, 40, "bfloat16")),
        torch.bfloat16,
        found.__setitem__,
    )
    refit(dense, collect_statistics(dense, batches, Silent()), [target], batches, Silent())
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in found.values())


def test_infinite_activations_name_the_block():
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.fill_(3e38)
    with pytest.raises(WeightsError, match="after block 1"):
        slice_in_memory(model, 40)


def test_every_parameter_is_written_once_and_contiguous(family):
    model = tiny_model(family)
    config = model.config
    dimensions = dimensions_of(config)
    dense = DenseModel(
        build_runnable_meta_model(config), ModelWeights(model), dimensions, torch.device("cpu"), torch.float32
    )
    batches = Batches(random_rows(rows=10), 4)
    names = []

    def sink(name, tensor):
        assert tensor.is_contiguous(), name
        names.append(name)

    meta_model = build_runnable_meta_model(stock_config(config, dimensions, 36, "float32"))
    expected = sorted(name for name, _ in meta_model.named_parameters())
    count = sum(parameter.numel() for parameter in meta_model.parameters())
    statistics = collect_statistics(dense, batches, Silent())
    refit(dense, statistics, [Target(36, meta_model, torch.float32, sink)], batches, Silent())
    assert sorted(names) == expected
    assert count == dimensions.parameters(36)


def test_counts_equal_the_instantiated_models(family):
    config = tiny_config(family)
    dimensions = dimensions_of(config)
    model = tiny_model(family)
    assert dimensions.parameters() == sum(parameter.numel() for parameter in model.parameters())
