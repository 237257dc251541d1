"""The record's schema, the checks of `slicecli verify`, and what must never be published."""

from __future__ import annotations

import copy
import functools
import json
import operator
import shutil
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slicecli.checkpoint.folder import file_digest
from slicecli.hub.inspection import inspect_folder
from slicecli.hub.verify import CHECKS, verify_contents, verify_folder
from slicecli.record.json_schema import record_schema
from slicecli.record.schema import RefitRecord, schema_errors
from slicecli.runtime.secrets import find_secrets, find_tokens
from slicecli.runtime.versions import __version__

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
TOKEN = "hf_" + "PlantedInATest" + "0" * 20
KINDS = {
    "stock": ("llama", []),
    "fewer channels": ("llama", ["--mlp-dim", "61"]),
    "sharded": ("llama", ["--max-shard-size", "60KB"]),
    "published": ("llama", ["--method", "slicegpt"]),
    "schedule": ("llama", ["--method", "slicegpt", "--schedule", "linear:0.1:0.4", "--slice-head"]),
    "gpt2": ("gpt2", []),
    "opt": ("opt", ["--method", "slicegpt"]),
}


@pytest.fixture(scope="session")
def slices(checkpoints, text_file, tmp_path_factory):
    """A function that gives a slice of a kind, made once by the command line; the stock one was measured."""
    from click.testing import CliRunner

    from slicecli.cli import group
    from slicecli.proof.tiny import random_model, tiny_config
    from slicecli.testing.checkpoints import save_checkpoint

    folder = tmp_path_factory.mktemp("verified")

    def run(*words):
        done = CliRunner().invoke(group, [str(word) for word in words])
        assert done.exit_code == 0, done.output

    @functools.cache
    def make(kind):
        family, words = KINDS[kind]
        if family == "llama":
            model = checkpoints("llama-3")
        else:
            model = save_checkpoint(random_model(tiny_config(family, has_head_dim=False)), folder / f"tiny-{family}")
        output = folder / kind
        rows = ["--samples", "24", "--seq-len", "32"]
        width = [] if "--schedule" in words else ["--dim", "36"]
        run("slice", model, *width, "--calibration", text_file, *rows, "-o", output, *words)
        if kind == "stock":
            measured = ["--perplexity", text_file, "--tasks", "demo", "--limit", "8", "--seq-len", "32"]
            run("eval", output, "--baseline", model, "--record", *measured)
        return output

    return make


@pytest.fixture
def stock(slices, tmp_path):
    """A measured stock slice that a test may damage."""
    return shutil.copytree(slices("stock"), tmp_path / "slice")


@pytest.fixture(scope="session")
def record(slices):
    return json.loads((slices("stock") / "slicecli.json").read_text())


def errors(folder):
    return [(one.check, one.text) for one in verify_folder(folder) if one.is_error]


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_record(change):
    return lambda folder: edit_json(folder / "slicecli.json", change)


def edit_card(old, new):
    def change(folder):
        path = folder / "README.md"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    return change


def edit_recorded(name, change):
    """Change a JSON file, and its hash in the record too."""

    def both(folder):
        edit_json(folder / name, change)
        digest = file_digest(folder / name)
        edit_json(folder / "slicecli.json", lambda record: record["files"].update({name: digest}))

    return both


def flip_byte(name):
    def flip(folder):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)

    return flip


# fresh slices


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_differs_in_a_fresh_slice(slices, run, kind):
    assert verify_folder(slices(kind)) == []
    done = run("verify", slices(kind))
    assert done.exit_code == 0
    files = sum(1 for path in slices(kind).rglob("*") if path.is_file())
    line = f"{kind}: {files} files, record, files, counts, config, card and secrets: nothing differs."
    assert done.stdout.splitlines() == [line]


def test_buffers_in_the_weight_files_are_no_parameters(slices, tmp_path):
    """Some families keep buffers beside the parameters; nothing else may be more than is recorded."""
    import safetensors.numpy

    for name, is_wrong in (("model.layers.0.mlp.act_fn.beta", False), ("model.layers.0.mlp.more.weight", True)):
        folder = shutil.copytree(slices("stock"), tmp_path / name)
        path = folder / "model.safetensors"
        tensors = safetensors.numpy.load_file(path)
        safetensors.numpy.save_file({**tensors, name: tensors["model.norm.weight"][:2]}, path, {"format": "pt"})
        edit_json(
            folder / "slicecli.json", lambda record, path=path: record["weights"].update({path.name: file_digest(path)})
        )
        (found,) = (one for one in verify_folder(folder) if one.check == "counts")
        assert found.is_error == is_wrong
        assert "2 numbers besides" in found.text or is_wrong


