"""Slices whose experts have fewer channels: each expert chooses its own, and other MLPs keep the same share."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from slicecli.errors import PluginError, RequestError
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.shapes import pairs_within
from slicecli.family.slice_plan import Width
from slicecli.family.written_class import SliceClasses
from slicecli.progress import Silent
from slicecli.proof.declaration import (
    ModelWeights,
    _empty_like,
    logits,
    prove_channels,
    relative_error,
    slice_in_memory,
)
from slicecli.proof.tiny import random_model, tiny_config
from slicecli.slicing.context import Batches, Content, DenseModel, NoJournal, Snapshot
from slicecli.slicing.refit import collect_statistics
from slicecli.testing.checkpoints import nonsense_text, save_checkpoint

WHOLE, EXPERTS = 48, 6


def dimensions(family="qwen2_moe", adapter=None, **changes):
    fields = tiny_config(family, **changes).to_dict()
    return Dimensions(adapter or plugins().adapters[family], fields)


def model_of(family, **changes):
    return random_model(tiny_config(family, **changes), dtype="float64")


def tokens(rows=40, length=24):
    return torch.randint(2, 258, (rows, length), generator=torch.Generator().manual_seed(1))


def dense_of(model, sizes):
    return DenseModel(_empty_like(model, sizes, on_meta=True), ModelWeights(model), sizes, model.device, model.dtype)


# sizes


@pytest.mark.parametrize(
    ("family", "changes", "widths"),
    [
        ("mixtral", {}, {"intermediate_size": 24}),
        ("qwen3_moe", {}, {"moe_intermediate_size": 24}),
        ("qwen3_moe", {"decoder_sparse_step": 2}, {"moe_intermediate_size": 24, "intermediate_size": 44}),
        ("qwen3_moe", {"mlp_only_layers": [0, 1]}, {"intermediate_size": 24}),
        ("qwen2_moe", {}, {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 28}),
    ],
)
def test_the_width_asked_for_is_that_of_routed_experts_and_others_keep_the_same_share(family, changes, widths):
    assert dimensions(family, **changes).with_mlp_dim(24).sliced_mlp_widths == widths


@pytest.mark.parametrize(
    ("mlp_dim", "shared", "dense"), [(1024, 4096, 7936), (1056, 4224, 8192), (1400, 5600, 10882), (8, 32, 62)]
)
def test_other_widths_are_multiples_that_formats_can_use_where_that_of_experts_is(mlp_dim, shared, dense):
    sizes = dimensions(
        moe_intermediate_size=1408,
        shared_expert_intermediate_size=5632,
        intermediate_size=10944,
        mlp_only_layers=[0],
    )
    widths = sizes.with_mlp_dim(mlp_dim).sliced_mlp_widths
    assert (widths["shared_expert_intermediate_size"], widths["intermediate_size"]) == (shared, dense)


def test_all_channels_of_the_experts_are_no_change():
    sizes = dimensions()
    assert sizes.with_mlp_dim(WHOLE) is sizes


def test_every_channel_of_the_experts_costs_the_same_parameters():
    sizes = dimensions("qwen3_moe")
    per_channel = sizes.blocks * EXPERTS * 3 * 40
    assert sizes.parameters(40) - sizes.with_mlp_dim(32).parameters(40) == (WHOLE - 32) * per_channel


def test_experts_have_widths_that_transformers_can_multiply():
    with pytest.raises(RequestError, match="The nearest legal widths: 32 and 40"):
        dimensions().check_mlp_dim(37)
    dimensions("qwen3_moe", mlp_only_layers=[0, 1]).check_mlp_dim(37)


def test_a_declaration_that_does_not_list_the_width_of_its_experts_keeps_them():
    adapter = replace(plugins().adapters["qwen2_moe"], mlp_widths=("shared_expert_intermediate_size",))
    assert "does not list 'moe_intermediate_size'" in dimensions(adapter=adapter).mlp_obstacle


# what goes


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_channels_of_experts_that_add_nothing_go_and_each_expert_has_its_own(family):
    model, sizes = model_of(family), dimensions(family)
    assert prove_channels(model, sizes, tokens(), 1e-9) < 1e-12


@pytest.fixture
def alternating(monkeypatch):
    """Lets the rows of gate and up alternate in Mixtral's experts."""
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def alternating(self, tokens, index, weights):
        made = torch.zeros_like(tokens)
        for expert in range(len(self.gate_up_proj)):
            share = (weights * (index == expert)).sum(-1, keepdim=True)
            both = tokens @ self.gate_up_proj[expert].T
            made = made + share * ((self.act_fn(both[:, ::2]) * both[:, 1::2]) @ self.down_proj[expert].T)
        return made

    monkeypatch.setattr(MixtralExperts, "forward", alternating)


