"""The model card of a slice: what it is, how it loads, what changed, how it was made.

What a base model's card says is another's text. Only a licence and languages are taken from it, and only where
they look like what they should be.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

__all__ = ["render_card"]

_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})?|multilingual")


def render_card(record: dict[str, Any], source_folder: Path, command: str) -> str:
    """Return the text of a slice's README.md.

    Args:
        record: The slice's record.
        source_folder: Folder of the dense model, whose card may state a licence and languages.
        command: The command that makes the slice again.
    """
    from huggingface_hub import ModelCardData

    inherited = _inherited(source_folder)
    source = record["source"]
    data = ModelCardData(
        base_model=source["model"] if source["commit"] else None,
        base_model_relation="finetune" if source["commit"] else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["slicecli", "sliced", "pruned"],
        **inherited,
    )
    return f"---\n{data.to_yaml()}\n---\n\n{_body(record, command, 'license' in inherited)}"


def _inherited(folder: Path) -> dict[str, Any]:
    """Take licence and languages from the base model's card, where they are well formed."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(folder / "README.md").data.to_dict()
    except Exception:  # no card, or one that is not valid: then nothing is inherited
        return {}
    inherited: dict[str, Any] = {}
    for key in ("license", "license_name"):
        value = data.get(key)
        if isinstance(value, str) and _LICENSE.fullmatch(value):
            inherited[key] = value
    link = data.get("license_link")
    if isinstance(link, str) and re.fullmatch(r"(https://)?[\w./%-]{1,200}", link):
        inherited["license_link"] = link
    languages = data.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if isinstance(languages, list) and all(isinstance(x, str) and _LANGUAGE.fullmatch(x) for x in languages):
        inherited["language"] = languages
    return inherited


def _body(record: dict[str, Any], command: str, has_license: bool) -> str:
    source, calibration = record["source"], record["calibration"]
    name, dim, hidden_size = source["model"], record["dim"], record["hidden_size"]
    parameters, size = record["parameters"], record["bytes"]
    commit = f" at commit `{source['commit']}`" if source["commit"] else ""
    license_note = (
        "" if has_license else "\nThe licence of the base model is not stated in its card; find it out before use.\n"
    )
    trust = ", trust_remote_code=True" if record["needs_remote_code"] else ""
    versions = ", ".join(f"{package} {number}" for package, number in record["versions"].items())
    return f"""\
# {name.rpartition("/")[2]}, sliced to hidden size {dim}

This is `{name}`{commit} with its hidden size sliced from {hidden_size} to {dim} by slicecli
{record["slicecli_version"]}. {_method_sentence(record)}
{license_note}
## Use

{_layout_sentence(record)}

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("PATH_OR_REPOSITORY", dtype="auto"{trust})
tokenizer = AutoTokenizer.from_pretrained("PATH_OR_REPOSITORY"{trust})
```

## Before and after

| | dense | slice |
|---|---|---|
| hidden size | {hidden_size} | {dim} |
| parameters | {parameters["dense"]:,} | {parameters["sliced"]:,} |
| bytes of weights | {size["dense"]:,} | {size["sliced"]:,} |

{_energy_sentence(record)}

## How it was made

```
{command}
```

Calibration: `{calibration["text"]}`, {calibration["samples"]} rows of {calibration["sequence_length"]} tokens, seed
{calibration["seed"]}, SHA-256 of the ids `{calibration["sha256"]}`. Versions: {versions}. `slicecli.json` has the whole
record, with the SHA-256 of each weight file.

A slice is worse than the model it comes from; measure it on your own task before you rely on it.
"""


def _method_sentence(record: dict[str, Any]) -> str:
    if record["method"] == "refit":
        return (
            "Every matrix that reads or writes the residual stream\nwas refitted by least squares; nothing was trained."
        )
    return (
        "The stream is projected on the principal directions of each\n"
        "place it is read at, as published ([SliceGPT](https://arxiv.org/abs/2401.15024)); nothing was refitted or "
        "trained."
    )


def _layout_sentence(record: dict[str, Any]) -> str:
    model_type = record["source"]["model_type"]
    if record["layout"] == "custom-code":
        return (
            f"It is a `{model_type}` model with a narrower residual stream than that class can describe, so it brings\n"
            "`configuration_slicecli.py` and `modeling_slicecli.py`, which need torch and transformers only: read them "
            "before you\ntrust them. After `import slicecli` transformers takes the installed ones instead, and the "
            "flag is not needed. Made with\n"
            f"transformers {record['versions']['transformers']}."
        )
    if record["needs_remote_code"]:
        return "It runs the code of its base model, which lies beside the weights: read it before you trust it."
    return f"It is a stock `{model_type}` checkpoint: no custom code is needed."


def _energy_sentence(record: dict[str, Any]) -> str:
    kept = record["energy"]["kept"]
    if record["method"] == "refit":
        return f"The basis keeps {kept:.2%} of the energy of the normalised residual stream on the calibration text."
    return (
        f"The bases keep {kept:.2%} of the energy of the residual stream on the calibration text, the mean over places."
    )
