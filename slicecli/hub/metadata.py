"""The metadata of a slice's card: what the Hub lists, links and filters it by.

What a base model's card says is another's text. Only a licence and languages are taken from it, and only where they
look like what they should be. Results in the `model-index` are measured ones: a prediction is no result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.data.text import NAMED_TEXTS
from slicecli.family.slice_plan import width_name
from slicecli.runtime.inputs import is_repository_name
from slicecli.runtime.markdown import visible

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["TAGS", "base_model_of", "card_metadata", "inherited_metadata", "is_trained"]

TAGS = ("slicecli", "sliced", "pruned")
DISTILLED_TAG = "distillation"
UNKNOWN_LICENSE = "other"
_LICENSE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_LICENSE_LINK = re.compile(r"(https://)?[\w./%-]{1,200}")
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})?|multilingual")


def inherited_metadata(folder: Path) -> dict[str, Any]:
    """Take licence and languages from a base model's card, where they are well formed."""
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
    if isinstance(link, str) and _LICENSE_LINK.fullmatch(link):
        inherited["license_link"] = link
    languages = data.get("language")
    languages = [languages] if isinstance(languages, str) else languages
    if isinstance(languages, list) and languages:
        # YAML reads the code of Norwegian as a truth value
        known = [one for one in languages if isinstance(one, str) and _LANGUAGE.fullmatch(one)]
        if len(known) == len(languages):
            inherited["language"] = known
    return inherited


def base_model_of(record: Mapping[str, Any]) -> str | None:
    """Return the Hub id of the model a slice was made from, or of the nearest one before it that is on the Hub."""
    for one in (record["source"], *record["ancestry"]):
        if one["commit"] and is_repository_name(str(one["model"]), needs_owner=True):
            return str(one["model"])
    return None


def is_trained(record: Mapping[str, Any]) -> bool:
    """Say whether a slice, or a slice that it was made from, was trained."""
    return "recovery" in record or any(one["trained_tokens"] for one in record["ancestry"])


def card_metadata(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the metadata of a slice's card, as the Hub names it."""
    from huggingface_hub import ModelCardData

    base_model = base_model_of(record)
    trainings = record.get("recovery", [])
    datasets = [record["calibration"]["dataset"], *(one["dataset"] for one in trainings)]
    named = [one for one in dict.fromkeys(datasets) if one and is_repository_name(one, needs_owner=True)]
    data = ModelCardData(
        base_model=base_model,
        # the Hub knows four relations, none of which is pruning; unstated it would count as this one too
        base_model_relation="finetune" if base_model else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        datasets=named or None,
        tags=[*TAGS, *([DISTILLED_TAG] if is_trained(record) else [])],
        **{"license": UNKNOWN_LICENSE, **record["inherited"]},
    )
    results = list(_eval_results(record))
    if results:
        data.model_name = _model_name(record)
        data.eval_results = results
    metadata: dict[str, Any] = data.to_dict()
    return metadata


def _model_name(record: Mapping[str, Any]) -> str:
    repository: str | None = record["repository"]
    return repository or visible(
        f"{record['source']['model'].rpartition('/')[2]}-{width_name(record['dim'], record['mlp_dim'])}"
    )


def _eval_results(record: Mapping[str, Any]) -> Iterator[EvalResult]:
    """Yield what was measured of the slice."""
    from huggingface_hub import EvalResult

    results = record["results"]
    for text, figure in (results.get("perplexity") or {}).items():
        if figure["value"] is not None:
            known = NAMED_TEXTS.get(text)
            kind, config = (known.dataset, known.config) if known else _dataset(text, figure["text_sha256"])
            yield EvalResult(
                task_type="text-generation",
                dataset_type=kind,
                dataset_config=config,
                dataset_name=visible(text),
                metric_type="perplexity",
                metric_value=figure["value"],
                metric_name=f"perplexity, rows of {figure['seq_len']} tokens",
            )
    for task, figure in (results.get("tasks") or {}).items():
        if figure["value"] is not None:
            how = f"{figure['num_fewshot']} examples, {figure['samples']} questions"
            kind, config = _dataset(task, figure["questions_sha256"])
            yield EvalResult(
                task_type="text-generation",
                dataset_type=kind,
                dataset_config=config,
                dataset_name=visible(task),
                metric_type=visible(figure["metric"]),
                metric_value=figure["value"],
                metric_name=f"{visible(figure['metric'])}, {how}",
            )


def _dataset(name: str, digest: str | None) -> tuple[str, str | None]:
    """Return type and configuration of a text or task: a file in a folder would pass for a dataset of somebody's."""
    shown = visible(name)
    return (shown, None) if digest is None or "/" not in shown else (shown.rpartition("/")[2], shown)
