"""The model card of a slice: what it is, how it loads, what changed, what other dims would give, how it was made.

The card is a function of the record alone, so that it can be written again and checked. What slicecli writes stands
between two marks; text outside of them is its owner's and stays as it is.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from slicecli.errors import OutputError
from slicecli.family.friendly_dims import gguf_type
from slicecli.family.serving import SliceKind, verdicts_on
from slicecli.family.slice_plan import sliced_widths
from slicecli.hub.metadata import base_model_of, card_metadata, is_trained
from slicecli.runtime.markdown import code, code_block, heading, prose
from slicecli.runtime.versions import __version__

__all__ = ["CARD_FILE", "PLOT_FILE", "RECOVERY_PLOT_FILE", "Card", "read_card", "render_body", "render_card"]

CARD_FILE = "README.md"
PLOT_FILE = "plots/prediction.png"
RECOVERY_PLOT_FILE = "plots/recovery.png"
TEMPLATE_FILE = "card.md.jinja"
UNKNOWN_PLACE = "PATH"
_VERDICTS = {
    "correct": "A small slice of this class gave the same logits in {}",
    "wrong": "**Do not use {}**: a small slice of this class ran there and gave other logits",
    "refused": "It does not run in {}",
}
_BEGIN = re.compile(r"<!-- slicecli ([\w.+-]+): begin -->\n")
_END = "\n<!-- slicecli: end -->"
CITATION = """\
@inproceedings{xu2025representation,
  title = {How can representation dimension dominate structurally pruned {LLMs}?},
  author = {Xu, Mingxue and Alazraki, Lisa and Mandic, Danilo P.},
  booktitle = {ICLR 2025 Workshop on Sparsity in LLMs},
  year = {2025},
  note = {arXiv:2503.04377}
}

