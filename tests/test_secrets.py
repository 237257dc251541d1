"""Nothing of the machine or its user gets out: not into records, cards, commits, nor onto the screen."""

from __future__ import annotations

import json
import shutil
import tempfile

import pytest
from programs import run_command

from slicecli.testing.loopback_hub import LoopbackHub

NAME = "owner/model"
USER = "plantedusername"


@pytest.fixture(scope="module")
def traces(checkpoints, text_file, tmp_path_factory):
    """What commands that work and commands that fail print, write and publish; and the secrets of their user."""
    root = tmp_path_factory.mktemp("machine")
    home, scratch, work = root / "home" / USER, root / "scratch", root / "home" / USER / "work"
    for folder in (work, scratch):
        folder.mkdir(parents=True)
    model, text = home / "models" / "tiny", home / "models" / "text.jsonl"
    shutil.copytree(checkpoints("llama-3"), model)
    shutil.copyfile(text_file, text)
    quick = ["--calibration", text, "--samples", "8", "--seq-len", "32"]
    measure = ["--perplexity", text, "--limit", "4", "--seq-len", "32"]
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        hub.upload(NAME, checkpoints("llama-3"))
        token = hub.add_user("somebody")
        patch.setattr(tempfile, "tempdir", str(scratch))
        environment = hub.environment(home / "cache", token=token)
        environment |= {"HOME": str(home), "USER": USER, "LOGNAME": USER, "TMPDIR": str(scratch)}
        printed = []

        def call(*words, code=0):
            done = run_command(*words, cwd=work, env=environment)
            assert done.returncode == code, done.stderr
            printed.append(done.stdout + done.stderr)

        call("slice", model, "--dim", "36", "-o", "one", "--push", "somebody/one", "--token", token, *quick)
        call("slice", NAME, "--dim", "36", "--method", "slicegpt", "-o", "two", *quick)
        call("eval", "one", "--baseline", model, "--record", "-o", "eval.json", *measure)
        call("card", "one")
        call("push", "one", "somebody/one", "--dry-run")
        call("push", "one", "somebody/one", "--format", "json")
        call("verify", "one")
        call("verify", "somebody/one", "--format", "json")
        call("inspect", "somebody/one")
        call("estimate", "one", "--dim", "24", "--format", "json")
        call("slice", NAME, "--dim", "48", *quick, code=2)
        call("slice", NAME, "--dim", "36", "-o", "one", *quick, code=1)
        call("inspect", "owner/nothing", "--token", token, code=1)
        call("push", "one", "other/one", "--token", "hf_" + "x" * 34, code=1)
        (work / "one" / "model.safetensors").write_bytes(b"damaged")
        call("eval", "one", *measure, code=1)
        call("verify", "one", code=1)
        call("push", "one", "somebody/one", code=1)
        commits = [[commit.message, commit.description] for commit in hub.repository("somebody/one").commits]
        return {
            "screen": [text.encode() for text in printed],
            "files": [path.read_bytes() for path in work.rglob("*") if path.is_file()],
            "names": [str(path.relative_to(work)).encode() for path in work.rglob("*")],
            "commits": [json.dumps(commits).encode()],
            "published": list(hub.files("somebody/one").values()),
        }, [secret.encode() for secret in (token, USER, str(home), str(root))]


@pytest.mark.parametrize("place", ["screen", "files", "names", "commits", "published"])
def test_neither_token_nor_name_nor_place_gets_out(traces, place):
    found, secrets = traces
    assert found[place]
    for content in found[place]:
        assert not [secret for secret in secrets if secret in content], content[:2000]


def test_nothing_unfinished_stays(traces):
    found, _ = traces
    assert not [name for name in found["names"] if b".incomplete" in name]
