"""Widths of slices of the published method, and the counts that follow from them."""

from __future__ import annotations

import dataclasses
import json

import pytest

from slicecli.adapters import select_adapter
from slicecli.errors import RequestError, UnsupportedModelError
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.schedule import PublishedSizes, Schedule, count, read_schedule, slices_head
from slicecli.family.slice_plan import Width


def llama(hidden_size, blocks, heads, key_value_heads, intermediate_size, vocabulary, **others):
    return {
        "model_type": "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": key_value_heads,
        "intermediate_size": intermediate_size,
        "vocab_size": vocabulary,
        **others,
    }


LLAMA_2_7B = llama(4096, 32, 32, 32, 11008, 32000)
LLAMA_2_70B = llama(8192, 80, 64, 8, 28672, 32000)
LLAMA_3_8B = llama(4096, 32, 32, 8, 14336, 128256)
LLAMA_3_2_1B = llama(2048, 16, 32, 8, 8192, 128256, tie_word_embeddings=True)
PHI_3_MINI = {**llama(3072, 32, 32, 32, 8192, 32064), "model_type": "phi3"}
PHI_2 = {**llama(2560, 32, 32, 32, 10240, 51200), "model_type": "phi"}
OPT_125M = {
    "model_type": "opt",
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "ffn_dim": 3072,
    "vocab_size": 50272,
    "max_position_embeddings": 2048,
}
GPT_2 = {"model_type": "gpt2", "n_embd": 64, "n_layer": 3, "n_head": 4, "vocab_size": 300, "n_positions": 64}
MIXTRAL = {**llama(64, 3, 4, 2, 96, 300), "model_type": "mixtral", "num_local_experts": 4}
SMALL = llama(64, 3, 4, 2, 96, 300)


def dimensions(fields):
    return Dimensions(select_adapter(fields, plugins().adapters), fields)


@pytest.mark.parametrize(
    ("fields", "dense", "billions"),
    [
        (LLAMA_2_7B, 6.738, {0.1: 6.940, 0.2: 6.106, 0.25: 5.705, 0.3: 5.293, 0.5: 3.730}),
        (LLAMA_2_70B, 68.98, {0.1: 70.78, 0.2: 62.15, 0.25: 57.91, 0.3: 53.64, 0.5: 37.44}),
        (LLAMA_3_8B, 8.030, {0.1: 8.142, 0.2: 7.220, 0.25: 6.776, 0.3: 6.319, 0.5: 4.580}),
        (PHI_3_MINI, 3.821, {0.1: 3.934, 0.2: 3.467, 0.25: 3.238, 0.3: 3.000, 0.5: 2.126}),
        (LLAMA_3_2_1B, 1.236, {0.1: 1.483, 0.2: 1.337, 0.25: 1.270, 0.3: 1.198, 0.5: 0.924}),
    ],
    ids=["Llama-2-7B", "Llama-2-70B", "Llama-3-8B", "Phi-3-mini", "Llama-3.2-1B"],
)
def test_counts_equal_those_of_the_published_implementation(fields, dense, billions):
    """Its rule: floor((1 - s) d), down to a multiple of 8; the head is not sliced."""
    sizes = PublishedSizes(dimensions(fields))
    digits = 2 if dense > 10 else 3
    assert round(sizes.parameters() / 1e9, digits) == dense
    for sparsity, expected in billions.items():
        dim = int((1 - sparsity) * sizes.hidden_size)
        assert round(sizes.parameters(dim - dim % 8) / 1e9, digits) == expected


@pytest.mark.parametrize(("fields", "dim", "expected"), [(PHI_2, 2048, 2_391_772_160), (OPT_125M, 608, 147_250_880)])
def test_counts_equal_those_it_is_tested_for(fields, dim, expected):
    assert PublishedSizes(dimensions(fields)).parameters(dim) == expected


def test_a_count_follows_the_formula():
    """N(k) = V k + V d + sum [k (h + 2g) + h k + 2 f k + f o + k² + k o], o = d in the last block, else k."""
    sizes = dimensions(LLAMA_3_8B)
    vocabulary, d, k, f = 128256, 4096, 3072, 14336
    h, g = 32 * 128, 8 * 128
    expected = vocabulary * k + vocabulary * d
    for block in range(32):
        o = d if block == 31 else k
        expected += k * (h + 2 * g) + h * k + 2 * f * k + f * o + k * k + k * o
    assert PublishedSizes(sizes).parameters(k) == expected == 6_775_635_968
    assert sizes.parameters(k) == 6_022_695_936


def test_a_dim_need_not_suit_the_family_s_config():
    sizes = PublishedSizes(dimensions(LLAMA_3_8B))
    sizes.check_dim(3071)
    for dim in (0, -1, 4096, 5000):
        with pytest.raises(RequestError, match="nearest legal"):
            sizes.check_dim(dim)
    assert Width(sparsity=0.25).resolve(sizes, 2) == 3072


def test_widths_of_a_model_with_experts_are_multiples_of_8(tmp_path):
    mixture = dimensions(MIXTRAL)
    sizes = PublishedSizes(mixture, True)
    assert sizes.legal_dims() == range(8, 64, 8)
    with pytest.raises(RequestError, match="multiple of 8 numbers"):
        sizes.check_dim(44)
    file = tmp_path / "schedule.json"
    file.write_text(json.dumps({"blocks": [[44, 44]] * 3, "head": 44}))
    with pytest.raises(RequestError, match="width of 44 before the experts of block 0"):
        read_schedule(str(file), mixture)


