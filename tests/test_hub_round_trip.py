"""From a dense model on the Hub to a slice on the Hub that loads where this program is not installed."""

from __future__ import annotations

import json

import pytest
from programs import run_command, run_program

from slicecli.family.serving import SliceKind, verdicts_on

NAME = "meta-llama/Meta-Llama-3-8B-Instruct"
CARD = b"---\nlicense: llama3\nlanguage:\n- en\npipeline_tag: text-generation\n---\n\n# A model\n"
# a program of somebody who has transformers and not slicecli
LOAD = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "slicecli" or name.startswith("slicecli_"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

name, trust = sys.argv[1], sys.argv[2] == "trust"
model = AutoModelForCausalLM.from_pretrained(name, dtype="auto", trust_remote_code=trust)
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust)
ids = tokenizer("one two three", return_tensors="pt")["input_ids"]
out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, pad_token_id=0)
assert not any(module.partition(".")[0] == "slicecli" for module in sys.modules)
print(type(model).__name__, out[0].tolist())
"""


@pytest.mark.parametrize(
    ("method", "class_name"),
    [("refit", "LlamaForCausalLM"), ("slicegpt", "SlicedForCausalLM")],
    ids=["stock", "custom"],
)
def test_a_slice_goes_to_the_hub_and_comes_back_without_this_program(
    loopback_hub, checkpoints, slice_words, tmp_path, method, class_name
):
    loopback_hub.upload(NAME, checkpoints("llama-3"))
    commit = loopback_hub.upload(NAME, {"README.md": CARD})
    done = run_command(
        "slice", NAME, "--dim", "36", "--method", method, "--push", "me/slice", "--private",
        "--format", "json", *slice_words, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    folder = tmp_path / report["output"]
    assert report["published"]["repository"] == "me/slice"

    # what is there is what is here
    there = loopback_hub.files("me/slice")
    here = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    assert there.keys() - {".gitattributes"} == here.keys()
    assert all(there[name] == path.read_bytes() for name, path in here.items())
    assert loopback_hub.repository("me/slice").private

    # the card leads back to the model and says how to load this very slice
    record, card = json.loads(there["slicecli.json"]), there["README.md"].decode()
    content = record["source"].pop("content")
    assert len(content) == 64
    assert record["source"] == {"model": NAME, "revision": None, "commit": commit, "model_type": "llama"}
    for line in (
        f"base_model: {NAME}",
        "license: llama3",
        "base_model_relation: finetune",
        "library_name: transformers",
    ):
        assert f"\n{line}\n" in card
    assert 'from_pretrained("me/slice"' in card
    assert ("trust_remote_code=True" in card) == (method == "slicegpt")
    verdicts = verdicts_on(SliceKind.of_record(record))
    assert ("llama-cli -m slice.gguf" in card) == (verdicts["llama.cpp"].verdict == "correct") == (method == "refit")

    # it generates where slicecli is not, and writes the same as the folder
    trust = "trust" if method == "slicegpt" else "no"
    from_hub = run_program("-c", LOAD, "me/slice", trust)
    assert from_hub.returncode == 0, from_hub.stderr
    assert from_hub.stdout.split()[0] == class_name
    from_folder = run_program("-c", LOAD, folder, trust)
    assert from_hub.stdout == from_folder.stdout

    # and with slicecli, without trusting anything
    code = "import slicecli; model, tokenizer = slicecli.load('me/slice'); print(type(model).__module__)"
    loaded = run_program("-c", code)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("transformers." if method == "refit" else "slicecli.modeling.")


def test_a_slice_of_a_slice_remembers_both(loopback_hub, checkpoints, slice_words, run, tmp_path):
    loopback_hub.upload(NAME, checkpoints("llama-3"))
    first = run_command("slice", NAME, "--dim", "40", "--push", "me/first", *slice_words, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    done = run_command("slice", "me/first", "--dim", "32", *slice_words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "first-dim32"
    record = json.loads((folder / "slicecli.json").read_text())
    assert record["source"]["model"] == "me/first"
    assert record["hidden_size"] == 40
    (before,) = record["ancestry"]
    assert (before["model"], before["hidden_size"], before["dim"]) == (NAME, 48, 40)
    card = (folder / "README.md").read_text()
    assert "base_model: me/first\n" in card
    assert f"`{NAME}` (48 to 40" in card
    assert run("verify", folder).exit_code == 0
    # a third one, of a folder this time: the base model on the Hub is still found
    assert run("slice", folder, "--dim", "24", "-o", tmp_path / "third", *slice_words).exit_code == 0
    third = json.loads((tmp_path / "third" / "slicecli.json").read_text())
    assert [one["dim"] for one in third["ancestry"]] == [32, 40]
    assert "base_model: me/first\n" in (tmp_path / "third" / "README.md").read_text()


def test_published_slices_are_found_by_their_base_model(loopback_hub):
    def card(*lines):
        return {"README.md": "\n".join(["---", *lines, "---", "", "# A model"]).encode()}

    loopback_hub.upload("me/slice", card(f"base_model: {NAME}", "tags:", "- slicecli", "- sliced"))
    loopback_hub.upload("me/other-slice", card("base_model: owner/other", "tags:", "- slicecli"))
    loopback_hub.upload("me/no-slice", card(f"base_model: {NAME}"))

    def search(*words):
        done = run_command("search", *words, "--format", "json")
        assert done.returncode == 0, done.stderr
        return {one["repository"]: one["base_model"] for one in json.loads(done.stdout)}

    assert search() == {"me/slice": NAME, "me/other-slice": "owner/other"}
    assert search("--base-model", NAME) == {"me/slice": NAME}
    assert search("other") == {"me/other-slice": "owner/other"}
    assert search("nothing") == {}
