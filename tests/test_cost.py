"""What a model and its slices cost, told from the config alone, against models that are built and run."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import subprocess
import sys

import pytest
import torch
import transformers
from test_families import CASES

from slicecli.errors import RequestError, UnsupportedModelError
from slicecli.estimation.cost import CostModel, Workload, speed_up, times
from slicecli.estimation.devices import DEVICES, Device, custom_device, device_named
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.schedule import PublishedSizes
from slicecli.family.slice_plan import METHODS, SlicePlan
from slicecli.jobs.plan import config_of
from slicecli.proof.tiny import random_model
from slicecli.testing.adapter_tests import compare_operations

LLAMA_3_8B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
}
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
# without one of these a file is damaged rather than brief
SIZES = {"vocab_size", "hidden_size", "n_embd", "num_attention_heads", "n_head", "intermediate_size"}
H100 = DEVICES["h100-sxm"]
TYPES = {kind: adapter for adapter in plugins().adapters.values() for kind in adapter.model_types}
TOKENS = torch.randint(2, 250, (1, 24), generator=torch.Generator().manual_seed(0))


def dimensions_of(fields):
    return Dimensions(TYPES[fields["model_type"]], fields)


def model_of(fields, method="refit", slice_head=None):
    return CostModel(dimensions_of(fields), method, slice_head)


def as_shipped(config):
    """The fields of a config.json that leaves out whatever is as its class has it anyway."""
    usual = type(config)().to_dict()
    # how the class resolves these, the file need not say either
    resolved = {"layer_types", "no_rope_layers"}
    return {
        name: value
        for name, value in config.to_dict().items()
        if name == "model_type" or (value != usual.get(name) and name not in resolved)
    }


def parameters_of(config):
    """Count the parameters of a model that takes no memory, a shared one once."""
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    return sum(parameter.numel() for parameter in model.parameters())


def slice_config(config, dimensions, method, dim, slice_head=None):
    """The config of a slice, as the engine makes it."""
    sizes = PublishedSizes(dimensions, slice_head) if method == "slicegpt" else None
    plan = SlicePlan(
        model="tiny",
        model_type=config.model_type,
        adapter=dimensions.adapter.name,
        hidden_size=dimensions.hidden_size,
        dim=dim,
        dtype="float32",
        dense_parameters=0,
        sliced_parameters=0,
        dense_dtype="float32",
        method=method,
        layout=dimensions.layout if method == "refit" else "custom-code",
        schedule=sizes and sizes.schedule(dim),
    )
    return config_of(plan, config, dimensions)


@pytest.mark.parametrize(("adapter", "config"), CASES.values(), ids=CASES)
def test_a_file_that_says_no_more_than_it_must_gives_the_counts_of_the_model(adapter, config):
    dimensions = Dimensions(adapter, as_shipped(config))
    assert dimensions.declaration() == Dimensions(adapter, config.to_dict()).declaration()
    dim = dimensions.nearest_legal(dimensions.hidden_size * 3 // 4)[0]
    for method in METHODS:
        costs = CostModel(dimensions, method)
        assert costs.dense("float32").parameters == parameters_of(config)
        sliced = slice_config(config, dimensions, method, dim)
        assert costs.sliced(dim, "float32").parameters == parameters_of(sliced), method


@pytest.mark.parametrize("kind", TYPES)
def test_every_field_may_be_left_out_that_is_as_the_class_has_it(kind):
    default = transformers.CONFIG_MAPPING[kind]
    fields = default().to_dict()
    blocks = next(name for name in ("num_hidden_layers", "n_layer", "num_layers") if name in fields)
    small = default(**{blocks: 2})
    # some classes cannot build a model of their own defaults
    if fields.get("head_dim", 0) is None:
        small.head_dim = small.hidden_size // small.num_attention_heads
    if fields.get("num_key_value_heads", 0) is None:
        small.num_key_value_heads = small.num_attention_heads
    said, counted = small.to_dict(), parameters_of(small)
    costs = model_of(said).dense("float32")
    assert costs.parameters == counted
    for left_out in said.keys() - {"model_type", "layer_types", "no_rope_layers"}:
        if said[left_out] != fields.get(left_out):
            continue
        brief = {name: value for name, value in said.items() if name != left_out}
        if left_out in SIZES:
            # refused, or the size of something that the family does not have
            with contextlib.suppress(UnsupportedModelError):
                assert model_of(brief).dense("float32") == costs, left_out
        else:
            assert model_of(brief).dense("float32") == costs, left_out
            assert dimensions_of(brief).declaration() == dimensions_of(said).declaration(), left_out


def test_a_null_is_not_a_missing_field():
    fields = {**LLAMA_3_8B, "model_type": "mistral"}
    for null in ({"sliding_window": None}, {"head_dim": None}):
        config = transformers.AutoConfig.for_model(**fields | null | {"num_hidden_layers": 2})
        dimensions = dimensions_of(fields | null | {"num_hidden_layers": 2})
        assert dimensions.window(0) == config.sliding_window
        assert dimensions.parameters() == parameters_of(config)
    # what most classes make of it, if their version lets it through
    assert dimensions_of(fields | {"num_key_value_heads": None}).key_value_heads == 32
    missing = {name: value for name, value in fields.items() if name != "num_key_value_heads"}
    assert dimensions_of(missing).key_value_heads == transformers.MistralConfig().num_key_value_heads
    assert dimensions_of(missing).window(0) == transformers.MistralConfig().sliding_window


@pytest.mark.parametrize(
    "fields",
    [
        {"model_type": "llama"},
        {"model_type": "mistral"},
        {"model_type": "mistral", "sliding_window": None},
        {"model_type": "mixtral", "sliding_window": 9},
        {"model_type": "ministral"},
        {"model_type": "ministral", "layer_types": ["full_attention", "sliding_attention"] * 3},
        {"model_type": "phi3", "sliding_window": 2047},
        {"model_type": "starcoder2", "sliding_window": 4096},
        {"model_type": "qwen2", "sliding_window": 131072, "max_window_layers": 2},
        {"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 2},
        {"model_type": "qwen2", "use_sliding_window": True},
        {"model_type": "qwen3", "use_sliding_window": True, "max_window_layers": 4, "sliding_window": 17},
        {"model_type": "qwen2_moe", "sliding_window": 32768},
        {"model_type": "qwen2_moe", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 4},
        {"model_type": "qwen3_moe", "sliding_window": 5},
        {"model_type": "qwen3_moe", "use_sliding_window": True},
        {"model_type": "smollm3", "sliding_window": 7},
        {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 7},
        {
            "model_type": "smollm3",
            "use_sliding_window": True,
            "sliding_window": 7,
            "no_rope_layers": [1, 0, 0, 1, 1, 1],
        },
        {"model_type": "cohere"},
        {"model_type": "cohere2"},
        {"model_type": "cohere2", "sliding_window": 3, "sliding_window_pattern": 2},
    ],
    ids=str,
)
def test_windows_are_those_of_the_models_own_cache(fields):
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 6}
    cache = transformers.DynamicCache(config=transformers.AutoConfig.for_model(**fields, **sizes))
    layers = cache.layers or [None] * 6
    dimensions = dimensions_of({**fields, **sizes, "vocab_size": 100})
    assert [dimensions.window(block) for block in range(6)] == [getattr(one, "sliding_window", None) for one in layers]


def test_a_list_of_layers_of_another_length_is_refused():
    with pytest.raises(UnsupportedModelError, match="lists 1 layer_types for 32 blocks"):
        model_of({**LLAMA_3_8B, "sliding_window": 8, "layer_types": ["full_attention"]})


def test_llama_3_8b_has_the_counts_that_are_known():
    assert model_of(LLAMA_3_8B).dense("bfloat16").parameters == 8_030_261_248
    assert model_of(LLAMA_3_8B).sliced(3072, "bfloat16").parameters == 6_022_695_936
    assert model_of(LLAMA_3_8B, "slicegpt").sliced(3072, "bfloat16").parameters == 6_775_635_968


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_bytes_are_those_of_the_dtype(dtype):
    cost = model_of(LLAMA_3_8B).dense(dtype, Workload(4, 1000))
    size = getattr(torch, dtype).itemsize
    assert cost.bytes == cost.parameters * size
    assert cost.kv_cache_bytes == 4 * 1000 * cost.kv_cache_bytes_per_token == 4 * 1000 * 2 * 32 * 8 * 128 * size
    assert cost.serve_bytes == cost.bytes + cost.kv_cache_bytes + cost.working_bytes
    assert json.loads(json.dumps(cost.to_json())) == cost.to_json()
    with pytest.raises(RequestError, match="float17"):
        model_of(LLAMA_3_8B).dense("float17")


@pytest.mark.parametrize("slice_head", [None, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", ["llama", "mistral", "phi", "cohere", "opt", "gpt2", "mixtral", "qwen2_moe decoder_sparse_step=2"]
)
def test_operations_of_a_slice_are_those_that_it_takes(name, method, slice_head):
    adapter, config = CASES[name]
    dimensions = Dimensions(adapter, config.to_dict())
    model = random_model(slice_config(config, dimensions, method, 48, slice_head))
    cost = CostModel(dimensions, method, slice_head).sliced(48, "float32", Workload(1, TOKENS.shape[1]))
    compare_operations(model, dimensions, cost, TOKENS)


def test_a_token_meets_the_parameters_that_are_active():
    for fields in (LLAMA_3_8B, {**MIXTRAL, "num_experts_per_tok": 8}):
        cost = model_of(fields).dense("bfloat16")
        assert cost.active_parameters == cost.parameters
    some, all_of_them = (
        model_of({**MIXTRAL, "num_local_experts": count}).dense("bfloat16").parameters for count in (2, 8)
    )
    # two of eight; of the router each token meets every row
    assert model_of(MIXTRAL).dense("bfloat16").active_parameters == some + 6 * 4096 * 32 < all_of_them
    with pytest.raises(UnsupportedModelError, match="num_experts_per_tok"):
        model_of({**MIXTRAL, "num_experts_per_tok": "two"})


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_weights_read_are_those_expected_over_all_ways_to_send_tokens(tokens):
    experts, per_token = 4, 2
    fields = {**MIXTRAL, "num_hidden_layers": 1, "num_local_experts": experts, "num_experts_per_tok": per_token}
    cost = model_of(fields).dense("float16", Workload(tokens, 1))
    choices = list(itertools.combinations(range(experts), per_token))
    ways = list(itertools.product(choices, repeat=tokens))
    needed = sum(len(set().union(*way)) for way in ways) / len(ways)
    expert = 3 * 4096 * 14336
    looked_up = 32000 * 4096
    weights = (cost.decode_bytes_read - cost.kv_cache_bytes) / 2
    assert weights == pytest.approx(cost.parameters - looked_up - (experts - needed) * expert, rel=1e-12)


def test_a_shared_table_is_read_as_the_head():
    read = {
        is_tied: model_of({**LLAMA_3_8B, "tie_word_embeddings": is_tied}).dense("float16").decode_bytes_read
        for is_tied in (True, False)
    }
    assert read[True] == read[False]


@pytest.mark.parametrize("fields", [LLAMA_3_8B, MIXTRAL], ids=["dense", "experts"])
@pytest.mark.parametrize("device", [H100, custom_device("2TB/s"), custom_device(tflops=100)], ids=lambda one: one.name)
def test_more_sequences_never_take_less_time(fields, device):
    costs, found = model_of(fields), []
    for batch in (1, 2, 3, 8, 64, 1000):
        workload = Workload(batch, 512)
        found.append(times(costs.dense("bfloat16", workload), workload, device))
    assert [one.decode for one in found] == sorted(one.decode for one in found)
    assert [one.prefill for one in found] == sorted(one.prefill for one in found)


@pytest.mark.parametrize("fields", [LLAMA_3_8B, MIXTRAL, {**LLAMA_3_8B, "tie_word_embeddings": True}], ids=str)
def test_a_slice_that_loses_less_gains_less_until_it_gains_nothing(fields):
    costs, workload = model_of(fields), Workload(2, 4096)
    dense = costs.dense("bfloat16", workload)
    gains = [
        speed_up(dense, costs.sliced(dim, "bfloat16", workload), workload, H100)
        for dim in (1024, 2048, 3072, 4032, 4096)
    ]
    assert [one.decode for one in gains] == sorted((one.decode for one in gains), reverse=True)
    assert [one.prefill for one in gains] == sorted((one.prefill for one in gains), reverse=True)
    assert gains[-1].decode == gains[-1].prefill == 1
    # no more than the parts that shrink
    assert all(1 < one.decode < 4096 / dim for one, dim in zip(gains[:3], (1024, 2048, 3072), strict=True))


def test_shortcuts_make_a_slice_of_full_width_slower():
    costs = model_of(LLAMA_3_8B, "slicegpt")
    gain = speed_up(costs.dense("bfloat16"), costs.sliced(4096, "bfloat16"), Workload(), H100)
    assert gain.decode < 1 and gain.prefill < 1


def test_the_bound_is_the_one_that_takes_longer():
    costs, workload = model_of(LLAMA_3_8B), Workload(8, 1024)
    dense, sliced = costs.dense("bfloat16", workload), costs.sliced(3072, "bfloat16", workload)
    reading, computing = custom_device("1TB/s"), custom_device(tflops=1)
    assert times(dense, workload, reading).decode == dense.decode_bytes_read / 1e12
    assert times(dense, workload, computing).prefill == 8 * 1024 * dense.flops_per_token_prefill / 1e12
    both = Device("both", reading.bandwidth, computing.flops, "test")
    gain = speed_up(dense, sliced, workload, both)
    for phase in ("prefill", "decode"):
        bounds = {
            "bandwidth": getattr(times(sliced, workload, reading), phase),
            "compute": getattr(times(sliced, workload, computing), phase),
        }
        assert getattr(gain, f"{phase}_bound") == max(bounds, key=bounds.__getitem__)
        assert getattr(times(sliced, workload, both), phase) == max(bounds.values())
    assert speed_up(dense, sliced, workload, reading).decode_bound == "bandwidth"
    assert json.loads(json.dumps(gain.to_json())) == gain.to_json()


def test_the_cache_stops_growing_where_the_window_is_full():
    fields = {**LLAMA_3_8B, "model_type": "mistral", "sliding_window": 4096}
    short, full, long = (model_of(fields).dense("float16", Workload(3, length)) for length in (1000, 4096, 30000))
    assert short.kv_cache_bytes == 3 * 1000 * short.kv_cache_bytes_per_token
    assert full.kv_cache_bytes == long.kv_cache_bytes == 3 * 4096 * short.kv_cache_bytes_per_token
    assert full.flops_per_token_decode == long.flops_per_token_decode > short.flops_per_token_decode
    unbounded = model_of(fields | {"sliding_window": None}).dense("float16", Workload(3, 30000))
    assert long.flops_per_token_prefill < unbounded.flops_per_token_prefill


def test_figures_of_devices():
    for name, device in DEVICES.items():
        assert device.name == name and device.source
        # every one of them multiplies faster than it reads, by a factor that has grown from 100 to 400
        assert 50 < device.flops / device.bandwidth < 500
    assert device_named("H100-SXM") is H100
    with pytest.raises(RequestError, match=r"'rtx4090'.*Did you mean 'rtx-4090'.*l40s"):
        device_named("rtx4090")
    assert custom_device("2TB/s").bandwidth == 2e12 and custom_device("2TB/s").flops is None
    assert custom_device("900 GB/s", 10) == Device("custom", 9e11, 1e13, "given on request")
    for wrong in ({}, {"bandwidth": "fast"}, {"tflops": 0}, {"tflops": math.nan}, {"bandwidth": "0GB/s"}):
        with pytest.raises(RequestError):
            custom_device(**wrong)


def test_impossible_work_is_refused():
    for batch, length in ((0, 1), (1, 0), (-1, 5)):
        with pytest.raises(RequestError, match="is empty"):
            Workload(batch, length)
    for dim in (0, -1, 4097):
        with pytest.raises(RequestError, match="from 1 to 4096"):
            model_of(LLAMA_3_8B).sliced(dim, "float16")


def test_nothing_heavy_is_imported():
    code = f"""
import sys
from slicecli.family.dimensions import Dimensions
from slicecli.estimation.cost import CostModel
from slicecli.family.plugins import plugins
CostModel(Dimensions(plugins().adapters["llama"], {LLAMA_3_8B}), "slicegpt").sliced(3072, "bfloat16")
heavy = {{"torch", "numpy", "transformers", "scipy"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
