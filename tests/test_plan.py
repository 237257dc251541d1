"""From wishes to legal dims."""

from __future__ import annotations

import pytest

from slicecli.adapters import select_adapter
from slicecli.errors import RequestError, UnsupportedModelError
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.slice_plan import Width
from slicecli.runtime.inputs import parse_bytes, parse_count

LLAMA_3_8B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
}
LLAMA_32_1B = {**LLAMA_3_8B, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16}
LLAMA_32_1B |= {"head_dim": 64, "tie_word_embeddings": True}
QWEN_25_05B = {"model_type": "qwen2", "hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 24}
QWEN_25_05B |= {"num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 151936, "tie_word_embeddings": True}
PHI_3_MINI = {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
PHI_3_MINI |= {"num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32064}


def dimensions(fields, unties=False):
    return Dimensions(select_adapter(fields, plugins().adapters), fields, unties)


@pytest.mark.parametrize(
    ("fields", "published"),
    [
        (LLAMA_3_8B, 8_030_261_248),
        (LLAMA_32_1B, 1_235_814_400),
        (QWEN_25_05B, 494_032_768),
        (PHI_3_MINI, 3_821_079_552),
    ],
)
def test_dense_counts_equal_the_published_models(fields, published):
    assert dimensions(fields).parameters() == published


def test_a_sliced_llama_3_has_three_quarters_of_its_parameters():
    assert dimensions(LLAMA_3_8B).parameters(3072) == 6_022_695_936


@pytest.mark.parametrize(("unties", "tables"), [(False, 1), (True, 2)])
def test_a_slice_of_a_tied_model_has_one_table_or_two(unties, tables):
    sizes = dimensions(LLAMA_32_1B, unties)
    block = (sizes.parameters() - 128256 * 2048 - 2048) * 1920 // 2048
    assert sizes.parameters(1920) == block + tables * 128256 * 1920 + 1920


def test_a_target_chooses_a_wider_slice_where_the_table_is_shared():
    target = Width(target_parameters=900_000_000)
    tied, untied = (target.resolve(dimensions(LLAMA_32_1B, unties), 2) for unties in (False, True))
    assert tied > untied


@pytest.mark.parametrize(("dim", "neighbours"), [(3000, "s: 2976 and 3008"), (1, ": 32"), (4095, ": 4064")])
def test_an_illegal_dim_names_its_neighbours(dim, neighbours):
    with pytest.raises(RequestError, match=f"nearest legal dim{neighbours}"):
        dimensions(LLAMA_3_8B).check_dim(dim)


@pytest.mark.parametrize("dim", [4096, 5000, 0, -32])
def test_a_dim_outside_the_hidden_size_is_refused(dim):
    with pytest.raises(RequestError, match="nearest legal"):
        dimensions(LLAMA_3_8B).check_dim(dim)


def test_every_legal_dim_passes_and_every_other_fails():
    sizes = dimensions({**LLAMA_3_8B, "hidden_size": 96, "num_attention_heads": 6})
    legal = set(sizes.legal_dims())
    assert legal == set(range(6, 96, 6))
    for dim in range(-2, 100):
        if dim in legal:
            sizes.check_dim(dim)
        else:
            with pytest.raises(RequestError):
                sizes.check_dim(dim)


@pytest.mark.parametrize(("sparsity", "dim"), [(0.25, 3072), (0.3, 2816), (0.01, 3968), (0.999, 128)])
def test_a_sparsity_goes_to_the_nearest_preferred_dim(sparsity, dim):
    assert Width(sparsity=sparsity).resolve(dimensions(LLAMA_3_8B), 2) == dim


def test_a_narrow_model_may_have_any_legal_dim():
    sizes = dimensions({**LLAMA_3_8B, "hidden_size": 64, "num_attention_heads": 8})
    assert Width(sparsity=0.25).resolve(sizes, 4) == 48


def test_targets_give_the_largest_dim_that_fits():
    sizes = dimensions(LLAMA_3_8B)
    dim = Width(target_parameters=parse_count("6B")).resolve(sizes, 2)
    assert sizes.parameters(dim) <= 6e9 < sizes.parameters(dim + 128)
    dim = Width(memory=parse_bytes("12GiB")).resolve(sizes, 2)
    assert 2 * sizes.parameters(dim) <= 12 * 2**30 < 2 * sizes.parameters(dim + 128)
    with pytest.raises(RequestError, match="smallest"):
        Width(target_parameters=1000).resolve(sizes, 2)


@pytest.mark.parametrize("given", [{}, {"dim": 1, "sparsity": 0.5}, {"memory": 1, "target_parameters": 1}])
def test_exactly_one_width_is_needed(given):
    with pytest.raises(RequestError, match="exactly one"):
        Width(**given)


@pytest.mark.parametrize("sparsity", [0.0, 1.0, -0.1, 7.0, float("nan")])
def test_a_sparsity_is_a_fraction(sparsity):
    with pytest.raises(RequestError):
        Width(sparsity=sparsity).resolve(dimensions(LLAMA_3_8B), 2)


@pytest.mark.parametrize(
    ("text", "value"), [("6B", 6 * 10**9), ("750M", 750 * 10**6), ("1.5e3", 1500), ("12", 12), ("2k", 2000)]
)
def test_counts_are_read(text, value):
    assert parse_count(text) == value


@pytest.mark.parametrize(
    ("text", "value"), [("12GiB", 12 * 2**30), ("12GB", 12 * 10**9), ("500MB", 500 * 10**6), ("1024", 1024)]
)
def test_sizes_are_read(text, value):
    assert parse_bytes(text) == value


@pytest.mark.parametrize("text", ["", "B", "-1B", "6X", "six", "0", "nan", "inf", "1e999"])
def test_nonsense_is_no_number(text):
    with pytest.raises(RequestError):
        parse_count(text)
    with pytest.raises(RequestError):
        parse_bytes(text)


def test_an_unknown_type_is_refused_with_its_nearest_match():
    with pytest.raises(UnsupportedModelError, match=r"Did you mean 'llama'.*Supported: .*qwen3"):
        dimensions({"model_type": "lama"})


def test_an_adapter_can_be_named():
    adapters = plugins().adapters
    assert select_adapter({"model_type": "my-llama"}, adapters, "llama").name == "llama"
    with pytest.raises(RequestError, match="no adapter"):
        select_adapter(LLAMA_3_8B, adapters, "lama")


def test_phi3_with_long_rope_needs_code_of_its_own_and_says_why():
    fields = {**PHI_3_MINI, "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48}}
    adapter = plugins().adapters["phi3"]
    assert adapter.layout(fields) == "custom-code"
    assert "LongRoPE" in adapter.why_not_stock(fields)
    assert adapter.layout(PHI_3_MINI) == "stock"


@pytest.mark.parametrize("value", [None, "4096", 0, -1, 3.5, True])
def test_a_config_without_sound_sizes_is_refused(value):
    with pytest.raises(UnsupportedModelError, match="hidden_size"):
        dimensions({**LLAMA_3_8B, "hidden_size": value})
