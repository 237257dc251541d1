"""Slices with fewer MLP channels: which widths are legal, and what becomes of them from the request to the card."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load_file

from slicecli.adapters import PassedThrough, select_adapter
from slicecli.errors import PluginError, RequestError
from slicecli.estimation.shape import ShapeLosses
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.shapes import is_met_by_pairs, pairs_within
from slicecli.family.slice_plan import Width
from slicecli.family.written_class import SliceClasses
from slicecli.testing.checkpoints import nonsense_text, save_checkpoint

SIZE = 80


def dimensions(family="llama", **changes):
    fields = tiny_config(family).to_dict() | changes
    return Dimensions(select_adapter(fields, plugins().adapters), fields)


# sizes


def test_every_channel_costs_the_same_parameters():
    sizes = dimensions("llama-biased")
    per_channel = sizes.blocks * (3 * 36 + 2)  # gate, up and down, and the biases of gate and up
    assert sizes.parameters(36) - sizes.with_mlp_dim(50).parameters(36) == (SIZE - 50) * per_channel


def test_all_channels_are_no_change():
    sizes = dimensions()
    assert sizes.with_mlp_dim(SIZE) is sizes
    assert sizes.with_mlp_dim(None) is sizes


@pytest.mark.parametrize(
    ("family", "changes", "name"),
    [
        ("llama", {}, "intermediate_size"),
        ("llama", {"model_type": "gpt2", "n_embd": 48, "n_layer": 2, "n_head": 4, "n_inner": None}, "n_inner"),
        ("llama", {"model_type": "opt", "ffn_dim": 80}, "ffn_dim"),
    ],
)
def test_the_config_of_a_slice_has_the_width_under_the_name_of_the_family(family, changes, name):
    assert dimensions(family, **changes).with_mlp_dim(50).mlp_fields() == {name: 50}


def test_the_hidden_size_may_stay_only_where_channels_go():
    sizes = dimensions()
    assert 48 not in sizes.legal_dims()
    assert 48 in sizes.with_mlp_dim(50).legal_dims()
    assert 49 not in sizes.with_mlp_dim(50).legal_dims()


@pytest.mark.parametrize("mlp_dim", [-1, 0, SIZE + 1])
def test_a_width_that_cannot_be_is_refused(mlp_dim):
    with pytest.raises(RequestError, match=f"from 1 to {SIZE}"):
        dimensions().check_mlp_dim(mlp_dim)


def whole():
    """Sizes of a model whose declaration keeps its MLPs whole."""
    from dataclasses import replace

    adapter = replace(plugins().adapters["llama"], mlp_obstacle="Its channels are tied.")
    return Dimensions(adapter, tiny_config("llama").to_dict())


def test_a_declared_obstacle_keeps_all_channels():
    assert not whole().legal_mlp_dims()
    for width in (Width(mlp_dim=50), Width(mlp_sparsity=0.5)):
        with pytest.raises(RequestError, match="Its channels are tied"):
            width.resolve_mlp(whole())


def test_a_declaration_without_the_width_of_the_mlp_says_so():
    from dataclasses import replace

    sizes = dimensions()
    block = replace(sizes.adapter.block, branches=sizes.adapter.block.branches[:1])
    fields = tiny_config("llama").to_dict()
    assert "no writer of width" in Dimensions(replace(sizes.adapter, block=block), fields).mlp_obstacle
    block = replace(sizes.adapter.block, passed_through=(PassedThrough("mlp.scale", "intermediate_size"),))
    assert "keeps a parameter" in Dimensions(replace(sizes.adapter, block=block), fields).mlp_obstacle


def test_a_width_that_follows_from_another_field_is_refused():
    from dataclasses import replace

    adapter = replace(plugins().adapters["llama"], derived={"intermediate_size": lambda config: 80})
    with pytest.raises(PluginError, match="does not take the width"):
        Dimensions(adapter, tiny_config("llama").to_dict()).with_mlp_dim(50)


# requests


@pytest.mark.parametrize(("sparsity", "mlp_dim"), [(0.25, 60), (0.501, 40), (0.001, None)])
def test_a_sparsity_goes_to_the_nearest_width(sparsity, mlp_dim):
    assert Width(mlp_sparsity=sparsity).resolve_mlp(dimensions()) == mlp_dim


def test_a_sparsity_of_a_wide_model_goes_to_a_width_that_formats_can_use():
    assert Width(mlp_sparsity=0.3).resolve_mlp(dimensions(intermediate_size=14336)) == 9984


def test_a_width_of_the_mlp_alone_keeps_the_hidden_size():
    assert Width(mlp_dim=50).resolve(dimensions().with_mlp_dim(50), 2) == 48


def test_a_target_counts_the_channels_that_go():
    sizes = dimensions()
    limit = sizes.parameters(36)
    width = Width(target_parameters=limit, mlp_dim=40)
    dim = width.resolve(sizes.with_mlp_dim(width.resolve_mlp(sizes)), 2)
    assert dim > 36
    assert sizes.with_mlp_dim(40).parameters(dim) <= limit


def test_nothing_to_remove_is_refused():
    with pytest.raises(RequestError, match="Nothing would be removed"):
        Width(mlp_dim=SIZE).resolve(dimensions(), 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"mlp_dim": 50, "mlp_sparsity": 0.5}, "chosen twice"),
        ({"mlp_sparsity": 1.0}, "not a fraction of the MLP channels"),
        ({"mlp_sparsity": float("nan")}, "not a fraction"),
        ({}, "No width"),
        ({"dim": 36, "shape": "mlp"}, "no effect without a target"),
        ({"dim": 36, "of": "parameters"}, "no effect without --sparsity"),
        ({"target_parameters": 9, "shape": "mlp", "mlp_dim": 40}, "chooses the MLP's width"),
        ({"sparsity": 1.5, "of": "parameters"}, "not a fraction of the parameters"),
    ],
)
def test_requests_without_sense_are_refused(given, message):
    with pytest.raises(RequestError, match=message):
        Width(**given)


# pairs of widths


def pairs(family="llama", share=0.8, **wish):
    sizes = dimensions(family)
    classes = SliceClasses.of_method(sizes, "refit", "llama")
    width = Width(target_parameters=int(share * sizes.parameters()), **wish)
    found = pairs_within(width, sizes, classes, 4)
    counts = [classes.with_mlp_dim(mlp_dim).at(dim).parameters(dim) for dim, mlp_dim in found]
    return sizes, width.target_parameters, found, counts


@pytest.mark.parametrize("family", ["llama", "llama-biased", "llama-tied"])
def test_pairs_fit_and_use_up_a_target(family):
    sizes, limit, found, counts = pairs(family)
    assert len(found) > 2
    for (dim, mlp_dim), count in zip(found, counts, strict=True):
        assert count <= limit
        if mlp_dim is not None:  # one channel more would be too many
            assert mlp_dim + 1 == SIZE or sizes.with_mlp_dim(mlp_dim + 1).parameters(dim) > limit


def test_no_pair_is_narrower_than_another_in_both_widths():
    found = [(dim, mlp_dim or SIZE) for dim, mlp_dim in pairs()[2]]
    assert found == sorted(found, reverse=True)
    assert [mlp_dim for _, mlp_dim in found] == sorted({mlp_dim for _, mlp_dim in found})


def test_pairs_reach_from_channels_alone_to_the_hidden_size_alone():
    sizes, limit, found, _ = pairs()
    assert found[0].dim == sizes.hidden_size
    assert found[-1].mlp_dim is None
    assert pairs(shape="mlp")[2] == found[:1]
    assert found[-1].dim == Width(target_parameters=limit, shape="width").resolve(sizes, 4)


def test_both_widths_are_multiples_of_a_number_of_the_users():
    for dim, mlp_dim in pairs(multiple_of=12)[2]:
        assert dim % 12 == 0
        assert (mlp_dim or 12) % 12 == 0


def test_a_fraction_of_the_parameters_is_a_target():
    sizes = dimensions()
    dim = Width(sparsity=0.2, of="parameters", shape="width").resolve(sizes, 4)
    assert dim == Width(target_parameters=int(0.8 * sizes.parameters())).resolve(sizes, 4)


def test_a_target_of_a_model_with_whole_mlps_is_met_by_the_hidden_size():
    assert is_met_by_pairs(Width(target_parameters=9), dimensions(), "refit")
    assert not is_met_by_pairs(Width(target_parameters=9), whole(), "refit")
    with pytest.raises(RequestError, match="Its channels are tied"):
        pairs_within(Width(target_parameters=9, shape="mlp"), whole(), None, 4)


def test_a_target_of_the_published_method_is_met_by_the_hidden_size(run, checkpoints):
    assert not is_met_by_pairs(Width(target_parameters=9), dimensions(), "slicegpt")
    done = run("slice", checkpoints(), "--target-params", "60k", "--shape", "mlp", "--method", "slicegpt", "--dry-run")
    assert "--shape mlp require the refit" in done.output


def test_a_target_that_nothing_or_everything_fits_is_refused():
    with pytest.raises(RequestError, match="The smallest has"):
        pairs(share=0.001)
    with pytest.raises(RequestError, match="dense model fits"):
        pairs(share=1.0)


def test_the_pair_of_least_loss_depends_on_what_each_width_loses():
    size, channels = 12, 20
    even = ShapeLosses([1 - dim / size for dim in range(size + 1)], [1 - m / channels for m in range(channels + 1)])
    free = ShapeLosses(even.discarded, [0.0] * (channels + 1))
    some = [(12, 8), (9, 12), (6, None)]
    assert min(some, key=lambda pair: free.predict(*pair)) == (12, 8)
    assert min(some, key=lambda pair: ShapeLosses([0.0] * (size + 1), even.cut).predict(*pair)) == (6, None)


# slices


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    text = nonsense_text(tmp_path_factory.mktemp("text") / "text.jsonl")
    return ("--calibration", text, "--samples", "24", "--seq-len", "32", "--no-cache")


@pytest.fixture(scope="module")
def both(checkpoints, words, tmp_path_factory):
    """A slice of both widths."""
    from click.testing import CliRunner

    from slicecli.cli import group

    output = tmp_path_factory.mktemp("both") / "slice"
    asked = ["slice", checkpoints(), "--dim", "36", "--mlp-dim", "61", "-o", output, *words]
    done = CliRunner().invoke(group, [str(word) for word in asked])
    assert done.exit_code == 0, done.output
    return output


def record_of(folder):
    return json.loads((folder / "slicecli.json").read_text())


def test_the_full_width_gives_the_same_bytes(run, checkpoints, words, tmp_path):
    for name, more in (("without", []), ("full", ["--mlp-dim", SIZE])):
        done = run("slice", checkpoints(), "--dim", "36", *more, "-o", tmp_path / name, *words)
        assert done.exit_code == 0, done.output
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("without", "full")
    )
    assert first == second


def test_weights_config_and_record_have_the_width(both):
    tensors = load_file(both / "model.safetensors")
    assert tensors["model.layers.0.mlp.gate_proj.weight"].shape == (61, 36)
    assert tensors["model.layers.2.mlp.down_proj.weight"].shape == (36, 61)
    assert json.loads((both / "config.json").read_text())["intermediate_size"] == 61
    record = record_of(both)
    assert (record["mlp_size"], record["mlp_dim"], record["dim"]) == (SIZE, 61, 36)
    assert record["parameters"]["sliced"] == sum(tensor.numel() for tensor in tensors.values())
    assert record["predictions"] == []


def test_the_card_says_both_widths(both):
    card = (both / "README.md").read_text()
    assert "sliced to hidden size 36 and MLP width 61" in card
    assert "sliced from 48 to 36 and its MLPs from 80 to 61 channels" in card
    assert "| MLP width | 80 | 61 |" in card


def test_the_command_in_the_record_makes_the_same_slice(run, checkpoints, both, words, tmp_path):
    command = record_of(both)["command"]
    assert "--dim 36 --mlp-dim 61" in command
    asked = command.split()[3:]
    asked[asked.index("--calibration") + 1] = words[1]
    done = run("slice", checkpoints(), *asked, "--no-cache", "-o", tmp_path / "again")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "again" / "model.safetensors").read_bytes() == (both / "model.safetensors").read_bytes()


def test_a_slice_of_the_mlp_alone_keeps_the_hidden_size(run, checkpoints, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = run("slice", checkpoints("phi3"), "--mlp-sparsity", "0.5", "--write-as", "own", *words)
    assert done.exit_code == 0, done.output
    folder = tmp_path / "tiny-phi3-dim48-mlp40"
    assert load_file(folder / "model.safetensors")["model.layers.0.mlp.gate_up_proj.weight"].shape == (80, 48)
    assert "sliced to MLP width 40" in (folder / "README.md").read_text()
    assert run("verify", folder).exit_code == 0
    assert record_of(folder)["sparsity"] == 0


@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_a_slice_in_a_portable_class_has_the_width(run, checkpoints, words, tmp_path, family):
    done = run("slice", checkpoints(family), "--mlp-dim", "61", "--write-as", "llama", "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    assert load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"].shape == (61, 48)
    assert run("verify", tmp_path / "out").exit_code == 0


def test_a_target_is_met_by_the_pair_that_loses_least(run, checkpoints, words, tmp_path):
    """The choice is of the first pass; the slice is the one that its widths alone would give."""
    dense = dimensions().parameters()
    target = ("--target-params", str(int(0.8 * dense)), "--write-as", "own")
    listed = json.loads(run("slice", checkpoints(), *target, "--dry-run", "--format", "json", *words).stdout)
    assert listed["dim"] is None
    done = run("slice", checkpoints(), *target, "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    record = record_of(tmp_path / "out")
    assert {"dim": record["dim"], "mlp_dim": record["mlp_dim"]} in listed["pairs"]
    assert record["parameters"]["sliced"] <= 0.8 * dense
    assert run("verify", tmp_path / "out").exit_code == 0
    widths = ("--dim", record["dim"], *(() if record["mlp_dim"] is None else ("--mlp-dim", record["mlp_dim"])))
    done = run("slice", checkpoints(), *widths, "--write-as", "own", "-o", tmp_path / "same", *words)
    assert done.exit_code == 0, done.output
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("out", "same"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("shape", "mlp_dim", "dim"), [("width", None, 36), ("mlp", 31, 48)])
def test_a_target_may_be_met_by_one_width_alone(run, checkpoints, shape, mlp_dim, dim):
    limit = dimensions().parameters(36)
    words = ("--target-params", limit, "--shape", shape, "--write-as", "own", "--dry-run", "--format", "json")
    plan = json.loads(run("slice", checkpoints(), *words).stdout)
    assert (plan["dim"], plan["mlp_dim"], plan["pairs"]) == (dim, mlp_dim, [])


def test_a_slice_can_be_sliced_again(run, both, words, tmp_path):
    done = run("slice", both, "--dim", "32", "--mlp-dim", "40", "-o", tmp_path / "again", *words)
    assert done.exit_code == 0, done.output
    record = record_of(tmp_path / "again")
    assert (record["mlp_size"], record["mlp_dim"]) == (61, 40)
    assert [(one["mlp_size"], one["mlp_dim"]) for one in record["ancestry"]] == [(SIZE, 61)]
    assert "48 to 36, MLP width 80 to 61" in (tmp_path / "again" / "README.md").read_text()
    assert run("verify", tmp_path / "again").exit_code == 0


@pytest.mark.parametrize("family", ["gpt2", "opt", "falcon"])
def test_a_slice_with_custom_code_has_the_width_in_the_config_of_its_class(run, words, tmp_path, family):
    from slicecli.proof.tiny import random_model
    from slicecli.proof.tiny import tiny_config as small

    model = save_checkpoint(random_model(small(family, has_head_dim=False)), tmp_path / "model")
    done = run("slice", model, "--mlp-dim", "50", "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    field = {"gpt2": "n_inner", "opt": "ffn_dim", "falcon": "ffn_hidden_size"}[family]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dense_config"][field] == 50
    assert run("verify", tmp_path / "out").exit_code == 0


def test_an_inferred_declaration_has_the_width_of_the_mlp(run, checkpoints, words, tmp_path):
    done = run("slice", checkpoints(), "--adapter", "auto", "--mlp-dim", "61", "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output
    assert record_of(tmp_path / "out")["mlp_dim"] == 61


def test_the_published_method_keeps_the_channels(run, checkpoints, words):
    done = run("slice", checkpoints(), "--dim", "36", "--mlp-dim", "61", "--method", "slicegpt", *words)
    assert done.exit_code == 2
    assert "require the refit" in done.output


def test_less_is_lost_than_without_other_channels(run, checkpoints, both, tmp_path):
    """The channels that go are not just any: the first as many, without a refit, lose more."""
    import transformers

    from slicecli.proof.declaration import logits, relative_error, slice_in_memory

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoints(), dtype=torch.float64).eval()
    fields = model.config.to_dict()
    sizes = Dimensions(select_adapter(fields, plugins().adapters), fields)
    token_ids = torch.randint(2, 258, (40, 24), generator=torch.Generator().manual_seed(1))
    (made,), _ = slice_in_memory(model, sizes, token_ids, 48, mlp_dim=61)
    dense = logits(model, token_ids)
    chosen = relative_error(logits(made, token_ids), dense)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, 61:] = 0
    assert chosen < 0.7 * relative_error(logits(model, token_ids), dense)


# estimates and measurements


def test_the_count_of_an_estimate_is_that_of_the_slice(run, checkpoints, both):
    done = run("estimate", checkpoints(), "--dim", "36", "--mlp-dim", "61", "--format", "json")
    (row,) = json.loads(done.stdout)["estimates"]
    assert row["mlp_dim"] == 61
    assert row["parameters"] == record_of(both)["parameters"]["sliced"]


def estimated(run, model, *words):
    (row,) = json.loads(run("estimate", model, *words, "--format", "json").stdout)["estimates"]
    return row


def test_an_estimate_counts_the_other_head_with_the_same_channels(run, checkpoints):
    widths = ("--dim", "36", "--mlp-dim", "61")
    untied = estimated(run, checkpoints("llama-tied"), *widths)["untied"]
    assert untied["parameters"] == estimated(run, checkpoints("llama-tied"), *widths, "--untie")["parameters"]


def test_an_estimate_counts_slices_with_custom_code(run, words, tmp_path):
    from slicecli.proof.tiny import random_model
    from slicecli.proof.tiny import tiny_config as small

    model = save_checkpoint(random_model(small("gpt2", has_head_dim=False)), tmp_path / "model")
    run("slice", model, "--dim", "40", "--mlp-dim", "50", "-o", tmp_path / "out", *words)
    written = record_of(tmp_path / "out")["parameters"]["sliced"]
    assert estimated(run, model, "--dim", "40", "--mlp-dim", "50")["parameters"] == written


def test_an_estimate_of_the_mlp_alone_is_at_the_hidden_size(run, checkpoints):
    (row,) = json.loads(run("estimate", checkpoints(), "--mlp-dim", "61", "--format", "json").stdout)["estimates"]
    assert (row["dim"], row["legal"]) == (48, True)


def test_an_estimate_predicts_nothing_without_all_channels(run, checkpoints):
    words = ("estimate", checkpoints(), "--dim", "36", "--dense-perplexity", "9", "--format", "json")
    whole, narrower = (json.loads(run(*words, *more).stdout) for more in ([], ["--mlp-dim", "61"]))
    assert "perplexity" in whole["estimates"][0]
    assert "perplexity" not in narrower["estimates"][0]
    assert any("all MLP channels" in note for note in narrower["notes"])


def test_an_estimate_of_a_slice_is_of_its_dense_model(run, checkpoints, both):
    dense, of_slice = (
        json.loads(run("estimate", model, "--dim", "24", "--format", "json").stdout) for model in (checkpoints(), both)
    )
    assert of_slice["estimates"] == dense["estimates"]
    assert any("dim 36 and MLP width 61" in note for note in of_slice["notes"])


def test_inspect_names_the_width_or_why_it_cannot_change(run, checkpoints):
    found = json.loads(run("inspect", checkpoints(), "--format", "json").stdout)
    assert (found["mlp_size"], found["mlp_obstacle"]) == (SIZE, "")


def test_a_curve_of_the_hidden_size_takes_no_such_slice(run, checkpoints, both, text_file, tmp_path):
    for name, model in (("dense", checkpoints()), ("slice", both)):
        measure = ["--perplexity", text_file, "--limit", "4", "--seq-len", "32"]
        done = run("eval", model, *measure, "-o", tmp_path / f"{name}.json")
        assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "slice.json").read_text())["mlp_dim"] == 61
    done = run("fit", tmp_path / "dense.json", tmp_path / "slice.json")
    assert done.exit_code == 2
    assert "keeps 61 of 80 MLP channels" in done.output


def test_an_estimate_of_a_target_counts_the_pairs_that_slice_would_choose_among(run, checkpoints, words):
    target = ("--target-params", int(0.8 * dimensions().parameters()))
    rows = json.loads(run("estimate", checkpoints(), *target, "--format", "json").stdout)["estimates"]
    plan = json.loads(run("slice", checkpoints(), *target, "--dry-run", "--format", "json", *words).stdout)
    assert [{"dim": row["dim"], "mlp_dim": row["mlp_dim"]} for row in rows] == plan["pairs"]
    assert all(row["parameters"] <= target[1] for row in rows)


def test_an_estimate_predicts_those_pairs_that_keep_all_channels(run, checkpoints):
    target = ("--target-params", int(0.8 * dimensions().parameters()), "--dense-perplexity", "9")
    done = run("estimate", checkpoints(), *target, "--format", "json")
    rows = json.loads(done.stdout)["estimates"]
    assert {row["mlp_dim"] for row in rows if "perplexity" in row} == {None}
    assert run("estimate", checkpoints(), *target).exit_code == 0


def test_a_spectrum_predicts_slices_with_fewer_channels(run, checkpoints, text_file, tmp_path):
    model, spectrum = checkpoints(), tmp_path / "spectrum.json"
    words = ("--calibration", text_file, "--samples", "8", "--seq-len", "32")
    assert run("spectrum", model, *words, "-o", spectrum).exit_code == 0
    assert json.loads(spectrum.read_text())["channels"][-1] == {"mlp_dim": SIZE, "lost": 0.0}
    words = ("estimate", model, "--dense-perplexity", "9", "--relation", "fisher", "--spectrum", spectrum)
    predicted = []
    for mlp_dim in (20, 60, SIZE):
        done = run(*words, "--dim", "36", "--mlp-dim", str(mlp_dim), "--format", "json")
        assert done.exit_code == 0, done.output
        predicted += json.loads(done.stdout)["estimates"]
    worst, middle, best = (one["perplexity"]["value"] for one in predicted)
    assert worst > middle > best > 9
    done = run(*words, "--target-params", int(0.8 * dimensions().parameters()))
    assert "is predicted to lose least" in done.output


def test_as_much_is_lost_at_the_equal_dim():
    losses = ShapeLosses([1 - dim / 12 for dim in range(13)], [1 - m / 20 for m in range(21)])
    equal = losses.equal_dim(9, 15)
    assert equal is not None
    assert losses.predict(int(equal) + 1, None) < losses.predict(9, 15) < losses.predict(int(equal), None)
    assert losses.equal_dim(9, None) == 9
    assert ShapeLosses([0.0] * 13, losses.cut).equal_dim(9, 15) is None


# what the statistics say of channels


@pytest.mark.parametrize("family", ["llama", "granite", "gpt2", "falcon", "opt", "phi"])
def test_without_channels_the_mlps_lose_what_they_add_to_the_stream(family):
    """Against a run of the whole model: e(0) is all that the MLPs write, but for what a bias writes for all tokens."""
    from slicecli.linalg.channels import RIDGE
    from slicecli.linalg.normal_equations import inverse_scale
    from slicecli.progress import Silent
    from slicecli.proof.declaration import ModelWeights, _empty_like
    from slicecli.proof.tiny import random_model
    from slicecli.proof.tiny import tiny_config as small
    from slicecli.slicing.context import Batches, DenseModel
    from slicecli.slicing.modules import first_tensor
    from slicecli.slicing.refit import collect_statistics
    from slicecli.slicing.sliced_tensors import matrix_of

    model = random_model(small(family, has_head_dim=False), dtype="float64")
    fields = model.config.to_dict()
    sizes = Dimensions(select_adapter(fields, plugins().adapters), fields)
    token_ids = torch.randint(2, sizes.vocabulary, (12, 16), generator=torch.Generator().manual_seed(0))
    dense = DenseModel(_empty_like(model, sizes, on_meta=True), ModelWeights(model), sizes, model.device, model.dtype)
    found = collect_statistics(dense, Batches(token_ids, 5), Silent(), with_channels=True).channel_losses

    expected, blocks = 0.0, list(model.get_submodule(sizes.adapter.blocks))
    entering, behind = {}, {}
    writers = [one for declared in sizes.declared_blocks for one in declared.branches if sizes.is_mlp(one)]
    for index, (block, branch) in enumerate(zip(blocks, writers, strict=True)):
        writer = block.get_submodule(branch.writer.path)
        writer.register_forward_pre_hook(lambda _module, args, at=index: entering.update({at: args[0]}))
        block.register_forward_hook(lambda _module, _args, output, at=index: behind.update({at: first_tensor(output)}))
    with torch.no_grad():
        model(input_ids=token_ids)
    for index, (block, branch) in enumerate(zip(blocks, writers, strict=True)):
        weight = inverse_scale(behind[index].flatten(0, -2), sizes.epsilon, dense.is_centred)
        z = entering[index].flatten(0, -2) * weight
        if sizes.has_bias(branch.writer):  # which repairs what is the same for all tokens
            z = z - weight @ torch.linalg.lstsq(weight, z).solution
        gram = z.T @ z + RIDGE * z.square().sum(0).mean() * torch.eye(z.shape[1], dtype=z.dtype)
        matrix = matrix_of(branch.writer, block.state_dict()) * sizes.multiplier(branch.multiplier)
        expected += float((matrix @ gram @ matrix.T).trace()) / (token_ids.numel() * sizes.hidden_size)
    assert float(found[0]) == pytest.approx(expected, rel=1e-6)
    assert (found.diff() <= 0).all()
    assert float(found[-1]) == 0
