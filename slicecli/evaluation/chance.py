"""What an accuracy is worth nothing above: the level that guessing reaches on a task.

An accuracy is lost by slicing only down to this level, so whoever compares or predicts accuracies has to know it.
The levels are one over the number of choices, as the tasks' own papers count them (ARC has a few questions of three
or five choices; the field takes four).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import fmean

__all__ = ["chance_level"]

# by name without case and punctuation; tasks whose level is not constant (TruthfulQA, MMLU-Pro) are left out
_LEVELS = {
    **dict.fromkeys(("anlir1", "anlir2", "anlir3", "cb", "mnli", "mnlimismatch", "socialiqa", "siqa", "xnli"), 1 / 3),
    **dict.fromkeys(("boolq", "copa", "cola", "mrpc", "piqa", "qnli", "qqp", "rte", "sst2", "storycloze"), 1 / 2),
    **dict.fromkeys(("wic", "winogrande", "wnli", "wsc", "wsc273", "winograd", "xcopa", "xwinograd"), 1 / 2),
    **dict.fromkeys(("ai2arc", "arc", "arcc", "arcchallenge", "arce", "arceasy", "belebele", "hellaswag"), 1 / 4),
    **dict.fromkeys(("logiqa", "logiqa2", "medmcqa", "mmlu", "openbookqa", "obqa", "race", "sciq", "swag"), 1 / 4),
    **dict.fromkeys(("commonsenseqa", "csqa", "mathqa"), 1 / 5),
    # free answers: guessing reaches nothing
    **dict.fromkeys(("drop", "gsm8k", "lambada", "lambadaopenai", "lambadastandard", "naturalquestions"), 0.0),
    **dict.fromkeys(("nqopen", "squadv2", "triviaqa", "webqs"), 0.0),
}
# a task of many parts, which all have its level
_PARTS = {"mmlu_": 1 / 4, "blimp_": 1 / 2, "belebele_": 1 / 4, "xcopa_": 1 / 2, "xwinograd_": 1 / 2, "xnli_": 1 / 3}
_OTHERWISE = ("mmlu_pro", "mmlu_prox")
# as slicecli.data.names writes it
_QUESTION_FILE = re.compile(r"\.jsonl( \([0-9a-f]+\))?$", re.IGNORECASE)


def chance_level(task: str, choices: Sequence[int] = ()) -> float | None:
    """Return the accuracy that guessing reaches.

    Args:
        task: Name of the task: lm-eval's, or as publications spell it (`ARC-c`, `WinoGrande`). A `.jsonl` file is no
            known task, whatever its name.

    Example:
        >>> chance_level("PIQA"), chance_level("mmlu_anatomy"), chance_level("mine", [2, 4])
        (0.5, 0.25, 0.375)
    """
    if _QUESTION_FILE.search(task):
        return fmean(1 / count for count in choices) if choices else None
    name = re.sub(r"[^a-z0-9]+", "_", task.lower())
    known = _LEVELS.get(name.replace("_", ""), 1 / 2 if name == "blimp" else None)
    if known is None and not name.startswith(_OTHERWISE):
        known = next((level for prefix, level in _PARTS.items() if name.startswith(prefix)), None)
    if known is None and choices:
        known = fmean(1 / count for count in choices)
    return known
