"""Models by Hub id, with the real client against a Hub on this machine."""

from __future__ import annotations

import json

import pytest

from slicecli.checkpoint import file_digest

NAME = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.fixture
def commit(loopback_hub, checkpoints):
    """The commit of a model on the Hub, beside which there is a gated one."""
    loopback_hub.create("meta-llama/gated", gated=True)
    loopback_hub.upload("meta-llama/gated", {"config.json": b"{}"})
    return loopback_hub.upload(NAME, checkpoints("llama-3"))


@pytest.fixture
def slicecli(loopback_hub, isolated_hub_cache, commit, forks, tmp_path):
    def call(*words, **more):
        environment = {**loopback_hub.environment(isolated_hub_cache), **more}
        return forks.run("-m", "slicecli", *words, env=environment, cwd=tmp_path)

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


def test_an_illegal_dim_is_refused_before_weights_are_downloaded(slicecli, loopback_hub, slice_words):
    done = slicecli("slice", NAME, "--dim", "37", *slice_words)
    assert done.returncode == 2
    assert "36 and 40" in done.stderr
    fetched = [request.path.rpartition("/")[2] for request in loopback_hub.requests if "/resolve/" in request.path]
    assert "config.json" in fetched
    assert not any(name.endswith(".safetensors") for name in fetched)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("nobody/nothing",), "no such repository"),
        (("meta-llama/gated",), "gated"),
        ((NAME, "--revision", "missing"), "no such revision"),
        (("bad//name",), "no folder"),
        (("bad name",), "not a valid Hub id"),
    ],
)
def test_a_model_that_cannot_be_fetched_is_one_sentence(slicecli, loopback_hub, words, message):
    done = slicecli("inspect", *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert loopback_hub.token not in done.stderr
