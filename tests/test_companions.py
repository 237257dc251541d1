"""What goes along with a slice, what stays behind and is named, and that the tokenizer is the model's."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from programs import run_command, run_program

from slicecli.checkpoint import companions
from slicecli.checkpoint.companions import MOST_FILE_BYTES, MOST_FILES, MOST_KNOWN_BYTES, choose_companions
from slicecli.errors import SourceError
from slicecli.hub.card import CARD_FILE, PLOT_FILE
from slicecli.modeling import CODE_FILES

pytestmark = pytest.mark.slow

NAME = "somebody/model"
TEMPLATE = "additional_chat_templates/tool_use.jinja"
# a tokenizer of a class and a vocabulary of its own, which joins the words of the vocabulary
TOKENIZER = """
from pathlib import Path
from transformers import PreTrainedTokenizerFast
from .words_mine import split

class MineTokenizer(PreTrainedTokenizerFast):
    vocab_files_names = {"tokenizer_file": "tokenizer.json", "mine_file": "VOCABULARY"}

    def __init__(self, *arguments, mine_file=None, **named):
        self.words = split(Path(mine_file).read_text()) if mine_file or NEEDED else []
        super().__init__(*arguments, **named)

    def joined(self, text):
        if isinstance(text, list):
            return [self.joined(one) for one in text]
        for word in self.words:
            text = text.replace(word, "~")
        return text

    def _encode_plus(self, text, *arguments, **named):
        return super()._encode_plus(self.joined(text), *arguments, **named)
