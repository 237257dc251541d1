"""The conformance suite against adapters and slices that are deliberately wrong: all are caught, by name.

Each row damages one thing in a shipped declaration and names the tests of the suite that must fail; the message of one
must name the module or parameter at fault.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from programs import run_program

from slicecli.adapters import Adapter, Block, Embedding, Norm
from slicecli.family.plugins import plugins
from slicecli.proof.tiny import random_model
from slicecli.testing.adapter_tests import AdapterTests, Subject, tiny_of

pytestmark = pytest.mark.slow

NAMES = "test_it_names_every_parameter_with_its_size"
COUNTS = "test_counts_equal_the_model"
GROWS = "test_exactly_what_touches_the_stream_grows_with_it"
CONTEXT = "test_the_context_length_is_that_of_the_config_class"
OPERATIONS = "test_estimated_operations_are_those_of_the_model"
CACHE = "test_the_estimated_cache_is_that_of_the_model"
FOLDING = "test_folding_the_norms_leaves_logits_unchanged"
ROTATION = "test_a_rotation_leaves_logits_unchanged_in_float64"
ROTATION_32 = "test_a_rotation_leaves_logits_unchanged_in_float32"
REFIT = "test_the_refit_at_full_width_finds_nothing_to_mend"
START = "test_a_slice_starts_from_the_projection_of_the_stream"
ILLEGAL = "test_illegal_dims_are_refused_with_the_legal_neighbours"
CONFIG_CLASS = "test_the_config_class_takes_the_legal_dims_and_no_others"
WIDER = "test_a_wider_slice_is_closer_to_the_model"
WIDER_PUBLISHED = "test_a_wider_published_slice_is_closer_to_the_model"
PROVED = "test_the_published_method_is_proved_on_a_small_model"
PUBLISHED = "test_the_published_method_at_full_width_leaves_logits_unchanged"
TIED = "test_a_tied_model_stays_tied_without_loss"
PORTABLE = "test_a_portable_class_computes_the_same"
PORTABLE_SLICE = "test_a_slice_in_a_portable_class_is_the_same_slice"
WIDTHS = "test_channels_can_be_removed_or_the_declaration_says_why_not"
CHANNELS = (
    "test_channels_that_add_nothing_are_removed_without_loss",
    "test_more_channels_are_closer_to_the_model",
    "test_a_slice_with_fewer_channels_has_the_parameters_that_were_predicted",
    "test_a_slice_with_fewer_channels_generates",
)
# what looks at slices in files
OF_FILES = [
    "test_a_slice_has_the_parameters_that_were_predicted",
    "test_a_slice_loads_whole",
    "test_a_slice_loads_without_its_head",
    "test_saving_and_loading_a_slice_keeps_it",
    "test_generation_with_cache_equals_generation_without",
    "test_a_padded_batch_equals_single_rows",
    "test_a_slice_runs_in_bfloat16",
]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One way to be wrong.

    Attributes:
        family: The adapter that is damaged.
        damage: Makes the damaged one of it.
        names: What a message must name.
        caught_by: The tests that must fail.
        changes: Config fields of the tiny model.
    """

    family: str
    damage: Callable[[Adapter], Adapter]
    names: str
    caught_by: tuple[str, ...] = (NAMES,)
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)


def in_block(change: Callable[[Block], Block]) -> Callable[[Adapter], Adapter]:
    """Return a damage to the block, whether it is one or a function."""

    def damage(adapter: Adapter) -> Adapter:
        block = adapter.block
        if callable(block):
            return replace(adapter, block=lambda dimensions, index: change(block(dimensions, index)))
        return replace(adapter, block=change(block))

    return damage


def in_branch(number: int, **changes: Any) -> Callable[[Adapter], Adapter]:
    """Return a damage to one branch; a function among the changes is applied to the old value."""

    def change(block: Block) -> Block:
        branches = list(block.branches)
        old = branches[number]
        new = {name: value(getattr(old, name)) if callable(value) else value for name, value in changes.items()}
        branches[number] = replace(old, **new)
        return replace(block, branches=tuple(branches))

    return in_block(change)


def without_bias(linears):
    return tuple(replace(linear, bias=False) for linear in linears)


def in_portable(**changes: Any) -> Callable[[Adapter], Adapter]:
    """Return a damage to the first portable class, the only one that is left."""
    return lambda adapter: replace(adapter, portable=(replace(adapter.portable[0], **changes),))


MULTIPLIERS = {"residual_multiplier": 0.22, "embedding_multiplier": 12.0, "logits_scaling": 8.0}


