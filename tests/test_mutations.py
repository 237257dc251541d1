"""The conformance suite against adapters that are deliberately wrong: every mutation is caught, and named.

Each row damages one thing in a shipped declaration. The suite is run on it as an author would run it; it must fail,
and a message must name the module or parameter at fault.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from slicecli.adapters import Adapter, Block, Embedding, Norm
from slicecli.family.plugins import plugins

pytestmark = pytest.mark.slow

SUITE = """
import pytest
from slicecli.testing import AdapterTests
from test_mutations import DAMAGES, MUTATIONS, mutant, sound

class Declaration(AdapterTests):
    # without what looks at slices in files: the damaged slices are for that
    pass

class Declared(Declaration):
    # without what slices in memory, where that need not be
    pass

class Damaged(AdapterTests):
    # with what looks at slices in files only
    adapter = sound("llama")

    @pytest.fixture
    def subject(self, slicecli_subject):
        if not hasattr(slicecli_subject, "is_damaged"):
            slicecli_subject.is_damaged = True
            self.damage(slicecli_subject)
        return slicecli_subject

for name in [name for name in dir(AdapterTests) if name.startswith("test_")]:
    setattr(Declaration if name in {of_files} else Damaged, name, None)
for name in {in_memory}:
    assert hasattr(Declaration, name)
    setattr(Declared, name, None)

for number, (damage, _) in enumerate(DAMAGES.values()):
    globals()[f"TestDamaged{number}"] = type(f"TestDamaged{number}", (Damaged,), {"damage": staticmethod(damage)})

for number, (name, mutation) in enumerate(MUTATIONS.items()):
    globals()[f"TestMutant{number}"] = type(
        f"TestMutant{number}",
        (Declaration if mutation.needs_slices else Declared,),
        {"adapter": mutant(name), "tiny_config": mutation.changes},
    )
class TestSound(Declaration):
    adapter = sound("llama")

class TestUndamaged(Damaged):
    damage = staticmethod(lambda subject: None)

