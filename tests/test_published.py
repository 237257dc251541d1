"""The published method as a whole: against a second implementation in float64, and through the command line."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import transformers
from conftest import VOCABULARY, tiny_model
from safetensors.torch import load_file
from test_families import CASES
from test_slicing import dimensions_of, logits, random_rows

from slicecli.adapters import Adapter
from slicecli.checkpoint.folder import file_digest
from slicecli.errors import PluginError
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.schedule import PublishedSizes, Schedule, count, read_schedule
from slicecli.linalg.basis import principal_basis, random_rotation
from slicecli.proof.declaration import prove_shortcuts, published_in_memory, relative_error
from slicecli.proof.float64 import Float64Throughout
from slicecli.proof.tiny import random_model


def in_float64(family, **changes):
    return tiny_model(family, **changes).double()


def published(model, schedule, rows=None, **options):
    rows = random_rows() if rows is None else rows
    return published_in_memory(model, dimensions_of(model.config), rows, schedule, **options)


def projector(streams, width):
    """The projection on the leading eigenvectors of the second moment, by numpy."""
    flat = streams.reshape(-1, streams.shape[-1]).numpy()
    _, vectors = np.linalg.eigh(flat.T @ flat)
    kept = torch.from_numpy(np.ascontiguousarray(vectors[:, -width:]))
    return kept @ kept.T


def reference_logits(model, schedule, calibration, rows):
    """A Llama whose stream, at full width, is projected at every place as slicing would leave it.

    The projections are those of the stream of the calibration rows that went through all earlier ones.
    """
    both = torch.cat([calibration, rows])
    shown = len(calibration)
    inner = model.model
    places = iter(schedule.site_widths)

    def cut(stream):
        return stream @ projector(stream[:shown], next(places))

    with torch.no_grad():
        stream = cut(inner.embed_tokens(both))
        positions = inner.rotary_emb(stream, torch.arange(both.shape[1])[None])
        mask = torch.full((both.shape[1],) * 2, -1e30).triu(1).double()[None, None]
        for block in inner.layers:
            added, _ = block.self_attn(
                hidden_states=block.input_layernorm(stream), position_embeddings=positions, attention_mask=mask
            )
            stream = cut(stream + added)
            stream = cut(stream + block.mlp(block.post_attention_layernorm(stream)))
        return model.lm_head(inner.norm(stream))[shown:]


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(((36, 36),) * 3, 48),
        Schedule(((36, 36),) * 3, 36),
        Schedule(((44, 40), (40, 30), (36, 20)), 33),
        Schedule(((48, 48),) * 3, 48),
    ],
    ids=["head whole", "head sliced", "falling", "full"],
)
@pytest.mark.parametrize("family", ["llama", "llama-biased", "llama-tied"])
def test_a_slice_computes_what_the_projected_model_does(family, schedule):
    model = in_float64(family)
    rows = random_rows(6, seed=7)
    with Float64Throughout():
        expected = reference_logits(model, schedule, random_rows(), rows)
    sliced = published(model, schedule)
    assert {name: tuple(value.shape) for name, value in sliced.named_parameters()} == schedule.shapes(
        dimensions_of(model.config)
    )
    with Float64Throughout():
        # the angles of positions are float32 in one of them
        assert relative_error(logits(sliced, rows), expected) < 1e-6


def test_the_order_of_batches_and_their_size_do_not_matter():
    model, schedule = in_float64("llama"), Schedule(((36, 36),) * 3, 48)
    with Float64Throughout():
        assert (
            relative_error(
                logits(published(model, schedule, batch_rows=7)), logits(published(model, schedule, batch_rows=40))
            )
            < 1e-9
        )


def test_a_random_orientation_turns_the_weights_and_nothing_else():
    model, schedule = in_float64("llama"), Schedule(((36, 36), (30, 30), (36, 30)), 48)
    plain = published(model, schedule)
    turned, again, other = (published(model, schedule, orientation="random", seed=seed) for seed in (1, 1, 2))
    with Float64Throughout():
        expected = logits(plain)
        for one in (turned, other):
            assert relative_error(logits(one), expected) < 1e-9
    weights = [one.get_input_embeddings().weight for one in (plain, turned, again, other)]
    assert torch.equal(weights[1], weights[2])
    assert relative_error(weights[1], weights[0]) > 0.5
    assert relative_error(weights[1], weights[3]) > 0.5


def test_rotations_are_drawn_uniformly():
    """Orthogonal, and no direction is preferred: the mean over many is zero, entries have variance 1/n."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([random_rotation(5, generator) for _ in range(4000)])
    assert torch.allclose(drawn @ drawn.mT, torch.eye(5, dtype=torch.float64).expand_as(drawn), atol=1e-12)
    assert float(drawn.mean(0).abs().max()) < 0.03
    assert torch.allclose(drawn.square().mean(0), torch.full((5, 5), 0.2, dtype=torch.float64), atol=0.02)


