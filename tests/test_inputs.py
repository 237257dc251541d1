"""What a user writes is read once, before any work: names, paths, tokens and numbers."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import click
import pytest

import slicecli
from slicecli.api import generate_text
from slicecli.cli import COMMANDS, group
from slicecli.cli.options import LocalPath
from slicecli.errors import RequestError, SourceError
from slicecli.hub.options import PushOptions
from slicecli.hub.push import push_slice
from slicecli.jobs.options import SliceOptions
from slicecli.runtime.inputs import find_folder, is_repository_name, local_path, parse_repository, parse_token


def commands():
    """Return every command with the words that lead to it."""
    found = {}
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        inner = getattr(command, "commands", None)
        found |= {(name, sub): one for sub, one in inner.items()} if inner else {(name,): command}
    return found


def parameters(is_wanted):
    """Return cases of the parameters that are wanted: the words of the command, the command, the parameter."""
    return [
        pytest.param(words, command, one, id=f"{'-'.join(words)} {one.opts[-1]}")
        for words, command in commands().items()
        for one in command.params
        if is_wanted(one) and not getattr(one, "is_flag", False)
    ]


def given(words, command, parameter, value):
    """Return a command's words with a value for a parameter, and something for each argument that is required."""
    arguments = [one for one in command.params if isinstance(one, click.Argument) and one.required]
    values = [value if one is parameter else "." if isinstance(one.type, LocalPath) else "x" for one in arguments]
    option = [] if parameter in arguments else [value]
    if isinstance(parameter, click.Option):
        option = [f"{parameter.opts[-1]}={value}"]
    return [*words, *option, "--", *values]


# options


@pytest.mark.parametrize(("words", "command", "parameter"), parameters(lambda one: one.name != "prompt"))
def test_an_empty_value_is_refused_whatever_the_option(run, tmp_path, monkeypatch, words, command, parameter):
    monkeypatch.chdir(tmp_path)
    done = run(*given(words, command, parameter, ""))
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("Error: ")
    assert (parameter.opts[-1] if isinstance(parameter, click.Option) else parameter.human_readable_name) in message
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("words", "command", "parameter"), parameters(lambda one: isinstance(one.type, click.Path)))
def test_a_tilde_is_the_home_of_the_user_in_every_path(tmp_path, monkeypatch, words, command, parameter):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert isinstance(parameter.type, LocalPath)
    path = tmp_path / "here"
    path.touch() if parameter.type.file_okay else path.mkdir()
    context = click.Context(command)
    assert parameter.type.convert("~/here", parameter, context) == path
    with pytest.raises(RequestError, match="home folder of '~nobodys' is not known"):
        parameter.type.convert("~nobodys/here", parameter, context)


@pytest.fixture
def no_weights(checkpoint_copy):
    """A model whose weights are missing: what is refused after they were looked for is refused too late."""
    (checkpoint_copy / "model.safetensors").unlink()
    return checkpoint_copy


SLICING = (("--seed", 10**30), ("--samples", 10**30), ("--samples", 0), ("--batch-size", 10**30), ("--seq-len", 10**30))
MEASURING = (("--limit", 10**30), ("--limit", 0), ("--num-fewshot", 10**30), ("--num-fewshot", -1))
NUMBERS = {
    "slice": (*SLICING, ("--seed", -(2**63) - 1), ("--sparsity", "nan"), ("--sparsity", "inf"), ("--sparsity", -1)),
    "spectrum": SLICING,
    "sweep": (*SLICING, *MEASURING),
    "eval": (*MEASURING, ("--seed", 10**30), ("--seed", -1), ("--batch-size", 10**30), ("--seq-len", 10**30)),
    "generate": (
        *(("--temperature", value) for value in ("nan", "inf", "-1", "-inf", "1e-300")),
        *(("--seed", value) for value in (10**30, -(2**63) - 1)),
        *(("--max-new-tokens", value) for value in (0, 10**30)),
    ),
    "estimate": (
        *(("--dense-perplexity", value) for value in ("nan", "inf", 1, -8)),
        *(("--max-perplexity", value) for value in ("nan", "inf", 0)),
        *(("--dense-accuracy", f"piqa={value}") for value in ("nan", "inf", 2)),
        *(("--measured", f"36={value}") for value in ("nan", "inf", 0)),
        *(("--sweep", value) for value in ("nan:0.5:0.1", "0.1:0.5:inf", "0.1:nan:0.1")),
        *((option, value) for option in ("--batch", "--length") for value in (0, 10**30)),
        *(("--tflops", value) for value in ("nan", "inf", 0)),
        *((option, value) for option in ("--memory", "--bandwidth") for value in ("nanGiB", "infGB", "-1GB")),
        ("--target-params", "nan"),
    ),
    "search": (("--limit", 0), ("--limit", 10**30)),
    "relations": tuple(("--max-sparsity", value) for value in ("nan", "inf", 0, -1, 2)),
}


