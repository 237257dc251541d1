"""Recognises what is not a whole dense model of transformers: adapters, quantised weights, files of other programs.

Only the config and the names of files are looked at, so that the true cause is said before anything is downloaded.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from slicecli.errors import SourceError, UnsupportedModelError, shown
from slicecli.runtime.inputs import is_repository_name
from slicecli.runtime.json import read_json

__all__ = ["FOREIGN_FILES", "check_is_whole", "check_not_quantised", "refuse_without_config"]

ADAPTER_FILE = "adapter_config.json"
# what quantisers write beside config.json, or wrote before transformers had a field for it
QUANTISATION_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
# the same in config.json, where it is not that of transformers
QUANTISATION_FIELDS = {"quantization": "MLX", "compression_config": "compressed-tensors"}
FOREIGN_FILES = (ADAPTER_FILE, *QUANTISATION_FILES)
# files of models without config.json, by what their names match, and what they belong to
OTHER_FORMATS = {
    "*.gguf": "in the format of llama.cpp",
    "params.json": "in the format in which Llama and Mistral were first released",
    "model_index.json": "part of a diffusers pipeline",
    "*.nemo": "in the format of NeMo",
}
MOST_SHOWN = 3


def check_is_whole(name: str, folder: Path) -> None:
    """Refuse an adapter such as LoRA, which holds changes to another model."""
    path = folder / ADAPTER_FILE
    if not path.exists():
        return
    content = read_json(path)
    base = content.get("base_model_name_or_path") if isinstance(content, dict) else None
    is_known = isinstance(base, str) and is_repository_name(base) and not Path(base).exists()
    merged = "Merge them into that model with merge_and_unload() of peft, save the result, and pass its folder"
    has_weights = (folder / "config.json").exists()
    raise UnsupportedModelError(
        f"{name} has an {ADAPTER_FILE}: it only holds changes to another model" + (f", {base}." if is_known else "."),
        f"{merged}; or remove the file if this is the merged model." if has_weights else f"{merged}.",
    )


def check_not_quantised(name: str, folder: Path, fields: Mapping[str, Any]) -> None:
    """Refuse quantised weights, by what the config or a file beside it says."""
    remedy = "Slice the original weights, then quantise the slice."
    for field, program in QUANTISATION_FIELDS.items():
        if isinstance(fields.get(field), dict) and fields[field]:
            raise UnsupportedModelError(f"{name} is quantised ({program}: config.json has `{field}`).", remedy)
    quantization = fields.get("quantization_config")
    if quantization:
        method = quantization.get("quant_method", "unknown method") if isinstance(quantization, dict) else "?"
        raise UnsupportedModelError(f"{name} is quantised ({shown(method).strip(chr(39))}).", remedy)
    for file, program in QUANTISATION_FILES.items():
        if (folder / file).exists():
            raise UnsupportedModelError(
                f"{name} is quantised ({program}: it has a {file}).",
                f"{remedy} If these are the original weights, remove {file}.",
            )


def refuse_without_config(name: str, folder: Path, files: Collection[str], remedy: str = "") -> None:
    """Refuse a folder or repository without config.json, saying what it is instead."""
    check_is_whole(name, folder)
    for pattern, what in OTHER_FORMATS.items():
        for file in fnmatch.filter(sorted(files), pattern):
            raise UnsupportedModelError(
                f"{name} has no config.json; its {shown(file)} is {what}.",
                f"Pass the transformers checkpoint it was made from, or convert it to one. {remedy}".strip(),
            )
    inner = sorted(path.parent.name for path in folder.glob("*/config.json"))
    if inner:
        more = f" and {len(inner) - MOST_SHOWN} more" if len(inner) > MOST_SHOWN else ""
        usual = f"Pass one of its subfolders that has one: {', '.join(inner[:MOST_SHOWN])}{more}."
    else:
        usual = "Pass the folder of a transformers model."
    raise SourceError(f"{name} has no config.json.", f"{usual} {remedy}".strip())