def without_scale(path: str) -> Callable[[Adapter], Adapter]:
    """Return a damage to the scales of the first portable class."""

    def damage(adapter: Adapter) -> Adapter:
        scales = {name: scale for name, scale in adapter.portable[0].scales.items() if name != path}
        return in_portable(scales=scales)(adapter)

    return damage


MUTATIONS = {
    # norms
    "norm of another kind: a LayerNorm declared as RMSNorm": Mutation(
        "starcoder2",
        lambda a: replace(a, norm=replace(a.norm, kind="rms")),
        "model.layers.0.self_attn.q_proj",
        caught_by=(ROTATION, FOLDING),
    ),
    "centred RMSNorm stream": Mutation(
        "llama",
        lambda a: replace(a, norm=replace(a.norm, kind="layer")),
        "model.layers.0.self_attn.q_proj",
        caught_by=(ROTATION_32,),
    ),
    "norm weight without its offset": Mutation(
        "gemma",
        lambda a: replace(a, norm=replace(a.norm, weight_offset=0.0)),
        "model.layers.0.self_attn.q_proj",
        caught_by=(ROTATION, TIED),
    ),
    "norm of the other branch": Mutation(
        "llama",
        in_branch(0, norm="post_attention_layernorm"),
        "model.layers.0.input_layernorm",
        caught_by=(NAMES, COUNTS),
    ),
    "norm weight undeclared": Mutation(
        "llama",
        lambda a: replace(a, norm=replace(a.norm, has_weight=False)),
        "model.layers.0.input_layernorm.weight",
        caught_by=(NAMES, GROWS),
    ),
    "norm bias undeclared": Mutation(
        "phi", lambda a: replace(a, norm=replace(a.norm, has_bias=False)), "model.layers.0.input_layernorm.bias"
    ),
    "wrong epsilon": Mutation(
        "olmo",
        lambda a: replace(a, norm=Norm("layer", epsilon=0.5, has_weight=False)),
        "norm",
        caught_by=(REFIT, PUBLISHED),
    ),
    "final norm of a block": Mutation(
        "llama", lambda a: replace(a, final_norm="model.layers.0.input_layernorm"), "model.norm.weight"
    ),
    # readers
    "missed reader": Mutation(
        "llama",
        in_branch(0, readers=lambda readers: readers[:2]),
        "model.layers.0.self_attn.v_proj.weight",
        caught_by=(NAMES, OPERATIONS),
    ),
    "reader of a width it has not": Mutation(
        "llama",
        in_branch(1, readers=lambda readers: tuple(replace(one, width="query") for one in readers)),
        "model.layers.0.mlp.gate_proj.weight",
    ),
    "missed router": Mutation("mixtral", in_branch(1, readers=()), "model.layers.0.mlp.gate.weight"),
    "transposed weight not said to be": Mutation(
        "gpt2",
        in_branch(1, readers=lambda readers: tuple(replace(one, is_transposed=False) for one in readers)),
        "transformer.h.0.mlp.c_fc.weight",
    ),
    # biases
    "forgotten bias of readers": Mutation(
        "qwen2", in_branch(0, readers=without_bias), "model.layers.0.self_attn.q_proj.bias"
    ),
    "forgotten bias of a writer": Mutation(
        "phi", in_branch(1, writer=lambda writer: replace(writer, bias=False)), "model.layers.0.mlp.fc2.bias"
    ),
    "invented bias": Mutation(
        "llama",
        in_branch(1, writer=lambda writer: replace(writer, bias=True)),
        "the model has no model.layers.0.mlp.down_proj.bias",
    ),
    "forgotten bias of the head": Mutation(
        "phi", lambda a: replace(a, head=replace(a.head, bias=False)), "lm_head.bias"
    ),
    # writers and branches
    "missed writer": Mutation("llama", in_branch(1, writer=None), "model.layers.0.mlp.down_proj.weight"),
    "forgotten multiplier": Mutation(
        "granite",
        in_branch(0, multiplier=""),
        "model.layers.0",
        changes={"residual_multiplier": 0.22},
        caught_by=(REFIT, PUBLISHED),
    ),
    "forgotten gate": Mutation(
        "qwen2_moe", in_branch(1, writer=lambda writer: replace(writer, gate="")), "model.layers.0", caught_by=(REFIT,)
    ),
    "parallel block declared as sequential": Mutation(
        "gpt_neox",
        in_block(lambda block: replace(block, is_parallel=False)),
        "gpt_neox.layers.0",
        caught_by=(REFIT, PUBLISHED),
    ),
    "sequential block declared as parallel": Mutation(
        "llama",
        in_block(lambda block: replace(block, is_parallel=True)),
        "model.layers.0",
        caught_by=(REFIT, PUBLISHED),
    ),
    "width that may change": Mutation(
        "gpt2", lambda a: replace(a, keeps_width=False), "GPT2LMHeadModel", caught_by=(PROVED,)
    ),
    "branch in a module that is not there": Mutation(
        "llama",
        in_branch(1, module="feed_forward"),
        "feed_forward",
        caught_by=(WIDER, WIDER_PUBLISHED, REFIT, PUBLISHED, PROVED),
    ),
    "experts of another width": Mutation(
        "mixtral",
        in_branch(1, experts=lambda experts: replace(experts, writer_width="query")),
        "model.layers.0.mlp.experts.down_proj",
    ),
    "missed experts": Mutation("qwen2_moe", in_branch(1, experts=None), "model.layers.0.mlp.experts.gate_up_proj"),
    # embeddings and what is passed through
    "untouched position embedding": Mutation(
        "opt", lambda a: replace(a, embeddings=a.embeddings[:1]), "model.decoder.embed_positions.weight"
    ),
    "untouched token embedding": Mutation(
        "gpt2", lambda a: replace(a, embeddings=a.embeddings[1:]), "transformer.wte.weight"
    ),
    "too few rows of an embedding": Mutation(
        "opt",
        lambda a: replace(a, embeddings=(a.embeddings[0], Embedding(a.embeddings[1].path, "max_position_embeddings"))),
        "model.decoder.embed_positions.weight",
    ),
    "embeddings not said to grow with the width": Mutation(
        "gemma",
        lambda a: replace(a, scales_embeddings_by_width=False),
        "the output of model.embed_tokens is",
        caught_by=(START,),
    ),
    "embeddings said to grow with the width": Mutation(
        "llama",
        lambda a: replace(a, scales_embeddings_by_width=True),
        "the output of model.embed_tokens is",
        caught_by=(START,),
    ),
    "forgotten parameter apart from the stream": Mutation(
        "qwen3", in_block(lambda block: replace(block, passed_through=())), "model.layers.0.self_attn.q_norm.weight"
    ),
    # MLP channels
    "own name of the MLP's width forgotten": Mutation(
        "gpt2",
        lambda a: replace(a, names={usual: own for usual, own in a.names.items() if own != "n_inner"}),
        "does not take the width of the MLP from intermediate_size",
        caught_by=CHANNELS,
    ),
    "reader whose width is said to be a number": Mutation(
        "llama",
        in_branch(1, readers=lambda readers: (replace(readers[0], width="88"), *readers[1:])),
        "model.layers.0.mlp.gate_proj.weight",
        caught_by=CHANNELS[:2],
    ),
    "width of experts that is not listed": Mutation(
        "qwen3_moe",
        lambda a: replace(a, mlp_widths=("intermediate_size",)),
        "moe_intermediate_size",
        caught_by=(WIDTHS,),
    ),
    "width of experts that is said to be a number": Mutation(
        "mixtral",
        in_branch(1, experts=lambda experts: replace(experts, reader_width="176")),
        "mlp.experts.gate_up_proj",
        caught_by=(WIDTHS,),
    ),
    # sizes and dims
    "own name of the longest row forgotten": Mutation(
        "gptj",
        lambda a: replace(a, names={usual: own for usual, own in a.names.items() if own != "n_positions"}),
        "max_position_embeddings is n_positions",
        caught_by=(CONTEXT,),
    ),
    "rule on dims that none keeps": Mutation(
        "qwen2", lambda a: replace(a, dim_divisors=("vocab_size",)), "no dim at all is legal", caught_by=(ILLEGAL,)
    ),
    "rule on dims forgotten": Mutation(
        "llama", lambda a: replace(a, dim_divisors=()), "hidden size", caught_by=(CONFIG_CLASS,)
    ),
    "rule on dims invented": Mutation(
        "qwen2",
        lambda a: replace(a, dim_divisors=("num_attention_heads",)),
        "dim_divisors rules out",
        caught_by=(CONFIG_CLASS,),
    ),
    "a tied class declared as stock": Mutation(
        "gpt_neox", lambda a: replace(a, stock_obstacle=""), "gpt_neox.layers.0.attention", caught_by=(NAMES, CACHE)
    ),
    # portable classes
    "tensor of a portable class forgotten": Mutation(
        "qwen2",
        in_portable(constants={}),
        "lacks model.layers.0.self_attn.o_proj.bias",
        caught_by=(PORTABLE, PORTABLE_SLICE),
    ),
    "tensor of a portable class with another value": Mutation(
        "qwen2", in_portable(constants={"self_attn.o_proj.bias": 0.1}), "logits change", caught_by=(PORTABLE,)
    ),
    "tensor that a portable class has not": Mutation(
        "qwen2",
        in_portable(constants={"self_attn.o_proj.bias": 0.0, "mlp.up_proj.bias": 0.0}),
        "model.layers.0.mlp.up_proj.bias",
        caught_by=(PORTABLE,),
    ),
    "field of a portable class forgotten": Mutation(
        "qwen2", in_portable(fields={}, constants={}), "model.layers.0.self_attn.k_proj.bias", caught_by=(PORTABLE,)
    ),
    "field of a portable class with another value": Mutation(
        "olmo", in_portable(fields={"rms_norm_eps": 0.5}), "logits change", caught_by=(PORTABLE,)
    ),
    "parts of a fused linear with other widths": Mutation(
        "phi3",
        lambda a: in_portable(
            splits={
                **a.portable[0].splits,
                "self_attn.qkv_proj": tuple(
                    replace(part, width=width)
                    for part, width in zip(
                        a.portable[0].splits["self_attn.qkv_proj"], ("key_value", "query", "key_value"), strict=True
                    )
                ),
            }
        )(a),
        "model.layers.0.self_attn.k_proj.weight",
        caught_by=(PORTABLE,),
    ),
    "parts of a fused linear in another order": Mutation(
        "phi3",
        lambda a: in_portable(
            splits={**a.portable[0].splits, "mlp.gate_up_proj": a.portable[0].splits["mlp.gate_up_proj"][::-1]}
        )(a),
        "logits change",
        caught_by=(PORTABLE, PORTABLE_SLICE),
    ),
    "fused linear that is not split": Mutation(
        "phi3", in_portable(splits={}), "lacks model.layers.0.mlp.gate_proj.weight", caught_by=(PORTABLE,)
    ),
    "scale of the branches forgotten": Mutation(
        "granite", without_scale("mlp.down_proj"), "logits change", changes=MULTIPLIERS, caught_by=(PORTABLE,)
    ),
    "scale of the logits forgotten": Mutation(
        "granite", without_scale("model.norm"), "logits change", changes=MULTIPLIERS, caught_by=(PORTABLE,)
    ),
    "scale of the queries forgotten": Mutation(
        "granite", without_scale("self_attn.q_proj"), "logits change", caught_by=(PORTABLE,)
    ),
    "stream that is not centred": Mutation(
        "olmo", in_portable(centres_stream=False), "logits change", caught_by=(PORTABLE,)
    ),
    "condition of a portable class forgotten": Mutation(
        "olmo", in_portable(obstacle=""), "logits change", changes={"clip_qkv": 0.5}, caught_by=(PORTABLE,)
    ),
    "biases that a portable class has no place for": Mutation(
        "llama",
        in_portable(obstacle=""),
        "model.layers.0.self_attn.k_proj.bias",
        changes={"attention_bias": True},
        caught_by=(PORTABLE,),
    ),
    "window that a portable class has not": Mutation(
        "phi3", in_portable(obstacle=""), "logits change", changes={"sliding_window": 16}, caught_by=(PORTABLE,)
    ),
}