def test_principal_directions_come_with_their_energies():
    data = torch.randn(200, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moment = data.T @ data
    vectors, energies = principal_basis(moment)
    assert torch.allclose(vectors.T @ moment @ vectors, torch.diag(energies), atol=1e-9)
    assert torch.equal(energies, energies.sort(descending=True).values)


def test_the_slice_is_calibrated_on_what_slicing_has_left():
    """Were each basis that of the dense stream, narrow first blocks could not change the later ones."""
    model = in_float64("llama")
    narrow, wide = (
        published(model, Schedule(((first, first), (36, 36), (36, 36)), 48)).get_submodule("model.layers.2.shortcuts.0")
        for first in (12, 48)
    )
    assert relative_error(narrow.weight, wide.weight) > 0.01


def test_shortcuts_are_products_taken_in_float64():
    """At full width they are orthogonal as far as the stored dtype can say, which float32 products would not be."""
    model = tiny_model("llama").to(torch.float32)
    shortcut = published(model, Schedule(((48, 48),) * 3, 48)).get_submodule("model.layers.1.shortcuts.0").weight
    shortcut = shortcut.detach()
    error = shortcut.double() @ shortcut.double().T - torch.eye(48, dtype=torch.float64)
    assert float(error.abs().max()) < 3e-7


def test_a_stream_with_a_mean_is_not_centred_for_root_mean_square_norms():
    """The published implementation takes the mean out of every model's embeddings."""
    model = in_float64("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.add_(1.0)
    with Float64Throughout():
        assert relative_error(logits(published(model, Schedule(((48, 48),) * 3, 48))), logits(model)) < 1e-9


def test_the_norm_has_the_model_s_own_epsilon():
    model = in_float64("llama", rms_norm_eps=0.3)
    with Float64Throughout():
        assert relative_error(logits(published(model, Schedule(((48, 48),) * 3, 48))), logits(model)) < 1e-9


@pytest.mark.parametrize(
    "name", ["phi3", "phi", "opt", "falcon", "gpt_neox", "gptj", "granite", "cohere", "mixtral", "qwen2_moe"]
)
def test_widths_may_change_where_nothing_forbids_it(name):
    adapter, config = CASES[name]
    model, sizes = random_model(config), Dimensions(adapter, config.to_dict())
    has_experts = any(branch.experts for block in sizes.declared_blocks for branch in block.branches)
    if has_experts:
        schedule = Schedule(((60, 44), (44, 36)), 36)
    else:
        schedule = read_schedule("linear:0.1:0.4", sizes)
        assert len(set(schedule.site_widths)) == 3
    rows = torch.randint(2, 300, (20, 24), generator=torch.Generator().manual_seed(0))
    sliced = published_in_memory(model, sizes, rows, schedule)
    assert sum(value.numel() for value in sliced.parameters()) == count(schedule.shapes(sizes))
    assert torch.isfinite(logits(sliced, rows)).all()


def test_a_family_whose_block_does_more_than_it_says_is_not_sliced(monkeypatch):
    """The proof on a small model stops it before anything is read."""
    adapter = plugins().adapters["llama"]
    assert isinstance(adapter, Adapter)
    config = CASES["llama"][1]
    own = transformers.models.llama.modeling_llama.LlamaDecoderLayer.forward

    def scaled(self, *args, **kwargs):
        return own(self, *args, **kwargs) * 1.5

    assert prove_shortcuts(adapter, config, slices_head=False) == 0
    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaDecoderLayer, "forward", scaled)
    with pytest.raises(PluginError, match=r"LlamaForCausalLM: its blocks do more.*--method refit"):
        prove_shortcuts(adapter, config, slices_head=False)


@pytest.mark.parametrize(
    ("model_type", "fields"),
    [
        ("phi", {"hidden_size": 2560, "num_attention_heads": 32, "partial_rotary_factor": 0.4}),
        ("stablelm", {"hidden_size": 2048, "num_attention_heads": 32, "partial_rotary_factor": 0.25}),
        ("falcon", {"hidden_size": 4544, "num_attention_heads": 71, "multi_query": True}),
        ("phi3", {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48}}),
    ],
)
def test_the_proof_finds_a_small_model_for_configs_of_real_ones(model_type, fields):
    adapter = next(one for one in plugins().adapters.values() if model_type in one.model_types)
    prove_shortcuts(adapter, transformers.CONFIG_MAPPING[model_type](**fields), slices_head=False)


def test_a_family_that_keeps_its_width_is_found_out():
    adapter, config = CASES["gpt2"]
    prove_shortcuts(adapter, config, slices_head=True)
    with pytest.raises(PluginError, match=r"fails to run with a narrow stream.*--slice-head"):
        prove_shortcuts(adapter, config, slices_head=False)


