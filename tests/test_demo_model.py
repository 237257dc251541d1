"""The embedded model: small, trained, sensitive to slicing, and the demo made with it."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
import transformers
from test_slicing import slice_in_memory

from slicecli.calibration import calibration_rows, evaluation_rows
from slicecli.demo import MODEL_FOLDER, documents
from slicecli.evaluation.perplexity import measure_perplexity
from slicecli.slicing import pipeline
from slicecli.slicing.ridge import solve_ridge
from slicecli.text import read_text


@pytest.fixture(scope="module")
def model():
    return transformers.AutoModelForCausalLM.from_pretrained(MODEL_FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return transformers.AutoTokenizer.from_pretrained(MODEL_FOLDER)


@pytest.fixture(scope="module")
def calibration(tokenizer):
    return calibration_rows(read_text("demo", "calibration"), tokenizer, 128, 256, seed=0).ids


@pytest.fixture(scope="module")
def held_out(tokenizer):
    return evaluation_rows(read_text("demo", "evaluation"), tokenizer, 256, samples=80)


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
        patch.setattr(pipeline, "solve_ridge", lambda moments: solve_ridge(moments, ridges=()))
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


def as_phi3(model):
    """The same function in the Phi-3 layout: query, key and value in one matrix, gate and up in another."""
    llama = model.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings")
    fields = {name: getattr(llama, name) for name in names} | {
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": None,
    }
    phi3 = transformers.Phi3ForCausalLM(transformers.Phi3Config(**fields, rope_theta=10000.0)).eval()
    state = dict(model.state_dict())
    for index in range(llama.num_hidden_layers):
        prefix = f"model.layers.{index}."
        attention = [state.pop(f"{prefix}self_attn.{name}_proj.weight") for name in "qkv"]
        mlp = [state.pop(f"{prefix}mlp.{name}_proj.weight") for name in ("gate", "up")]
        state[f"{prefix}self_attn.qkv_proj.weight"] = torch.cat(attention)
        state[f"{prefix}mlp.gate_up_proj.weight"] = torch.cat(mlp)
    phi3.load_state_dict(state)
    return phi3


def test_fused_projections_are_sliced_like_separate_ones(model, calibration, held_out, slices):
    twin = as_phi3(model)
    assert twin.get_parameter("model.layers.0.self_attn.qkv_proj.weight").shape[1] == 96
    ids = held_out.ids[:4]
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)
    (sliced,), _ = slice_in_memory(twin, 72, rows=calibration, batch=16)
    assert perplexity(sliced, held_out) == pytest.approx(perplexity(slices["72"], held_out), rel=2e-3)


def test_the_demo_slices_measures_and_writes(run, tmp_path):
    done = run("demo", "-o", tmp_path / "demo", "--dims", "84,60", "--format", "json")
    assert done.exit_code == 0, done.output
    dense, wide, narrow = json.loads(done.stdout)
    values = [row["perplexity"]["value"] for row in (dense, wide, narrow)]
    assert values == sorted(values)
    assert dense["parameters"] > wide["parameters"] > narrow["parameters"]
    assert all(row["text"].startswith("This function returns") for row in (dense, wide, narrow))
    for dim in (84, 60):
        folder = tmp_path / "demo" / f"dim{dim}"
        assert {path.name for path in folder.iterdir()} >= {"config.json", "model.safetensors", "README.md"}
        loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
        assert loaded.config.hidden_size == dim
