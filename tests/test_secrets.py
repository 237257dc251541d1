"""Nothing of the machine or its user gets out: not into records, cards, commits, nor onto the screen."""

from __future__ import annotations

import json

import pytest

NAME = "owner/model"
USER = "plantedusername"


@pytest.fixture
def machine(loopback_hub, checkpoints, text_file, forks, tmp_path):
    """A user with a telling name, home folder and token, and a model, a text and a working folder in that home."""
    import shutil

    home = tmp_path / "home" / USER
    work = home / "work"
    work.mkdir(parents=True)
    shutil.copytree(checkpoints("llama-3"), home / "models" / "tiny")
    shutil.copyfile(text_file, home / "models" / "text.jsonl")
    loopback_hub.upload(NAME, checkpoints("llama-3"))
    token = loopback_hub.add_user("somebody")
    environment = loopback_hub.environment(home / "cache", token=token)
    environment |= {"HOME": str(home), "USER": USER, "LOGNAME": USER, "TMPDIR": str(tmp_path / "scratch")}
    (tmp_path / "scratch").mkdir()

    def call(*words, code=0):
        done = forks.run("-m", "slicecli", *words, cwd=work, env=environment)
        assert done.returncode == code, done.stderr
        said.append(done.stdout + done.stderr)
        return done

    said: list[str] = []
    return home, work, token, call, said


def test_neither_token_nor_name_nor_place_gets_out(machine, loopback_hub, tmp_path):
    home, work, token, call, said = machine
    quick = ["--calibration", home / "models" / "text.jsonl", "--samples", "8", "--seq-len", "32"]
    measure = ["--perplexity", home / "models" / "text.jsonl", "--limit", "4", "--seq-len", "32"]
    call(
        "slice",
        home / "models" / "tiny",
        "--dim",
        "36",
        "-o",
        "one",
        "--push",
        "somebody/one",
        "--token",
        token,
        *quick,
    )
    call("slice", NAME, "--dim", "36", "--method", "slicegpt", "-o", "two", *quick)
    call("eval", "one", "--baseline", home / "models" / "tiny", "--record", "-o", "eval.json", *measure)
    call("card", "one")
    call("push", "one", "somebody/one", "--dry-run")
    call("push", "one", "somebody/one", "--format", "json")
    call("verify", "one")
    call("verify", "somebody/one", "--format", "json")
    call("inspect", "somebody/one")
    call("estimate", "one", "--dim", "24", "--format", "json")
    # and where it fails
    call("slice", NAME, "--dim", "37", *quick, code=2)
    call("slice", NAME, "--dim", "36", "-o", "one", *quick, code=1)
    call("inspect", "owner/nothing", "--token", token, code=1)
    call("push", "one", "other/one", "--token", "hf_" + "x" * 34, code=1)
    (work / "one" / "model.safetensors").write_bytes(b"damaged")
    call("eval", "one", *measure, code=1)
    call("verify", "one", code=1)
    call("push", "one", "somebody/one", code=1)

    secrets = (token, USER, str(home), str(tmp_path))
    for text in said:
        for secret in secrets:
            assert secret not in text, text
    for path in work.rglob("*"):
        assert not any(part.startswith(".") and part.endswith(".incomplete") for part in path.parts), path
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in secrets), path
    for commit in loopback_hub.repository("somebody/one").commits:
        assert not any(secret in json.dumps([commit.message, commit.description]) for secret in secrets)
    for content in loopback_hub.files("somebody/one").values():
        assert not any(secret.encode() in content for secret in secrets)
