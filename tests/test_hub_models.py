"""Models by Hub id, with the real client against a Hub on this machine."""

from __future__ import annotations

import json

import pytest
from programs import run_command, run_program

from slicecli.checkpoint.folder import file_digest

NAME = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.fixture
def commit(loopback_hub, checkpoints):
    """The commit of a model on the Hub, beside which there is a gated one."""
    loopback_hub.create("meta-llama/gated", gated=True)
    loopback_hub.upload("meta-llama/gated", {"config.json": b"{}"})
    return loopback_hub.upload(NAME, checkpoints("llama-3"))


@pytest.fixture
def slicecli(loopback_hub, isolated_hub_cache, commit, tmp_path):
    def call(*words, **more):
        environment = {**loopback_hub.environment(isolated_hub_cache), **more}
        return run_command(*words, env=environment, cwd=tmp_path)

    return call


def test_a_hub_model_is_sliced_and_its_commit_recorded(slicecli, commit, run, checkpoints, slice_words, tmp_path):
    done = slicecli("slice", NAME, "--dim", "36", "--format", "json", *slice_words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["model"], report["revision"]) == (NAME, commit)
    output = tmp_path / "Meta-Llama-3-8B-Instruct-dim36"
    record = json.loads((output / "slicecli.json").read_text())
    assert record["source"]["commit"] == commit
    card = (output / "README.md").read_text()
    assert f"base_model: {NAME}" in card
    assert f"slicecli slice {NAME} --dim 36 --revision {commit}" in card
    # the same weights as from the folder itself
    assert run("slice", checkpoints("llama-3"), "--dim", "36", "-o", tmp_path / "local", *slice_words).exit_code == 0
    assert file_digest(output / "model.safetensors") == file_digest(tmp_path / "local" / "model.safetensors")
    # and once more without the network
    again = slicecli("slice", NAME, "--dim", "24", *slice_words, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr


@pytest.fixture
def snapshot(slicecli, isolated_hub_cache, commit, tmp_path):
    """Return a function that gives the path of a revision in a cache that no variable names."""

    def make(*words):
        assert slicecli(*words).returncode == 0
        cache = (isolated_hub_cache / "hub").rename(tmp_path / "elsewhere")
        return cache / f"models--{NAME.replace('/', '--')}" / "snapshots" / commit

    return make


def test_the_path_of_a_revision_in_a_cache_is_as_good_as_its_name(
    slicecli, snapshot, loopback_hub, slice_words, tmp_path
):
    by_name = ("slice", NAME, "--dim", "36", "-o", tmp_path / "name", *slice_words)
    folder = snapshot(*by_name)
    loopback_hub.requests.clear()
    link = tmp_path / "link"
    link.symlink_to(folder)
    for number, (path, offline) in enumerate([(folder, "1"), (folder, "0"), (link, "1")]):
        output = tmp_path / f"path{number}"
        done = slicecli("slice", path, "--dim", "36", "-o", output, *slice_words, HF_HUB_OFFLINE=offline)
        assert done.returncode == 0, done.stderr
        for file in ("slicecli.json", "README.md", "config.json", "model.safetensors"):
            assert (output / file).read_bytes() == (tmp_path / "name" / file).read_bytes(), file
    assert loopback_hub.requests == []


@pytest.mark.parametrize("first", ["estimate", "inspect"])
def test_what_a_revision_in_a_cache_lacks_is_fetched_into_it(
    slicecli, snapshot, isolated_hub_cache, slice_words, tmp_path, first
):
    folder = snapshot(first, NAME)
    words = ("slice", folder, "--dim", "36", "-o", tmp_path / "out", *slice_words)
    offline = slicecli(*words, HF_HUB_OFFLINE="1")
    assert offline.returncode == 1
    (error,) = [line for line in offline.stderr.splitlines() if line.startswith("Error")]
    assert f"The model {NAME!r} cannot be fetched: offline mode is on" in error
    done = slicecli(*words)
    assert done.returncode == 0, done.stderr
    assert (folder / "model.safetensors").is_file()
    assert not (isolated_hub_cache / "hub").exists()


def test_the_record_of_a_slice_in_a_cache_is_left_alone(
    slicecli, snapshot, loopback_hub, checkpoints, slice_words, text_file, tmp_path, run
):
    assert run("slice", checkpoints(), "--dim", "36", "-o", tmp_path / "out", *slice_words).exit_code == 0
    for file in ("slicecli.json", "README.md"):
        loopback_hub.upload(NAME, {file: (tmp_path / "out" / file).read_bytes()})
    folder = snapshot("inspect", NAME).parent
    (commit,) = folder.iterdir()
    before = {path.name: path.read_bytes() for path in commit.iterdir()}
    for words in (("eval", commit, "--perplexity", text_file, "--record"), ("card", commit)):
        done = run(*words)
        assert done.exit_code == 1
        assert "Copy the folder" in done.stderr
    assert {path.name: path.read_bytes() for path in commit.iterdir()} == before


def test_an_illegal_dim_is_refused_before_weights_are_downloaded(slicecli, loopback_hub, slice_words):
    done = slicecli("slice", NAME, "--dim", "37", "--write-as", "own", *slice_words)
    assert done.returncode == 2
    assert "36 and 40" in done.stderr
    fetched = [request.path.rpartition("/")[2] for request in loopback_hub.requests if "/resolve/" in request.path]
    assert "config.json" in fetched
    assert not any(name.endswith(".safetensors") for name in fetched)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nobody/nothing",), "the repository does not exist"),
        (("meta-llama/gated",), "gated"),
        ((NAME, "--revision", "missing"), "no such revision"),
        (("bad//name",), "neither an existing folder"),
        (("bad name",), "nor a valid Hub id"),
    ],
)
def test_a_model_that_cannot_be_fetched_is_one_sentence(slicecli, loopback_hub, words, message):
    done = slicecli("inspect", *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert loopback_hub.token not in done.stderr


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        (
            "adapter_config.json",
            b'{"base_model_name_or_path": "meta-llama/base"}',
            "changes to another model, meta-llama/base",
        ),
        ("model-Q4_K_M.gguf", b"GGUF", "its 'model-Q4_K_M.gguf' is in the format of llama.cpp"),
    ],
)
@pytest.mark.parametrize("command", ["inspect", "estimate"])
def test_a_repository_without_a_model_of_transformers_says_what_it_is(
    slicecli, loopback_hub, command, file, content, says
):
    loopback_hub.upload("me/other", {file: content, "README.md": b"# Mine\n"})
    done = slicecli(command, "me/other")
    assert done.returncode == 1
    assert says in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_quantised_model_of_the_hub_is_told_by_a_file_beside_its_config(slicecli, loopback_hub, checkpoints):
    files = {path.name: path.read_bytes() for path in checkpoints().iterdir()}
    loopback_hub.upload("me/gptq", {**files, "quantize_config.json": b'{"bits": 4}'})
    for command in ("inspect", "estimate"):
        assert "quantised (GPTQ" in slicecli(command, "me/gptq").stderr


@pytest.mark.parametrize("token", ["hf_one\nhf_two", "hf_é"])
def test_a_token_that_cannot_be_sent_is_no_broken_connection(loopback_hub, isolated_hub_cache, commit, token):
    code = (
        "import sys, time\n"
        "from slicecli.errors import SlicecliError\n"
        "from slicecli.hub.search import find_slices\n"
        "from slicecli.checkpoint.source import Source\n"
        "from slicecli.data.text import read_text\n"
        "time.sleep = lambda _: print('waits')\n"
        "for call in (lambda: Source.find(sys.argv[1], token=sys.argv[2]), lambda: find_slices(token=sys.argv[2]),\n"
        "             lambda: read_text('me/text', 'calibration', sys.argv[2])):\n"
        "    try: call()\n"
        "    except SlicecliError as error: print(error)\n"
    )
    done = run_program("-c", code, NAME, token, env=loopback_hub.environment(isolated_hub_cache))
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all("the token contains an invalid character" in line for line in lines)
    assert "hf_" not in done.stdout