# damage


def _results(record):
    return record["results"]["perplexity"]["nonsense.jsonl"]


DAMAGES = {
    "no record": (lambda folder: (folder / "slicecli.json").unlink(), "record", "slicecli.json is missing"),
    "a record that is no JSON": (
        lambda folder: (folder / "slicecli.json").write_text("{"),
        "record",
        "not a JSON object",
    ),
    "a record of nested lists": (
        lambda folder: (folder / "slicecli.json").write_text("[" * 100_000),
        "record",
        "not a JSON object",
    ),
    "a record of a later version": (edit_record(lambda record: record.update(record_version=2)), "record", "is 2"),
    "other weights": (flip_byte("model.safetensors"), "files", "model.safetensors differs from the recorded file"),
    "weights that break off": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "counts",
        "model.safetensors is damaged, or not a safetensors file",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "files", "model.safetensors is missing"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "files", "tokenizer.json is missing"),
    "another tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "files",
        "tokenizer.json differs",
    ),
    "code that nobody recorded": (
        lambda folder: (folder / "modeling.py").write_text("print()"),
        "files",
        "modeling.py is not in the record",
    ),
    "a pickle that nobody recorded": (
        lambda folder: (folder / "pytorch_model.bin").write_bytes(b"x"),
        "files",
        "pytorch_model.bin is not in the record",
    ),
    "weights that nobody recorded": (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "other.safetensors"),
        "files",
        "other.safetensors is not in the record",
    ),
    "an adapter of another model": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        "files",
        "adapter_config.json is not in the record",
    ),
    "parameters": (
        edit_record(lambda record: record["parameters"].update(sliced=63323)),
        "counts",
        "63,323 parameters",
    ),
    "sparsity": (edit_record(lambda record: record.update(sparsity=0.2)), "counts", "sparsity is 0.2"),
    "dim": (edit_record(lambda record: record.update(dim=35)), "config", "hidden_size is 36"),
    "bytes": (edit_record(lambda record: record["bytes"].update(sliced=1)), "counts", "1 bytes"),
    "dense bytes": (edit_record(lambda record: record["bytes"].update(dense=1)), "counts", "dense model's bytes"),
    "tokens": (edit_record(lambda record: record["calibration"].update(tokens=1)), "counts", "not 1 calibration"),
    "dtype": (edit_record(lambda record: record.update(dtype="bfloat16")), "counts", "tensors of dtype F32"),
    "another width": (
        edit_recorded("config.json", lambda config: config.update(hidden_size=40)),
        "config",
        "hidden_size is 40 in config.json, but 36 in the record",
    ),
    "another type": (
        edit_recorded("config.json", lambda config: config.update(model_type="gemma")),
        "config",
        "model_type is gemma",
    ),
    "code from elsewhere": (
        edit_recorded("config.json", lambda config: config.update(auto_map={"AutoModel": "you/repo--modeling.Model"})),
        "config",
        "another repository",
    ),
    "code without a file": (
        edit_recorded("config.json", lambda config: config.update(auto_map={"AutoModel": "modeling.Model"})),
        "config",
        "an unrecorded file: modeling.Model",
    ),
    "no config": (lambda folder: (folder / "config.json").unlink(), "config", "config.json is missing"),
    "no card": (lambda folder: (folder / "README.md").unlink(), "card", "README.md is missing"),
    "a card that is none": (
        lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"),
        "card",
        "cannot be read as a card",
    ),
    "a card without marks": (edit_card(": begin -->", " -->"), "card", "no text between slicecli's markers"),
    "a number in the card's text": (edit_card("| 36 |", "| 40 |"), "card", "| 40 |"),
    "another perplexity in the record": (
        edit_record(lambda record: _results(record).update(value=2.5)),
        "card",
        "nonsense.jsonl, perplexity",
    ),
    "no perplexity in the record": (
        edit_record(lambda record: record["results"].pop("perplexity")),
        "card",
        "which is not in the record",
    ),
    "no licence": (edit_card("license: other\n", ""), "card", "license is null"),
    "another library": (edit_card("library_name: transformers", "library_name: peft"), "card", "library_name is peft"),
    "no tag": (edit_card("- sliced\n", ""), "card", "lacks the tag sliced"),
    "a token": (
        lambda folder: (folder / "notes.md").write_text(f"use {TOKEN}"),
        "secrets",
        "notes.md holds a Hub token",
    ),
    "the home folder in the card": (
        lambda folder: (folder / "README.md").write_text(
            f"{(folder / 'README.md').read_text()}\n{Path.home()}/models\n"
        ),
        "secrets",
        "README.md holds",
    ),
    "a path in the config": (
        edit_recorded("config.json", lambda config: config.update(made_in="/home/somebody/models")),
        "secrets",
        "config.json holds a local path",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_each_damage_is_found_and_named(stock, name, monkeypatch):
    monkeypatch.setenv("HOME", "/home/plantedname")
    damage, check, words = DAMAGES[name]
    damage(stock)
    found = errors(stock)
    assert any(one == check and words in text for one, text in found), found
    # what is wrong is said where it is wrong
    assert {one for one, _ in found} <= {check, "files", "counts", "config", "card"}
    secret = [TOKEN, "/home/plantedname"]
    assert not any(one in text for _, text in found for one in secret)


@pytest.mark.parametrize(
    ("kind", "damage", "check", "words"),
    [
        ("sharded", flip_byte("model-00002-of-00005.safetensors"), "files", "model-00002-of-00005.safetensors differs"),
        ("sharded", lambda folder: (folder / "model.safetensors.index.json").unlink(), "counts", "cannot be found"),
        (
            "sharded",
            edit_recorded("model.safetensors.index.json", lambda index: index["weight_map"].popitem()),
            "counts",
            "does not match the tensors",
        ),
        (
            "sharded",
            edit_recorded("model.safetensors.index.json", lambda index: index["metadata"].update(total_size=1)),
            "counts",
            "states 1 bytes",
        ),
        ("published", flip_byte("modeling_slicecli.py"), "files", "modeling_slicecli.py differs"),
        (
            "published",
            edit_recorded("config.json", lambda config: config.update(embedding_size=35)),
            "config",
            "embedding_size is 35",
        ),
        (
            "published",
            edit_recorded("config.json", lambda config: config["auto_map"].update(AutoModel="you/x--modeling.Model")),
            "config",
            "another repository",
        ),
        ("published", edit_record(lambda record: record["schedule"].update(head=47)), "config", "head_width is 48"),
        ("schedule", edit_record(lambda record: record.update(dim=35)), "counts", "the mean of its schedule is"),
        ("gpt2", edit_record(lambda record: record.update(dim=35)), "config", "embedding_size is 36"),
    ],
)  # fmt: skip
def test_damage_to_other_kinds_of_slices_is_found(slices, tmp_path, kind, damage, check, words):
    folder = shutil.copytree(slices(kind), tmp_path / kind)
    damage(folder)
    found = errors(folder)
    assert any(one == check and words in text for one, text in found), found


def test_what_an_owner_adds_is_no_difference(stock, run):
    edit_card("---\n\n", "my_field: 3\n---\n\nMine.\n\n")(stock)
    edit_card("- sliced\n", "- sliced\n- mine\n")(stock)
    edit_card("license: other", "license: mit")(stock)
    (stock / "README.md").open("a").write("\nMine too.\n")
    (stock / "notes.md").write_text("see /home, https://huggingface.co/me/slice and ~/models\n")
    (stock / "LICENSE-models").write_text("As you please.")
    (stock / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert errors(stock) == []
    done = run("verify", stock)
    assert done.exit_code == 0
    assert "note, files: notes.md is not in the record" in done.stdout
    assert ".gitattributes" not in done.stdout


def test_the_text_of_another_version_is_not_compared(stock):
    edit_card(f"slicecli {__version__}: begin", "slicecli 0.0.7: begin")(stock)
    edit_card("| 36 |", "| 40 |")(stock)
    (found,) = verify_folder(stock)
    assert not found.is_error
    assert "0.0.7" in found.text


def test_paths_in_what_came_from_the_hub_are_notes(stock):
    plant = edit_recorded("tokenizer_config.json", lambda config: config.update(name_or_path="/home/somebody/model"))
    plant(stock)
    assert [text for _, text in errors(stock)] == ["tokenizer_config.json holds a local path"]
    edit_record(lambda record: record["source"].update(model="you/model", commit="0" * 40))(stock)
    found = [one for one in verify_folder(stock) if one.check == "secrets"]
    assert [(one.is_error, one.text) for one in found] == [(False, "tokenizer_config.json holds a local path")]


def test_the_report_says_what_differs_and_where(stock, run):
    flip_byte("model.safetensors")(stock)
    done = run("verify", stock, "--format", "json")
    assert done.exit_code == 1
    report = json.loads(done.stdout)
    assert (report["subject"], report["ok"]) == ("slice", False)
    assert report["checks"] == {**dict.fromkeys(CHECKS, 0), "files": 1}
    text = "model.safetensors differs from the recorded file"
    assert report["findings"] == [{"check": "files", "is_error": True, "text": text}]
    done = run("verify", stock)
    assert done.exit_code == 1
    assert done.stdout.splitlines()[0] == f"files: {text}"
    assert done.stdout.splitlines()[1].endswith(": 1 difference.")


def test_what_is_no_folder_and_no_repository_is_refused(run, stock, embedded_model):
    assert run("verify", stock / "config.json").exit_code == 1
    assert "There is no folder" in run("verify", "./nothing").stderr
    assert run("verify", stock, "--revision", "main").exit_code == 2
    done = run("verify", embedded_model)
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "record: slicecli.json is missing, so this is not a slice",
        f"{embedded_model.name}: 1 difference.",
    ]


def test_it_needs_no_torch(stock):
    code = (
        "import sys\n"
        "from slicecli.cli import group\n"
        f"group(['verify', {str(stock)!r}], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'lm_eval', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "nothing differs" in done.stdout


# the schema


def test_every_field_is_described_and_every_object_is_closed():
    objects = record_schema()["$defs"]
    fields = [(name, field, part) for name in objects for field, part in objects[name]["properties"].items()]
    assert len(fields) > 150
    for name, field, part in fields:
        described = part if "description" in part else objects[part.get("$ref", "").rpartition("/")[2]]
        assert described["description"].endswith("."), (name, field)
        assert part.get("type") != "object" or part["additionalProperties"] is False, (name, field)
    assert all(one["additionalProperties"] is False for one in objects.values())


def test_the_schema_is_one():
    import jsonschema

    jsonschema.Draft202012Validator.check_schema(record_schema())
    assert record_schema()["$id"] == "urn:slicecli:record:1"


def required_paths(part, path=()):
    """Yield the path of every required field that a validated record has."""
    if isinstance(part, pydantic.BaseModel):
        for name, field in type(part).model_fields.items():
            if field.is_required():
                yield (*path, name)
            yield from required_paths(getattr(part, name), (*path, name))
    elif isinstance(part, dict):
        for name, inner in part.items():
            yield from required_paths(inner, (*path, name))
    elif isinstance(part, list) and part:
        yield from required_paths(part[0], (*path, 0))


def without(record, path):
    changed = copy.deepcopy(record)
    del functools.reduce(operator.getitem, path[:-1], changed)[path[-1]]
    return changed


def test_a_record_without_any_one_of_its_fields_is_refused(record):
    paths = list(required_paths(RefitRecord.model_validate(record)))
    assert len(paths) > 120
    for path in paths:
        place = "$" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path[:-1])
        place = place.replace(".nonsense.jsonl", '["nonsense.jsonl"]')
        assert schema_errors(without(record, path)) == [f'{place} lacks "{path[-1]}"'], path


VIOLATIONS = [
    ("record_version", "1"),
    ("record_version", True),
    ("slicecli_version", "0.1.0 <script>"),
    ("source.model", "/home/me/model"),
    ("source.model", "a/b/c"),
    ("source.model", ""),
    ("source.model", "x" * 256),
    ("source.model", "mo\u202edel"),
    ("source.model", "mo\ndel"),
    ("source.commit", "main"),
    ("source.commit", "0" * 39 + "\n"),
    ("source.revision", "x\x1b[2J"),
    ("source.model_type", None),
    ("source.more", 1),
    ("ancestry", {}),
    ("ancestry", [{}]),
    ("repository", "me"),
    ("repository", "me/slice\n"),
    ("repository", "../me"),
    ("command", ""),
    ("command", "slicecli\nslice"),
    ("inherited", {"license": "MIT\nx: y"}),
    ("inherited", {"license_link": "javascript:x()"}),
    ("inherited", {"language": ["english language"]}),
    ("inherited", {"language": "en"}),
    ("inherited", {"tags": ["x"]}),
    ("adapter", "a\x00"),
    ("method", "prune"),
    ("layout", "other"),
    ("needs_remote_code", 1),
    ("hidden_size", 48.0),
    ("hidden_size", "48"),
    ("hidden_size", 2**60),
    ("dim", 0),
    ("dim", True),
    ("dim", -36),
    ("sparsity", 1),
    ("sparsity", float("nan")),
    ("sparsity", "0.25"),
    ("schedule", {"blocks": [[36]], "head": 36}),
    ("dtype", "int8"),
    ("parameters.sliced", 0),
    ("bytes.sliced", None),
    ("calibration.text", "a\tb"),
    ("calibration.dataset", "https://example.org/x"),
    ("calibration.seed", 1.5),
    ("calibration.sha256", "0" * 63),
    ("calibration.sha256", "0" * 64 + "\n"),
    ("calibration.sha256", "G" * 64),
    ("energy.of", "stream"),
    ("energy.kept", 1.5),
    ("energy.spectrum", [{"dim": 1, "kept": 0.5}]),
    ("results", None),
    ("results.perplexity", {"x" * 256: {}}),
    ("results.tasks", {"a\nb": {}}),
    ("results.more", {}),
    ("curve", {"curves": []}),
    ("curve", []),
    ("predictions", None),
    ("other_dims", [{"dim": 3}]),
    ("weights", {}),
    ("weights", {"../model.safetensors": "0" * 64}),
    ("weights", {"model.bin": "0" * 64}),
    ("weights", {"model.safetensors": "0"}),
    ("files", {"/etc/passwd": "0" * 64}),
    ("files", {"a/../b": "0" * 64}),
    ("files", {"a\\b": "0" * 64}),
    ("files", {".git/config": "0" * 64}),
    ("files", {"a/.hidden": "0" * 64}),
    ("files", {"C:x": "0" * 64}),
    ("files", {"a//b": "0" * 64}),
    ("files", {"a\n": "0" * 64}),
    ("versions", {"torch": 2}),
    ("more", 1),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), VIOLATIONS, ids=lambda one: repr(one)[:40])
