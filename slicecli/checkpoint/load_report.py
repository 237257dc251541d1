"""What transformers reports of loading a checkpoint, judged: what must not be made up, left out or mistaken."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from slicecli.checkpoint.weight_headers import StoredTensor
from slicecli.errors import UnsupportedModelError, WeightsError

__all__ = ["check_report", "check_stored", "some_of"]

MOST_NAMED = 3
# endings of the tensors that a method of quantising writes beside or in place of a weight
QUANTISED = {
    ".qweight": "GPTQ or AWQ",
    ".SCB": "bitsandbytes",
    ".quant_map": "bitsandbytes",
    ".absmax": "bitsandbytes",
    ".weight_scale": "FP8",
    ".weight_scale_inv": "FP8",
    ".weight_packed": "compressed-tensors",
    ".scales": "MLX",
}
# what the format calls types whose numbers are no weights without a scale
SCALED_TYPES = frozenset(
    {"I8", "U8", "I16", "U16", "I32", "U32", "I64", "U64", "BOOL", "F4", "F8_E4M3", "F8_E5M2", "F8_E8M0"}
)
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
    name: str,
    report: Mapping[str, Any],
    stored: Collection[str],
    model: Any,
    is_strict: bool,
    unused: Sequence[str] = (),
) -> tuple[str, ...]:
    """Refuse a checkpoint that is not what the model's class loads.

    Args:
        is_strict: Refuse tensors that the class does not use, where it does not declare that it ignores them; otherwise
            they are warned of.
    """
    ignored = _ignored(stored, model, unused)
    missing, unexpected = sorted(report["missing_keys"]), sorted(report["unexpected_keys"] - {*ignored})
    if missing:
        _check_wrapper(name, missing, stored)
        head = (
            ""
            if set(missing) - set(model._tied_weights_keys or ())
            else (" If the head is the embedding table, set tie_word_embeddings to true in config.json.")
        )
        raise WeightsError(
            f"The checkpoint of {name} lacks {_tensors(missing)}.",
            f"Download it again, or check that config.json belongs to these weights.{head}",
        )
    found = f"The checkpoint of {name} holds {_tensors(unexpected, 'unused ')}: its config does not account for them"
    if unexpected and is_strict:
        raise WeightsError(
            f"{found}.",
            "Check that config.json belongs to these weights (number of layers, biases), or remove these tensors.",
        )
    warnings = [f"{found}."] if unexpected else []
    if ignored:
        warnings.append(f"The checkpoint of {name} holds {_tensors(ignored, 'unused ')}; its model class ignores them.")
    return tuple(warnings)


def some_of(names: Sequence[str]) -> str:
    """Return the first few of some names, and how many there are besides."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _tensors(names: Sequence[str], kind: str = "") -> str:
    return f"{len(names):,} {kind}tensor{'s' if len(names) > 1 else ''} ({some_of(names)})"


def check_stored(name: str, tensors: Mapping[str, StoredTensor]) -> None:
    """Refuse weight files that do not hold the weights themselves, by what their headers say."""
    if any(part in one for one in tensors for part in (".lora_A.", ".lora_B.", ".base_layer.")):
        raise UnsupportedModelError(
            f"{name} holds LoRA matrices, which are changes to another model.",
            "Merge them into that model first, with merge_and_unload() of peft.",
        )
    remedy = "Slice the original weights, then quantise the slice."
    for ending, method in QUANTISED.items():
        if example := next((one for one in sorted(tensors) if one.endswith(ending)), None):
            raise UnsupportedModelError(f"{name} is quantised ({method}: it holds {example}).", remedy)
    for one, tensor in tensors.items():
        if tensor.dtype in SCALED_TYPES and len(tensor.shape) >= 2 and one.endswith(".weight"):
            raise UnsupportedModelError(f"{name} is quantised ({one} is stored as {tensor.dtype}).", remedy)


def _check_wrapper(name: str, missing: Sequence[str], stored: Collection[str]) -> None:
    """Say which program has put something in front of the names of tensors."""
    wrappers = {**dict.fromkeys(_common_prefix(missing, stored), ""), **WRAPPERS}
    for wrapper, program in wrappers.items():
        if wrapped := sorted(one for one in stored if f".{wrapper}" in f".{one}"):
            by = f", as {program} writes them," if program else ""
            raise WeightsError(
                f"The names of {_tensors(wrapped)} of {name} contain {wrapper!r}{by} and the model class does "
                "not recognise them.",
                f"Save the inner model, or remove {wrapper!r} from the names.",
            )


def _common_prefix(missing: Sequence[str], stored: Collection[str]) -> list[str]:
    """Return what stands in front of the names of all missing tensors in the files, if that is so."""
    first = next((one for one in stored if one.endswith(f".{missing[0]}")), None)
    prefix = None if first is None else first.removesuffix(missing[0])
    return [prefix] if prefix and all(f"{prefix}{one}" in stored for one in missing) else []


def _ignored(stored: Collection[str], model: Any, unused: Sequence[str]) -> list[str]:
    """Return the tensors in the files that the class of a model, or its family, declares it ignores."""
    patterns = [*(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()), *OLD_BUFFERS, *unused]
    ignored = re.compile("|".join(f"(?:{pattern})" for pattern in patterns))
    own = set(model.state_dict())
    prefix = f"{model.base_model_prefix}."
    return sorted(
        name
        for name in stored
        if ignored.search(name) and not {name, f"{prefix}{name}", name.removeprefix(prefix)} & own
    )
