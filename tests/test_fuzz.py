"""Whatever is in the files of a model, a slice or a measurement: a command ends in a result or in one sentence.

Properties are tested on documents that hypothesis damages, and what was found that way is kept as cases by hand, which
follow the properties they once broke. `SLICECLI_FUZZ=20 python -m pytest tests/test_fuzz.py` tries 20 times as many.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from slicecli.proof.tiny import SIZES, random_model, tiny_config
from slicecli.testing.checkpoints import nonsense_text, save_checkpoint

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is Linux's"),
]

FACTOR = int(os.environ.get("SLICECLI_FUZZ", "1"))
SECONDS = 30  # for one command; the slowest takes less than one
MOST_MEGABYTES = 800
MOST_CHARACTERS = 1500
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
RECORD, CARD = "slicecli.json", "README.md"

# what json cannot write, by what stands for it until the document is text
LONG_NUMBER, DEEP, DEEPER = "@long number@", "@deep@", "@deeper@"
RAW = {LONG_NUMBER: "9" * 5000, DEEP: "[" * 300 + "]" * 300, DEEPER: '{"a":' * 5000 + "0" + "}" * 5000}
HOSTILE = [
    None, True, False, 0, -1, 1, 2, 3, 7, 10**6, 10**9, 10**12, 10**30, -(10**30), 10**400, 2**31, 2**63,
    0.5, -0.0, 1e-30, 1e308, math.nan, math.inf, -math.inf, LONG_NUMBER,
    "", "x", "48", "NaN", "-1", "a" * 10_000, "\x1b[31m\nred", "\ud800", "[/b]", "../x", "/etc/passwd", "torch.float32",
    "float8_e4m3fn", [], [1], [None], [0] * 1000, ["x", {}], [[1]], {}, {"a": 1}, DEEP, DEEPER,
]  # fmt: skip


def examples(count):
    return settings(
        max_examples=max(6, count * FACTOR // 3),
        derandomize=True,
        database=None,
        deadline=None,
        # `run` keeps nothing between examples; what takes time is the command, not the making of its input
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# damage


def places_in(document, prefix=()):
    """Yield the paths of all values inside a document, of long lists the first few."""
    inner = document.items() if isinstance(document, dict) else enumerate(document[:6])
    for name, value in inner:
        yield (*prefix, name)
        if isinstance(value, (dict, list)):
            yield from places_in(value, (*prefix, name))


def at(document, path):
    for name in path:
        document = document[name]
    return document


def changed(document, path, *value):
    """Return a document with another value at a path, or without any there."""
    copy = dict(document) if isinstance(document, dict) else list(document)
    if len(path) > 1:
        copy[path[0]] = changed(document[path[0]], path[1:], *value)
    elif value:
        copy[path[0]] = value[0]
    else:
        del copy[path[0]]
    return copy


@st.composite
def damaged(draw, documents, names=()):
    """Draw one of some documents with values, of fields of its own or with new names, put in, dropped or swapped."""
    document = draw(st.sampled_from(documents))
    values = st.one_of(st.sampled_from(HOSTILE), st.integers(), st.floats(), st.text(max_size=8))
    for _ in range(draw(st.sampled_from([1, 1, 1, 2, 3]))):
        places = list(places_in(document))
        if not places:
            break
        kind = draw(st.sampled_from(["put", "put", "put", "put", "add", "drop", "swap"]))
        place = draw(st.sampled_from(places))
        if kind == "drop":
            document = changed(document, place)
        elif kind == "swap":
            document = changed(document, place, at(document, draw(st.sampled_from(places))))
        elif kind == "add" and names:
            document = {**document, draw(st.sampled_from(names)): draw(values)}
        else:
            document = changed(document, place, draw(values))
    return as_bytes(document)


def as_bytes(document):
    text = json.dumps(document)
    for name, raw in RAW.items():
        text = text.replace(json.dumps(name), raw)
    return text.encode()


@st.composite
def torn(draw, contents):
    """Draw one of some files with bytes lost, changed, put in or repeated."""
    content = draw(st.sampled_from(contents))
    start = draw(st.integers(0, len(content)))
    end = draw(st.integers(start, len(content)))
    junk = [b"", b"\xff\xfe", b"\x00", b'"', b"{", b"[" * 3000, b"9" * 5000, b"\xc0\x80"]
    middle = draw(st.one_of(st.sampled_from(junk), st.binary(max_size=4), st.just(content[start:end] * 2)))
    return draw(st.sampled_from([content[:start] + middle + content[end:], content[:start] + middle, middle]))


def broken(documents, names=()):
    """Damaged JSON, now and then as bytes."""
    whole = [as_bytes(document) for document in documents]
    return st.one_of(damaged(documents, names), damaged(documents, names), damaged(documents, names), torn(whole))


# how a command ends


class Endless(BaseException):
    """A command that does not end."""


@contextlib.contextmanager
def in_time():
    def stop(_signal, _frame):
        raise Endless

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_megabytes():
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) / 1024


@pytest.fixture
def ends_well(run):
    """Run a command that may fail, and check how it ends; return what it printed, and the sentence if there is one."""

    def check(*words, output=None):
        Path("/proc/self/clear_refs").write_text("5")  # forgets the peak
        before = peak_megabytes()
        with in_time():
            done = run(*words)
        assert peak_megabytes() - before < MOST_MEGABYTES
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        assert done.exit_code in (0, 1, 2)
        assert "Traceback" not in done.output
        lines = done.stderr.removesuffix("\n").split("\n")
        assert all(line.isprintable() for line in lines)
        errors = [line for line in lines if line.startswith("Error: ")]
        if "--format" in words and done.exit_code == 0:
            json.loads(done.stdout, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        if done.exit_code == 0 or (words[0] == "verify" and not errors):
            assert errors == []
        else:
            assert errors == lines[-1:]
            assert len(errors[0]) < MOST_CHARACTERS
            if output is not None:
                assert not output.exists()
                assert not list(output.parent.iterdir()) if output.parent.exists() else True
        done.sentence = errors[0] if errors else ""
        return done

    return check


@pytest.fixture
def refused(ends_well):
    """Run a command that must fail; return its sentence."""

    def check(*words, output=None):
        done = ends_well(*words, output=output)
        assert done.exit_code in (1, 2), done.output
        assert done.sentence
        return done.sentence

    return check


# what is damaged


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def little_text(room):
    return nonsense_text(room / "text.jsonl", documents=40)


@pytest.fixture(scope="module")
def models(room):
    """Return a function that gives a folder with a tiny checkpoint of a family, which must not be changed."""
    made = {}

    def make(family):
        if family not in made:
            folder = save_checkpoint(random_model(tiny_config(family)), room / family)
            fields = {"bos_token_id": 0, "eos_token_id": 1, "temperature": 0.6, "top_p": 0.9, "do_sample": True}
            (folder / "generation_config.json").write_text(json.dumps(fields))
            made[family] = folder
        return made[family]

    return make


@pytest.fixture(scope="module")
def measured(room, models, little_text):
    """Slices of a model, and all that is written when they are measured, by name."""
    from click.testing import CliRunner

    from slicecli.cli import group

    def done(*words):
        result = CliRunner().invoke(group, [str(word) for word in words], prog_name="slicecli")
        assert result.exit_code == 0, result.output

    model, questions = models("llama"), room / "questions.jsonl"
    rows = [{"query": "a b", "choices": ["c", "d"], "gold": number % 2} for number in range(4)]
    questions.write_text("\n".join(map(json.dumps, rows)))
    calibration = ("--calibration", little_text, "--samples", "6", "--seq-len", "32")
    on = ("--perplexity", little_text, "--tasks", questions, "--seq-len", "32", "--limit", "4")
    done("eval", model, *on, "-o", room / "dense.json")
    for dim in (56, 48, 40):
        done("slice", model, "--dim", dim, "-o", room / f"slice{dim}", *calibration)
        done("eval", room / f"slice{dim}", *on, "-o", room / f"{dim}.json")
    results = [room / f"{name}.json" for name in ("dense", 56, 48, 40)]
    done("fit", *results, "-o", room / "curve.json")
    done("spectrum", model, *calibration, "-o", room / "spectrum.json")
    done("card", room / "slice48", "--curve", room / "curve.json")
    done("eval", room / "slice48", *on, "--baseline", model, "--record", "-o", room / "both.json")
    documents = [json.loads(path.read_text()) for path in results]
    return {
        "model": model,
        "slice": room / "slice48",
        "results": results,
        "documents": documents,
        "sweep": {"dense": documents[0], "points": documents[1:]},
        "both": json.loads((room / "both.json").read_text()),
        "curve": json.loads((room / "curve.json").read_text()),
        "spectrum": json.loads((room / "spectrum.json").read_text()),
        "record": json.loads((room / "slice48" / RECORD).read_text()),
        "questions": questions,
    }


@pytest.fixture
def with_file(room):
    """Return a function that gives a copy of a folder with one file replaced; each call removes the copy before."""
    copy = room / "copy"

    def make(folder, name, content):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy)
        (copy / name).unlink(missing_ok=True)
        (copy / name).write_bytes(content)
        return copy

    yield make
    shutil.rmtree(copy, ignore_errors=True)


@pytest.fixture
def copy_of(tmp_path):
    def make(folder):
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return make


def edit(folder, name=CONFIG, **changes):
    path = folder / name
    path.write_bytes(as_bytes({**json.loads(path.read_text()), **changes}))
    return folder


def work(kind, model, text, output):
    """Return the words of a command that reads a whole model."""
    rows = ("--calibration", text, "--samples", "4", "--seq-len", "16")
    return {
        "slice": ("slice", model, "--dim", "32", "-o", output, *rows, "--format", "json"),
        "published": ("slice", model, "--dim", "32", "--method", "slicegpt", "-o", output, *rows),
        "spectrum": ("spectrum", model, *rows, "--format", "json"),
        "eval": ("eval", model, "--perplexity", text, "--seq-len", "16", "--limit", "2", "--format", "json"),
        "generate": ("generate", model, "a b", "--max-new-tokens", "2"),
    }[kind]


WORK = ("slice", "slice", "published", "eval", "spectrum", "generate")

# config.json

FAMILIES = ("llama", "qwen3_moe", "gpt2", "gptj", "gemma2", "phi3", "cohere2", "stablelm", "opt", "qwen2")
FIELDS = (
    *SIZES, "model_type", "architectures", "auto_map", "dtype", "torch_dtype", "head_dim", "layer_types",
    "sliding_window", "use_sliding_window", "rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor",
    "tie_word_embeddings", "attention_bias", "mlp_bias", "rms_norm_eps", "hidden_act", "num_labels", "id2label",
    "quantization_config", "is_encoder_decoder", "text_config", "mlp_only_layers", "no_rope_layers",
    "attn_implementation", "transformers_version", "_name_or_path", "attribute_map", "sub_configs", "to_dict",
)  # fmt: skip


@pytest.fixture(scope="module")
def configs():
    return [tiny_config(family).to_dict() for family in FAMILIES]


@given(data=st.data())
@examples(160)
def test_any_config(ends_well, room, configs, data):
    content = data.draw(broken(configs, FIELDS))
    words = data.draw(
        st.sampled_from(
            [
                ("inspect",),
                ("inspect", "--format", "json"),
                ("estimate", "--format", "json"),
                ("estimate", "--dense-perplexity", "8", "--method", "slicegpt"),
                ("slice", "--dry-run", "--sparsity", "0.4", "--format", "json"),
                ("slice", "--dry-run", "--target-params", "100000", "--method", "slicegpt"),
            ]
        )
    )
    folder = room / "config"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(content)
    ends_well(words[0], folder, *words[1:])


@given(data=st.data())
@examples(8)
def test_any_config_of_a_type_that_is_inferred(ends_well, room, data):
    content = data.draw(broken([tiny_config("helium").to_dict()], FIELDS))
    folder = room / "config"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(content)
    ends_well("inspect", folder)


@given(data=st.data())
@examples(30)
def test_any_config_of_a_whole_model(ends_well, room, models, little_text, with_file, data):
    folder = models(data.draw(st.sampled_from(["llama", "gptj", "qwen3_moe", "phi3"])))
    content = data.draw(broken([json.loads((folder / CONFIG).read_text())], FIELDS))
    output = room / "whole" / "out"
    copy = with_file(folder, CONFIG, content)
    ends_well(*work(data.draw(st.sampled_from(WORK)), copy, little_text, output), output=output)
    shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": LONG_NUMBER}, "cannot be read"),
        ({"rope_theta": DEEP}, "nested too deeply"),
        ({"rope_theta": DEEPER}, "nested too deeply"),
        ({"architectures": 5}, "architectures = 5, but a list"),
        ({"architectures": "LlamaForCausalLM"}, "but a list"),
        ({"architectures": ["\x1b[31m\nred"]}, "not a decoder"),
        ({"architectures": ["a" * 10**6]}, "not a decoder"),
        ({"model_type": "a" * 10**6}, "not supported"),
        ({"rms_norm_eps": "silu"}, "rms_norm_eps = 'silu'"),
        ({"rms_norm_eps": [1e-6]}, "rms_norm_eps"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps"),
        ({"hidden_size": 2**31}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_hidden_layers": 10**30}, "num_hidden_layers"),
        ({"num_attention_heads": 10**30}, "num_attention_heads"),
        ({"vocab_size": 10**400}, "vocab_size"),
        ({"intermediate_size": "a" * 10**6}, "but a positive integer is required"),
        ({"num_labels": 10**9}, "num_labels"),
        ({"text_config": {"num_layers": 10**9}}, "num_layers"),
        ({"attention_types": [[["global"], 10**30]]}, "attention_types"),
    ],
)
def test_a_config_that_cannot_be(refused, ends_well, copy_of, models, changes, message):
    folder = edit(copy_of(models("llama")), **changes)
    (folder / WEIGHTS).unlink()  # nothing looks at it
    assert message in refused("inspect", folder)
    ends_well("slice", folder, "--dim", "32", "--dry-run")


@pytest.mark.parametrize("field", ["to_dict", "attribute_map", "from_pretrained"])
def test_a_config_that_replaces_a_part_of_its_class(refused, copy_of, models, field):
    folder = edit(copy_of(models("llama")), **{field: 1})
    assert "reserved by config classes" in refused("slice", folder, "--dim", "32", "--dry-run")


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("cohere2", {"layer_types": True}),
        ("phi3", {"rope_parameters": -1}),
        ("qwen2", {"use_sliding_window": 1, "sliding_window": "x"}),
        ("qwen3_moe", {"mlp_only_layers": 5}),
        ("glm", {"partial_rotary_factor": 1e308}),
        ("qwen3_moe", {"num_experts_per_tok": 10**6}),
    ],
)
def test_a_field_that_only_some_families_read(ends_well, room, family, changes):
    folder = room / f"{family}-field"
    folder.mkdir(exist_ok=True)
    (folder / CONFIG).write_bytes(as_bytes({**tiny_config(family).to_dict(), **changes}))
    for words in (("estimate", folder), ("slice", folder, "--dim", "32", "--dry-run", "--method", "slicegpt")):
        ends_well(*words)


@pytest.mark.parametrize("length", [0, 1, -5, True, "x", 1e308])
def test_a_longest_row_that_cannot_be(refused, copy_of, models, little_text, length):
    folder = edit(copy_of(models("llama")), max_position_embeddings=length)
    assert "max_position_embeddings" in refused("eval", folder, "--perplexity", little_text)
    assert "max_position_embeddings" in refused("slice", folder, "--dim", "32", "--dry-run")


def test_a_vocabulary_that_is_no_number(refused, copy_of, models, little_text):
    folder = edit(copy_of(models("llama")), vocab_size="x")
    assert "vocab_size" in refused("eval", folder, "--perplexity", little_text, "--seq-len", "16")


@pytest.mark.parametrize("kind", ["slice", "published", "eval", "spectrum", "generate"])
def test_a_model_that_cannot_be_run(refused, copy_of, models, little_text, tmp_path, kind):
    folder = edit(copy_of(models("qwen3_moe")), num_experts_per_tok=50)  # of six
    output = tmp_path / "outputs" / "out"
    assert "failed to run" in refused(*work(kind, folder, little_text, output), output=output)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"vocab_size": 10**9}),
        ("llama", {"num_key_value_heads": 1000}),
        ("llama", {"head_dim": 10**9}),
        ("gptj", {"n_positions": 10**9}),
        ("gptj", {"rotary_dim": 10**9}),
        ("phi3", {"partial_rotary_factor": 1e6}),
        ("phi3", {"intermediate_size": 10**9}),
    ],
)
@pytest.mark.parametrize("kind", ["slice", "eval"])
def test_sizes_that_the_weights_do_not_have_take_no_memory(
    refused, copy_of, models, little_text, tmp_path, family, changes, kind
):
    folder = edit(copy_of(models(family)), **changes)
    output = tmp_path / "outputs" / "out"
    refused(*work(kind, folder, little_text, output), output=output)


def test_a_tiny_model_that_would_be_large(refused, room):
    folder = room / "wide-experts"
    folder.mkdir()
    fields = {**tiny_config("deepseek_v3").to_dict(), "q_lora_rank": 10**8, "architectures": ["DeepseekV3ForCausalLM"]}
    (folder / CONFIG).write_text(json.dumps(fields))
    assert "could be inferred" in refused("inspect", folder)


def test_a_class_of_another_type_is_what_the_record_says(ends_well, copy_of, models, little_text, tmp_path):
    # transformers reads a config of this type with that field as one of another type
    folder = edit(copy_of(models("mistral")), layer_types=None)
    output = tmp_path / "out"
    assert ends_well(*work("slice", folder, little_text, output)).exit_code == 0
    assert ends_well("verify", output).exit_code == 0


# weights


def read_weights(folder):
    content = (folder / WEIGHTS).read_bytes()
    size = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def weights_of(header, data, size=None):
    text = as_bytes(header)
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


@st.composite
def damaged_weights(draw, folder):
    """Draw a weight file with another header, or other data."""
    header, data = read_weights(folder)
    names = sorted(header.keys() - {"__metadata__"})
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    shape = header[name]["shape"]
    kinds = "size dtype shape offsets drop rename twice swap metadata any bytes number short long many"
    kind = draw(st.sampled_from(kinds.split()))
    if kind == "size":
        return weights_of(
            header, data, draw(st.one_of(st.sampled_from([0, 1, 10**8, 2**63]), st.integers(0, 2**64 - 1)))
        )
    if kind == "any":
        return with_length(draw(damaged([header])), data)
    if kind == "bytes":
        return draw(torn([weights_of(header, data)]))
    if kind == "twice":
        text = as_bytes(header)[:-1] + b"," + as_bytes({name: header[other]})[1:]
        return with_length(text, data)
    if kind == "number":
        start = header[name]["data_offsets"][0]
        number = draw(st.sampled_from([math.nan, math.inf, -math.inf, 3e38, 1e-45]))
        data = data[:start] + struct.pack("<f", number) + data[start + 4 :]
    elif kind == "short":
        data = data[: draw(st.integers(0, len(data)))]
    elif kind == "long":
        data += b"\0" * 4
    elif kind == "drop":
        del header[name]
    elif kind == "rename":
        header[draw(st.sampled_from(["x", "../x", "/etc/passwd", "a" * 5000, "\x1b[31m", "ü", other]))] = header.pop(
            name
        )
    elif kind == "swap":
        header[name], header[other] = header[other], header[name]
    elif kind == "metadata":
        header["__metadata__"] = draw(st.sampled_from([None, 3, {"format": "tf"}, {"format": 3}, {}, {"a": {"b": 1}}]))
    elif kind == "many":
        nothing = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]}
        header |= {f"extra{number}": nothing for number in range(10_000)}
    else:
        header[name] = {
            **header[name],
            **draw(
                {
                    "dtype": st.sampled_from(
                        [
                            {"dtype": kind}
                            for kind in ("F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "C64", "X", "", 3)
                        ]
                    ),
                    "shape": st.sampled_from(
                        [{"shape": one} for one in ([], [0], [2**31, 2**31], [2**63], [-1], [10**30], shape[::-1], "x")]
                    ),
                    "offsets": st.sampled_from(
                        [
                            {"data_offsets": one}
                            for one in ([0, 0], [4, 0], [-4, 0], [0, len(data)], [0, 10**30], [2**63, 2**63 + 4], None)
                        ]
                        + [{"data_offsets": header[other]["data_offsets"]}]
                    ),
                }[kind]
            ),
        }
    return weights_of(header, data)


def with_length(text, data):
    return len(text).to_bytes(8, "little") + text + data


@given(data=st.data())
@examples(32)
def test_any_weights(ends_well, room, models, little_text, with_file, data):
    folder = models(data.draw(st.sampled_from(["llama", "gpt2", "qwen3_moe"])))
    copy = with_file(folder, WEIGHTS, data.draw(damaged_weights(folder)))
    output = room / "weights" / "out"
    ends_well(*work(data.draw(st.sampled_from(WORK)), copy, little_text, output), output=output)
    shutil.rmtree(output, ignore_errors=True)


@given(data=st.data())
@examples(30)
def test_any_index(ends_well, room, models, little_text, with_file, data):
    folder = models("llama")
    names = [name for name in read_weights(folder)[0] if name != "__metadata__"]
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, "model-1.safetensors")}
    copy = with_file(folder, INDEX, data.draw(broken([index])))
    (copy / WEIGHTS).rename(copy / "model-1.safetensors")
    output = room / "index" / "out"
    ends_well(*work(data.draw(st.sampled_from(WORK)), copy, little_text, output), output=output)
    shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize(
    "file",
    [
        "../x.safetensors", "/etc/x.safetensors", "..\\x.safetensors", "C:x.safetensors", "./model.safetensors",
        "a\x00.safetensors", "a\n.safetensors", "a" * 300 + ".safetensors", "ü" * 200 + ".safetensors",
        "\ud800.safetensors",
    ],
)  # fmt: skip
def test_an_index_with_a_name_that_is_none(refused, copy_of, models, little_text, tmp_path, file):
    folder = copy_of(models("llama"))
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    assert "not a safetensors file next to it" in refused(*work("slice", folder, little_text, tmp_path / "o" / "out"))


@pytest.mark.parametrize("content", [DEEPER, {"weight_map": DEEP}, {"weight_map": {"x": LONG_NUMBER}}])
def test_an_index_that_exhausts_a_parser(refused, copy_of, models, little_text, tmp_path, content):
    folder = copy_of(models("llama"))
    (folder / WEIGHTS).unlink()
    (folder / INDEX).write_bytes(as_bytes(content))
    assert "index" in refused(*work("slice", folder, little_text, tmp_path / "o" / "out"))


def test_a_tensor_of_a_kind_that_cannot_be_checked(ends_well, copy_of, models, little_text, tmp_path):
    folder = copy_of(models("llama"))
    header, data = read_weights(folder)
    start, end = header["model.norm.weight"]["data_offsets"]
    # half of the bytes, so that the length does not give it away
    header["model.norm.weight"] |= {"dtype": "F8_E4M3", "shape": [end - start]}
    (folder / WEIGHTS).write_bytes(weights_of(header, data))
    ends_well(*work("slice", folder, little_text, tmp_path / "o" / "out"), output=tmp_path / "o" / "out")


def test_what_a_measured_checkpoint_lacks_is_not_made_up(refused, copy_of, models, little_text):
    folder = copy_of(models("llama"))
    header, data = read_weights(folder)
    header["elsewhere"] = header.pop("model.norm.weight")
    (folder / WEIGHTS).write_bytes(weights_of(header, data))
    for kind in ("eval", "generate"):
        sentence = refused(*work(kind, folder, little_text, None))
        assert "lacks 1 tensor (model.norm.weight)" in sentence


def test_an_adapter_of_another_model_is_refused(refused, copy_of, models, little_text, tmp_path):
    folder = copy_of(models("llama"))
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(models("gpt2"))}))
    assert "adapter_config.json" in refused(*work("slice", folder, little_text, tmp_path / "o" / "out"))
    assert "adapter_config.json" in refused(*work("eval", folder, little_text, None))


# tokenizer, generation config, and what else lies there


OTHER_FIELDS = (
    "tokenizer_class", "model_max_length", "truncation", "padding", "normalizer", "pre_tokenizer", "bos_token",
    "unk_token", "added_tokens_decoder", "extra_special_tokens", "auto_map", "max_length", "num_beams", "eos_token_id",
    "pad_token_id", "cache_implementation", "suppress_tokens",
)  # fmt: skip


@given(data=st.data())
@examples(30)
def test_any_tokenizer_or_generation_config(ends_well, room, models, little_text, with_file, data):
    folder = models("llama")
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json", "generation_config.json"]))
    copy = with_file(folder, name, data.draw(broken([json.loads((folder / name).read_text())], OTHER_FIELDS)))
    output = room / "tokenizer" / "out"
    ends_well(*work(data.draw(st.sampled_from(WORK)), copy, little_text, output), output=output)
    shutil.rmtree(output, ignore_errors=True)


def test_a_tokenizer_that_loads_and_cannot_read(refused, copy_of, models, little_text):
    folder = edit(copy_of(models("llama")), "tokenizer_config.json", model_max_length="tokenizers")
    assert "tokenizer" in refused(*work("eval", folder, little_text, None))


def replace(path, kind, outside):
    """Put something in the place of a file that is no file, or no small one."""
    content = path.read_bytes() if path.exists() else b"{}"
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "nowhere":
        path.symlink_to(path.name)
    elif kind == "huge":
        with path.open("wb") as file:
            file.truncate(3 << 30)  # without a block on the disk
    elif kind == "outside":
        outside.write_bytes(content)
        path.symlink_to(outside)


KINDS = ("pipe", "folder", "endless", "nowhere", "huge", "outside")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "file",
    [CONFIG, INDEX, "tokenizer.json", "generation_config.json", CARD, RECORD, "LICENSE.txt", "model-2.safetensors"],
)
def test_what_is_no_file_or_no_small_one(ends_well, copy_of, models, little_text, tmp_path, file, kind):
    folder = copy_of(models("llama"))
    replace(folder / file, kind, tmp_path / "outside")
    output = tmp_path / "outputs" / "out"
    ends_well("inspect", folder)
    ends_well("estimate", folder)
    if file in (INDEX, "tokenizer.json", "generation_config.json", RECORD):
        ends_well(*work("eval", folder, little_text, None))
    ends_well(*work("slice", folder, little_text, output), output=output)


@pytest.mark.parametrize("file", ["tokenizer.json", "LICENSE-of-mine", "generation_config.json", "chat_template.jinja"])
def test_a_slice_takes_nothing_over_from_outside_of_the_model(refused, copy_of, models, little_text, tmp_path, file):
    folder = copy_of(models("llama"))
    replace(folder / file, "outside", tmp_path / "secret")
    output = tmp_path / "outputs" / "out"
    assert f"{file} of copy links to something outside" in refused(
        *work("slice", folder, little_text, output), output=output
    )


def test_links_into_the_cache_of_the_hub_are_those_of_the_model(ends_well, models, little_text, tmp_path):
    snapshot, blobs = tmp_path / "models--x" / "snapshots" / "0", tmp_path / "models--x" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in models("llama").iterdir():
        shutil.copy(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert ends_well(*work("slice", snapshot, little_text, tmp_path / "out")).exit_code == 0


# records and cards of slices


@given(data=st.data())
@examples(40)
def test_any_record_of_a_slice(ends_well, room, measured, little_text, with_file, data):
    copy = with_file(measured["slice"], RECORD, data.draw(broken([measured["record"]], ("results", "curve", "x"))))
    about_slice(ends_well, data, copy, room, measured, little_text)


CARDS = [{"license": "mit", "tags": ["a"], "language": ["en"], "model-index": None, "base_model": "a/b"}]


@given(data=st.data())
@examples(16)
def test_any_card_of_a_slice(ends_well, room, measured, little_text, with_file, data):
    text = (measured["slice"] / CARD).read_bytes()
    front = b"---\n" + data.draw(damaged(CARDS)) + b"\n---\n" + text.split(b"---\n", 2)[2]
    copy = with_file(measured["slice"], CARD, data.draw(st.one_of(torn([text]), st.just(front))))
    about_slice(ends_well, data, copy, room, measured, little_text, is_card=True)


def about_slice(ends_well, data, folder, room, measured, little_text, is_card=False):
    output = room / "about" / "out"
    rows = ("--perplexity", little_text, "--seq-len", "32", "--limit", "2")
    commands = [
        ("card", folder),
        ("card", folder, "--curve", room / "curve.json"),
        ("inspect", folder, "--format", "json"),
        ("estimate", folder, "--format", "json"),
        ("eval", folder, *rows, "--record", "--format", "json"),
        ("eval", folder, *rows, "--baseline", measured["model"], "--record"),
        work("slice", folder, little_text, output),
    ]
    if not is_card:
        commands.append(("verify", folder, "--format", "json"))
    ends_well(*data.draw(st.sampled_from(commands)), output=output)
    shutil.rmtree(output, ignore_errors=True)


@pytest.mark.parametrize("value", [None, 3, "x", [], {"model": 3}])
def test_a_record_whose_source_is_no_source(ends_well, copy_of, measured, little_text, value):
    folder = edit(copy_of(measured["slice"]), RECORD, source=value)
    assert ends_well("inspect", folder, "--format", "json").exit_code == 0
    assert ends_well(*work("eval", folder, little_text, None)).exit_code == 0
    assert ends_well("verify", folder).exit_code == 1


def test_a_damaged_record_is_said_before_anything_is_measured(refused, copy_of, measured, little_text):
    folder = edit(copy_of(measured["slice"]), RECORD, hidden_size="x")
    sentence = refused("eval", folder, "--perplexity", little_text, "--record", "--seq-len", "2")
    assert "not the folder of a slice" in sentence


def test_tags_that_are_no_tags(refused, copy_of, measured):
    folder = copy_of(measured["slice"])
    path = folder / CARD
    before = path.read_text().replace("license: other", "license: other\ntags: [[1]]").replace("tags:\n", "x:\n")
    path.write_text(before)
    assert "cannot be rewritten" in refused("card", folder)
    assert path.read_text() == before


# cards of models


@given(data=st.data())
@examples(40)
def test_any_card_of_a_model(ends_well, room, models, with_file, data):
    figure = {
        "name": "x",
        "results": [
            {"dataset": {"name": "wikitext2", "type": "x"}, "metrics": [{"type": "perplexity", "value": 8.5}]},
            {"dataset": {"name": "piqa"}, "metrics": [{"type": "acc", "value": 0.7}]},
        ],
    }
    front = data.draw(damaged([{"license": "mit", "language": "en", "model-index": [figure]}], ("license",)))
    copy = with_file(models("llama"), CARD, b"---\n" + front + b"\n---\n# A model\n")
    ends_well("estimate", copy, "--format", "json")


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 10)
)


FIGURES = "model-index: [{{results: [{{dataset: {{name: {}}}, metrics: [{{type: {}, value: {}}}]}}]}}]"


@pytest.mark.parametrize(
    "front",
    [
        BOMB + FIGURES.format("*a9", "*a9", 3),
        FIGURES.format("wikitext2", "perplexity", "9" * 400),
        "x: " + "[" * 50_000,
        "x: [" + "1, " * 200_000 + "1]",
        "\n" * 900_000,
        "? [a]\n: b",
    ],
)
def test_a_card_that_takes_for_ever_to_read(ends_well, copy_of, models, front):
    folder = copy_of(models("llama"))
    (folder / CARD).write_text(f"---\n{front}\n---\n")
    assert ends_well("estimate", folder, "--format", "json").exit_code == 0


# curves, results, spectra, schedules, texts


@given(data=st.data())
@examples(24)
def test_any_curves(ends_well, room, measured, data):
    path = room / "damaged-curve.json"
    path.write_bytes(data.draw(broken([measured["curve"]])))
    model = measured["model"]
    commands = [
        ("estimate", model, "--curve", path, "--format", "json"),
        ("estimate", model, "--curve", path),
        ("card", room / "slice40", "--curve", path),
    ]
    ends_well(*data.draw(st.sampled_from(commands)))


@given(data=st.data())
@examples(100)
def test_any_results(ends_well, room, measured, data):
    path = room / "damaged-results.json"
    documents, paths = measured["documents"], measured["results"]
    number = data.draw(st.integers(0, len(documents) + 1))
    whole = [*documents, measured["sweep"], measured["both"]][number]
    path.write_bytes(data.draw(broken([whole])))
    others = [one for index, one in enumerate(paths) if index != number] if number < len(documents) else []
    words = data.draw(st.sampled_from([(), ("--format", "json"), ("-o", room / "fitted.json")]))
    done = ends_well("fit", *others, path, *words)
    if "-o" in words and done.exit_code == 0:
        content = (room / "fitted.json").read_text()
        json.loads(content, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


@given(data=st.data())
@examples(60)
def test_any_spectrum(ends_well, room, measured, data):
    path = room / "damaged-spectrum.json"
    path.write_bytes(data.draw(broken([measured["spectrum"]])))
    ends_well("estimate", measured["model"], "--spectrum", path, "--dense-perplexity", "9", "--format", "json")


@given(data=st.data())
@examples(40)
def test_any_schedule(ends_well, room, models, data):
    path = room / "schedule.json"
    path.write_bytes(data.draw(broken([{"blocks": [[40, 40], [36, 36]], "head": 64}])))
    ends_well("slice", models("llama"), "--method", "slicegpt", "--schedule", path, "--dry-run", "--format", "json")


@given(data=st.data())
@examples(40)
def test_any_text_or_questions(ends_well, room, models, data):
    path = room / "damaged.jsonl"
    lines = st.lists(
        damaged([{"text": "a b c d e f g h"}, {"query": "a b", "choices": ["c", "d e"], "gold": 0}]), max_size=3
    )
    good = b'{"text": "the stream reads the basis", "query": "the", "choices": ["stream", "basis"], "gold": 1}'
    path.write_bytes(b"\n".join([good] * 4 + data.draw(lines)))
    option = data.draw(st.sampled_from(["--perplexity", "--tasks"]))
    ends_well("eval", models("llama"), option, path, "--seq-len", "16", "--limit", "2", "--format", "json")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("curves", 0, "dense"), 10**400),
        (("curves", 0, "points", 0, "sparsity"), 10**400),
        (("curves", 0, "points", 0, "sparsity"), 1e-300),
        (("curves", 0, "points", 0, "value"), 1e308),
        (("curves", 0, "points", 0, "stderr"), -1),
        (("curves", 0, "points", 0, "dim"), "x"),
        (("curves", 0, "points"), "x"),
        (("curves", 0, "settings"), ["x"]),
        (("curves", 0, "reason"), DEEP),
        (("curves", 1, "chance"), math.nan),
        (("curves", 0, "model"), "\x1b[31m"),
        (("curves",), [{}] * 1000),
        (("curves", 0, "points"), [{"sparsity": 0.1, "value": 9}] * 10_000),
    ],
)
def test_curves_that_cannot_be(refused, ends_well, copy_of, tmp_path, measured, path, value):
    file = tmp_path / "curve.json"
    file.write_bytes(as_bytes(changed(measured["curve"], path, value)))
    refused("estimate", measured["model"], "--curve", file)
    ends_well("card", copy_of(measured["slice"]), "--curve", file)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("dense", "perplexity"), 3),
        (("dense", "perplexity", "text.jsonl"), False),
        (("dense", "perplexity", "text.jsonl", "value"), 0.5),
        (("dense", "perplexity", "text.jsonl", "value"), 1),
        (("dense", "tasks"), "x"),
        (("dense", "tasks", "questions.jsonl", "chance"), {"a": 1}),
        (("dense", "hidden_size"), 0),
        (("dense", "hidden_size"), 10**400),
        (("points", 0, "hidden_size"), math.nan),
        (("points", 0, "dim"), 0.5),
        (("points", 0, "dim"), math.inf),
        (("points", 0, "source"), "/etc/passwd"),
        (("points", 0, "evaluation"), 10**12),
        (("points", 0, "calibration"), "48"),
        (("points", 0, "method"), None),
        (("points", 0, "perplexity", "text.jsonl", "value"), "9"),
        (("points", 0, "perplexity", "text.jsonl", "bits_per_byte"), math.inf),
    ],
)
def test_results_that_cannot_be(refused, tmp_path, measured, path, value):
    file = tmp_path / "results.json"
    file.write_bytes(as_bytes(changed(measured["sweep"], path, value)))
    refused("fit", file)


@pytest.mark.parametrize("change", [("dim", math.inf), ("dim", 0.5), ("fisher", None), ("fisher", {"refit": 10**400})])
def test_a_spectrum_that_cannot_be(refused, tmp_path, measured, change):
    file = tmp_path / "spectrum.json"
    file.write_bytes(as_bytes(changed(measured["spectrum"], ("spectrum", 0, change[0]), change[1])))
    assert "is not a spectrum" in refused("estimate", measured["model"], "--spectrum", file)


@pytest.mark.parametrize("line", [{"text": "\ud800"}, {"text": LONG_NUMBER}, DEEPER, {"text": 3}])
def test_a_line_that_is_no_text(refused, tmp_path, models, line):
    file = tmp_path / "text.jsonl"
    file.write_bytes(as_bytes({"text": "a b c"}) + b"\n" + as_bytes(line))
    assert "Line 2" in refused("eval", models("llama"), "--perplexity", file)


def test_a_line_ends_at_the_end_of_the_line_only(ends_well, tmp_path, models):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"text": "one\u2028two\x85three " * 20}, ensure_ascii=False), encoding="utf-8")
    assert ends_well(*work("eval", models("llama"), file, None)).exit_code == 0


@pytest.mark.parametrize("line", [DEEPER, {"query": "a", "choices": ["\ud800", "b"], "gold": 0}, {"gold": LONG_NUMBER}])
def test_a_line_that_is_no_question(refused, tmp_path, models, line):
    file = tmp_path / "questions.jsonl"
    file.write_bytes(as_bytes(line))
    assert "Line 1" in refused("eval", models("llama"), "--tasks", file)


def test_names_with_what_a_table_takes_for_markup_are_shown_as_they_are(ends_well, tmp_path, models):
    file = nonsense_text(tmp_path / "[b] :smile: [red].jsonl", documents=20)
    done = ends_well("eval", models("llama"), "--perplexity", file, "--seq-len", "16", "--limit", "2")
    assert "[b] :smile: [red].jsonl" in done.stdout


# a disk that becomes full


class FullDisk:
    """Counts the writes below a folder, and lets all after some number of them fail."""

    def __init__(self, folder, most):
        self.folder, self.most, self.writes = str(folder), most, 0

    def write(self):
        self.writes += 1
        if self.writes > self.most:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def opened(self, real, path, mode="r", *rest, **named):
        file = real(path, mode, *rest, **named)
        is_here = isinstance(path, (str, os.PathLike)) and os.fspath(path).startswith(self.folder)
        return FullFile(file, self) if is_here and set(mode) & set("wax+") else file


class FullFile:
    """A file on it."""

    def __init__(self, file, disk):
        self._file, self._disk = file, disk

    def write(self, content):
        self._disk.write()
        return self._file.write(content)

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()


@pytest.fixture
def full_disk():
    """Return a function that fills the disk of a folder after some writes, by Python, the system or safetensors."""
    import safetensors.torch
    from safetensors import SafetensorError

    def fill(patch, folder, most):
        disk = FullDisk(folder, sys.maxsize if most is None else most)
        real_open, real_copy, real_save = io.open, os.sendfile, safetensors.torch.save_file

        def copy(target, *rest):
            if str(Path(f"/proc/self/fd/{target}").readlink()).startswith(disk.folder):
                disk.write()
            return real_copy(target, *rest)

        def save(tensors, path, *rest, **named):
            if str(path).startswith(disk.folder):
                try:
                    disk.write()
                except OSError as error:
                    # the words of safetensors 0.8
                    text = f"Error while serializing: I/O error: {error.strerror} (os error {error.errno})"
                    raise SafetensorError(text) from None
            real_save(tensors, path, *rest, **named)

        def open_file(*arguments, **named):
            return disk.opened(real_open, *arguments, **named)

        patch.setattr(builtins, "open", open_file)
        patch.setattr(io, "open", open_file)
        patch.setattr(os, "sendfile", copy)
        patch.setattr(safetensors.torch, "save_file", save)
        return disk

    return fill


def contents_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def with_card(room, models):
    """A model with a perplexity on its card, so that its slices have a plot."""
    folder = Path(shutil.copytree(models("llama"), room / "with-card"))
    figure = "{dataset: {name: wikitext2, type: x}, metrics: [{type: perplexity, value: 9.5}]}"
    (folder / CARD).write_text(f"---\nlicense: mit\nmodel-index: [{{name: x, results: [{figure}]}}]\n---\n")
    return folder


@pytest.mark.parametrize(("kind", "shards"), [("slice", ("--max-shard-size", "50KB")), ("published", ())])
def test_a_slice_on_a_disk_that_becomes_full(
    refused, ends_well, with_card, measured, little_text, full_disk, monkeypatch, tmp_path, kind, shards
):
    output = tmp_path / "outputs" / "out"
    words = (*work(kind, with_card, little_text, output), *shards, "--no-cache")

    def run_with(most, *more):
        with monkeypatch.context() as patch:
            patch.setenv("SLICECLI_JOURNAL_SECONDS", "0")  # a snapshot after every block
            disk = full_disk(patch, tmp_path / "outputs", most)
            if most is None:
                assert ends_well(*words).exit_code == 0
            else:
                assert "disk filled up" in refused(*words, *more)
        return disk.writes

    count = run_with(None)
    assert count > 40
    # the first writes are of journal and weights, the last of what else is in a folder, of plot, record and card
    for most in sorted({0, 1, 5, count // 3, count // 2, *range(count - 5, count)}):
        shutil.rmtree(output, ignore_errors=True)
        is_new = most % 2 == 0
        if not is_new:
            shutil.copytree(measured["slice"], output)
        before = contents_of(tmp_path / "outputs")
        run_with(most, *([] if is_new else ["--overwrite"]))
        assert contents_of(tmp_path / "outputs") == before
        assert [path.name for path in (tmp_path / "outputs").iterdir()] == ([] if is_new else ["out"])


@pytest.mark.parametrize("most", [0, 1, 2])
def test_a_card_with_curves_on_a_disk_that_becomes_full(refused, room, copy_of, measured, full_disk, monkeypatch, most):
    folder = copy_of(measured["slice"])
    curve = json.loads((room / "curve.json").read_text())
    del curve["curves"][1:]
    (room / "one-curve.json").write_text(json.dumps(curve))
    before = contents_of(folder)
    full_disk(monkeypatch, folder, most)
    assert "disk filled up" in refused("card", folder, "--curve", room / "one-curve.json")
    assert contents_of(folder) == before


def test_a_cache_on_a_full_disk_costs_no_slice(ends_well, models, little_text, full_disk, monkeypatch, tmp_path):
    monkeypatch.setenv("SLICECLI_CACHE", str(tmp_path / "cache"))
    disk = full_disk(monkeypatch, tmp_path / "cache", 0)
    done = ends_well(*work("slice", models("llama"), little_text, tmp_path / "out"))
    assert done.exit_code == 0, done.output
    assert disk.writes > 0
    assert contents_of(tmp_path / "cache") == {}


@pytest.mark.parametrize("command", ["fit", "eval"])
def test_results_on_a_full_disk(refused, measured, little_text, full_disk, monkeypatch, tmp_path, command):
    output = tmp_path / "results.json"
    output.write_text("old")
    full_disk(monkeypatch, tmp_path, 0)
    words = {"fit": ("fit", *measured["results"]), "eval": work("eval", measured["model"], little_text, None)}[command]
    assert "disk filled up" in refused(*words, "-o", output)
    assert contents_of(tmp_path) == {Path("results.json"): b"old"}


def test_a_file_that_the_system_lets_grow_no_further(models, little_text, tmp_path):
    limit = 20_000  # a snapshot is larger
    resource = pytest.importorskip("resource")
    output = tmp_path / "outputs" / "out"
    done = subprocess.run(
        [sys.executable, "-m", "slicecli", "-q", *map(str, work("slice", models("llama"), little_text, output))],
        env={**os.environ, "SLICECLI_JOURNAL_SECONDS": "0", "SLICECLI_CACHE": str(tmp_path / "cache")},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "File too large" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert list((tmp_path / "outputs").iterdir()) == []


# what an interrupted run has left


@pytest.fixture(scope="module")
def interrupted(room, models, little_text):
    """The folder with an unfinished slice, and the command that goes on with it."""
    from click.testing import CliRunner

    from slicecli.cli import group
    from slicecli.slicing.journal import FileJournal

    output = room / "interrupted" / "out"
    words = [str(word) for word in work("slice", models("llama"), little_text, output)] + ["--no-cache", "--resume"]
    saved = FileJournal.offer

    def offer(journal, phase, position, content):
        saved(journal, phase, position, content)
        if phase.startswith("refit") and position == 1:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLICECLI_JOURNAL_SECONDS", "0")
        patch.setattr(FileJournal, "offer", offer)
        CliRunner().invoke(group, words, prog_name="slicecli")
    assert (output.parent / ".out.incomplete" / ".journal" / "state.json").is_file()
    return output, words, Path(shutil.copytree(output.parent, room / "interrupted-copy"))


def test_an_interrupted_run_goes_on(ends_well, interrupted):
    output, words, whole = interrupted
    shutil.rmtree(output.parent)
    shutil.copytree(whole, output.parent)
    assert ends_well(*words).exit_code == 0
    assert ends_well("verify", output).exit_code == 0


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.json", lambda content: content.replace(b'"results"', b'"result"')),
        ("state.json", lambda content: content.replace(b'"number": ', b'"number": "x", "n": ')),
        ("state.json", lambda content: re.sub(rb'"file": "[0-9]+', b'"file": "../1', content)),
        ("state.json", lambda content: re.sub(rb'"missing": .*', b'"missing": [3]}', content)),
        ("*.safetensors", lambda content: content[: len(content) // 2]),
        ("*.safetensors", lambda content: None),
        ("../model.safetensors", lambda content: content[:1000]),
        ("../model.safetensors", lambda content: content[:100] + b"x" + content[101:]),
        ("../model.safetensors", lambda content: content + b"x" * 10**6),
    ],
)
def test_what_an_interrupted_run_left_and_was_damaged(refused, ends_well, interrupted, file, damage):
    output, words, whole = interrupted
    shutil.rmtree(output.parent)
    shutil.copytree(whole, output.parent)
    path = next((output.parent / ".out.incomplete" / ".journal").glob(file))
    content = damage(path.read_bytes())
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    assert "Leave out --resume" in refused(*words)
    assert not output.exists()
    assert ends_well(*words[:-1]).exit_code == 0
    assert ends_well("verify", output).exit_code == 0