"""


def files_in(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def put(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content)


def with_own_tokenizer(folder, vocabulary="mine.tiktoken", needed=True):
    """Give a model a tokenizer whose class is in its folder, where the config of the model names no code."""
    code = TOKENIZER.replace("VOCABULARY", vocabulary).replace("NEEDED", str(needed))
    words = "def split(text):\n    return text.split()\n"
    put(folder, {"tokenization_mine.py": code, "words_mine.py": words, vocabulary: "quick lazy\n"})
    path = folder / "tokenizer_config.json"
    fields = json.loads(path.read_text()) | {"tokenizer_class": "MineTokenizer"}
    fields["auto_map"] = {"AutoTokenizer": ["tokenization_mine.MineTokenizer", None]}
    path.write_text(json.dumps(fields))
    return folder


def left_out(record):
    return {one["reason"]: one["files"] for one in record["left_out"]}


@pytest.fixture
def sliced(run, slice_words, tmp_path):
    """Slice a model, and return the folder and the report."""

    def call(model, *words):
        done = run("slice", model, "--dim", "36", "-o", tmp_path / "out", "--format", "json", *slice_words, *words)
        assert done.exit_code == 0, done.output
        return tmp_path / "out", json.loads(done.stdout)

    return call


@pytest.fixture
def refused(run, slice_words, tmp_path):
    """Slice a model that must be refused before any pass, and return the sentence."""

    def call(model, *words):
        for path in model.glob("*.safetensors"):
            path.unlink()  # which nobody has looked for
        done = run("slice", model, "--dim", "36", "-o", tmp_path / "outputs" / "out", *slice_words, *words)
        assert done.exit_code == 1, done.output
        assert not (tmp_path / "outputs").exists() or os.listdir(tmp_path / "outputs") == []
        sentence = done.stderr.strip().splitlines()[-1]
        assert sentence.startswith("Error: ")
        return sentence

    return call


# which files


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("tokenizer.model", None),
        ("tokenizer.bin", None),  # of a known name
        ("mine.tiktoken", None),
        ("tekken.json", None),
        (TEMPLATE, None),
        ("custom_generate/generate.py", "code, copied only with --trust-remote-code"),
        ("tokenization_mine.py", "code, copied only with --trust-remote-code"),
        ("LICENSE", None),
        ("README.pt.md", None),
        ("eval_results.json", None),
        ("adapter_model.safetensors", "other weights"),
        ("pytorch_model-00001-of-00002.bin", "other weights"),
        ("pytorch_model.bin.index.json", "other weights"),
        ("tf_model.h5", "other weights"),
        ("flax_model.msgpack", "other weights"),
        ("model-Q4_K_M.gguf", "other weights"),
        ("model.onnx", "other weights"),
        ("model.onnx.data", "other weights"),
        ("optimizer.pt", "training state"),
        ("trainer_state.json", "training state"),
        ("training_args.bin", "training state"),
        ("params.json", "sizes of the dense weights"),
        ("hf_quant_config.json", "sizes of the dense weights"),
        ("library.so", "programs"),
        ("run.sh", "programs"),
        ("of two\nlines.txt", "a name that a record cannot hold"),
        ("C:drive.txt", "a name that a record cannot hold"),
        ("/etc/passwd", "a name that a record cannot hold"),
        ("n" * 256, "a name that a record cannot hold"),
    ],
)
def test_a_file_goes_along_or_is_named(file, reason):
    found = choose_companions({file: 10}, NAME, trusts_code=False)
    assert found.files == (() if reason else (file,))
    assert [(one.reason, one.files) for one in found.left_out] == ([(reason, (file,))] if reason else [])


@pytest.mark.parametrize(
    "file",
    [
        ".gitattributes", ".git/config", "../x", "a/../../x", "config.json", CARD_FILE, "readme.md", "slicecli.json",
        "model.safetensors", "model-00001-of-00002.safetensors", "model.safetensors.index.json", PLOT_FILE,
        *(path.name for path in CODE_FILES),
    ],
)  # fmt: skip
def test_what_is_hidden_or_written_anew_is_not_spoken_of(file):
    found = choose_companions({file: 10}, NAME, trusts_code=True)
    assert (found.files, found.left_out) == ((), ())


@pytest.mark.parametrize(
    ("folder", "files"),
    [
        ("onnx", ["config.json", "model.onnx"]),
        ("original", ["params.json", "tokenizer.model"]),
        ("checkpoint-500", ["tokenizer.json", "trainer_state.json"]),
        ("int4", ["deep/model.safetensors", "tokenizer.json"]),
        ("1_Pooling", ["config.json"]),
    ],
)
def test_another_checkpoint_stays_behind_as_a_folder(folder, files):
    sizes = {f"{folder}/{file}": 10 for file in files} | {"note.txt": 10, f"{folder}.txt": 10}
    found = choose_companions(sizes, NAME, trusts_code=True)
    assert set(found.files) == {f"{folder}.txt", "note.txt"}
    assert [one.files for one in found.left_out] == [(f"{folder}/",)]


def test_code_goes_along_where_it_is_trusted():
    sizes = {"tokenization_mine.py": 10, "custom_generate/generate.py": 10, "compiled.so": 10}
    found = choose_companions(sizes, NAME, trusts_code=True)
    assert found.files == ("custom_generate/generate.py", "tokenization_mine.py")
    assert [one.files for one in found.left_out] == [("compiled.so",)]


def test_large_files_stay_behind_and_the_small_come_first():
    sizes = {"large": MOST_FILE_BYTES + 1, "a": 90_000_000, "b": 80_000_000, "c": 70_000_000, "d/small": 1}
    found = choose_companions(sizes, NAME, trusts_code=False)
    assert found.files == ("b", "c", "d/small")
    assert {file for one in found.left_out for file in one.files} == sizes.keys() - set(found.files)
    many = choose_companions({f"{number:05}.txt": 1 for number in range(MOST_FILES + 5)}, NAME, trusts_code=False)
    assert len(many.files) == MOST_FILES
    assert sum(len(one.files) for one in many.left_out) == 5
    assert many.left_out[0].to_json()["count"] == 5


def test_a_tokenizer_larger_than_any_is_refused():
    assert choose_companions({"tokenizer.json": MOST_KNOWN_BYTES}, NAME, trusts_code=False).files
    with pytest.raises(SourceError, match=r"tokenizer\.json of somebody/model has"):
        choose_companions({"tokenizer.json": MOST_KNOWN_BYTES + 1}, NAME, trusts_code=False)


# in folders


def test_everything_small_goes_along_and_the_rest_is_named(checkpoint_copy, sliced, run):
    taken = {TEMPLATE: "{{ tools }}", "mine.tiktoken": "abc 1", "docs/deep/note.md": "Note.", "eval_results.json": "{}"}
    others = {"optimizer.pt": "x", "onnx/model.onnx": "x", "old.gguf": "x", "handler.py": "x", ".hidden": "x"}
    put(checkpoint_copy, taken | others)
    folder, report = sliced(checkpoint_copy)
    for name, content in taken.items():
        assert (folder / name).read_text() == content
    assert not files_in(folder) & (others.keys() - {"onnx/model.onnx"})
    assert not (folder / "onnx").exists()
    record = json.loads((folder / "slicecli.json").read_text())
    assert taken.keys() <= record["files"].keys()
    assert report["left_out"] == record["left_out"]
    assert left_out(record) == {
        "another checkpoint": ["onnx/"],
        "code, copied only with --trust-remote-code": ["handler.py"],
        "other weights": ["old.gguf"],
        "training state": ["optimizer.pt"],
    }
    assert run("verify", folder).exit_code == 0
    for name in taken:
        lost = shutil.copytree(folder, folder.with_name("lost"))
        (lost / name).unlink()
        done = run("verify", lost)
        assert done.exit_code == 1
        assert f"files: {name} is missing" in done.stdout
        shutil.rmtree(lost)


def test_what_stays_behind_is_said(checkpoint_copy, run, slice_words, tmp_path):
    put(checkpoint_copy, {"a.gguf": "x", "b.gguf": "x", "c.gguf": "x", "d.gguf": "x"})
    done = run("slice", checkpoint_copy, "--dim", "36", "-o", tmp_path / "out", "--dry-run", *slice_words)
    assert done.exit_code == 0, done.output
    assert "Not copied: a.gguf, b.gguf, c.gguf and 1 more (other weights)" in done.stderr
    assert not (tmp_path / "out").exists()


def test_what_must_not_be_published_stays_behind(checkpoint_copy, sliced, run):
    token = "hf_" + "Planted" * 5
    put(
        checkpoint_copy,
        {"notes.txt": f"mine is {token}", "train.yaml": "data: /home/somebody/data.jsonl", "a.txt": "a"},
    )
    folder, report = sliced(checkpoint_copy)
    assert "a.txt" in files_in(folder)
    assert left_out(report) == {"containing tokens or local paths": ["notes.txt", "train.yaml"]}
    assert run("verify", folder).exit_code == 0


@pytest.mark.parametrize(
    "place",
    [TEMPLATE, "mine.tiktoken", "additional_chat_templates", "docs/deep"],
    ids=lambda place: place.rpartition("/")[2],
)
def test_nothing_is_taken_over_from_outside_of_the_model(checkpoint_copy, refused, tmp_path, place):
    outside = tmp_path / "outside"
    put(outside, {"secret.jinja": "secret"})
    (checkpoint_copy / place).parent.mkdir(exist_ok=True)
    (checkpoint_copy / place).symlink_to(outside / "secret.jinja" if "." in place else outside)
    assert f"{place} of copy links to something outside" in refused(checkpoint_copy)


def test_what_is_no_regular_file_is_refused(checkpoint_copy, refused):
    (checkpoint_copy / "docs").mkdir()
    os.mkfifo(checkpoint_copy / "docs" / "pipe")
    assert "docs/pipe of copy is not a regular file" in refused(checkpoint_copy)


def test_links_within_the_model(checkpoint_copy, sliced):
    put(checkpoint_copy, {"docs/note.txt": "Note."})
    (checkpoint_copy / "other.txt").symlink_to("docs/note.txt")
    (checkpoint_copy / "again").symlink_to("docs")
    (checkpoint_copy / "docs" / "up").symlink_to("..")
    folder, report = sliced(checkpoint_copy)
    assert (folder / "other.txt").read_text() == "Note."
    assert not (folder / "other.txt").is_symlink()
    assert left_out(report) == {"links to folders": ["again/*", "docs/up/*"]}


# tokenizers


@pytest.mark.parametrize("method", ["refit", "slicegpt"])
def test_a_tokenizer_with_code_and_a_vocabulary_of_its_own(checkpoint_copy, sliced, run, tmp_path, method):
    model = with_own_tokenizer(checkpoint_copy)
    folder, _ = sliced(model, "--trust-remote-code", "--method", method)
    assert {"tokenization_mine.py", "words_mine.py", "mine.tiktoken"} <= files_in(folder)
    record = json.loads((folder / "slicecli.json").read_text())
    assert record["needs_remote_code"]
    assert "--trust-remote-code" in record["command"]
    assert "trust_remote_code=True" in (folder / "README.md").read_text()
    assert run("verify", folder).exit_code == 0
    stranger = Path(shutil.copytree(folder, tmp_path / "stranger"))
    text = (stranger / "tokenizer_config.json").read_text()
    (stranger / "tokenizer_config.json").write_text(text.replace("tokenization_mine.", "you/x--tokenization_mine."))
    done = run("verify", stranger)
    assert "tokenizer_config.json loads code from another repository: you/x--tokenization_mine" in done.stdout
    # where slicecli is not, and the model neither
    model.rename(tmp_path / "gone")
    code = (
        "import sys; sys.modules['slicecli'] = None\n"
        "from transformers import AutoTokenizer\n"
        "for folder in sys.argv[1:]:\n"
        "    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)\n"
        "    print(type(tokenizer).__name__, tokenizer('the quick fox')['input_ids'])"
    )
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = run_program("-c", code, folder, tmp_path / "gone", env=environment)
    assert done.returncode == 0, done.stderr
    ours, theirs = done.stdout.splitlines()
    assert ours == theirs
    assert ours.startswith("MineTokenizer")


@pytest.mark.parametrize("command", ["slice", "eval"])
def test_a_tokenizer_that_needs_code_is_not_replaced_by_another(
    checkpoint_copy, run, slice_words, text_file, tmp_path, command
):
    model = with_own_tokenizer(checkpoint_copy)
    words = {
        "slice": ["--dim", "36", "-o", tmp_path / "out", *slice_words],
        "eval": ["--perplexity", text_file, "--seq-len", "32"],
    }
    done = run(command, model, *words[command])
    assert done.exit_code == 1
    assert "runs its own code ('tokenization_mine.MineTokenizer'), which is not trusted" in done.stderr
    assert "--trust-remote-code" in done.stderr
    assert not (tmp_path / "out").exists()


def test_code_that_names_a_class_of_transformers_is_not_needed(checkpoint_copy, sliced, run):
    path = checkpoint_copy / "tokenizer_config.json"
    changes = {"auto_map": {"AutoTokenizer": ["tokenization_gpt2.GPT2Tokenizer", None]}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    folder, _ = sliced(checkpoint_copy)
    assert not json.loads((folder / "slicecli.json").read_text())["needs_remote_code"]
    assert run("verify", folder).exit_code == 0


@pytest.mark.parametrize(
    ("needed", "problem"), [(True, "cannot be loaded from a slice"), (False, "the tokens of 'The quick brown fox")]
)
def test_a_tokenizer_that_would_be_another_in_the_slice_is_refused(checkpoint_copy, refused, needed, problem):
    model = with_own_tokenizer(checkpoint_copy, "words.pkl", needed)
    sentence = refused(model, "--trust-remote-code")
    assert problem in sentence
    assert "These files are not copied: words.pkl (other weights)" in sentence


def test_a_chat_template_that_does_not_go_along_is_noticed(checkpoint_copy, refused):
    put(checkpoint_copy, {"templates/tool_use.jinja": "{{ tools }}"})
    (checkpoint_copy / "additional_chat_templates").symlink_to("templates")
    assert "its chat templates would differ" in refused(checkpoint_copy)


def test_a_chat_template_that_draws_or_fails_is_compared_too(checkpoint_copy, sliced):
    put(
        checkpoint_copy,
        {
            "additional_chat_templates/fails.jinja": "{{ raise_exception('never') }}",
            "additional_chat_templates/draws.jinja": "{{ range(1000000) | random }}",
            "additional_chat_templates/broken.jinja": "{% if %}",
        },
    )
    folder, _ = sliced(checkpoint_copy)
    assert sum(name.startswith("additional_chat_templates/") for name in files_in(folder)) == 3


@pytest.mark.parametrize("has_config", [True, False])
def test_a_slice_of_another_type_keeps_the_class_of_its_tokenizer(sliced, run, tmp_path, has_config):
    """What a type alone says of its tokenizer, as GPT-2's does, is said in the folder of a slice with its own type."""
    from slicecli.proof.tiny import random_model, tiny_config
    from slicecli.testing.checkpoints import save_checkpoint

    model = save_checkpoint(random_model(tiny_config("gpt2", has_head_dim=False)), tmp_path / "model")
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    vocabulary["<|endoftext|>"] = vocabulary.pop("</s>")
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    put(model, {"vocab.json": json.dumps(vocabulary), "merges.txt": "#version: 0.2\n"})
    if has_config:
        put(model, {"tokenizer_config.json": '{"model_max_length": 64}'})
    folder, _ = sliced(model)
    assert run("verify", folder).exit_code == 0
    fields = json.loads((folder / "tokenizer_config.json").read_text())
    assert fields == {"tokenizer_class": "GPT2Tokenizer"} | ({"model_max_length": 64} if has_config else {})
    code = (
        "import sys; from transformers import AutoTokenizer\n"
        "both = [AutoTokenizer.from_pretrained(folder, trust_remote_code=True) for folder in sys.argv[1:]]\n"
        "assert both[0].eos_token_id == both[1].eos_token_id is not None\n"
        "assert both[0]('a b')['input_ids'] == both[1]('a b')['input_ids']"
    )
    done = run_program("-c", code, model, folder)
    assert done.returncode == 0, done.stderr