def test_each_violation_is_named_by_its_place(record, path, value):
    changed = copy.deepcopy(record)
    *names, last = path.split(".")
    functools.reduce(operator.getitem, names, changed)[last] = value
    found = schema_errors(changed)
    assert found
    assert all(path in text or repr(last).replace("'", '"') in text for text in found), found
    assert all(text.isprintable() and len(text) < 400 for text in found), found


def is_beyond_json_schema(value):
    """For JSON Schema 48.0 is a whole number and NaN a number; for Python's `$` a text ends before its last newline."""
    return isinstance(value, float) or repr(value).count("\\n'") > 0


@pytest.mark.parametrize(
    ("path", "value"),
    [(path, value) for path, value in VIOLATIONS if not is_beyond_json_schema(value)],
    ids=lambda one: repr(one)[:40],
)
def test_the_published_schema_refuses_them_too(record, path, value):
    import jsonschema

    changed = copy.deepcopy(record)
    *names, last = path.split(".")
    functools.reduce(operator.getitem, names, changed)[last] = value
    validator = jsonschema.Draft202012Validator(record_schema())
    assert validator.is_valid(record)
    assert not validator.is_valid(changed)


def test_names_of_others_may_be_free_text(record):
    for name in ("Der Name: ein Märchen (1812).txt", "名前", "a|b`c<d>", "x" * 255):
        changed = copy.deepcopy(record)
        changed["calibration"]["text"] = name
        changed["results"]["perplexity"] = {name: _results(record)}
        assert schema_errors(changed) == []


