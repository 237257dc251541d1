"""The streamed probe against a whole model whose norms are replaced."""

from __future__ import annotations

import pytest
import torch
from test_fisher import rows_for, tiny

from slicecli.checkpoint.meta_model import build_runnable_meta_model
from slicecli.progress import Silent
from slicecli.proof.declaration import ModelWeights, random_basis
from slicecli.proof.float64 import Float64Throughout
from slicecli.slicing.context import Batches, DenseModel
from slicecli.slicing.projection import collect_projected_loss

pytestmark = pytest.mark.slow

DIMS = (44, 30, 12)


def streamed(model, dimensions, basis, rows, dims=DIMS, batch=2):
    meta_model = build_runnable_meta_model(model.config).to(model.dtype)  # its rotary frequencies too
    dense = DenseModel(meta_model, ModelWeights(model), dimensions, torch.device("cpu"), model.dtype)
    with Float64Throughout():
        return collect_projected_loss(dense, basis, Batches(rows, batch), dims, Silent())


def whole(model, dimensions, basis, rows, dim):
    """Return the nats per token of a model in memory, with n projected by hooks on its norms; as it is for no dim."""
    adapter = dimensions.adapter
    paths = [f"{adapter.blocks}.{i}.{path}" for i, one in enumerate(dimensions.declared_blocks) for path in one.norms]

    def hook(norm, inputs, _output):
        x = inputs[0]
        x = x - x.mean(-1, keepdim=True) if adapter.norm.is_centred else x
        n = x / (x.square().mean(-1, keepdim=True) + dimensions.epsilon).sqrt()
        kept = basis.vectors[:, : dim - basis.is_centred]
        n = n @ kept @ kept.T
        n = n * (norm.weight + adapter.norm.weight_offset) if adapter.norm.has_weight else n
        return n + norm.bias if adapter.norm.has_bias else n

    modules = [model.get_submodule(path) for path in (*paths, adapter.final_norm)]
    handles = [module.register_forward_hook(hook) for module in modules if dim is not None]
    with Float64Throughout(), torch.no_grad():
        logits = model(rows, use_cache=False).logits
    for handle in handles:
        handle.remove()
    return float(torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten()))


@pytest.mark.parametrize("name", ["llama", "tied", "parallel LayerNorms", "weights from 1", "learned positions, tied"])
def test_it_is_what_a_whole_model_says_with_its_norms_replaced(name):
    model, dimensions = tiny(name)
    rows, basis = rows_for(model), random_basis(dimensions, seed=1)
    found = streamed(model, dimensions, basis, rows)
    assert found.dense == pytest.approx(whole(model, dimensions, basis, rows, None), rel=1e-9)
    expected = {dim: whole(model, dimensions, basis, rows, dim) for dim in DIMS}
    assert found.projected == pytest.approx(expected, rel=1e-9)
    assert len(set(found.projected.values())) == len(DIMS)


def test_nothing_is_lost_at_full_width():
    model, dimensions = tiny("parallel LayerNorms")
    size = dimensions.hidden_size
    found = streamed(model, dimensions, random_basis(dimensions, seed=1), rows_for(model), (size,), batch=3)
    assert found.projected[size] == pytest.approx(found.dense, rel=1e-12)