# on the Hub


@pytest.fixture
def hub_model(loopback_hub, checkpoint_copy):
    put(
        checkpoint_copy,
        {
            TEMPLATE: "{{ tools }}",
            "mine.tiktoken": "abc 1",
            "a[1].txt": "a",
            "onnx/config.json": "{}",
            "onnx/model.onnx": "x",
            "model.gguf": "x",
            "large.csv": "x" * 2000,
            "tokenization_mine.py": "x = 1",
            ".eval_results/x.yaml": "x: 1",
        },
    )
    loopback_hub.upload(NAME, checkpoint_copy)
    return NAME


@pytest.fixture
def slicecli(loopback_hub, isolated_hub_cache, monkeypatch, tmp_path):
    monkeypatch.setattr(companions, "MOST_FILE_BYTES", 1000)

    def call(*words, **more):
        environment = {**loopback_hub.environment(isolated_hub_cache), **more}
        return run_command(*words, env=environment, cwd=tmp_path)

    return call


def fetched(hub):
    return {request.path.partition("/resolve/")[2].partition("/")[2] for request in hub.requests} - {""}


def test_a_hub_model_brings_all_that_is_small(hub_model, slicecli, loopback_hub, slice_words, tmp_path):
    done = slicecli("slice", hub_model, "--dim", "36", "-o", "out", "--format", "json", *slice_words)
    assert done.returncode == 0, done.stderr
    there = files_in(tmp_path / "out")
    assert {TEMPLATE, "mine.tiktoken", "a[1].txt", "tokenizer.json", "LICENSE.txt"} <= there
    unwanted = {"onnx/config.json", "onnx/model.onnx", "model.gguf", "large.csv", "tokenization_mine.py"}
    assert not unwanted & (there | fetched(loopback_hub))
    named = {file for files in left_out(json.loads(done.stdout)).values() for file in files}
    assert named == {"onnx/", "model.gguf", "large.csv", "tokenization_mine.py"}
    pushed = slicecli("push", "out", "me/slice")
    assert pushed.returncode == 0, pushed.stderr
    assert loopback_hub.files("me/slice").keys() - {".gitattributes"} == there
    # without the network, and with what the cache has
    again = slicecli("slice", hub_model, "--dim", "36", "-o", "again", *slice_words, HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert files_in(tmp_path / "again") == there
    # the code is fetched where it is trusted, and missed where there is no network
    words = ["slice", hub_model, "--dim", "36", "-o", "trusted", *slice_words, "--trust-remote-code"]
    missing = slicecli(*words, HF_HUB_OFFLINE="1")
    assert missing.returncode == 1
    assert "the cache is incomplete" in missing.stderr
    assert slicecli(*words).returncode == 0
    assert files_in(tmp_path / "trusted") == there | {"tokenization_mine.py"}


def test_without_the_network_what_loading_does_not_read_may_be_missing(
    hub_model, slicecli, isolated_hub_cache, slice_words, tmp_path
):
    words = ["slice", hub_model, "--dim", "36", "--format", "json", *slice_words]
    assert slicecli(*words, "-o", "first").returncode == 0
    (note,) = isolated_hub_cache.rglob("a[[]1].txt")
    note.unlink()
    done = slicecli(*words, "-o", "second", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert left_out(json.loads(done.stdout))["missing from this copy of the model"] == ["a[1].txt"]
    (template,) = isolated_hub_cache.rglob("tool_use.jinja")
    template.unlink()
    done = slicecli(*words, "-o", "third", HF_HUB_OFFLINE="1")
    assert done.returncode == 1
    assert "the cache is incomplete" in done.stderr


def test_an_estimate_fetches_only_what_describes_the_model(hub_model, slicecli, loopback_hub):
    done = slicecli("estimate", hub_model, "--dim", "36")
    assert done.returncode == 0, done.stderr
    assert fetched(loopback_hub) <= {"config.json", "README.md", "slicecli.json"}


def test_a_cache_of_another_program_does_without_a_list(hub_model, slicecli, isolated_hub_cache, slice_words, tmp_path):
    assert slicecli("inspect", hub_model).returncode == 0
    words = ["--dim", "36", *slice_words]
    assert slicecli("slice", hub_model, "-o", "first", *words).returncode == 0
    (trees,) = isolated_hub_cache.rglob("trees")
    shutil.rmtree(trees)
    done = slicecli("slice", hub_model, "-o", "second", *words, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert files_in(tmp_path / "second") == files_in(tmp_path / "first")