@pytest.mark.usefixtures("alternating")
def test_experts_that_arrange_their_channels_otherwise_are_found_out():
    with pytest.raises(PluginError, match="does not describe the MLPs"):
        prove_channels(model_of("mixtral"), dimensions("mixtral"), tokens(), 1e-9)


@pytest.mark.usefixtures("alternating")
def test_an_inferred_declaration_keeps_channels_that_cannot_be_removed():
    import transformers

    from slicecli.infer.inference import infer_adapter

    config = transformers.MixtralConfig()
    adapter = infer_adapter(config).adapter
    assert "the logits change" in adapter.mlp_obstacle
    assert not Dimensions(adapter, config.to_dict()).legal_mlp_dims()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_an_inferred_declaration_and_its_scaffold_have_the_widths_of_the_written_one(family):
    import transformers

    from slicecli.infer.inference import infer_adapter
    from slicecli.infer.scaffold import package_files

    config = transformers.CONFIG_MAPPING[family]()
    inferred, written = infer_adapter(config).adapter, plugins().adapters[family]
    found = Dimensions(inferred, config.to_dict())
    assert not found.mlp_obstacle
    assert found.mlp_widths == Dimensions(written, config.to_dict()).mlp_widths
    source = package_files(inferred, {})[f"slicecli_{family}/__init__.py"]
    assert ("mlp_widths=" in source) == (found.mlp_widths != ("intermediate_size",))


def test_an_expert_that_no_token_reaches_keeps_the_channels_of_most_weight():
    model, sizes = model_of("mixtral", num_local_experts=4), dimensions("mixtral", num_local_experts=4)
    gate = model.model.layers[0].mlp.gate
    original = type(gate).forward

    def without_the_last(self, hidden):
        scores, weights, index = original(self, hidden)
        return scores, weights, torch.where(index == 3, 2, index)

    type(gate).forward, forward = without_the_last, original
    try:
        (made,), _ = slice_in_memory(model, sizes, tokens(8), 64, mlp_dim=40)
        assert torch.isfinite(logits(made, tokens(8))).all()
    finally:
        type(gate).forward = forward
    before, after = (one.model.layers[0].mlp.experts.down_proj[3].detach().norm(dim=0) for one in (model, made))
    assert torch.allclose(after.sort().values, before.topk(40).values.sort().values)