del Declaration, Declared, Damaged
"""
OF_FILES = [
    "test_a_slice_has_the_parameters_that_were_predicted",
    "test_a_slice_loads_whole",
    "test_a_slice_loads_without_its_head",
    "test_saving_and_loading_a_slice_keeps_it",
    "test_generation_with_cache_equals_generation_without",
    "test_a_padded_batch_equals_single_rows",
    "test_a_slice_runs_in_bfloat16",
]

IN_MEMORY = [
    "test_the_refit_at_full_width_finds_nothing_to_mend",
    "test_a_wider_slice_is_closer_to_the_model",
    "test_a_wider_published_slice_is_closer_to_the_model",
    "test_the_published_method_at_full_width_leaves_logits_unchanged",
    "test_the_published_method_is_proved_on_a_small_model",
]


@dataclasses.dataclass(frozen=True)
class Mutation:
    """One way to be wrong.

    Attributes:
        family: The adapter that is damaged.
        damage: Makes the damaged one of it.
        names: What a message must name.
        changes: Config fields of the tiny model.
        needs_slices: Nothing quicker than a slice in memory names the fault.
    """

    family: str
    damage: Callable[[Adapter], Adapter]
    names: str
    changes: dict[str, Any] = dataclasses.field(default_factory=dict)
    needs_slices: bool = False


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


MUTATIONS = {
    # norms
    "norm of another kind: a LayerNorm declared as RMSNorm": Mutation(
        "starcoder2", lambda a: replace(a, norm=replace(a.norm, kind="rms")), "model.layers.0.self_attn.q_proj"
    ),
    "centred RMSNorm stream": Mutation(
        "llama", lambda a: replace(a, norm=replace(a.norm, kind="layer")), "model.layers.0.self_attn.q_proj"
    ),
    "norm weight without its offset": Mutation(
        "gemma", lambda a: replace(a, norm=replace(a.norm, weight_offset=0.0)), "model.layers.0.self_attn.q_proj"
    ),
    "norm of the other branch": Mutation(
        "llama", in_branch(0, norm="post_attention_layernorm"), "model.layers.0.input_layernorm"
    ),
    "norm weight undeclared": Mutation(
        "llama", lambda a: replace(a, norm=replace(a.norm, has_weight=False)), "model.layers.0.input_layernorm.weight"
    ),
    "norm bias undeclared": Mutation(
        "phi", lambda a: replace(a, norm=replace(a.norm, has_bias=False)), "model.layers.0.input_layernorm.bias"
    ),
    "wrong epsilon": Mutation(
        "olmo", lambda a: replace(a, norm=Norm("layer", epsilon=0.5, has_weight=False)), "norm", needs_slices=True
    ),
    "final norm of a block": Mutation(
        "llama", lambda a: replace(a, final_norm="model.layers.0.input_layernorm"), "model.norm.weight"
    ),
    # readers
    "missed reader": Mutation(
        "llama", in_branch(0, readers=lambda readers: readers[:2]), "model.layers.0.self_attn.v_proj.weight"
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
        "granite", in_branch(0, multiplier=""), "model.layers.0", {"residual_multiplier": 0.22}, needs_slices=True
    ),
    "forgotten gate": Mutation(
        "qwen2_moe", in_branch(1, writer=lambda writer: replace(writer, gate="")), "model.layers.0", needs_slices=True
    ),
    "parallel block declared as sequential": Mutation(
        "gpt_neox", in_block(lambda block: replace(block, is_parallel=False)), "gpt_neox.layers.0", needs_slices=True
    ),
    "sequential block declared as parallel": Mutation(
        "llama", in_block(lambda block: replace(block, is_parallel=True)), "model.layers.0", needs_slices=True
    ),
    "width that may change": Mutation(
        "gpt2", lambda a: replace(a, keeps_width=False), "GPT2LMHeadModel", needs_slices=True
    ),
    "branch in a module that is not there": Mutation(
        "llama", in_branch(1, module="feed_forward"), "feed_forward", needs_slices=True
    ),
    "experts of another width": Mutation(
        "mixtral",
        in_branch(1, experts=lambda experts: replace(experts, writer_width="query")),
        "model.layers.0.mlp.experts.down_proj",
    ),
    "missed experts": Mutation("qwen2_moe", in_branch(1, experts=None), "model.layers.0.mlp.experts.gate_up_proj"),
    # embeddings and what is kept
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
    ),
    "embeddings said to grow with the width": Mutation(
        "llama",
        lambda a: replace(a, scales_embeddings_by_width=True),
        "the output of model.embed_tokens is",
    ),
    "forgotten parameter apart from the stream": Mutation(
        "qwen3", in_block(lambda block: replace(block, kept=())), "model.layers.0.self_attn.q_norm.weight"
    ),
    # sizes and dims
    "own name of the longest row forgotten": Mutation(
        "gptj",
        lambda a: replace(a, names={usual: own for usual, own in a.names.items() if own != "n_positions"}),
        "max_position_embeddings is n_positions",
    ),
    "rule on dims that none keeps": Mutation(
        "qwen2", lambda a: replace(a, dim_divisors=("vocab_size",)), "no dim at all is legal"
    ),
    "rule on dims forgotten": Mutation("llama", lambda a: replace(a, dim_divisors=()), "hidden size"),
    "rule on dims invented": Mutation(
        "qwen2", lambda a: replace(a, dim_divisors=("num_attention_heads",)), "dim_divisors rules out"
    ),
    "a tied class declared as stock": Mutation(
        "gpt_neox", lambda a: replace(a, stock_obstacle=""), "gpt_neox.layers.0.attention"
    ),
}


# what can be wrong with a slice though its declaration is right; the test that must notice


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
    "a slice that ignores the attention mask": (
        ignores_the_attention_mask,
        "test_a_padded_batch_equals_single_rows[refit]",
    ),
    "a slice that answers differently with a cache": (
        answers_differently_with_a_cache,
        "test_generation_with_cache_equals_generation_without[refit]",
    ),
    "a slice that saves other weights": (saves_other_weights, "test_saving_and_loading_a_slice_keeps_it[refit]"),
    "a slice that computes otherwise in half precision": (
        computes_otherwise_in_half_precision,
        "test_a_slice_runs_in_bfloat16[refit]",
    ),
    "a slice that lacks a tensor": (lacks_a_tensor, "test_a_slice_loads_whole[refit]"),
    "a slice that brings code": (brings_code, "test_a_slice_loads_whole[refit]"),
    "a slice that has a parameter more": (
        has_a_parameter_more,
        "test_a_slice_has_the_parameters_that_were_predicted[refit]",
    ),
}


def sound(family: str) -> Adapter:
    """Return a shipped adapter."""
    return plugins().adapters[family]


def mutant(name: str) -> Adapter:
    """Return the damaged adapter of a row."""
    return MUTATIONS[name].damage(sound(MUTATIONS[name].family))


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of one run of the suite on all mutants, and on an adapter unharmed."""
    folder = tmp_path_factory.mktemp("mutants")
    (folder / "test_mutants.py").write_text(
        SUITE.replace("{of_files}", repr(OF_FILES)).replace("{in_memory}", repr(IN_MEMORY))
    )
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    words = ["-q", "-p", "no:cacheprovider", "--slicecli-report", "report.json", "test_mutants.py"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stdout
    return json.loads((folder / "report.json").read_text())["tests"]


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_wrong_declaration_is_caught_and_the_fault_is_named(name, report):
    own = f"::TestMutant{list(MUTATIONS).index(name)}::"
    failed = [test for test in report if own in test["name"] and test["outcome"] == "failed"]
    assert failed, "no test failed"
    messages = [test["message"] for test in failed]
    assert any(MUTATIONS[name].names in message for message in messages), "\n".join(messages)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_slice_of_a_sound_declaration_is_caught(name, report):
    own = f"::TestDamaged{list(DAMAGES).index(name)}::"
    failed = [
        test["name"].rpartition("::")[2] for test in report if own in test["name"] and test["outcome"] == "failed"
    ]
    assert DAMAGES[name][1] in failed
    assert len(failed) < 4


def test_every_test_of_the_suite_catches_something(report):
    names = {test["name"].rpartition("::")[2].partition("[")[0] for test in report}
    caught = {test["name"].rpartition("::")[2].partition("[")[0] for test in report if test["outcome"] == "failed"}
    assert names == caught


@pytest.mark.parametrize("name", ["TestSound", "TestUndamaged"])
def test_without_a_mutation_the_same_suite_passes(name, report):
    outcomes = [test["outcome"] for test in report if f"::{name}::" in test["name"]]
    assert outcomes.count("passed") > 8
    assert "failed" not in outcomes
