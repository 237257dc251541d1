"""What transformers reports of loading a checkpoint, judged: what must not be made up, left out or mistaken."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from slicecli.errors import UnsupportedModelError, WeightsError

__all__ = ["check_report", "some_of"]

MOST_NAMED = 3
# endings of the tensors that a method of quantising writes beside or in place of a weight
QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".weight_scale": "FP8",
    ".weight_scale_inv": "FP8",
    ".weight_packed": "compressed-tensors",
    ".scales": "MLX",
}
# what programs put in front of every name when they save a model that they have wrapped
WRAPPERS = {
    "_orig_mod.": "torch.compile",
    "module.": "DataParallel or DeepSpeed",
    "_fsdp_wrapped_module.": "FSDP",
    "base_model.model.": "PEFT",
}
# buffers of old checkpoints, which transformers leaves aside for every class
OLD_BUFFERS = (r"rotary_emb\.inv_freq", r"(^|\.)position_ids$")


def check_report(
    name: str, report: Mapping[str, Any], stored: Collection[str], model: Any, is_strict: bool
) -> tuple[str, ...]:
    """Refuse a checkpoint that is not what the model's class loads.

    Args:
        name: Name of the model.
        report: The loading info of `from_pretrained`.
        stored: Names of the tensors in the weight files.
        model: The model that was loaded.
        is_strict: Refuse tensors that the class does not use, where it does not declare that it ignores them; otherwise
            they are warned of.

    Returns:
        What the user should know of tensors that are not used.

    Raises:
        UnsupportedModelError: The weights are quantised, or changes to another model.
        WeightsError: A tensor is missing, or not used.
    """
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
    if missing or unexpected:
        _check_names(name, missing, stored)
    if missing:
        raise WeightsError(
            f"The checkpoint of {name} lacks {_tensors(missing)}.",
            "Download it again, or check that config.json belongs to it.",
        )
    found = f"The checkpoint of {name} holds {_tensors(unexpected, 'unused ')}: a model of its config has none such"
    if unexpected and is_strict:
        raise WeightsError(
            f"{found}.",
            "Check that config.json belongs to these weights (number of layers, biases), or remove what is not needed.",
        )
    warnings = [f"{found}."] if unexpected else []
    if ignored := _ignored(stored, model):
        warnings.append(f"The checkpoint of {name} holds {_tensors(ignored, 'unused ')}: its class leaves them aside.")
    return tuple(warnings)


def some_of(names: Sequence[str]) -> str:
    """Return the first few of some names, and how many there are besides."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _tensors(names: Sequence[str], kind: str = "") -> str:
    return f"{len(names):,} {kind}tensor{'s' if len(names) > 1 else ''} ({some_of(names)})"


def _check_names(name: str, missing: Sequence[str], stored: Collection[str]) -> None:
    """Say why a checkpoint does not fit its class, where the names of its tensors tell.

    Raises:
        UnsupportedModelError: The weights are quantised, or changes to another model.
        WeightsError: A program has put something in front of the names.
    """
    if any(".lora_A." in one or ".lora_B." in one for one in stored):
        raise UnsupportedModelError(
            f"{name} holds LoRA matrices: changes to another model.", "Merge them into that model first."
        )
    if not missing:
        return
    for ending, method in QUANTISED.items():
        if example := next((one for one in sorted(stored) if one.endswith(ending)), None):
            raise UnsupportedModelError(
                f"{name} is quantised ({method}, by the names of its tensors, such as {example}).",
                "Slice the original weights, then quantise the slice.",
            )
    for wrapper, program in WRAPPERS.items():
        if wrapped := sorted(one for one in stored if f".{wrapper}" in f".{one}"):
            raise WeightsError(
                f"The names of {_tensors(wrapped)} of {name} have {wrapper!r} in them, as {program} writes them, and "
                "the model's class does not find them.",
                f"Save the inner model, or take {wrapper!r} out of the names.",
            )


def _ignored(stored: Collection[str], model: Any) -> list[str]:
    """Return the tensors in the files that the class of a model declares it ignores."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *OLD_BUFFERS]
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    own = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    return sorted(
        name
        for name in stored
        if ignored.search(name) and not {name, f"{prefix}{name}", name.removeprefix(prefix)} & own
    )