@inproceedings{ashkboos2024slicegpt,
  title = {{SliceGPT}: Compress Large Language Models by Deleting Rows and Columns},
  author = {Ashkboos, Saleh and Croci, Maximilian L. and do Nascimento, Marcelo Gennari and Hoefler, Torsten and
            Hensman, James},
  booktitle = {International Conference on Learning Representations},
  year = {2024},
  note = {arXiv:2401.15024}
}"""


class Card:
    """A card in its parts.

    Attributes:
        before: The owner's text before what slicecli wrote.
        body: What slicecli wrote; `None` where there is nothing of it.
    """

    def __init__(self, text: str) -> None:
        from huggingface_hub import ModelCard

        card = ModelCard(text, ignore_metadata_errors=False)
        self.metadata: dict[str, Any] = card.data.to_dict()
        self.before, self.body, self.version, self.after = card.text.strip("\n"), None, None, ""
        found = _BEGIN.search(card.text)
        end = card.text.find(_END, found.end()) if found else -1
        if found is not None and end >= 0:
            self.before = card.text[: found.start()].strip("\n")
            self.body = card.text[found.end() : end]
            self.version = found[1]
            self.after = card.text[end + len(_END) :].strip("\n")


def read_card(folder: Path) -> Card | None:
    """Return the card of a folder, `None` where there is none."""
    path = folder / CARD_FILE
    if not path.is_file():
        return None
    try:
        return Card(path.read_text(encoding="utf-8"))
    except Exception as error:  # YAML errors, and what the Hub's client raises for metadata that is none
        raise OutputError(
            f"The card of {folder.name!r} cannot be read: {type(error).__name__}.",
            f"Fix the YAML at the top of {CARD_FILE}, or remove the file.",
        ) from None


def render_card(record: Mapping[str, Any], existing: Card | None = None) -> str:
    """Return the text of a slice's README.md."""
    from huggingface_hub import ModelCardData

    metadata = card_metadata(record)
    before = after = ""
    if existing is not None:
        metadata = merged_metadata(existing.metadata, metadata)
        before, after = existing.before, existing.after
    parts = [
        f"---\n{ModelCardData(ignore_metadata_errors=True, **metadata).to_yaml()}\n---",
        before,
        f"<!-- slicecli {__version__}: begin -->\n{render_body(record)}{_END}",
        after,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def merged_metadata(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> dict[str, Any]:
    """Return a card's metadata with ours in it: tags of both; a licence of the owner's stays where ours is unknown."""
    merged = {**theirs, **ours}
    tags = theirs.get("tags")
    merged["tags"] = list(dict.fromkeys([*ours["tags"], *(tags if isinstance(tags, list) else [])]))
    if ours["license"] == "other":
        merged |= {name: theirs[name] for name in ("license", "license_name", "license_link") if name in theirs}
    if "model-index" not in ours:
        merged.pop("model-index", None)
    return merged


def render_body(record: Mapping[str, Any]) -> str:
    """Return what slicecli writes into a card, as Markdown."""
    name = str(record["source"]["model"])
    place = record["repository"] or UNKNOWN_PLACE
    text: str = _template().render(
        **record,
        name=name.rpartition("/")[2],
        base_model_link=f"[{name}](https://huggingface.co/{name})" if base_model_of(record) == name else code(name),
        widths=" and ".join(sliced_widths(record)),
        change_of_widths=_change_of_widths(record),
        method_sentence=_method_sentence(record),
        layout_sentence=_layout_sentence(record),
        transformers_snippet=_transformers_snippet(place, record["needs_remote_code"]),
        programs=list(_programs(record, place)),
        measured=list(_measured(record)),
        energy_sentence=_energy_sentence(record),
        trainings=list(_trainings(record)),
        recovery_plot=RECOVERY_PLOT_FILE if RECOVERY_PLOT_FILE in record["files"] else "",
        recovery_plot_caption=_recovery_plot_caption(record),
        plot=PLOT_FILE if PLOT_FILE in record["files"] else "",
        command_block=code_block("\n".join(" ".join(one.splitlines()) for one in _commands(record))),
        citation_block=code_block(CITATION, "bibtex"),
    )
    return text.strip("\n")


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("slicecli.hub", "."),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Markdown, not HTML; every text of others passes through one of the filters below
        autoescape=False,
    )
    environment.filters.update(
        code=code,
        heading=heading,
        prose=prose,
        sentence=_sentence,
        thousands=lambda number: f"{number:,}",
        figure=_figure,
    )
    return environment.get_template(TEMPLATE_FILE)


def _figure(value: float, quantity: str) -> str:
    """Return a perplexity or an accuracy as a person reads it."""
    if quantity == "perplexity":
        return f"{value:.2f}" if value < 1000 else f"{value:,.0f}" if value < 1e6 else f"{value:.1e}"
    return f"{value:.3f}"


def _sentence(text: str) -> str:
    """Return a remark as a sentence."""
    return prose(text[:1].upper() + text[1:].rstrip(".") + ".")


def _commands(record: Mapping[str, Any]) -> list[str]:
    return [record["command"], *(one["command"] for one in record.get("recovery", ()))]


def _recovery_plot_caption(record: Mapping[str, Any]) -> str:
    """Say what the plot of the last training shows."""
    if "recovery" in record and record["recovery"][-1]["block_errors"]:
        return "Error of each block on held-out rows before and after it was trained"
    return "Divergence from the teacher on held-out rows against the tokens trained on"


def _trainings(record: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence on each training after slicing."""
    for one in record.get("recovery", ()):
        tokens, teacher = f"{one['tokens']:,} tokens of {code(one['text'])}", code(one["teacher"]["model"])
        if one["mode"] == "blocks":
            how = f"one block after the other on {tokens} to follow the activations of {teacher}"
        else:
            rank = one["lora_rank"]
            what = "all weights" if rank is None else f"low-rank adapters of rank {rank}, then merged"
            how = f"({what}) on {tokens} to predict as {teacher} does"
        yield (
            f"Then it was trained {how}: the mean KL divergence per token on held-out rows of that text fell from "
            f"{one['kl_before']:.4f} to {one['kl_after']:.4f}."
        )


def _measured(record: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Yield the rows of the table of measured figures."""
    for text, figure, cells in _figures(record, "perplexity", "rows_sha256", digits=3):
        what = f"perplexity, {figure['tokens']:,} tokens in rows of {figure['seq_len']}"
        if figure["text_sha256"] is not None and figure["text_sha256"] == record["calibration"]["text_sha256"]:
            what += ", on the text it was calibrated on"
        yield {"what": text, "metric": what, **cells}
    for task, figure, cells in _figures(record, "tasks", "requests_sha256", digits=4):
        chance = "" if figure.get("chance") is None else f", chance {figure['chance']:.3f}"
        what = f"{figure['metric']}, {figure['num_fewshot']} examples, {figure['samples']:,} questions{chance}"
        yield {"what": task, "metric": what, **cells}


def _figures(
    record: Mapping[str, Any], kind: str, digest: str, digits: int
) -> Iterator[tuple[str, Mapping[str, Any], dict[str, str]]]:
    """Yield each text or task, a figure on it, and the cells of its row: dense, before a training, and as it is."""
    results = record["results"]
    untrained = record["recovery"][0]["results"] if "recovery" in record else {}
    own, dense, sliced = (of.get(kind) or {} for of in (results, results.get("dense") or {}, untrained))
    for name, figure in {**sliced, **own}.items():
        before = sliced.get(name)
        if before is not None and before[digest] != figure[digest]:  # on other rows or questions
            before = None
        cells = {"dense": dense.get(name), "sliced": before, "slice": own.get(name)}
        yield name, figure, {column: _cell(one, digits) for column, one in cells.items()}


def _cell(figure: Mapping[str, Any] | None, digits: int) -> str:
    if figure is None or figure.get("value") is None:
        return "not measured"
    error = figure.get("stderr")
    return f"{figure['value']:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def _transformers_snippet(place: str, needs_remote_code: bool) -> str:
    trust = ", trust_remote_code=True" if needs_remote_code else ""
    return code_block(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("{place}", dtype="auto"{trust})\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{place}"{trust})\n'
        'inputs = tokenizer("Once upon a time", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=32)[0]))",
        "python",
    )


def _programs(record: Mapping[str, Any], place: str) -> Iterator[dict[str, str]]:
    """Yield what is known of each program that was given a slice of this class: a sentence, and how to run it there."""
    if record["layout"] == "stock" and record["needs_remote_code"]:  # the class is the repository's own
        return
    flag = " --trust-remote-code" if record["needs_remote_code"] else ""
    snippets = {
        "vLLM": code_block(f"vllm serve {place}{flag}"),
        "llama.cpp": _llama_cpp_snippet(record["repository"], [record["dim"], record["mlp_dim"] or record["dim"]]),
    }
    for client, found in verdicts_on(SliceKind.of_record(record)).items():
        yield {
            "sentence": f"{_VERDICTS[found.verdict].format(client)} ({found.version}).",
            "snippet": snippets.get(client, "") if found.verdict == "correct" else "",
        }


def _llama_cpp_snippet(repository: str | None, widths: Sequence[int]) -> str:
    folder = "PATH" if repository is None else repository.rpartition("/")[2]
    name = "slice" if repository is None else folder
    download = [] if repository is None else [f"hf download {repository} --local-dir {folder}"]
    lines = [
        *download,
        f"python llama.cpp/convert_hf_to_gguf.py {folder} --outfile {name}.gguf",
        f"llama-cli -m {name}.gguf",
    ]
    if kind := gguf_type(*widths):
        lines += [f"llama-quantize {name}.gguf {name}-{kind}.gguf {kind}", f"llama-cli -m {name}-{kind}.gguf"]
    return code_block("\n".join(lines))


def _change_of_widths(record: Mapping[str, Any]) -> str:
    hidden = (
        f"its hidden size (the width of the residual stream) sliced from {record['hidden_size']} to {record['dim']}"
    )
    if record["mlp_dim"] is None:
        return hidden
    channels = f"from {record['mlp_size']} to {record['mlp_dim']} channels"
    is_narrower = record["dim"] < record["hidden_size"]
    return f"{hidden} and its MLPs {channels}" if is_narrower else f"its MLPs sliced {channels}"


def _method_sentence(record: Mapping[str, Any]) -> str:
    was_trained = is_trained(record)
    if record["method"] == "refit":
        removed = "" if record["mlp_dim"] is None else "The MLP channels that cost least to do without were removed. "
        end = "." if was_trained else "; nothing was trained."
        return f"{removed}Every matrix that reads or writes the residual stream was refitted by least squares{end}"
    end = "nothing was refitted." if was_trained else "nothing was refitted or trained."
    return (
        "The residual stream is projected onto its principal directions at each norm site, as published "
        f"([SliceGPT](https://arxiv.org/abs/2401.15024)); {end}"
    )


def _layout_sentence(record: Mapping[str, Any]) -> str:
    model_type = code(record["source"]["model_type"])
    if record["layout"] == "custom-code":
        return (
            f"It is a {model_type} model with a narrower residual stream than the stock class can describe, so "
            "it includes `configuration_slicecli.py` and `modeling_slicecli.py`, which need only torch and "
            "transformers: read them before you trust them. After `import slicecli` transformers uses the installed "
            "classes instead, and the flag is not needed. Made with transformers "
            f"{code(record['versions']['transformers'])}."
        )
    if record["needs_remote_code"]:
        return "It runs the code of its base model, which is stored with the weights: read it before you trust it."
    written_type = code(record["written_type"])
    if written_type == model_type:
        return f"It is a stock {model_type} checkpoint: no custom code is needed."
    return (
        f"It is a stock {written_type} checkpoint: its base model is of type {model_type}, and this class computes the "
        "same. No custom code is needed."
    )


def _energy_sentence(record: Mapping[str, Any]) -> str:
    kept = record["energy"]["kept"]
    trained = ", before it was trained" if "recovery" in record else ""
    if record["method"] == "refit":
        return (
            f"The basis keeps {kept:.2%} of the energy of the normalised residual stream on the calibration "
            f"text{trained}."
        )
    return (
        f"The bases keep {kept:.2%} of the residual stream's energy on the calibration text, averaged over norm "
        f"sites{trained}."
    )