def test_few_tokens_are_enough_for_many_experts():
    model, sizes = model_of("qwen3_moe", num_experts=16), dimensions("qwen3_moe", num_experts=16)
    (made,), _ = slice_in_memory(model, sizes, tokens(1, 12), 64, mlp_dim=32)
    assert relative_error(logits(made, tokens(4)), logits(model, tokens(4))) < 1


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_less_is_lost_than_without_the_channels_of_least_weight(family):
    model, sizes = model_of(family), dimensions(family)
    kept = sizes.mlp_size * 3 // 4
    (made,), _ = slice_in_memory(model, sizes, tokens(), 64, mlp_dim=kept)
    dense = logits(model, tokens(8))
    chosen = relative_error(logits(made, tokens(8)), dense)
    with torch.no_grad():
        for layer in model.model.layers:
            writers = [*layer.mlp.experts.down_proj]
            writers += [layer.mlp.shared_expert.down_proj.weight] if family == "qwen2_moe" else []
            for weight in writers:
                weight[:, weight.norm(dim=0).argsort()[: len(weight.T) // 4]] = 0
    assert chosen < 0.8 * relative_error(logits(model, tokens(8)), dense)


# what the statistics say


def losses_of(model, sizes, token_ids, journal=None):
    dense = dense_of(model, sizes)
    return collect_statistics(dense, Batches(token_ids, 5), Silent(), journal, with_channels=True).channel_losses


def test_experts_lose_what_each_of_them_adds_for_its_own_tokens():
    """With one expert for each token nothing overlaps: e(0) is all that the mixture writes."""
    from slicecli.linalg.normal_equations import inverse_scale

    changes = {"num_experts_per_tok": 1, "num_local_experts": 3}
    model, sizes, token_ids = model_of("mixtral", **changes), dimensions("mixtral", **changes), tokens(12)
    found = losses_of(model, sizes, token_ids)
    written, behind = [], []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda _module, _args, output: written.append(output))
        layer.register_forward_hook(lambda _module, _args, output: behind.append(output))
    with torch.no_grad():
        model(input_ids=token_ids)
    expected = sum(
        float((added * inverse_scale(after, sizes.epsilon, False)).square().mean())
        for added, after in zip(written, behind, strict=True)
    )
    assert float(found[0]) == pytest.approx(expected, rel=0.02)  # but for the ridge
    assert (found.diff() <= 0).all()
    assert float(found[-1]) == 0


@pytest.mark.parametrize("changes", [{}, {"mlp_only_layers": [0]}])
def test_mlps_of_other_widths_are_in_the_losses_at_their_share(changes):
    model, sizes = model_of("qwen2_moe", **changes), dimensions(**changes)
    found = losses_of(model, sizes, tokens(12))
    assert found.shape == (WHOLE + 1,)
    assert float(found[0]) > float(found[WHOLE // 2]) > 0 == float(found[-1])


class Interrupted(Exception):
    """The end of a run."""


class OneBlock(NoJournal):
    """Keeps what the pass has after a block, and ends it there; then gives it back."""

    saved = None

    def resume(self, phase):
        return None if self.saved is None or self.saved[0] != phase else self.saved[1]

    def offer(self, phase, position, content):
        if self.saved is None:
            kept = Content(content.streams, {name: value.clone() for name, value in content.tensors.items()})
            self.saved = phase, Snapshot(position, dict(kept), {})
            raise Interrupted


@pytest.mark.parametrize("family", ["llama", "qwen2_moe"])
def test_an_interrupted_pass_goes_on_with_the_losses_so_far(family):
    model, sizes, journal = model_of(family), dimensions(family), OneBlock()
    with pytest.raises(Interrupted):
        losses_of(model, sizes, tokens(12), journal)
    assert torch.equal(losses_of(model, sizes, tokens(12), journal), losses_of(model, sizes, tokens(12)))


def test_a_pass_without_losses_is_not_gone_on_with_where_they_are_wanted():
    model, sizes, journal = model_of("mixtral"), dimensions("mixtral"), OneBlock()
    with pytest.raises(Interrupted):
        collect_statistics(dense_of(model, sizes), Batches(tokens(12), 5), Silent(), journal)
    assert torch.equal(losses_of(model, sizes, tokens(12), journal), losses_of(model, sizes, tokens(12)))


# slices in files


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    text = nonsense_text(tmp_path_factory.mktemp("text") / "text.jsonl")
    return ("--calibration", text, "--samples", "16", "--seq-len", "32", "--no-cache")


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    model = random_model(tiny_config("qwen2_moe", mlp_only_layers=[0]))
    return save_checkpoint(model, tmp_path_factory.mktemp("moe") / "tiny-moe")


@pytest.fixture(scope="module")
def sliced(dense, words, tmp_path_factory):
    from click.testing import CliRunner

    from slicecli.cli import group

    output = tmp_path_factory.mktemp("sliced") / "slice"
    done = CliRunner().invoke(
        group, ["slice", str(dense), "--dim", "48", "--mlp-dim", "32", "-o", str(output), *map(str, words)]
    )
    assert done.exit_code == 0, done.output
    return output


def record_of(folder):
    return json.loads((folder / "slicecli.json").read_text())


def test_a_slice_of_experts_loads_whole_in_its_own_class(sliced):
    import transformers

    model, report = transformers.AutoModelForCausalLM.from_pretrained(sliced, output_loading_info=True)
    assert type(model).__name__ == "Qwen2MoeForCausalLM"
    assert not any(report.values())
    assert model.model.layers[1].mlp.experts.gate_up_proj.shape == (EXPERTS, 64, 48)
    assert model.model.layers[1].mlp.shared_expert.up_proj.weight.shape == (37, 48)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (48, 59)
    with torch.no_grad():
        assert torch.isfinite(model(input_ids=tokens(2)).logits).all()


def test_record_card_and_config_have_every_width(run, sliced):
    others = {
        "shared_expert_intermediate_size": {"dense": 56, "sliced": 37},
        "intermediate_size": {"dense": 88, "sliced": 59},
    }
    record, config = record_of(sliced), json.loads((sliced / "config.json").read_text())
    assert (record["mlp_size"], record["mlp_dim"], record["other_mlp_widths"]) == (WHOLE, 32, others)
    assert config["moe_intermediate_size"] == 32
    assert {name: config[name] for name in others} == {name: one["sliced"] for name, one in others.items()}
    stored = sum(value.numel() for file in sliced.glob("*.safetensors") for value in load_file(file).values())
    assert record["parameters"]["sliced"] == stored
    card = (sliced / "README.md").read_text()
    assert "| MLP width | 48 | 32 |" in card
    assert "| `shared_expert_intermediate_size` | 56 | 37 |" in card
    done = run("verify", sliced)
    assert done.exit_code == 0, done.output


def test_verify_finds_another_width_in_the_config(run, sliced, tmp_path):
    import shutil

    copy = shutil.copytree(sliced, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text()) | {"shared_expert_intermediate_size": 38}
    (copy / "config.json").write_text(json.dumps(config))
    done = run("verify", copy)
    assert done.exit_code == 1
    assert "shared_expert_intermediate_size is 38 in config.json, but 37 in the record" in done.output


def test_an_estimate_of_experts_counts_as_the_slice_and_one_of_the_slice_as_the_dense_model(run, dense, sliced):
    words = ("--dim", "48", "--mlp-dim", "32", "--format", "json")
    first, second = (json.loads(run("estimate", model, *words).stdout) for model in (dense, sliced))
    (row,) = first["estimates"]
    assert row["parameters"] == record_of(sliced)["parameters"]["sliced"]
    assert second["dense"]["parameters"] == first["dense"]["parameters"] == record_of(sliced)["parameters"]["dense"]


def test_inspect_names_all_widths(run, dense):
    found = json.loads(run("inspect", dense, "--format", "json").stdout)
    assert found["mlp_widths"] == {
        "moe_intermediate_size": WHOLE,
        "shared_expert_intermediate_size": 56,
        "intermediate_size": 88,
    }
    assert "48 (shared_expert_intermediate_size 56, intermediate_size 88)" in run("inspect", dense).output


def test_a_slice_of_experts_can_be_sliced_again(run, sliced, words, tmp_path):
    done = run("slice", sliced, "--mlp-dim", "16", "-o", tmp_path / "again", *words)
    assert done.exit_code == 0, done.output
    assert record_of(tmp_path / "again")["other_mlp_widths"]["intermediate_size"] == {"dense": 59, "sliced": 30}
    assert run("verify", tmp_path / "again").exit_code == 0


def test_an_inferred_mixture_with_custom_code_has_the_width_too(run, words, tmp_path):
    import transformers

    model = save_checkpoint(random_model(tiny_config("olmoe", has_head_dim=False)), tmp_path / "model")
    done = run("slice", model, "--dim", "48", "--mlp-dim", "64", "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dense_config"]["intermediate_size"] == 64
    assert run("verify", tmp_path / "out").exit_code == 0
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(value.numel() for value in made.parameters()) == record_of(tmp_path / "out")["parameters"]["sliced"]


def test_a_target_of_experts_is_met_by_the_pair_that_loses_least(run, dense, words, tmp_path):
    parameters = dimensions(mlp_only_layers=[0]).parameters()
    target = ("--target-params", str(int(0.75 * parameters)))
    listed = json.loads(run("slice", dense, *target, "--dry-run", "--format", "json", *words).stdout)
    done = run("slice", dense, *target, "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    record = record_of(tmp_path / "out")
    assert {"dim": record["dim"], "mlp_dim": record["mlp_dim"]} in listed["pairs"]
    assert record["parameters"]["sliced"] <= 0.75 * parameters
    assert run("verify", tmp_path / "out").exit_code == 0


def test_pairs_of_experts_fit_and_use_up_a_target():
    sizes = dimensions(mlp_only_layers=[0])
    classes = SliceClasses.of_method(sizes, "refit", "qwen2_moe")
    limit = int(0.75 * sizes.parameters())
    found = pairs_within(Width(target_parameters=limit), sizes, classes, 4)
    assert len(found) > 2
    for dim, mlp_dim in found:
        assert sizes.with_mlp_dim(mlp_dim).parameters(dim) <= limit
        if mlp_dim is not None and mlp_dim + 8 < WHOLE:
            assert sizes.with_mlp_dim(mlp_dim + 8).parameters(dim) > limit


def test_a_hidden_size_that_experts_cannot_be_multiplied_in_is_refused():
    sizes = dimensions("mixtral", hidden_size=48)
    assert list(sizes.legal_dims()) == [8, 16, 24, 32, 40]
    with pytest.raises(RequestError, match=r"A dim of 45 is not legal for a model with experts.*\n?.*40"):
        sizes.check_dim(45)