def test_only_so_many_faults_are_told():
    assert len(schema_errors({"method": "refit", "files": {f"../{index}": 1 for index in range(99)}})) == 20
    assert schema_errors([]) == ["$ is a list, not an object"]


def leaves(value, path=()):
    if isinstance(value, (dict, list)):
        for name, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, name))
    else:
        yield path


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(data=st.data())
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_record_says_the_checks_go_through(data, record, stock):
    """A record may come from anybody: it is refused, or compared, and nothing breaks."""
    changed = copy.deepcopy(record)
    for path in data.draw(st.lists(st.sampled_from(list(leaves(record))), min_size=1, max_size=3, unique=True)):
        place = functools.reduce(operator.getitem, path[:-1], changed)
        near = st.integers(0, 100) | st.floats(0, 1) | st.sampled_from(["a", "a/b", "0" * 64])
        place[path[-1]] = data.draw(near | JSON)
    text = json.dumps(changed)
    (stock / "slicecli.json").write_text(text)
    findings = verify_contents(inspect_folder(stock))
    assert all(one.check in CHECKS and one.text.isprintable() for one in findings)
    if not any(one.is_error for one in findings):
        assert schema_errors(json.loads(text)) == []


# secrets


@pytest.fixture
def somebody(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/srv/people/ärger")
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "plantedname")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    return work


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"token = {TOKEN!r}", "a Hub token"),
        ("hf_oauth_" + "aB3" * 9, "a Hub token"),
        ("api_org_" + "aB3" * 12, "a Hub token"),
        ("ghp_" + "aB3" * 12, "a GitHub token"),
        ("github_pat_" + "aB3_" * 14, "a GitHub token"),
        ("OPENAI_API_KEY=sk-proj-" + "aB3-" * 12, "an API key"),
        ("AKIA" + "A1B2" * 4, "an AWS key"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ('"cache": "/srv/people/ärger/.cache"', "the home folder"),
        (json.dumps({"cache": "/srv/people/ärger/.cache"}), "the home folder"),
        (json.dumps({"text": "first\n/srv/people/ärger/second"}), "the home folder"),
        ("see /srv/people/ärger", "the home folder"),
        ("/var/lib/plantedname/x", "the user's name in a path"),
        ("/home/alice/models", "a local path"),
        ("file:///Users/alice/models", "a local path"),
        (json.dumps("C:\\Users\\alice\\models"), "a local path"),
        (r"C:\Users\alice", "a local path"),
        ("{tempdir}/abc/model", "a local path"),
        ("{work}/model", "a local path"),
    ],
)
def test_secrets_are_named_without_being_told(somebody, text, kind):
    import tempfile

    text = text.replace("{tempdir}", tempfile.gettempdir()).replace("{work}", str(somebody))
    assert kind in find_secrets(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "/home",
        "the folder /home/ and ~/models, or /tmp",
        "https://example.org/home/alice/x and https://huggingface.co/plantedname/slice",
        "[a](https://example.org/Users/alice/) plantedname/slice by plantedname",
        "hf_transfer hf_xet hf_hub_download hf_" + "a" * 20,
        "sk-learn-based-and-a-very-long-name-of-something-else",
        "task-" + "aB3" * 12,
        "AKIA",
        "and/or, 1/2, a /b c",
    ],
)
def test_ordinary_text_holds_no_secret(somebody, text):
    assert find_secrets(text) == []


