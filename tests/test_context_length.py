"""The longest row of a model: under whatever name its class has it, in every command."""

from __future__ import annotations

import json

import pytest
import transformers

from slicecli.family.context_length import context_length, context_length_of_config
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.proof.tiny import SIZES, random_model, tiny_config
from slicecli.testing.checkpoints import byte_tokenizer, save_checkpoint

LONGEST = SIZES["n_positions"]
# types whose class says n_positions, max_seq_len, or max_position_embeddings, and fails on a longer row
BOUNDED = ["gpt2", "gptj", "codegen", "gpt_bigcode", "mpt", "opt"]
UNBOUNDED = {"bloom": {}, "falcon": {"alibi": True}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    made = {}

    def make(kind, **changes):
        if kind not in made:
            folder = tmp_path_factory.mktemp("models") / kind
            made[kind] = save_checkpoint(random_model(tiny_config(kind, has_head_dim=False, **changes)), folder)
        return made[kind]

    return make


def document_of(run, *words):
    done = run(*words, "--format", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize("kind", BOUNDED)
def test_rows_are_by_default_as_long_as_the_model_can_do(run, folders, text_file, kind):
    document = document_of(run, "eval", folders(kind), "--perplexity", text_file, "--limit", "1")
    assert document["perplexity"][text_file.name]["seq_len"] == LONGEST


@pytest.mark.parametrize("kind", BOUNDED)
def test_longer_rows_are_refused_with_the_number(run, folders, text_file, kind):
    done = run("eval", folders(kind), "--perplexity", text_file, "--seq-len", LONGEST + 1)
    assert done.exit_code == 2
    assert f"Use --seq-len {LONGEST} or less." in done.stderr


@pytest.mark.parametrize("kind", UNBOUNDED)
def test_a_model_that_biases_attention_by_distance_has_no_longest_row(run, folders, text_file, kind):
    folder = folders(kind, **UNBOUNDED[kind])
    document = document_of(run, "eval", folder, "--perplexity", text_file, "--seq-len", 3 * LONGEST, "--limit", "1")
    assert document["perplexity"][text_file.name]["seq_len"] == 3 * LONGEST


@pytest.mark.parametrize("kind", ["gpt2", "gptj", "opt"])
def test_a_model_and_its_slice_go_through_every_command_without_a_length(run, folders, text_file, tmp_path, kind):
    output = tmp_path / "out"
    calibration = ("--calibration", text_file, "--samples", "4", "--no-cache")
    document_of(run, "slice", folders(kind), "--dim", "56", "-o", output, *calibration)
    record = json.loads((output / "slicecli.json").read_text())
    assert record["calibration"]["sequence_length"] == LONGEST
    # the slice's config has the dense one inside
    found = document_of(run, "eval", output, "--perplexity", text_file, "--limit", "1", "--baseline", folders(kind))
    assert found["perplexity"][text_file.name]["seq_len"] == LONGEST
    assert document_of(run, "estimate", folders(kind))["workload"]["length"] == LONGEST
    assert document_of(run, "spectrum", folders(kind), *calibration[:-1])["calibration"]["sequence_length"] == LONGEST


def test_a_sweep_needs_no_length_either(run, folders, text_file, tmp_path):
    words = ("--calibration", text_file, "--samples", "4", "--no-cache", "--perplexity", text_file, "--limit", "1")
    document = document_of(run, "sweep", folders("gpt2"), "--dims", "56", "-o", tmp_path / "sweep", *words)
    assert document["points"][0]["perplexity"][text_file.name]["seq_len"] == LONGEST


@pytest.mark.parametrize("kind", ["gpt_bigcode", "mpt"])
def test_questions_longer_than_the_model_can_do_lose_their_beginning(run, folders, tmp_path, kind):
    question = {"query": "a stream " * LONGEST, "choices": [" one", " two"], "gold": 0}
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps(question) + "\n")
    assert document_of(run, "eval", folders(kind), "--tasks", path)["tasks"]["long.jsonl"]["samples"] == 1


def test_a_prompt_leaves_room_for_what_is_written(run, folders):
    words = ("generate", folders("gpt2"), "a" * 100, "--max-new-tokens")
    # with the token before the prompt there are 101, and the last one that is written is not read
    assert document_of(run, *words, "20")["tokens"] <= 20
    done = run(*words, "21")
    assert done.exit_code == 2
    assert "Use --max-new-tokens 20 or less." in done.stderr
    assert "shorter prompt" in run("generate", folders("gpt2"), "a" * LONGEST).stderr


def test_an_estimate_of_longer_sequences_says_that_there_are_none(run, folders):
    done = run("estimate", folders("gptj"), "--length", 4 * LONGEST)
    assert done.exit_code == 0
    assert f"exceed the limit of gptj ({LONGEST})" in done.stderr


@pytest.mark.parametrize("model_type", [kind for one in plugins().adapters.values() for kind in one.model_types])
def test_an_adapter_says_what_the_class_says(model_type):
    adapter = next(one for one in plugins().adapters.values() if model_type in one.model_types)
    config = tiny_config(model_type, has_head_dim=adapter.layout({}) == "stock")
    assert Dimensions(adapter, config.to_dict()).context_length == context_length_of_config(config) == LONGEST
    # and where config.json leaves it out, neither goes below the usual length alone
    name = adapter.names.get("max_position_embeddings", "max_position_embeddings")
    fields = {key: value for key, value in config.to_dict().items() if key != name}
    default = context_length_of_config(transformers.CONFIG_MAPPING[model_type]())
    assert min(Dimensions(adapter, fields).context_length or 2048, 2048) == min(default, 2048)


def test_of_a_config_with_both_names_the_usual_one_counts_as_in_the_class():
    fields = {"model_type": "gpt2", "n_positions": 64, "max_position_embeddings": 32}
    config = transformers.GPT2Config.from_dict(fields)
    assert context_length(fields, {"max_position_embeddings": "n_positions"}) == context_length_of_config(config) == 32


class Mine(transformers.PreTrainedConfig):
    """A class of somebody's own: with a name for the longest row that it does not map."""

    def __init__(self, seq_length=512, text_config=None, **kwargs):
        self.seq_length, self.text_config = seq_length, text_config
        super().__init__(**kwargs)


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, 512),
        ({"seq_length": 64}, 64),
        ({"seq_length": 64, "max_position_embeddings": 32}, 32),
        ({"text_config": {"max_position_embeddings": 7}}, 512),
        ({"text_config": tiny_config("gpt2", has_head_dim=False)}, LONGEST),
        # what a class does not know of does not bind it
        ({"n_ctx": 64}, 512),
    ],
)
def test_a_class_of_somebodys_own_is_asked_too(fields, expected):
    assert context_length_of_config(Mine(**fields)) == expected


def test_the_end_that_a_tokenizer_appends_is_no_part_of_a_prompt(run, checkpoints, checkpoint_copy):
    from tokenizers import processors

    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    tokenizer.save_pretrained(checkpoint_copy)
    words = ("--max-new-tokens", "8")
    expected = document_of(run, "generate", checkpoints(), "The stream", *words)
    assert document_of(run, "generate", checkpoint_copy, "The stream", *words)["text"] == expected["text"]
    # one that is written out is the user's own
    ended = document_of(run, "generate", checkpoints(), "The stream</s>", *words)
    assert ended["text"] != expected["text"]
    assert document_of(run, "generate", checkpoint_copy, "The stream</s>", *words)["text"] == ended["text"]
    # and of nothing, what begins a text is left
    assert document_of(run, "generate", checkpoint_copy, "", *words) == {
        **document_of(run, "generate", checkpoints(), "", *words),
        "model": str(checkpoint_copy),
        "tokens_per_second": pytest.approx(0, abs=1e9),
    }