# what can be wrong with a slice though its declaration is right; the tests that must notice


def ignores_the_attention_mask(subject):
    loaded = subject.loaded("refit")
    forward = loaded.forward
    loaded.forward = lambda *args, attention_mask=None, position_ids=None, **kwargs: forward(*args, **kwargs)


def answers_differently_with_a_cache(subject):
    loaded = subject.loaded("refit")
    forward = loaded.forward

    def forward_with_cache(*args, **kwargs):
        found = forward(*args, **kwargs)
        if kwargs["input_ids"].shape[1] == 1:
            found.logits = -found.logits
        return found

    loaded.forward = forward_with_cache


def saves_other_weights(subject):
    loaded = subject.loaded("refit")
    save = loaded.save_pretrained

    def save_and_change(folder):
        save(folder)
        loaded.lm_head.weight.data *= 2

    loaded.save_pretrained = save_and_change


def computes_otherwise_in_half_precision(subject):
    subject.loaded("refit").lm_head.weight.data *= 2


def lacks_a_tensor(subject):
    from safetensors.torch import load_file, save_file

    path = subject.sliced("refit") / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.norm.weight"]
    save_file(tensors, path, metadata={"format": "pt"})


def brings_code(subject):
    (subject.sliced("refit") / "modeling_mine.py").write_text("")