def test_tokens_of_the_user_are_known(monkeypatch):
    text = "mine is not-of-the-usual-form, and so"
    assert find_tokens(text) == []
    assert find_tokens(text, ["not-of-the-usual-form"]) == ["a Hub token"]
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        with monkeypatch.context() as patch:
            patch.setenv(name, "not-of-the-usual-form")
            assert find_tokens(text) == ["a Hub token"]
    # what is too short to be one would be found everywhere
    assert find_tokens(text, ["mine", ""]) == []


def test_the_embedded_model_holds_no_secret(embedded_model):
    for path in embedded_model.iterdir():
        if path.suffix not in {".safetensors", ".png"}:
            assert find_secrets(path.read_text()) == [], path.name


# repositories


def verify(*words):
    command = [sys.executable, "-m", "slicecli", "-q", "verify", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def sent_weights(hub):
    """Return the bytes of weight files that the hub sent, and whether each was asked for by range."""
    asked = [one for one in hub.requests if one.method == "GET" and one.path.endswith(".safetensors")]
    return sum(one.sent_bytes for one in asked), all(one.range for one in asked)


def test_a_repository_is_checked_without_its_weights(loopback_hub, slices):
    folder = slices("stock")
    loopback_hub.upload("me/slice", folder)
    done = verify("me/slice")
    assert (done.returncode, done.stderr) == (0, "")
    files = sum(1 for path in folder.rglob("*") if path.is_file())
    assert done.stdout.startswith(f"me/slice: {files} files, record, files, ")
    size = (folder / "model.safetensors").stat().st_size
    sent, is_by_range = sent_weights(loopback_hub)
    assert is_by_range
    assert 0 < sent < size / 2
    loopback_hub.requests.clear()
    assert verify("me/slice", "--download").returncode == 0
    assert sent_weights(loopback_hub)[0] >= size


def test_what_was_changed_in_a_repository_is_found(loopback_hub, stock):
    loopback_hub.upload("me/slice", {".gitattributes": b"*.safetensors filter=lfs"})
    first = loopback_hub.upload("me/slice", stock)
    flip_byte("model.safetensors")(stock)
    content = (stock / "model.safetensors").read_bytes()
    commit = loopback_hub.upload("me/slice", {"model.safetensors": content, "pytorch_model.bin": b"x" * 99})
    done = verify("me/slice", "--format", "json")
    report = json.loads(done.stdout)
    assert done.returncode == 1
    assert [one["text"].partition(" ")[0] for one in report["findings"]] == ["model.safetensors", "pytorch_model.bin"]
    assert verify("me/slice", "--download", "--revision", commit).returncode == 1
    # what it was before is another matter, and hidden files are the Hub's own
    assert verify("me/slice", "--revision", first).returncode == 0


@pytest.mark.parametrize(
    "head",
    [
        b"x" * 300_000,
        b"[]",
        b"[" * 99_000,
        b'{"a": {"dtype": "F32", "shape": ["x", 2], "data_offsets": [0, 4]}}',
        b'{"a": 1}',
    ],
    ids=["no-length", "list", "nested", "shape", "number"],
)
def test_a_head_that_is_damaged_on_the_hub_is_named(loopback_hub, slices, head):
    loopback_hub.upload("me/slice", slices("stock"))
    content = head if len(head) > 100_000 else len(head).to_bytes(8, "little") + head
    loopback_hub.upload("me/slice", {"model.safetensors": content.ljust(200_000)})
    done = verify("me/slice")
    assert done.returncode == 1, done.stderr
    assert "files: model.safetensors differs from the recorded file" in done.stdout
    assert "counts: model.safetensors is damaged, or not a safetensors file" in done.stdout


def test_a_slice_in_shards_is_checked_in_another_s_repository(loopback_hub, slices):
    loopback_hub.upload("you/copy", slices("sharded"))
    changed = {
        "slicecli.json": (slices("sharded") / "slicecli.json")
        .read_bytes()
        .replace(b'"repository": null', b'"repository": "me/slice"')
    }
    loopback_hub.upload("you/copy", changed)
    done = verify("you/copy", "--format", "json")
    texts = [one["text"] for one in json.loads(done.stdout)["findings"] if one["check"] == "record"]
    assert texts == ["according to it the slice is published as me/slice"]


def test_a_repository_that_is_missing_or_no_slice_is_named(loopback_hub, checkpoints):
    done = verify("me/nothing")
    assert done.returncode == 1
    assert "The repository 'me/nothing' cannot be checked: the repository does not exist" in done.stderr
    loopback_hub.upload("me/dense", checkpoints("llama-3"))
    done = verify("me/dense")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (1, "me/dense: 1 difference.")
    assert sent_weights(loopback_hub)[0] == 0


# the page


def test_the_page_of_the_record_has_the_checks():
    page = (ROOT / "docs" / "record.md").read_text()
    for check in CHECKS:
        assert f"\n| `{check}` |" in page