def test_the_head_is_left_whole_where_that_is_possible():
    assert PublishedSizes(dimensions(SMALL)).schedule(48) == Schedule(((48, 48),) * 3, 64)
    assert PublishedSizes(dimensions(SMALL), True).schedule(48) == Schedule(((48, 48),) * 3, 48)
    assert slices_head(dimensions(MIXTRAL), None)
    assert slices_head(dimensions(GPT_2), None)
    for fields in (MIXTRAL, GPT_2):
        sizes = dimensions(fields)
        PublishedSizes(sizes).schedule(48).check(sizes)
        with pytest.raises(RequestError, match="--slice-head"):
            PublishedSizes(sizes, False).schedule(48).check(sizes)


def test_a_linear_schedule_goes_from_the_first_sparsity_to_the_last():
    schedule = read_schedule("linear:0.125:0.375", dimensions(SMALL))
    assert schedule == Schedule(((56, 56), (48, 48), (40, 40)), 64)
    assert schedule.dim == 48
    assert read_schedule("linear:0.125:0.375", dimensions(SMALL), head=True).head == 40
    assert schedule.shortcuts(0) == [(56, 56), (56, 48)]
    assert schedule.shortcuts(2) == [(40, 40), (40, 64)]


def test_a_schedule_is_read_from_a_file(tmp_path):
    file = tmp_path / "widths.json"
    file.write_text(json.dumps({"blocks": [[60, 50], [40, 30], [20, 10]], "head": 33}))
    schedule = read_schedule(str(file), dimensions(SMALL))
    assert schedule == Schedule(((60, 50), (40, 30), (20, 10)), 33)
    assert schedule.site_widths == (60, 50, 40, 30, 20, 10, 33)
    with pytest.raises(RequestError, match="Leave out --slice-head"):
        read_schedule(str(file), dimensions(SMALL), head=True)


def test_shapes_follow_the_places():
    sizes = dimensions({**SMALL, "mlp_bias": True})
    shapes = Schedule(((60, 50), (40, 30), (20, 10)), 33).shapes(sizes)
    assert shapes["model.embed_tokens.weight"] == (300, 60)
    assert shapes["model.layers.0.self_attn.q_proj.weight"] == (64, 60)
    assert shapes["model.layers.0.self_attn.o_proj.weight"] == (50, 64)
    assert shapes["model.layers.0.mlp.up_proj.weight"] == (96, 50)
    assert shapes["model.layers.0.mlp.down_proj.weight"] == (40, 96)
    assert shapes["model.layers.0.mlp.down_proj.bias"] == (40,)
    assert shapes["model.layers.0.mlp.up_proj.bias"] == (96,)
    assert shapes["model.layers.0.shortcuts.0.weight"] == (50, 60)
    assert shapes["model.layers.2.shortcuts.1.weight"] == (33, 10)
    assert shapes["lm_head.weight"] == (300, 33)
    assert not [name for name in shapes if "norm" in name]


def test_readers_behind_norms_with_a_bias_get_one():
    sizes = dimensions({**OPT_125M, "enable_bias": False})
    shapes = PublishedSizes(sizes).schedule(600).shapes(sizes)
    assert shapes["lm_head.bias"] == (50272,)
    assert shapes["model.decoder.layers.3.fc1.bias"] == (3072,)
    assert "model.decoder.layers.3.fc2.bias" not in shapes
    assert count(shapes) == PublishedSizes(sizes).parameters(600)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"blocks": 3}',
        '{"blocks": [[48, 48], [48, 48]]}',
        '{"blocks": [[48], [48], [48]]}',
        '{"blocks": [[48, 0], [48, 48], [48, 48]]}',
        '{"blocks": [[48, 65], [48, 48], [48, 48]]}',
        '{"blocks": [[48, 4.5], [48, 48], [48, 48]]}',
        '{"blocks": [[48, true], [48, 48], [48, 48]]}',
        '{"blocks": [[48, 48], [48, 48], [48, 48]], "head": "48"}',
        '{"blocks": [[48, 48], [48, 48], [48, 48]], "width": 48}',
    ],
)
def test_a_file_that_is_no_schedule_for_the_model_is_refused(tmp_path, content):
    file = tmp_path / "widths.json"
    file.write_text(content)
    with pytest.raises(RequestError, match="schedule"):
        read_schedule(str(file), dimensions(SMALL))


@pytest.mark.parametrize("text", ["linear:0.1", "linear:1:0", "linear:0.1:1.5", "linear:a:b", "no-such-file.json"])
def test_what_is_no_schedule_is_refused(text):
    with pytest.raises(RequestError):
        read_schedule(text, dimensions(SMALL))


def test_a_branch_that_cannot_be_taken_apart_is_refused():
    sizes = dimensions(OPT_125M)
    (attention, mlp), block = sizes.declared_blocks[0].branches, sizes.declared_blocks[0]
    bare = dataclasses.replace(block, branches=(attention, dataclasses.replace(mlp, activation="")))
    sizes = Dimensions(dataclasses.replace(sizes.adapter, block=bare), OPT_125M)
    with pytest.raises(UnsupportedModelError, match="--method refit"):
        PublishedSizes(sizes)