def has_a_parameter_more(subject):
    import torch

    subject.loaded("refit").register_parameter("more", torch.nn.Parameter(torch.ones(1)))


DAMAGES = {
    ignores_the_attention_mask: {"test_a_padded_batch_equals_single_rows"},
    answers_differently_with_a_cache: {"test_generation_with_cache_equals_generation_without"},
    saves_other_weights: {"test_saving_and_loading_a_slice_keeps_it"},
    computes_otherwise_in_half_precision: {"test_a_slice_runs_in_bfloat16"},
    lacks_a_tensor: {"test_a_slice_loads_whole", "test_a_slice_loads_without_its_head"},
    brings_code: {"test_a_slice_loads_whole"},
    has_a_parameter_more: {"test_a_slice_has_the_parameters_that_were_predicted"},
}


def sound(family: str) -> Adapter:
    """Return a shipped adapter."""
    return plugins().adapters[family]


def mutant(name: str) -> Adapter:
    """Return the damaged adapter of a row."""
    return MUTATIONS[name].damage(sound(MUTATIONS[name].family))


def tiny_subject(adapter: Adapter, folder: Any, **changes: Any) -> Subject:
    """Return what the suite tests an adapter on."""
    config = tiny_of(adapter, adapter.model_types[0], **changes)
    return Subject(adapter, random_model(config), folder, is_real=False)


