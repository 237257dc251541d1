"""The model card: what it says, what it keeps, and that nothing of others does anything in it."""

from __future__ import annotations

import copy
import json
import re

import pytest
import yaml
from markdown_it import MarkdownIt

from slicecli.errors import OutputError
from slicecli.family import serving
from slicecli.family.serving import SliceKind, Verdict
from slicecli.hub.card import Card, read_card, render_card
from slicecli.hub.metadata import base_model_of, inherited_metadata
from slicecli.hub.writing import enter_results, own_files, write_card
from slicecli.runtime.markdown import code, code_block, heading, prose

HOSTILE = (
    "</code><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "a|b\n| c | d |",
    "`` ` ```",
    "```\n# heading\n```",
    "[x](javascript:alert(1))",
    "![x](https://evil.example/x.png)",
    "https://evil.example www.evil.example a@evil.example",
    "\n<!-- slicecli: end -->\n",
    "x\n---\nlicense: mit\n---",
    "{{ 7 * 7 }}{% include 'x' %}",
    "abc\u202edef\u2066\x1b[31m",
    "*_~#>+-!\\",
    "",
    "&lt;b&gt; <b>",
)
ALLOWED_LINKS = re.compile(
    r"https://(arxiv\.org/abs/[\d.]+|docs\.vllm\.ai|github\.com/ggml-org/llama\.cpp|huggingface\.co/[\w.-]+/[\w.-]+)"
    r"|slicecli\.json|plots/prediction\.png"
)
FIGURE = {
    "value": 12.5, "nll": 2.5, "stderr": 0.25, "tokens": 4000, "seq_len": 32, "bits_per_byte": 1.0,
    "rows_sha256": "a" * 64, "text_sha256": None,
}  # fmt: skip
TASK = {
    "metric": "acc", "value": 0.5, "stderr": 0.05, "chance": 0.25, "samples": 100, "num_fewshot": 0, "metrics": {},
    "requests_sha256": "b" * 64, "questions_sha256": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def one_slice(checkpoints, text_file, tmp_path_factory):
    """A slice of a tiny model, made by the command line."""
    from click.testing import CliRunner

    from slicecli.cli import group

    output = tmp_path_factory.mktemp("card") / "slice"
    words = ["slice", checkpoints(), "--dim", "36", "-o", output, "--calibration", text_file, "--samples", "8"]
    result = CliRunner().invoke(group, [str(word) for word in [*words, "--seq-len", "32"]])
    assert result.exit_code == 0, result.output
    return output


@pytest.fixture
def slice_copy(one_slice, tmp_path):
    import shutil

    return shutil.copytree(one_slice, tmp_path / "slice")


@pytest.fixture
def record(one_slice):
    return json.loads((one_slice / "slicecli.json").read_text())


def tokens_of(text):
    """Parse a card's body as the Hub does: with HTML let through, and tables."""
    body = re.sub(r"\A---\n.*?\n---\n", "", text, flags=re.DOTALL)
    found = []
    for token in MarkdownIt("commonmark", {"html": True}).enable("table").parse(body):
        found += [token, *(token.children or [])]
    return found


def metadata_of(text):
    return yaml.safe_load(re.match(r"---\n(.*?)\n---\n", text, flags=re.DOTALL)[1])


def check_is_harmless(text):
    tokens = tokens_of(text)
    html = [token.content.strip() for token in tokens if token.type in {"html_block", "html_inline"}]
    assert all(re.fullmatch(r"<!-- slicecli [\w.+-]+: begin -->|<!-- slicecli: end -->", one) for one in html), html
    links = [token.attrGet("href") or token.attrGet("src") for token in tokens if token.type in {"link_open", "image"}]
    assert all(ALLOWED_LINKS.fullmatch(link) for link in links), links
    columns, rows = [], []
    for token in tokens:
        if token.type == "tr_open":
            columns = []
        elif token.type in {"td_open", "th_open"}:
            columns.append(token)
        elif token.type == "tr_close":
            rows.append(len(columns))
    assert set(rows) <= {2, 3, 7}, rows


def test_the_card_of_a_slice_is_harmless_and_whole(one_slice, record):
    text = (one_slice / "README.md").read_text()
    check_is_harmless(text)
    card = read_card(one_slice)
    assert (card.before, card.after) == ("", "")
    assert render_card(record, card) == text
    assert "model-index" not in card.metadata
    assert card.metadata["license"] == "other"
    assert "states no licence" in text
    assert set(record["files"]) == set(own_files(one_slice)) - set(record["weights"])


@pytest.mark.parametrize(
    ("verdict", "sentence", "is_shown"),
    [
        ("correct", "gave the same logits in vLLM (package 1).", True),
        ("wrong", "**Do not use vLLM**", False),
        ("refused", "It does not run in vLLM (package 1).", False),
        (None, "Other programs were not tried with this class.", False),
    ],
)
def test_a_program_is_named_as_it_was_found(record, monkeypatch, verdict, sentence, is_shown):
    kind = SliceKind.of_record(record)
    found = [] if verdict is None else [Verdict("a slice", kind, "vLLM", "package 1", verdict, None, "")]
    monkeypatch.setattr(serving, "all_verdicts", lambda: tuple(found))
    text = render_card(record)
    assert sentence in text
    assert ("vllm serve" in text) == is_shown
    assert "llama-cli" not in text


@pytest.mark.parametrize(("dim", "kind"), [(512, "Q4_K_M"), (448, "Q8_0"), (432, None)])
def test_the_lines_for_llama_cpp_go_on_to_a_type_that_fits_the_dim(record, monkeypatch, dim, kind):
    found = [Verdict("a slice", SliceKind.of_record(record), "llama.cpp", "package 1", "correct", 1.0, "")]
    monkeypatch.setattr(serving, "all_verdicts", lambda: tuple(found))
    text = render_card(record | {"dim": dim, "layout": "stock", "written_type": "llama"})
    if kind is None:
        assert "llama-quantize" not in text
    else:
        assert f"llama-quantize slice.gguf slice-{kind}.gguf {kind}\nllama-cli -m slice-{kind}.gguf" in text


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_names_of_others_are_shown_and_do_nothing(record, text):
    record["source"] |= {"model": text, "model_type": text}
    widths = {"hidden_size": 64, "dim": 48, "mlp_size": 90, "mlp_dim": 80}
    record["ancestry"] = [{**record["source"], "method": text, **widths, "slicecli_version": "0", "trained_tokens": 1}]
    record["calibration"] |= {"text": text}
    record["command"] = text
    record["versions"] = {text or "x": text}
    record["weights"] = {text: "0" * 64}
    task = {**TASK, "metric": text}
    record["results"] = {"perplexity": {text: FIGURE}, "tasks": {text: task}, "dense": {"tasks": {text: task}}}
    estimate = {
        "dim": 36, "sparsity": 0.25, "parameters": None, "value": 13.0, "low": 12.0, "high": 14.0,
        "is_outside": False, "paper": None, "measured": None,
    }  # fmt: skip
    record["predictions"] = [
        {
            "quantity": "perplexity", "evaluation": text, "dense": {"value": 10.0, "source": text}, "chance": None,
            "relation": "odds", "formula": text, "parameters": {text: {"value": 1.0, "stderr": None}},
            "valid_sparsity": [0.1, 0.3], "basis": text, "measured_slices": 1, "notes": [text], "estimates": [estimate],
        }
    ]  # fmt: skip
    rendered = render_card(record)
    check_is_harmless(rendered)
    assert Card(rendered).body is not None
    assert render_card(record, Card(rendered)) == rendered
    # what can be seen of it is seen: the longest run of letters of the name is somewhere
    word = max(re.findall(r"[A-Za-z]+", text), key=len, default="")
    assert word in rendered
    for letter in "\u202e\u2066\x1b":
        assert letter not in rendered


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_text_of_others_renders_as_itself(text):
    visible = re.sub(r"[\u202e\u2066\x1b]", "", " ".join(text.split()))
    (inline,) = [token for token in MarkdownIt().parse(code(text)) if token.type == "inline"]
    assert [token.type for token in inline.children] == ["code_inline"]
    assert inline.children[0].content.strip().replace("¦", "|") == visible
    (block,) = MarkdownIt().parse(code_block(text, "python"))
    assert block.type == "fence"
    sentence = MarkdownIt("commonmark", {"html": True}).parse(f"So: {prose(text)}")
    (inline,) = [token for token in sentence if token.type == "inline"]
    assert {token.type for token in inline.children} <= {"text", "text_special", "entity"}
    assert "".join(token.content for token in inline.children) == f"So: {visible}".rstrip()
    assert "\n" not in heading(text)


@pytest.fixture
def owned(slice_copy):
    """The path of a card in which the owner has written: metadata, and text before and after ours."""
    path = slice_copy / "README.md"
    text = path.read_text()
    begin = text.index("<!-- slicecli")
    mine = text[:begin].replace("- sliced\n", "- sliced\n- mine\n").replace("license: other", "license: mit")
    mine = mine.replace("\n---\n", "\nwidget: []\nmodel-index: []\n---\n", 1)
    path.write_text(mine + "\nBefore, I say.\n\n" + text[begin:] + "\nAnd after.\n")
    write_card(slice_copy)
    return path


def test_what_the_owner_writes_stays(owned):
    card = read_card(owned.parent)
    assert (card.before, card.after) == ("Before, I say.", "And after.")
    assert "mine" in card.metadata["tags"]
    assert card.metadata["license"] == "mit"
    assert card.metadata["widget"] == []


def test_an_index_without_measured_figures_goes(owned):
    assert "model-index" not in read_card(owned.parent).metadata


def test_a_card_that_is_written_again_is_the_same(owned):
    once = owned.read_text()
    write_card(owned.parent)
    assert owned.read_text() == once


def test_a_card_without_our_marks_is_the_owner_s_all_of_it(slice_copy):
    (slice_copy / "README.md").write_text("---\nlicense: mit\n---\n\n# My own\n")
    write_card(slice_copy)
    assert read_card(slice_copy).before == "# My own"
    assert read_card(slice_copy).body


def test_a_card_whose_metadata_cannot_be_read_is_left_alone(slice_copy):
    path = slice_copy / "README.md"
    path.write_text("---\nlicense: [\n---\n")
    with pytest.raises(OutputError, match="Fix the YAML"):
        write_card(slice_copy)
    assert path.read_text() == "---\nlicense: [\n---\n"


MEASURED = {"wikitext2": {**FIGURE, "value": 15.5}}


@pytest.fixture
def curves(record):
    """The curves through a slice of perplexity 15.5."""
    from slicecli.estimation.results import fit_results, series_of

    name = record["source"]["model"]
    settings = {"limit": None, "num_fewshot": None, "sequence_length": 32, "seed": 1, "dtype": "float32", "rows": {}}
    dense = {
        "model": name, "model_type": "llama", "revision": None, "perplexity": {"wikitext2": FIGURE}, "tasks": {},
        "parameters": 1000, "hidden_size": 48, "dim": 48, "sparsity": 0.0, "method": None,
        "source": {"model": name, "commit": None, "content": None}, "calibration": None, "evaluation": settings,
    }  # fmt: skip
    method, calibration = record["method"], record["calibration"]
    own = {**dense, "perplexity": MEASURED, "dim": 36, "sparsity": 0.25, "method": method, "calibration": calibration}
    return [one.to_json() for one in fit_results(series_of([dense, own]))]


@pytest.fixture
def measured(slice_copy, curves):
    """A slice whose figures have been entered, with the text of its card."""
    enter_results(slice_copy, MEASURED, {"piqa": TASK}, {"perplexity": {"wikitext2": FIGURE}}, curves)
    return slice_copy, (slice_copy / "README.md").read_text()


def test_measured_figures_go_to_the_index_and_predictions_do_not(measured):
    (index,) = metadata_of(measured[1])["model-index"]
    found = {
        (result["dataset"]["name"], result["dataset"]["type"], metric["type"]): metric["value"]
        for result in index["results"]
        for metric in result["metrics"]
    }
    assert found == {("wikitext2", "Salesforce/wikitext", "perplexity"): 15.5, ("piqa", "piqa", "acc"): 0.5}


def test_measured_figures_are_shown_beside_those_of_the_model(measured):
    _, text = measured
    check_is_harmless(text)
    assert "| 12.500 ± 0.250 | 15.500 ± 0.250 |" in text
    assert "| not measured | 0.5000 ± 0.0500 |" in text


def test_a_curve_is_drawn_on_the_card(measured):
    folder, text = measured
    assert (folder / "plots" / "prediction.png").read_bytes().startswith(b"\x89PNG")
    assert "](plots/prediction.png)" in text


def test_predictions_go_through_what_was_measured(measured):
    new = json.loads((measured[0] / "slicecli.json").read_text())
    (prediction,) = new["predictions"]
    rows = {row["dim"]: row for row in prediction["estimates"]}
    assert rows[36]["measured"] == pytest.approx(15.5)
    assert rows[36]["value"] == pytest.approx(15.5, rel=1e-6)
    assert set(rows) >= {one["dim"] for one in new["other_dims"]}
    assert all(row["low"] <= row["value"] <= row["high"] for row in rows.values())


def test_a_curve_through_more_slices_is_not_replaced_by_one_through_this_slice(measured, curves):
    folder, _ = measured
    longer = copy.deepcopy(curves)
    longer[0]["points"].append({**longer[0]["points"][0], "dim": 24, "sparsity": 0.5, "value": 40.0})
    longer[0] |= {"relation": "power"}
    enter_results(folder, {}, {}, None, longer)
    enter_results(folder, {}, {}, None, curves)
    kept = json.loads((folder / "slicecli.json").read_text())["curve"]["curves"]
    assert [len(one["points"]) for one in kept] == [2]


@pytest.mark.parametrize(
    ("yaml_text", "inherited"),
    [
        ("license: llama3\nlanguage: en", {"license": "llama3", "language": ["en"]}),
        (
            "license: other\nlicense_name: my-terms\nlicense_link: LICENSE",
            {"license": "other", "license_name": "my-terms", "license_link": "LICENSE"},
        ),
        ("license: '<script>'\nlanguage: [en, '[x](y)']", {}),
        ("license: {a: b}\nlanguage: {a: b}", {}),
        ("license: mit\nlicense_link: javascript:alert(1)", {"license": "mit"}),
        ("license: |\n  mit\n  base_model: evil/model", {}),
        ("base_model: evil/model\ntags: [x]", {}),
        ("language: [no, en]", {}),  # YAML reads the first as false
    ],
)
def test_of_another_card_only_well_formed_licences_and_languages_are_taken(tmp_path, yaml_text, inherited):
    (tmp_path / "README.md").write_text(f"---\n{yaml_text}\n---\n\n# Text\n")
    assert inherited_metadata(tmp_path) == inherited


def test_the_base_model_is_the_nearest_on_the_hub(record):
    hub = {"model": "owner/model", "commit": "0" * 40}
    record["source"] |= {"model": "folder", "commit": None}
    assert base_model_of(record) is None
    record["ancestry"] = [{"model": "other", "commit": None}, hub]
    assert base_model_of(record) == "owner/model"
    record["source"] |= {"model": "owner/x](y)", "commit": "0" * 40}
    assert base_model_of(record) == "owner/model"


def test_the_command_prints_the_card(run, slice_copy):
    result = run("card", slice_copy, "--print")
    assert result.exit_code == 0, result.output
    assert result.stdout.strip() == (slice_copy / "README.md").read_text().strip()


def test_the_command_needs_a_slice(run, tmp_path):
    result = run("card", tmp_path)
    assert result.exit_code == 1
    assert "Pass the folder of a slice" in result.stderr


def test_the_command_needs_a_curve_of_this_slice(run, slice_copy, tmp_path):
    (tmp_path / "curve.json").write_text('{"curves": [{"model": "other", "method": "refit"}]}')
    result = run("card", slice_copy, "--curve", tmp_path / "curve.json")
    assert result.exit_code == 2
    assert "no curve of" in result.stderr
