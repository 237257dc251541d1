"""Models by Hub id, with the real client against a Hub on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from loopback import COMMIT, loopback_hub

from slicecli.checkpoint import file_digest

NAME = "meta-llama/Meta-Llama-3-8B-Instruct"


@pytest.fixture
def hub(checkpoints):
    with loopback_hub({NAME: checkpoints("llama-3")}, gated=("meta-llama/gated",)) as server:
        yield server


@pytest.fixture
def slicecli(hub, tmp_path):
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}",
        "HF_HOME": str(tmp_path / "cache"),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": "hf_dummy",
        "NO_PROXY": "127.0.0.1",
    }
    environment.pop("HF_HUB_OFFLINE", None)

    def call(*words, **more):
        command = [sys.executable, "-m", "slicecli", *map(str, words)]
        return subprocess.run(
            command, env={**environment, **more}, cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return call


def test_a_hub_model_is_sliced_and_its_commit_recorded(slicecli, hub, run, checkpoints, slice_words, tmp_path):
    done = slicecli("slice", NAME, "--dim", "36", "--format", "json", *slice_words)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["model"], report["revision"]) == (NAME, COMMIT)
    output = tmp_path / "Meta-Llama-3-8B-Instruct-dim36"
    record = json.loads((output / "slicecli.json").read_text())
    assert record["source"]["commit"] == COMMIT
    card = (output / "README.md").read_text()
    assert f"base_model: {NAME}" in card
    assert f"slicecli slice {NAME} --dim 36 --revision {COMMIT}" in card
    # the same weights as from the folder itself
    assert run("slice", checkpoints("llama-3"), "--dim", "36", "-o", tmp_path / "local", *slice_words).exit_code == 0
    assert file_digest(output / "model.safetensors") == file_digest(tmp_path / "local" / "model.safetensors")
    # and once more without the network
    again = slicecli("slice", NAME, "--dim", "24", *slice_words, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr


def test_an_illegal_dim_is_refused_before_weights_are_downloaded(slicecli, hub, slice_words):
    done = slicecli("slice", NAME, "--dim", "37", *slice_words)
    assert done.returncode == 2
    assert "36 and 40" in done.stderr
    assert hub.requests
    assert not any("safetensors" in request and "index" not in request for request in hub.requests)


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
def test_a_model_that_cannot_be_fetched_is_one_sentence(slicecli, words, message):
    done = slicecli("inspect", *words)
    assert done.returncode == 1
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert "hf_dummy" not in done.stderr