@pytest.mark.parametrize(("name", "option", "value"), [(name, *one) for name, all_ in NUMBERS.items() for one in all_])
def test_a_number_that_is_none_or_out_of_range_is_refused_before_any_work(run, no_weights, name, option, value):
    model = [] if name in {"search", "relations"} else [no_weights]
    more = {
        "slice": [] if option == "--sparsity" else ["--dim", "36"],
        "generate": ["a"],
        "spectrum": ["--format", "json"],
        "relations": ["--validate"],
        "estimate": ["--dense-perplexity", "8"] if option in {"--max-perplexity", "--measured"} else [],
    }
    done = run(name, *model, *more.get(name, []), f"{option}={value}")
    assert done.exit_code == 2, done.output
    assert done.stdout == ""
    assert done.stderr.strip().splitlines()[-1].startswith("Error: ")
    assert "Traceback" not in done.stderr


def test_a_negative_seed_is_one_where_torch_takes_it(run, checkpoints):
    assert run("generate", checkpoints(), "a", "--seed", "-1", "--temperature", "1").exit_code == 0


@pytest.mark.parametrize("size", ["30kB", "30000", "30e3", "29.296875KiB", "30000B"])
def test_a_shard_size_is_read_as_every_other_size(run, checkpoints, slice_words, tmp_path, size):
    done = run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "out", "--max-shard-size", size, *slice_words)
    assert done.exit_code == 0, done.output
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 1
    alone = max(36 * 300 * 4, 36 * 80 * 4)  # a tensor that is larger has a file of its own
    assert all((tmp_path / "out" / file).stat().st_size <= max(30_000, alone) + 4096 for file in files)


def test_a_variable_of_the_environment_that_is_read_late_is_checked_early(run, no_weights, monkeypatch):
    for variable, value in (("SLICECLI_CACHE_SIZE", "big"), ("SLICECLI_JOURNAL_SECONDS", "nan")):
        with monkeypatch.context() as patch:
            patch.setenv(variable, value)
            done = run("slice", no_weights, "--dim", "36", "--dry-run")
        assert done.exit_code == 2
        assert variable in done.stderr


def test_a_dim_that_is_given_twice_counts_once(run, checkpoints):
    done = run("estimate", checkpoints(), "--dim", "36,36,24", "--format", "json")
    assert [one["dim"] for one in json.loads(done.stdout)["estimates"]] == [36, 24]


def test_a_device_has_one_size(run, checkpoints):
    done = run("slice", checkpoints(), "--dim", "36", "--max-memory", "0=1GB,00=2GB", "--dry-run")
    assert done.exit_code == 2
    assert "does not give each device a size" in done.stderr


# names of repositories


@pytest.mark.parametrize("name", ["me/x", "Me-2/a_b.c-d", "0/1", f"{'a' * 96}/{'b' * 96}"])
def test_an_id_is_taken_as_it_is(name):
    assert parse_repository(name) == name


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/me/x",
        "http://huggingface.co/me/x/",
        "https://hf.co/me/x/tree/main",
        "https://huggingface.co/me/x/blob/main/config.json?download=true#L1",
        "https://huggingface.co/datasets/me/x",
        "http://127.0.0.1:8000/me/x",
        "https://huggingface.co/me/x.git",
        "git@hf.co:me/x.git",
        "huggingface.co/me/x",
        "hf://me/x",
        "hf://datasets/me/x",
        "me/x/",
        "me//x",
        " me/x",
        "me/x\n",
    ],
)
def test_of_an_address_the_id_inside_is_offered(text):
    with pytest.raises(RequestError, match="not a valid Hub id") as caught:
        parse_repository(text)
    assert caught.value.remedy == "Use me/x."


@pytest.mark.parametrize(
    "text",
    ["", "me/a--b", "me/a..b", "me/..", "../x", "-me/x", "me/x.", "a/b/c", "mé/x", "me/x y", "https://huggingface.co"],
)
def test_what_can_be_no_id_is_told_the_form(text):
    with pytest.raises(RequestError) as caught:
        parse_repository(text)
    assert caught.value.remedy.startswith("Use owner/name, each of letters")


def test_only_what_is_read_may_have_no_owner():
    assert parse_repository("gpt2", needs_owner=False) == "gpt2"
    with pytest.raises(RequestError, match="Use owner/gpt2"):
        parse_repository("gpt2")
    assert not is_repository_name("gpt2", needs_owner=True)