def test_the_command_writes_a_slice_with_its_code(run, checkpoints, slice_words, tmp_path):
    words = ["slice", checkpoints(), "--dim", "37", "--method", "slicegpt", *slice_words, "--format", "json"]
    made = []
    for name in ("one", "two"):
        result = run(*words, "-o", tmp_path / name, "--final-orientation", "random")
        assert result.exit_code == 0, result.output
        made.append(json.loads(result.stdout))
    fields = made[0]
    sizes = PublishedSizes(dimensions_of(transformers.AutoConfig.from_pretrained(checkpoints())))
    assert fields["method"] == "slicegpt"
    assert fields["layout"] == "custom-code"
    assert fields["schedule"] == {"blocks": [[37, 37]] * 3, "head": 48}
    assert fields["parameters"]["sliced"] == sizes.parameters(37)
    assert 0 < fields["energy_kept"] < 1
    digests = [file_digest(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    assert digests[0] == digests[1]
    record = json.loads((tmp_path / "one" / "slicecli.json").read_text())
    assert record["needs_remote_code"]
    assert record["schedule"] == fields["schedule"]
    kept = [point["kept"] for point in record["energy"]["spectrum"]]
    assert kept == sorted(kept)
    assert abs(kept[-1] - 1) < 1e-12
    card = (tmp_path / "one" / "README.md").read_text()
    assert "trust_remote_code=True" in card
    assert "--method slicegpt --final-orientation random" in card
    assert "refitted by least squares" not in card
    names = {path.name for path in (tmp_path / "one").iterdir()}
    assert {"configuration_slicecli.py", "modeling_slicecli.py", "LICENSE.txt", "tokenizer.json"} <= names


def test_the_command_of_a_card_makes_the_slice_again(run, checkpoints, slice_words, text_file, tmp_path, monkeypatch):
    for extra in (["--slice-head"], []):
        words = ["slice", checkpoints(), "--dim", "40", "--method", "slicegpt", *slice_words, *extra, "--overwrite"]
        assert run(*words, "-o", tmp_path / "first").exit_code == 0
        card = (tmp_path / "first" / "README.md").read_text()
        line = next(line for line in card.splitlines() if line.startswith("slicecli slice"))
        monkeypatch.chdir(text_file.parent)
        again = [checkpoints() if word == checkpoints().name else word for word in line.split()[1:]]
        assert run(*again, "-o", tmp_path / "again", "--overwrite").exit_code == 0
        weights = [load_file(tmp_path / name / "model.safetensors") for name in ("first", "again")]
        assert weights[0].keys() == weights[1].keys()
        assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_schedule_is_sliced_by_the_command(run, checkpoints, slice_words, tmp_path):
    result = run(
        *["slice", checkpoints(), "--schedule", "linear:0:0.5", "--method", "slicegpt", *slice_words],
        *["-o", tmp_path / "slice", "--format", "json"],
    )
    assert result.exit_code == 0, result.output
    fields = json.loads(result.stdout)
    assert fields["schedule"] == {"blocks": [[48, 48], [36, 36], [24, 24]], "head": 48}
    assert fields["dim"] == 36
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "slice")
    assert sum(value.numel() for value in model.parameters()) == fields["parameters"]["sliced"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--dim", "36", "--slice-head"], "--slice-head requires the slicegpt method"),
        (["--dim", "36", "--final-orientation", "random"], "--final-orientation requires the slicegpt method"),
        (["--schedule", "linear:0:0.5"], "--schedule requires the slicegpt method"),
        (["--dim", "36", "--schedule", "linear:0:0.5", "--method", "slicegpt"], "chosen more than once"),
        (["--schedule", "none.json", "--method", "slicegpt"], "schedule 'none.json' does not exist"),
        (["--schedule", "constant", "--method", "slicegpt"], "No width"),
        (["--dim", "48", "--method", "slicegpt"], "is not below"),
    ],
)
def test_wishes_that_do_not_go_together_are_refused(run, checkpoints, tmp_path, words, says):
    result = run("slice", checkpoints(), *words, "-o", tmp_path / "slice")
    assert result.exit_code == 2
    assert says in result.stderr
    assert not (tmp_path / "slice").exists()


def test_more_parameters_than_before_are_announced(run, checkpoints, slice_words, tmp_path):
    result = run(
        *["slice", checkpoints("llama-tied"), "--dim", "46", "--method", "slicegpt", *slice_words],
        *["-o", tmp_path / "slice"],
    )
    assert result.exit_code == 0, result.output
    assert "more parameters than the dense model" in result.stderr
    assert "shortcut matrices" in result.stderr


def test_a_slice_with_code_of_its_own_is_evaluated_and_generates(run, checkpoints, slice_words, text_file, tmp_path):
    words = ["slice", checkpoints(), "--dim", "36", "--method", "slicegpt", *slice_words, "-o", tmp_path / "slice"]
    assert run(*words).exit_code == 0
    measured = run("eval", tmp_path / "slice", "--perplexity", text_file, "--seq-len", "32", "--format", "json")
    assert measured.exit_code == 0, measured.output
    assert 1 < json.loads(measured.stdout)["perplexity"][text_file.name]["value"] < 10 * VOCABULARY
    written = run("generate", tmp_path / "slice", "the stream", "--max-new-tokens", "4")
    assert written.exit_code == 0, written.output
    looked_at = run("inspect", tmp_path / "slice")
    assert looked_at.exit_code == 1
    assert "is already a slice" in looked_at.stderr
