"""`slicecli estimate`, `fit` and where dense figures come from."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys

import pytest

from slicecli.errors import RequestError
from slicecli.estimation.dense_figures import accuracies, dense_perplexity
from slicecli.estimation.intervals import Prediction, published_calibration_shift, shifted
from slicecli.estimation.relations import Dense
from slicecli.family.dimensions import Dimensions
from slicecli.family.plugins import plugins
from slicecli.family.schedule import PublishedSizes

NAME = "meta-llama/Meta-Llama-3-8B-Instruct"
LLAMA_3_8B = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
    "tie_word_embeddings": False,
}


@pytest.fixture
def llama(tmp_path):
    folder = tmp_path / "llama-3"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(LLAMA_3_8B))
    return folder


@pytest.fixture
def estimate(run, llama):
    """Estimate in this process and return the JSON."""

    def call(*words, model=llama):
        result = run("-q", "estimate", model, "--format", "json", *words)
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return call


def refused(result):
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return result.stderr


def test_counts_are_exact(estimate):
    refit = estimate("--dim", "3072")
    assert refit["dense"]["parameters"] == 8_030_261_248
    assert refit["dense"]["bytes"] == 2 * 8_030_261_248
    assert refit["dense"]["bytes_by_dtype"]["float32"] == 4 * 8_030_261_248
    assert refit["estimates"][0]["parameters"] == 6_022_695_936
    assert refit["layout"] == "stock"
    published = estimate("--dim", "3072", "--method", "slicegpt")
    assert published["estimates"][0]["parameters"] == 6_775_635_968
    assert published["layout"] == "custom-code"
    # keys and values of 8 heads of 128 in 32 blocks, two bytes each, however wide the stream is
    assert refit["estimates"][0]["kv_cache_bytes_per_token"] == 2 * 8 * 128 * 32 * 2
    served = estimate("--dim", "3072", "--batch", "4", "--length", "1000")["estimates"][0]
    assert served["kv_cache_bytes"] == 4 * 1000 * served["kv_cache_bytes_per_token"]
    assert served["serve_bytes"] == served["bytes"] + served["kv_cache_bytes"] + served["working_bytes"]


def test_the_papers_relation_is_what_is_printed(estimate):
    document = estimate("--dim", "3072,2048", "--dense-perplexity", "8.0", "--relation", "paper")
    for one in document["estimates"]:
        predicted = one["perplexity"]
        assert predicted["value"] == pytest.approx(8.0 ** (4096 / one["dim"]))
        assert predicted["paper"] == predicted["value"]
        assert predicted["low"] <= predicted["value"] <= predicted["high"]
        assert predicted["relation"] == "paper"


def test_human_and_json_say_the_same(run, llama, estimate):
    words = ["--dim", "3584,3072", "--dense-perplexity", "8", "--dense-accuracy", "piqa=0.79", "--device", "h100-sxm"]
    document = estimate(*words)
    printed = run("estimate", llama, *words).stdout
    for one in document["estimates"]:
        assert f"{one['parameters']:,}" in printed
        assert f"{one['speed_up']['decode']:.2f} x" in printed
        for name, digits in (("value", 2), ("low", 2), ("high", 2)):
            assert f"{one['perplexity'][name]:.{digits}f}" in printed
        assert f"{one['accuracy']['piqa']['value']:.3f}" in printed
    assert document["dense"]["accuracy"]["piqa"]["chance"] == 0.5


@pytest.mark.parametrize("method", ["refit", "slicegpt"])
def test_targets_answer_with_a_legal_dim(estimate, method):
    family = plugins().adapters["llama"]
    dimensions = Dimensions(family, LLAMA_3_8B)
    sizes = dimensions if method == "refit" else PublishedSizes(dimensions)
    words = ["--method", method, "--dense-perplexity", "8"]
    (fewer,) = estimate("--target-params", "7B", "--shape", "width", *words)["estimates"]
    assert fewer["parameters"] <= 7e9 < sizes.parameters(fewer["dim"] + 128)
    (smaller,) = estimate("--memory", "12GiB", "--shape", "width", *words)["estimates"]
    assert smaller["bytes"] <= 12 * 2**30 < 2 * sizes.parameters(smaller["dim"] + 128)
    (good,) = estimate("--max-perplexity", "10", *words)["estimates"]
    (next_one,) = estimate("--dim", str(good["dim"] - 128), *words)["estimates"]
    assert good["perplexity"]["value"] <= 10 < next_one["perplexity"]["value"]
    for one in (fewer, smaller, good):
        assert one["legal"]
        assert one["dim"] in sizes.legal_dims()
    swept = estimate("--sweep", "0.1:0.5:0.1", *words)["estimates"]
    assert [one["sparsity"] for one in swept] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5], abs=1 / 64)
    assert all(one["legal"] for one in swept)


def test_an_illegal_dim_is_said_with_its_neighbours(run, llama, estimate):
    document = estimate("--dim", "3000", "--write-as", "own")
    (one,) = document["estimates"]
    assert not one["legal"]
    assert one["nearest_legal"] == [2976, 3008]
    assert "3000 is not legal" in document["notes"][0]
    assert "is not below" in refused(run("estimate", llama, "--dim", "4096"))
    assert "positive" in refused(run("estimate", llama, "--dim", "0"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dim", "3072", "--memory", "12GiB"), "chosen more than once"),
        (("--max-perplexity", "9"), "which is unknown"),
        (("--max-perplexity", "7", "--dense-perplexity", "8"), "No slice is predicted"),
        (("--target-params", "1M"), "No slice of this model fits in"),
        (("--dense-perplexity", "0.5"), "not above 1"),
        (("--dense-accuracy", "piqa=79"), "not between 0 and 1"),
        (("--dense-accuracy", "piqa"), "equals sign"),
        (("--chance", "piqa=nan"), "not a number"),
        (("--sweep", "0.5:0.1:0.1"), "not a range from"),
        (("--sweep", "0.1-0.5"), "LO:HI:STEP"),
        (("--relation", "hearsay", "--dense-perplexity", "8"), "Available: paper"),
        (("--relation", "paper", "--dense-accuracy", "mine=0.7"), "chance level"),
        (("--measured", "3072=9"), "require the dense perplexity"),
        (("--measured", "5000=9", "--dense-perplexity", "8"), "cannot have a slice"),
        (("--measured", "wide=9", "--dense-perplexity", "8"), "not a dim"),
        (("--curve", "missing.json"), "no file"),
        (("--device", "abacus"), "h100-sxm"),
        (("--device", "h100-sxm", "--tflops", "10"), "already sets"),
        (("--plot", "picture.txt", "--dense-perplexity", "8"), ".png"),
        (("--slice-head",), "slicegpt method"),
        (("--batch", "0"), "positive"),
    ],
)
def test_what_cannot_be_is_refused(run, llama, words, message):
    assert message in refused(run("estimate", llama, *words))


def test_beyond_what_is_published_there_is_a_warning(run, llama):
    result = run("estimate", llama, "--dim", "1024", "--dense-perplexity", "8")
    assert "Nothing is published beyond s = 0.6" in result.stderr
    assert "no data at this s" in result.stdout
    near = run("estimate", llama, "--dim", "3072", "--dense-perplexity", "8")
    assert "beyond" not in near.stderr
    assert "no data at this s" not in near.stdout


def test_measured_slices_narrow_the_interval(estimate):
    def width(*words):
        (one,) = estimate("--dim", "3072", "--dense-perplexity", "6.24", *words)["estimates"]
        return one["perplexity"]["high"] - one["perplexity"]["low"], one["perplexity"]["source"]

    (none, published), (one, _), (two, given) = (
        width(),
        width("--measured", "3264=11.31"),
        width("--measured", "3264=11.31", "--measured", "2880=19.42"),
    )
    assert none > one > two
    assert "published" in published
    assert "2 measured slices (given)" in given


def test_another_text_than_that_of_the_calibration_costs_more(estimate):
    def predicted(*words):
        (one,) = estimate("--dim", "3072", "--dense-perplexity", "7", *words)["estimates"]
        return one["perplexity"]

    own, other = predicted("--text", "c4", "--calibration", "c4"), predicted("--text", "c4")
    assert other["value"] > own["value"]
    assert other["high"] > own["high"]


@pytest.mark.parametrize("method", ["refit", "slicegpt"])
def test_more_calibration_text_loses_less(estimate, method):
    words = ["--dim", "3072", "--dense-perplexity", "8", "--method", method]
    values = [
        estimate(*words, "--samples", str(samples))["estimates"][0]["perplexity"]["value"]
        for samples in (16, 128, 1024)
    ]
    assert values == sorted(values, reverse=True)
    assert values[0] > 1.05 * values[2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--samples", "-5", "--seq-len", "-5"], "Use --samples 1 or more"),
        (["--seq-len", "0"], "Use --seq-len 2 or more"),
        (["--seq-len", "1000000"], "exceeds the limit"),
    ],
)
def test_calibration_text_that_slice_would_refuse_is_refused(run, llama, words, message):
    assert message in refused(run("estimate", llama, "--dim", "3072", "--dense-perplexity", "8", *words))


def test_a_slice_is_not_predicted_to_be_better_than_a_dense_model_that_is_worse_than_a_guess(estimate):
    predicted = estimate("--dim", "3072", "--dense-perplexity", "1e7")["estimates"][0]["perplexity"]
    assert predicted["low"] == pytest.approx(1e7, rel=1e-3)


def test_however_little_calibration_text_there_is_no_prediction_is_worse_than_a_guess():
    dense = Dense(math.log(8), ceiling=math.log(32000))
    near = Prediction(math.log(4000), math.log(2000), math.log(8000), "free-odds", False)
    predicted = shifted(near, dense, published_calibration_shift(0.01))
    assert predicted.low <= predicted.value == predicted.high == dense.ceiling


def test_nothing_is_predicted_silently(run, llama, estimate):
    result = run("estimate", llama, "--dim", "3072")
    assert "Quality cannot be predicted" in result.stderr
    document = estimate("--dim", "3072")
    assert "perplexity" not in document["dense"]
    assert "perplexity" not in document["estimates"][0]
    told = run("estimate", llama, "--dim", "3072", "--dense-perplexity", "8")
    assert "8 (given)" in told.stdout


# where dense figures come from

CARD = """---
model-index:
- name: tiny
  results:
  - task: {type: text-generation}
    dataset: {name: WikiText-2, type: wikitext}
    metrics:
    - {type: perplexity, value: 9.5}
  - dataset: {name: ARC-Challenge, type: ai2_arc}
    metrics:
    - {type: acc, value: 51.0}
    - {type: acc_norm, value: 53.5}
  - dataset: {name: piqa}
    metrics:
    - {type: acc, value: 0.8}
    - {type: f1, value: "high"}