def complaint(test: str, subject: Subject, folder: Any) -> str:
    """Return the message with which a test of the suite fails; nothing where it passes."""
    known = {"seed": 0, "orientation": "pca", "method": "refit", "record_property": lambda *_: None}
    known |= {"subject": subject, "tmp_path": folder}
    function = getattr(AdapterTests(), test)
    try:
        function(**{name: known[name] for name in inspect.signature(function).parameters})
    except (Exception, pytest.fail.Exception) as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_declaration_is_caught_and_the_fault_is_named(name, tmp_path):
    row = MUTATIONS[name]
    subject = tiny_subject(mutant(name), tmp_path, **row.changes)
    messages = [complaint(test, subject, tmp_path) for test in row.caught_by]
    assert all(messages), dict(zip(row.caught_by, messages, strict=True))
    assert any(row.names in message for message in messages), messages


@pytest.fixture(scope="module")
def slice_of_llama(tmp_path_factory):
    return tiny_subject(sound("llama"), tmp_path_factory.mktemp("sound")).sliced("refit")


@pytest.fixture
def subject(slice_of_llama, tmp_path):
    """A sound declaration, with a slice that may be damaged."""
    made = tiny_subject(sound("llama"), tmp_path)
    copy = shutil.copytree(slice_of_llama, tmp_path / "copy")
    made.sliced = lambda _method, _has_fewer_channels=False: copy
    return made


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_a_damaged_slice_of_a_sound_declaration_is_caught(damage, subject, tmp_path):
    damage(subject)
    failed = {one for one in OF_FILES if complaint(one, subject, tmp_path / one)}
    assert DAMAGES[damage] <= failed
    assert len(failed) < 4


def test_an_undamaged_slice_of_a_sound_declaration_passes(subject, tmp_path):
    assert not [one for one in OF_FILES if complaint(one, subject, tmp_path / one)]


def test_every_test_of_the_suite_catches_something():
    caught = {test for row in MUTATIONS.values() for test in row.caught_by}.union(*DAMAGES.values())
    assert caught == {name for name in dir(AdapterTests) if name.startswith("test_")}


def test_whoever_runs_the_suite_on_a_wrong_adapter_reads_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")
    (tmp_path / "test_mine.py").write_text(
        "from slicecli.testing import AdapterTests\n"
        "from test_mutations import mutant\n"
        "class TestMine(AdapterTests):\n"
        "    adapter = mutant('missed reader')\n"
    )
    words = ["-k", "names_every_parameter or context_length", "--slicecli-report", "report.json"]
    done = run_program("-m", "pytest", *words, "test_mine.py", cwd=tmp_path, kind="warm")
    assert done.returncode == 1, done.stdout
    report = json.loads((tmp_path / "report.json").read_text())["tests"]
    (failed,) = [test for test in report if test["outcome"] == "failed"]
    assert NAMES in failed["name"]
    assert MUTATIONS["missed reader"].names in failed["message"]
