"""The embedded model: small, trained, sensitive to slicing, and the demo made with it."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
import transformers
from test_slicing import dimensions_of, slice_in_memory

from slicecli.data.demo import MODEL_FOLDER, documents
from slicecli.data.packing import calibration_rows, evaluation_rows
from slicecli.data.text import read_text
from slicecli.evaluation.perplexity import measure_perplexity
from slicecli.family.schedule import Schedule
from slicecli.linalg import ridge
from slicecli.linalg.basis import centred_frame
from slicecli.linalg.ridge import solve_ridge
from slicecli.proof.declaration import published_in_memory

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def calibration(tokenizer):
    return calibration_rows(read_text("demo", "calibration"), tokenizer, 40, 256, seed=0).ids


@pytest.fixture(scope="module")
def held_out(tokenizer):
    return evaluation_rows(read_text("demo", "evaluation"), tokenizer, 256, samples=48)


def perplexity(model, rows):
    return measure_perplexity(model, rows, 16).value


@pytest.fixture(scope="module")
def dense_perplexity(model, held_out):
    return perplexity(model, held_out)


@pytest.fixture(scope="module")
def slices(model, calibration):
    """Dim and slice: two refitted, and one merely projected."""
    (wide, narrow), _ = slice_in_memory(model, 84, 72, rows=calibration, batch=16)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ridge, "solve_ridge", lambda moments, **_: solve_ridge(moments, ridges=()))
        (projected,), _ = slice_in_memory(model, 72, rows=calibration, batch=16)
    return {"84": wide, "72": narrow, "72 projected": projected}


def test_it_fits_into_a_few_megabytes_and_has_a_card():
    assert sum(path.stat().st_size for path in MODEL_FOLDER.iterdir()) < 4 * 2**20
    assert (MODEL_FOLDER / "README.md").read_text().startswith("---\n")


def test_it_writes_words_of_its_language(model, tokenizer):
    known = set(re.findall("[a-z]+", " ".join(documents("train")).lower()))
    torch.manual_seed(0)
    ids = tokenizer("The module", return_tensors="pt")["input_ids"]
    written = model.generate(ids, max_new_tokens=200, do_sample=True, temperature=0.7, pad_token_id=1)
    words = re.findall("[a-z]+", tokenizer.decode(written[0], skip_special_tokens=True).lower())
    assert len(words) > 60
    assert sum(word in known for word in words[:-1]) > 0.9 * len(words)


def test_it_predicts_text_it_has_not_seen(dense_perplexity, model):
    # a model that knows nothing has the vocabulary's size
    assert dense_perplexity < model.config.vocab_size / 30


def test_it_uses_its_width(slices, held_out, dense_perplexity):
    assert perplexity(slices["72 projected"], held_out) > 1.15 * dense_perplexity


def test_the_refit_repairs_a_good_part_of_the_projection_s_loss(slices, held_out, dense_perplexity):
    projected, fitted = (perplexity(slices[name], held_out) for name in ("72 projected", "72"))
    assert math.log(fitted / dense_perplexity) < 0.7 * math.log(projected / dense_perplexity)
    assert dense_perplexity < perplexity(slices["84"], held_out) < fitted


# the same trained function in the layouts of other families, whose slices must then be as good


def shared_fields(model):
    llama = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings")
    return {name: getattr(llama, name) for name in names} | {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
        "rope_parameters": llama.rope_parameters,
    }


def as_phi3(model):
    """Query, key and value in one matrix, gate and up in another."""
    fields = shared_fields(model) | {"rms_norm_eps": model.config.rms_norm_eps}
    twin = transformers.Phi3ForCausalLM(transformers.Phi3Config(**fields)).eval()
    state = dict(model.state_dict())
    for index in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        attention = [state.pop(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]
        mlp = [state.pop(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up")]
        state[f"{prefix}self_attn.qkv_proj.weight"] = torch.cat(attention)
        state[f"{prefix}mlp.gate_up_proj.weight"] = torch.cat(mlp)
    twin.load_state_dict(state)
    return twin


def as_mixtral(model):
    """Four experts that are the MLP each, of which two are mixed: whatever the router says, the sum is the MLP."""
    fields = shared_fields(model) | {"rms_norm_eps": model.config.rms_norm_eps, "num_local_experts": 4}
    twin = transformers.MixtralForCausalLM(transformers.MixtralConfig(**fields)).eval()
    twin.set_experts_implementation("eager")
    state = dict(model.state_dict())
    generator = torch.Generator().manual_seed(0)
    for index in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{index}.mlp."
        gate, up, down = (state.pop(f"{prefix}{name}_proj.weight") for name in ("gate", "up", "down"))
        state[f"{prefix}experts.gate_up_proj"] = torch.cat([gate, up]).expand(4, -1, -1)
        state[f"{prefix}experts.down_proj"] = down.expand(4, -1, -1)
        state[f"{prefix}gate.weight"] = torch.randn(4, model.config.hidden_size, generator=generator)
    twin.load_state_dict(state)
    return twin


def as_olmo(model):
    """LayerNorms without weight and with another epsilon, over a stream of one more dimension and without mean."""
    width = model.config.hidden_size
    twin = transformers.OlmoForCausalLM(
        transformers.OlmoConfig(**shared_fields(model) | {"hidden_size": width + 1, "tie_word_embeddings": False})
    ).eval()
    frame = centred_frame(width + 1).float()
    scale = math.sqrt((width + 1) / width * 1e-5 / model.config.rms_norm_eps)
    state = dict(model.state_dict())

    def reading(weight, norm):
        return (weight * norm) @ frame.T * math.sqrt(width / (width + 1))

    made = {"model.embed_tokens.weight": scale * state["model.embed_tokens.weight"] @ frame.T}
    made["lm_head.weight"] = reading(state["lm_head.weight"], state["model.norm.weight"])
    for index in range(model.config.num_hidden_layers):
        prefix = f"model.layers.{index}."
        for norm, readers, writer in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn.o_proj"),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
        ):
            for name in readers:
                name = f"{prefix}{name}.weight"
                made[name] = reading(state[name], state[f"{prefix}{norm}.weight"])
            made[f"{prefix}{writer}.weight"] = scale * frame @ state[f"{prefix}{writer}.weight"]
    twin.load_state_dict(made)
    return twin


@pytest.mark.parametrize(
    ("convert", "dim", "tolerance"),
    [(as_phi3, 72, 2e-3), (as_olmo, 73, 5e-3)],
    ids=["fused projections", "LayerNorm, one dimension for the mean"],
)
def test_the_same_function_in_another_layout_is_sliced_as_well(
    model, calibration, held_out, slices, convert, dim, tolerance
):
    twin = convert(model)
    require_same_function(twin, model, held_out)
    (sliced,), _ = slice_in_memory(twin, dim, rows=calibration, batch=16)
    assert perplexity(sliced, held_out) == pytest.approx(perplexity(slices["72"], held_out), rel=tolerance)


def test_the_published_method_slices_the_same_function_alike_in_every_layout(model, calibration, held_out):
    """Without a regression nothing depends on the layout: not on fused projections, experts, or a mean to take out."""
    found = []
    for twin in (model, as_phi3(model), as_mixtral(model), as_olmo(model)):
        sizes = dimensions_of(twin.config)
        schedule = Schedule.constant(sizes, 72)
        found.append(perplexity(published_in_memory(twin, sizes, calibration[:64], schedule, batch_rows=16), held_out))
    assert found == pytest.approx([found[0]] * 4, rel=1e-3)


def test_experts_are_refitted_each_to_its_own_tokens(model, calibration, held_out, slices):
    """Four experts that were the same can repair more, once sliced, than the one MLP that they stand for."""
    twin = as_mixtral(model)
    require_same_function(twin, model, held_out)
    (sliced,), _ = slice_in_memory(twin, 72, rows=calibration, batch=16)
    assert perplexity(sliced, held_out) < perplexity(slices["72"], held_out)


def require_same_function(twin, model, held_out):
    ids = held_out.ids[:4]
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, atol=1e-3, rtol=1e-3)


def test_the_demo_slices_measures_and_writes(run, monkeypatch, tmp_path):
    from slicecli.evaluation import measure
    from slicecli.jobs import plan as planning

    # with less text, which changes nothing but the time
    options, measuring = planning.SliceOptions, measure.EvaluationOptions
    monkeypatch.setattr(planning, "SliceOptions", lambda **given: options(**{**given, "samples": 32}))
    monkeypatch.setattr(measure, "EvaluationOptions", lambda **given: measuring(**given, limit=32))
    done = run("demo", "-o", tmp_path / "demo", "--dims", "60", "--format", "json")
    assert done.exit_code == 0, done.output
    dense, sliced = json.loads(done.stdout)
    assert dense["perplexity"]["value"] < sliced["perplexity"]["value"]
    assert dense["parameters"] > sliced["parameters"]
    assert all(row["text"].startswith("This function returns") for row in (dense, sliced))
    folder = tmp_path / "demo" / "dim60"
    assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "README.md"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    assert loaded.config.hidden_size == 60