---
# A card
"""


def test_dense_figures_come_from_flag_card_record_and_table_in_this_order(tmp_path):
    published = "meta-llama/Llama-2-7b-hf"
    assert dense_perplexity(tmp_path, published, "wikitext2", None).source == "published: arXiv:2401.15024 T1"
    assert accuracies(tmp_path, published, {})["piqa"].value == pytest.approx(0.7911)
    results = {"perplexity": {"wikitext2": {"value": 7.7}}, "tasks": {"piqa": {"value": 0.7, "metric": "acc"}}}
    (tmp_path / "slicecli.json").write_text(json.dumps({"results": results}))
    assert dense_perplexity(tmp_path, published, "wikitext2", None).value == 7.7
    assert accuracies(tmp_path, published, {})["piqa"].source == "slicecli.json"
    (tmp_path / "README.md").write_text(CARD)
    assert dense_perplexity(tmp_path, published, "wikitext2", None).value == 9.5
    found = accuracies(tmp_path, published, {"piqa": 0.1})
    assert (found["piqa"].value, found["piqa"].source) == (0.1, "given")
    assert (found["arc_challenge"].value, found["arc_challenge"].source) == (0.535, "the model's card")
    assert dense_perplexity(tmp_path, published, "wikitext2", 4.0).source == "given"
    assert dense_perplexity(tmp_path, published, "ptb", None) is None


@pytest.mark.parametrize(
    "card",
    [
        "---\nmodel-index: !!python/object/apply:os.system ['true']\n---\n",
        "---\nmodel-index:\n- results: 7\n- 3\n---\n",
        "---\nmodel-index: {results: [1]}\n---\n",
        "---\n- a list\n---\n",
        "---\n[unclosed\n---\n",
        "no metadata",
        "---\nmodel-index:\n- results:\n  - dataset: 5\n    metrics: [{type: perplexity, value: .nan}, 7]\n---\n",
        "---\nmodel-index:\n- results:\n  - dataset: {name: c4}\n    metrics: [{type: perplexity, value: true}]\n---\n",
    ],
)
def test_a_strange_card_says_nothing(tmp_path, card):
    (tmp_path / "README.md").write_text(card)
    assert dense_perplexity(tmp_path, "me/model", "wikitext2", None) is None
    assert accuracies(tmp_path, "me/model", {}) == {}


# what it costs to start


@pytest.mark.parametrize("more", [[], ["--measured", "3264=9.9", "--dense-accuracy", "piqa=0.8", "--device", "l4"]])
def test_estimate_imports_nothing_heavy_and_asks_no_network(llama, more):
    code = (
        "import sys, socket\n"
        "def refuse(*_): raise AssertionError('the network was asked')\n"
        "socket.socket.connect = refuse\n"
        "from slicecli.cli import group\n"
        f"group(['estimate', {str(llama)!r}, '--dense-perplexity', '8', *{more!r}], standalone_mode=False)\n"
        "names = 'torch transformers accelerate datasets lm_eval matplotlib scipy pandas pydantic'\n"
        "heavy = set(names.split())\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def by_hub(*words):
    """Run the command line as a process of its own, which uses the Hub of the fixture."""
    command = [sys.executable, "-m", "slicecli", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_of_a_hub_model_only_what_describes_it_is_fetched(checkpoints, loopback_hub):
    loopback_hub.upload(NAME, checkpoints("llama-3"))
    loopback_hub.upload(NAME, {"README.md": CARD.encode()})
    done = by_hub("estimate", NAME, "--dim", "36", "--format", "json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["dense"]["perplexity"] == {"value": 9.5, "text": "wikitext2", "source": "the model's card"}
    fetched = {request.path.rpartition("/")[2] for request in loopback_hub.requests if "/resolve/" in request.path}
    assert fetched <= {"config.json", "README.md", "slicecli.json"}
    assert "config.json" in fetched


def test_a_curve_is_taken_from_a_slice_on_the_hub(run, results, loopback_hub):
    files = results(*(eval_document(dim, odds(dim)) for dim in (4096, *DIMS)))
    curves = json.loads(run("fit", *files, "--format", "json").stdout)["curves"]
    config = {"config.json": json.dumps(LLAMA_3_8B).encode()}
    loopback_hub.upload(NAME, config)
    loopback_hub.upload("me/slice", {**config, "slicecli.json": json.dumps({"curve": {"curves": curves}}).encode()})
    command = ["estimate", NAME, "--dim", "3200", "--format", "json", "--curve"]
    done = by_hub(*command, "me/slice")
    assert done.returncode == 0, done.stderr
    (one,) = json.loads(done.stdout)["estimates"]
    assert one["perplexity"]["value"] == pytest.approx(odds(3200), rel=1e-6)
    assert "(me/slice)" in one["perplexity"]["source"]
    without = by_hub(*command, NAME)
    assert without.returncode == 2
    assert "has no curve" in without.stderr


def test_a_type_that_no_plugin_knows_is_one_sentence(run, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_3_8B, "model_type": "lama"}))
    result = run("estimate", tmp_path)
    assert result.exit_code == 1
    assert "llama" in result.stderr


# pictures


def test_a_plot_is_a_picture_and_the_same_each_time(run, llama, tmp_path):
    words = ["--dense-perplexity", "8", "--dense-accuracy", "piqa=0.79", "--measured", "3264=11"]
    for name in ("one.png", "two.png", "one.svg", "two.svg"):
        assert run("estimate", llama, *words, "--plot", tmp_path / name).exit_code == 0
    first = (tmp_path / "one.png").read_bytes()
    assert first.startswith(b"\x89PNG")
    assert first == (tmp_path / "two.png").read_bytes()
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    text = (tmp_path / "one.svg").read_text()
    assert str(tmp_path) not in text
    assert "nothing to draw" not in text
    assert "no prediction to plot" in refused(run("estimate", llama, "--plot", tmp_path / "three.png"))
    assert not (tmp_path / "three.png").exists()


def test_the_validation_is_drawn_and_printed(run, tmp_path):
    words = ["relations", "--validate", "--quantity", "perplexity", "--max-sparsity", "0.31"]
    result = run(*words, "--plot", tmp_path / "validation.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "validation.png").read_bytes().startswith(b"\x89PNG")
    lines = json.loads(run(*words, "--format", "json").stdout)
    for line in lines:
        if line["family"] == "all":
            assert f"{line['coverage']:.1%}" in result.stdout
    assert "Add --validate" in refused(run("relations", "--plot", tmp_path / "x.png"))
    names = {one["name"] for one in json.loads(run("relations", "--format", "json").stdout)}
    assert {
        "paper",
        "power",
        "odds",
        "exponent",
        "free-power",
        "free-odds",
        "linear",
        "decay",
        "from-perplexity",
    } <= names


# results files and curves


def eval_document(dim, perplexity, model="me/big", size=4096, method="refit", tasks=None, **settings):
    figure = {
        "value": perplexity, "nll": math.log(perplexity), "stderr": 0.02, "tokens": 2047, "seq_len": 2048,
        "bits_per_byte": 1.0, "rows_sha256": "a" * 64, "text_sha256": None,
    }  # fmt: skip
    task = {
        "metric": "acc", "value": tasks, "stderr": 0.01, "chance": 0.5, "samples": 100, "num_fewshot": 0, "metrics": {},
        "requests_sha256": "b" * 64, "questions_sha256": None,
    }  # fmt: skip
    calibration = {
        "text": "wikitext2", "dataset": None, "samples": 128, "sequence_length": 2048, "tokens": 128 * 2048, "seed": 0,
        "sha256": "c" * 64, "text_sha256": None,
    }  # fmt: skip
    usual = {"limit": None, "num_fewshot": None, "sequence_length": 2048, "seed": 1234, "dtype": "float32", "rows": {}}
    return {
        "model": model if dim == size else f"{model}-dim{dim}",
        "model_type": "llama",
        "revision": None,
        "perplexity": {"wikitext2": figure},
        "tasks": {} if tasks is None else {"piqa": task},
        "parameters": dim * 1000,
        "hidden_size": size,
        "dim": dim,
        "sparsity": 1 - dim / size,
        "method": None if dim == size else method,
        "source": {"model": model, "commit": None, "content": None},
        "calibration": None if dim == size else calibration,
        "evaluation": {**usual, **settings},
    }


def odds(dim, dense=6.0, scale=1.3, size=4096):
    return dense * math.exp(scale * (size - dim) / dim)


DIMS = (3840, 3584, 3328, 3072, 2816, 2560)


@pytest.fixture
def results(tmp_path):
    def write(*documents):
        files = []
        for index, document in enumerate(documents):
            files.append(tmp_path / f"result{index}.json")
            files[-1].write_text(json.dumps(document))
        return files

    return write


def test_fit_chooses_prints_and_writes_a_curve_that_estimate_uses(run, llama, results, estimate, tmp_path):
    files = results(eval_document(4096, 6.0), *(eval_document(dim, odds(dim)) for dim in DIMS))
    printed = run("fit", *files, "-o", tmp_path / "curve.json", "--plot", tmp_path / "curve.png")
    assert printed.exit_code == 0, printed.output
    assert "leave-one-out error" in printed.stdout
    document = json.loads((tmp_path / "curve.json").read_text())
    assert document["curve"]["relation"] == "odds"
    assert document["curve"]["parameters"]["c"] == pytest.approx(1.3)
    assert document["curve"]["valid_sparsity"] == pytest.approx([1 - 3840 / 4096, 1 - 2560 / 4096])
    assert len(document["points"]) == 7
    assert {one["relation"] for one in document["curve"]["alternatives"]} >= {"paper", "power", "odds"}
    assert json.loads(run("fit", *files, "--format", "json").stdout) == document
    (one,) = estimate("--curve", str(tmp_path / "curve.json"), "--dim", "3200")["estimates"]
    assert one["perplexity"]["value"] == pytest.approx(odds(3200), rel=1e-6)
    assert "6 measured slices (curve.json)" in one["perplexity"]["source"]
    assert not one["perplexity"]["is_outside"]
    (far,) = estimate("--curve", str(tmp_path / "curve.json"), "--dim", "2048")["estimates"]
    assert far["perplexity"]["is_outside"]

    def relative(prediction):
        return math.log(prediction["high"] / prediction["low"])

    assert relative(far["perplexity"]) > relative(one["perplexity"])
    refusal = refused(run("estimate", llama, "--curve", tmp_path / "curve.json", "--method", "slicegpt"))
    assert "--method refit" in refusal


def test_models_methods_and_settings_make_groups_of_their_own(run, results):
    two_models = results(
        *(eval_document(dim, odds(dim)) for dim in (4096, 3584, 3072)),
        *(eval_document(dim, odds(dim, scale=0.5), model="me/other") for dim in (4096, 3584, 3072)),
        *(eval_document(dim, odds(dim, scale=2.0), method="slicegpt") for dim in (3584, 3072)),
    )
    curves = json.loads(run("fit", *two_models, "--relation", "odds", "--format", "json").stdout)["curves"]
    found = {(one["model"], one["method"]): one["parameters"]["c"] for one in curves}
    assert found == pytest.approx({("me/big", "refit"): 1.3, ("me/other", "refit"): 0.5, ("me/big", "slicegpt"): 2.0})
    # and one set of parameters for all of them, with the error of each group predicted from the others
    shared = {one["relation"]: one for one in json.loads(run("fit", *two_models, "--format", "json").stdout)["shared"]}
    # a model with two groups weighs no more than one with one
    assert shared["odds"]["parameters"] == pytest.approx([(0.5 + (1.3 + 2.0) / 2) / 2])
    assert shared["odds"]["groups"] == 3
    assert shared["paper"]["parameters"] == []
    assert "leave-one-group-out" in run("fit", *two_models).stdout


def test_several_runs_of_a_slice_are_one_point(run, results):
    files = results(
        eval_document(4096, 6.0), eval_document(3072, 8.0), eval_document(3072, 9.0), eval_document(3584, 7.0)
    )
    curve = json.loads(run("fit", *files, "--format", "json").stdout)["curve"]
    assert [point["dim"] for point in curve["points"]] == [3584, 3072]
    assert curve["points"][1]["value"] == pytest.approx(math.sqrt(8.0 * 9.0))


def test_tasks_get_curves_that_may_lean_on_the_perplexity(run, results, estimate, tmp_path):
    def accuracy(dim):
        return 0.8 * math.exp(-0.5 * math.log(odds(dim) / 6.0))

    files = results(*(eval_document(dim, odds(dim), tasks=accuracy(dim)) for dim in (4096, *DIMS)))
    assert run("fit", *files, "-o", tmp_path / "curve.json").exit_code == 0
    curves = {one["quantity"]: one for one in json.loads((tmp_path / "curve.json").read_text())["curves"]}
    assert curves["accuracy"]["relation"] == "from-perplexity"
    assert curves["accuracy"]["parameters"]["r"] == pytest.approx(0.5)
    (one,) = estimate("--curve", str(tmp_path / "curve.json"), "--dim", "3200")["estimates"]
    assert one["accuracy"]["piqa"]["value"] == pytest.approx(accuracy(3200), rel=1e-4)


def test_results_that_do_not_make_a_curve_are_refused(run, results, tmp_path):
    lone = results(eval_document(3072, 9.0))
    assert "not the dense model" in refused(run("fit", *lone))
    other = results(eval_document(4096, 6.0, limit=3), eval_document(3072, 9.0))
    assert "not the dense model" in refused(run("fit", *other))
    for content in ("[]", "{}", "{", '{"perplexity": {"a": {"value": 1}}}'):
        path = tmp_path / "bad.json"
        path.write_text(content)
        assert "bad.json" in refused(run("fit", path)) or "incomplete" in refused(run("fit", path))
    files = results(eval_document(4096, 6.0), eval_document(3072, 9.0))
    assert "Available: paper" in refused(run("fit", *files, "--relation", "hearsay"))


def test_a_curve_file_that_was_changed_by_hand_is_refused(run, llama, results, tmp_path):
    files = results(*(eval_document(dim, odds(dim)) for dim in (4096, 3584, 3072)))
    path = tmp_path / "curve.json"
    assert run("fit", *files, "-o", path).exit_code == 0
    document = json.loads(path.read_text())
    document["curves"][0]["points"][0]["sparsity"] = 7
    path.write_text(json.dumps(document))
    assert "curve is invalid" in refused(run("estimate", llama, "--curve", path))
    path.write_text("{}")
    assert "no curves" in refused(run("estimate", llama, "--curve", path))


def test_the_table_is_readable_in_a_narrow_terminal(run, llama):
    printed = run("estimate", llama, "--dim", "3072", "--dense-perplexity", "8", "--device", "l4").stdout
    tables = [line.rstrip() for line in printed.splitlines() if line.startswith("  ")]
    assert max(len(line) for line in tables) <= 80
    assert re.search(r"3072 +0\.250 +6,022,695,936", printed)


def test_a_measured_accuracy_is_what_the_curve_goes_through(estimate):
    words = ["--dim", "3072,2880", "--dense-accuracy", "piqa=0.81", "--dense-accuracy", "arc_easy=0.8"]
    free = estimate(*words)["estimates"]
    known = estimate(*words, "--measured-accuracy", "piqa:3072=0.60")["estimates"]
    assert known[0]["accuracy"]["piqa"]["value"] == pytest.approx(0.60, abs=1e-4)
    assert known[1]["accuracy"]["piqa"]["value"] < 0.60 < free[1]["accuracy"]["piqa"]["value"]
    width, usual = (one[1]["accuracy"]["piqa"]["high"] - one[1]["accuracy"]["piqa"]["low"] for one in (known, free))
    assert width < 0.12 < usual
    assert known[1]["accuracy"]["arc_easy"] == free[1]["accuracy"]["arc_easy"]


def test_an_accuracy_above_the_dense_one_is_said(run, llama):
    words = ["--dim", "3072", "--dense-accuracy", "piqa=0.7", "--measured-accuracy", "piqa:3584=0.72"]
    assert "piqa passed for dim 3584 is above the dense one" in run("estimate", llama, *words).stderr


def test_an_accuracy_below_chance_is_said(run, llama):
    words = ["--dim", "3072", "--dense-accuracy", "piqa=0.7", "--measured-accuracy", "piqa:3584=0.4"]
    assert "piqa passed for dim 3584 is below chance, 0.5" in run("estimate", llama, *words).stderr


def test_nothing_is_predicted_below_chance(estimate):
    words = ["--dim", "3072,1024", "--dense-accuracy", "piqa=0.55", "--measured-accuracy", "piqa:3584=0.49"]
    for words_for in (words, words[:4]):
        for one in estimate(*words_for)["estimates"]:
            assert 0.5 <= one["accuracy"]["piqa"]["low"] <= one["accuracy"]["piqa"]["value"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--measured-accuracy", "piqa:3072=0.6"], "Pass --dense-accuracy piqa=A"),
        (["--dense-accuracy", "piqa=0.8", "--measured-accuracy", "piqa=0.6"], "Write piqa:3072=0.69"),
        (["--dense-accuracy", "piqa=0.8", "--measured-accuracy", "piqa:3072=60"], "between 0 and 1"),
        (["--dense-accuracy", "piqa=0.8", "--measured-accuracy", "piqa:9000=0.6"], "below 4096"),
    ],
)
def test_measured_accuracies_that_cannot_be_are_refused(run, llama, words, message):
    assert message in refused(run("estimate", llama, "--dim", "3072", *words))


def test_knowledge_is_checked():
    from slicecli.estimation.forecasts import ForecastInputs

    with pytest.raises(RequestError):
        ForecastInputs(measured={5000: 9.0}).check(4096)
    ForecastInputs(measured={3000: 9.0}, chances={"piqa": 0.5}).check(4096)


@pytest.mark.parametrize(
    ("option", "values", "message"),
    [
        ("--measured", ("3072=9", "3072=10"), "Two perplexities for dim 3072"),
        ("--measured-accuracy", ("piqa:3072=0.7", "piqa:3072=0.6"), "Two accuracies on piqa for dim 3072"),
        ("--dense-accuracy", ("piqa=0.8", "piqa=0.7"), "Two dense accuracies on piqa"),
        ("--chance", ("piqa=0.5", "piqa=0.4"), "Two chance levels of piqa"),
    ],
)
def test_a_figure_that_is_given_twice_is_refused(run, llama, option, values, message):
    words = [word for value in values for word in (option, value)]
    assert message in refused(run("estimate", llama, "--dim", "3072", "--dense-perplexity", "8", *words))


# spectra


def write_spectrum(path, scale=1.0, size=4096, **probe):
    entries = [
        {
            "dim": dim,
            "fisher": {"refit": scale * (1 - dim / size) ** 1.7, "slicegpt": scale * (1 - dim / size) ** 1.5},
            "fisher_of_sites": scale * (1 - dim / size) ** 1.6,
        }
        for dim in range(64, size + 1, 64)
    ]
    path.write_text(json.dumps({"hidden_size": size, "spectrum": entries, **probe}))
    return path


@pytest.mark.parametrize("method", ["refit", "slicegpt"])
def test_a_spectrum_predicts_by_its_weight_at_the_dim(estimate, tmp_path, method):
    words = ["--dense-perplexity", "8", "--method", method, "--dim", "3072,3008,2000"]
    document = estimate(*words, "--spectrum", str(write_spectrum(tmp_path / "one.json")))
    constants = set()
    for one in document["estimates"]:
        predicted = one["perplexity"]
        assert predicted["relation"] == "fisher"
        assert predicted["low"] < predicted["value"] < predicted["high"]
        weight = one["sparsity"] ** (1.7 if method == "refit" else 1.5)
        constants.add(round(math.log(predicted["value"] / 8) / weight, 2))
    # the study's constants, see docs/energy.md; a refit gets fewer tokens per unknown here
    (constant,) = constants
    assert constant == pytest.approx({"refit": 0.69 * 1.19, "slicegpt": 2.11}[method], abs=0.05)
    assert "small models" in document["estimates"][0]["perplexity"]["source"]
    assert any("1.3 million" in note for note in document["notes"])
    # twice the weight, twice the loss; and one measured slice replaces the constant
    double = estimate(*words, "--spectrum", str(write_spectrum(tmp_path / "two.json", 2.0)))
    for one, other in zip(document["estimates"], double["estimates"], strict=True):
        ratios = [math.log(each["perplexity"]["value"] / 8) for each in (one, other)]
        assert ratios[1] == pytest.approx(2 * ratios[0])
    spectrum = ["--spectrum", str(tmp_path / "one.json"), "--relation", "fisher"]
    anchored = estimate(*words, *spectrum, "--measured", "3264=9.0")
    for one, loose in zip(anchored["estimates"][:2], document["estimates"][:2], strict=True):
        widths = [
            math.log(each["perplexity"]["high"] / each["perplexity"]["low"]) / math.log(each["perplexity"]["value"] / 8)
            for each in (one, loose)
        ]
        assert widths[0] < widths[1]


def test_more_removed_never_seems_to_cost_less(estimate, tmp_path):
    losses = [{"dim": dim, "nll": 2 + 12 * (1 - dim / 4096) ** 1.6} for dim in (3840, 3072, 2048)]
    path = write_spectrum(tmp_path / "far.json", probe={"dense_nll": 2.0, "projected": losses})
    words = ["--dense-perplexity", "8", "--sweep", "0.1:0.9:0.1", "--spectrum", str(path)]
    values = [one["perplexity"]["value"] for one in estimate(*words)["estimates"]]
    assert values == sorted(values)


def test_a_probe_of_no_narrower_dim_is_refused(run, llama, tmp_path):
    path = write_spectrum(tmp_path / "wide.json", probe={"dense_nll": 2.0, "projected": [{"dim": 4096, "nll": 2.0}]})
    words = ["--dim", "3072", "--dense-perplexity", "8", "--spectrum", str(path)]
    assert "a dim below the hidden size" in refused(run("estimate", llama, *words))


def test_a_probe_predicts_the_refit_by_its_mean_with_the_weight(estimate, tmp_path):
    losses = [{"dim": dim, "nll": 2 + 4 * (1 - dim / 4096) ** 1.6} for dim in (3840, 3072, 2048)]
    path = write_spectrum(tmp_path / "probed.json", probe={"dense_nll": 2.0, "projected": losses})
    words = ["--dense-perplexity", "8", "--dim", "3584,3072,2560", "--spectrum", str(path)]
    for one in estimate(*words)["estimates"]:
        predicted = one["perplexity"]
        assert predicted["relation"] == "probe"
        fisher = one["sparsity"] ** 1.6
        mean = 4**0.3 * fisher * math.exp(-4 * fisher / 8)  # of F and of a loss that is four times as large
        # with 128 x 2048 tokens for 14336 unknowns it loses more than those of the study did
        assert math.log(predicted["value"] / 8) / mean == pytest.approx(0.96 * (1 + 6 / 23.3) / 1.057, abs=0.01)
    more, fewer = (
        [one["perplexity"] for one in estimate(*words, "--samples", samples)["estimates"]] for samples in ("4096", "16")
    )
    for one, other in zip(more, fewer, strict=True):
        lost, lost_with_fewer = ({end: math.log(each[end] / 8) for end in ("value", "high")} for each in (one, other))
        assert lost_with_fewer["value"] / lost["value"] == pytest.approx((1 + 6 / 7.3) / (1 + 6 / 590), rel=0.02)
        assert lost_with_fewer["high"] / lost_with_fewer["value"] > lost["high"] / lost["value"]
    published = estimate(*words, "--method", "slicegpt")
    assert published["estimates"][0]["perplexity"]["relation"] == "fisher"


def test_what_is_no_spectrum_of_this_model_is_refused(run, llama, tmp_path):
    words = ["estimate", llama, "--dense-perplexity", "8", "--spectrum"]
    assert "another model" in refused(run(*words, write_spectrum(tmp_path / "small.json", size=2048)))
    only_dense = '{"hidden_size": 4096, "spectrum": [{"dim": 4096, "fisher": {"refit": 0.0}}]}'
    bad = (
        "{",
        "[]",
        only_dense,
        '{"hidden_size": 4096, "spectrum": []}',
        '{"hidden_size": 4096, "spectrum": [{"dim": 9}]}',
    )
    for content in bad:
        (tmp_path / "bad.json").write_text(content)
        assert "not a spectrum" in refused(run(*words, tmp_path / "bad.json"))
    assert "needs a spectrum" in refused(
        run("estimate", llama, "--dense-perplexity", "8", "--relation", "fisher", "--dim", "3072")
    )