@pytest.mark.parametrize("name", ["me/a--b", "https://huggingface.co/me/x", "x", "me/..", "me/x/"])
def test_no_command_publishes_under_a_name_that_is_none(run, no_weights, tmp_path, name):
    for words in (
        ("push", no_weights, name, "--dry-run"),
        ("push", no_weights, name),
        ("slice", no_weights, "--dim", "36", "--push", name),
        ("slice", no_weights, "--dim", "36", "--push", name, "--dry-run"),
    ):
        done = run(*words)
        assert done.exit_code == 2
        assert "valid Hub id. Use " in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("inspect",),
        ("verify",),
        ("generate", "--", "a"),
        ("estimate", "MODEL", "--curve"),
        ("eval", "MODEL", "--perplexity", "demo", "--baseline"),
        ("adapters", "--scaffold"),
        ("search", "--base-model"),
    ],
)
def test_an_address_is_no_model_wherever_one_is_read(run, checkpoints, words):
    text = "https://huggingface.co/me/x"
    given = [checkpoints() if word == "MODEL" else word for word in words]
    given = ["generate", text, "a"] if words[0] == "generate" else [*given, text]
    done = run(*given)
    assert done.exit_code in (1, 2)
    assert "valid Hub id. Use me/x." in done.stderr


# paths


def test_a_folder_comes_before_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_folder("gpt2") is None
    (tmp_path / "gpt2").mkdir()
    assert find_folder("gpt2") == Path("gpt2")


@pytest.mark.parametrize("text", ["./gpt2", "/nowhere/gpt2", "a/b/c", "gpt2\\x"])
def test_a_path_that_leads_nowhere_is_no_name_on_the_hub(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match=r"There is no folder|neither an existing folder nor"):
        find_folder(text)


@pytest.mark.parametrize("text", ["a" * 300, f"{'a/' * 3000}a", "a\0b"])
def test_what_cannot_be_a_path_is_one_sentence(text):
    with pytest.raises(RequestError, match="cannot be used"):
        local_path(text)


def test_an_output_is_written_to_the_home_of_the_user(run, checkpoints, slice_words, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert run("slice", checkpoints(), "--dim", "36", "-o", "~/out", *slice_words).exit_code == 0
    assert os.listdir(tmp_path) == ["out"]
    assert run("eval", "~/out", "--perplexity", "demo", "--limit", "2", "--record").exit_code == 0
    assert run("card", "~/out").exit_code == 0


def test_a_file_may_lie_in_the_home_of_the_user_whatever_it_is(run, checkpoints, text_file, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copy(text_file, tmp_path / "text.jsonl")
    (tmp_path / "map.json").write_text('{"": "cpu"}')
    words = ("--calibration", "~/text.jsonl", "--samples", "8", "--seq-len", "32", "--device-map", "~/map.json")
    done = run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "out", *words)
    assert done.exit_code == 0, done.output


# tokens


@pytest.mark.parametrize(
    ("token", "says"),
    [
        ("", "empty"),
        ("hf_a\nb", "line break"),
        ("hf_a\r", "line break"),
        (" hf_a", "a space"),
        ("hf_é", "an invalid character"),
    ],
)
def test_a_token_that_cannot_be_sent_is_refused_and_not_shown(run, token, says):
    with pytest.raises(RequestError, match=says) as caught:
        parse_token(token)
    assert "hf_a" not in str(caught.value)
    for words in (("inspect", "me/x"), ("verify", "me/x"), ("push", "./x", "me/x"), ("search", "x")):
        done = run(*words[:1], "--token", token, *words[1:])
        assert done.exit_code == 2
        assert "hf_a" not in done.stderr


# the Python interface


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: slicecli.slice_model(model, 36, seed=10**30), "seed"),
        (lambda model: slicecli.slice_model(model, 36, samples=0), "--samples 1"),
        (lambda model: slicecli.slice_model(model, 36, max_shard_size="lots"), "not a size"),
        (lambda model: slicecli.slice_model(model, 36, output=""), "path is empty"),
        (lambda model: slicecli.slice_model(model, sparsity=math.nan), "sparsity of nan"),
        (lambda model: slicecli.evaluate(model, texts=["demo"], seed=-1), "seed"),
        (lambda model: slicecli.evaluate(model, texts=["demo"], limit=10**30), "limit"),
        (lambda model: slicecli.load(model, revision=""), "revision is empty"),
        (lambda _: slicecli.load(""), "path is empty"),
        (lambda _: generate_text(None, None, "a", temperature=math.nan), "temperature nan"),
        (lambda _: push_slice(Path(), "me/a--b", PushOptions()), "not a valid Hub id"),
    ],
)
def test_the_python_interface_refuses_the_same_before_any_work(no_weights, call, says):
    with pytest.raises(RequestError, match=says):
        call(str(no_weights))


def test_the_python_interface_takes_a_shard_size_as_text_or_number():
    assert SliceOptions(max_shard_size="30kB").max_shard_size == SliceOptions(max_shard_size=30_000).max_shard_size
