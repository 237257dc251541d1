"""A config has the fields of transformers 4 beside those of transformers 5, which reads the same from both."""

from __future__ import annotations

import json

import pytest
import transformers
from test_families import CASES, LONG_ROPE

from slicecli.checkpoint.legacy_fields import with_legacy_fields

ROTATIONS = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 30},
    "longrope": {
        "rope_type": "longrope",
        "factor": 2.0,
        "short_factor": [1.0 + index / 8 for index in range(20)],
        "long_factor": [2.0 + index for index in range(20)],
    },
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 30,
    },
}


def llama_fields(rotation, **changes):
    """Return the fields of a Llama config as transformers 5 writes them."""
    config = transformers.LlamaConfig(rope_parameters={**rotation, "rope_theta": 5e4}, dtype="bfloat16", **changes)
    return json.loads(config.to_json_string())


def of_version_5(fields):
    """Return the fields that a config class of transformers 5 reads from these."""
    return transformers.AutoConfig.for_model(**json.loads(json.dumps(fields))).to_dict()


def without_old_type(fields):
    """Return fields without the older name of `rope_type`, which classes keep where they find it."""
    rope = fields.get("rope_parameters") or {}
    return {**fields, "rope_parameters": {name: value for name, value in rope.items() if name != "type"}}


@pytest.mark.parametrize("kind", ROTATIONS)
def test_the_rotation_is_spelled_as_transformers_4_did(kind):
    found = with_legacy_fields(llama_fields(ROTATIONS[kind], head_dim=40), {})
    assert found["rope_theta"] == 5e4
    assert found["torch_dtype"] == "bfloat16"
    scaling = found["rope_scaling"]
    if kind == "default":
        assert scaling is None
    else:
        outside = ("rope_theta", "partial_rotary_factor")
        assert scaling == {name: value for name, value in found["rope_parameters"].items() if name not in outside}
        assert scaling["rope_type"] == kind


def test_a_rotation_that_transformers_4_does_not_know_is_named_for_it_to_refuse():
    rope = {"rope_type": "proportional", "rope_theta": 5e4, "partial_rotary_factor": 0.5}
    found = with_legacy_fields({"rope_parameters": rope}, {})
    assert found["rope_scaling"] == {"rope_type": "proportional"}
    assert found["partial_rotary_factor"] == 0.5


def test_long_rope_with_its_length_at_the_top_level_has_the_three_fields_that_phi_3_wants():
    fields = {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 60}
    scaling = with_legacy_fields(fields, {})["rope_scaling"]
    assert scaling.keys() == {"type", "short_factor", "long_factor"}


def test_experts_are_counted_under_both_names():
    assert with_legacy_fields({"num_local_experts": 6}, {})["num_experts"] == 6


def test_a_config_without_rotation_gets_none():
    assert with_legacy_fields({"n_embd": 64, "dtype": "float32"}, {}) == {
        "n_embd": 64,
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def test_the_familys_own_names_are_used():
    names = {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"}
    rope = {"rope_type": "default", "rope_theta": 5e4, "partial_rotary_factor": 0.5}
    found = with_legacy_fields({"rope_parameters": rope}, names)
    assert (found["rotary_emb_base"], found["rotary_pct"]) == (5e4, 0.5)
    assert "rope_theta" not in found


def test_rotations_by_kind_of_layer_stay_as_they_are():
    fields = {"rope_parameters": {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}}
    assert with_legacy_fields(fields, {}) == fields


def test_the_dense_config_inside_gets_them_too():
    found = with_legacy_fields({"dtype": "float32", "dense_config": llama_fields(ROTATIONS["linear"])}, {})
    assert found["torch_dtype"] == "float32"
    assert found["dense_config"]["rope_theta"] == 5e4
    assert found["dense_config"]["rope_scaling"]["factor"] == 2.0


@pytest.mark.parametrize("kind", ROTATIONS)
def test_transformers_5_reads_the_same_rotation_from_both_spellings(kind):
    fields = llama_fields(ROTATIONS[kind], head_dim=40)
    legacy = with_legacy_fields(fields, {})
    old = {name: value for name, value in legacy.items() if name not in ("rope_parameters", "dtype")}
    assert of_version_5(fields) == of_version_5(legacy) == of_version_5(old)


@pytest.mark.parametrize("name", CASES)
def test_transformers_5_reads_the_same_config_of_every_family(name):
    adapter, config = CASES[name]
    fields = json.loads(config.to_json_string())
    legacy = with_legacy_fields(fields, adapter.names)
    expected, found = (without_old_type(of_version_5(one)) for one in (fields, legacy))
    assert {name: found[name] for name in expected} == expected
    assert found.keys() - expected.keys() <= legacy.keys() - fields.keys()
