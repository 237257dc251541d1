"""Every shipped adapter against the conformance suite, on each of its model types and arrangements."""

from __future__ import annotations

import pytest
import transformers
from test_mutations import OF_FILES

from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.testing import AdapterTests
from slicecli.testing.adapter_tests import tiny_of

pytestmark = pytest.mark.slow

LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0 + index / 8 for index in range(8)],
    "long_factor": [2.0 + index for index in range(8)],
    "original_max_position_embeddings": 60,
}
# arrangements that a config can ask for, besides the type's own default
VARIANTS = {
    "llama": [{"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}],
    "internlm3": [{"attention_bias": True, "mlp_bias": True}],
    "qwen2": [
        {"tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1},
    ],
    "qwen3": [{"attention_bias": True}],
    "gemma": [{"attention_bias": True, "tie_word_embeddings": False}],
    "granite": [
        {
            "residual_multiplier": 0.22,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "logits_scaling": 8.0,
            "mlp_bias": True,
        },
        {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "tie_word_embeddings": True},
    ],
    "smollm3": [{"attention_bias": True, "mlp_bias": True}],
    "olmo": [{"attention_bias": True, "clip_qkv": 4.0}],
    "starcoder2": [{"use_bias": False}],
    "nemotron": [{"attention_bias": True, "mlp_bias": True}],
    "arcee": [{"attention_bias": True, "mlp_bias": True}],
    "seed_oss": [{"attention_out_bias": True, "mlp_bias": True}],
    "ernie4_5": [{"use_bias": True}],
    "hunyuan_v1_dense": [{"attention_bias": True}],
    "phi": [{"qk_layernorm": True}],
    "phi3": [{"sliding_window": 16}, {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 60}],
    "cohere": [{"use_qk_norm": True, "attention_bias": True}],
    "stablelm": [{"use_parallel_residual": True, "use_qkv_bias": True}, {"qk_layernorm": True}],
    "gpt_neox": [{"use_parallel_residual": False}, {"attention_bias": False, "tie_word_embeddings": True}],
    "falcon": [
        {"new_decoder_architecture": True, "bias": True},
        {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        {"parallel_attn": False, "alibi": True, "bias": True, "multi_query": False, "num_kv_heads": 4},
    ],
    "opt": [{"enable_bias": False}, {"tie_word_embeddings": False}],
    "gpt2": [{"n_inner": 100, "tie_word_embeddings": False}],
    "qwen2_moe": [{"decoder_sparse_step": 2}, {"mlp_only_layers": [0], "norm_topk_prob": True}],
    "qwen3_moe": [{"decoder_sparse_step": 2, "attention_bias": True}],
}


def cases():
    """Return a name for each case, with its adapter and config."""
    found = {}
    for adapter in plugins().adapters.values():
        for model_type in adapter.model_types:
            for changes in ({}, *VARIANTS.get(model_type, ())):
                name = " ".join([model_type, *(f"{field}={_short(value)}" for field, value in changes.items())])
                found[name] = (adapter, tiny_of(adapter, model_type, **changes))
    return found


def _short(value):
    return value.get("rope_type") if isinstance(value, dict) else value


def is_written_as_the_default(name):
    """Say whether slices of a case lie in their files as those of its type's default, which is another case."""
    default = name.partition(" ")[0]
    layouts = [adapter.layout(config.to_dict()) for adapter, config in (CASES[default], CASES[name])]
    return name != default and layouts[0] == layouts[1] and "tie_word_embeddings" not in name


def each(names):
    values = [CASES[name] for name in names]
    return pytest.mark.parametrize("slicecli_subject", values, ids=names, indirect=True, scope="class")


CASES = cases()
ARRANGED = [name for name in CASES if is_written_as_the_default(name)]


@each([name for name in CASES if name not in ARRANGED])
class TestFamily(AdapterTests):
    """One family."""


@each(ARRANGED)
class TestArrangement(AdapterTests):
    """One family in another arrangement, without what looks at slices in files."""


for test in OF_FILES:
    setattr(TestArrangement, test, None)


def test_every_variant_is_of_a_shipped_type():
    types = {model_type for adapter in plugins().adapters.values() for model_type in adapter.model_types}
    assert VARIANTS.keys() <= types


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("opt", {"do_layer_norm_before": False}),
        ("opt", {"word_embed_proj_dim": 512}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("gpt2", {"add_cross_attention": True}),
    ],
)
def test_arrangements_that_cannot_be_sliced_are_refused(name, fields):
    adapter = plugins().adapters[name]
    config = transformers.CONFIG_MAPPING[name]().to_dict()
    adapter.require_sliceable(config)
    assert Dimensions(adapter, config).parameters() > 1e8
    with pytest.raises(Exception, match=r"This (OPT|GPT-2) config"):
        adapter.require_sliceable(config | fields)
