"""Which class of transformers runs in which program that serves models, for slices.

A slice has heads whose width is not hidden_size / heads, which some programs assume. These are the findings of running
slices of small models in each program and comparing logits.
"""

from __future__ import annotations

from typing import Literal

__all__ = ["CLIENTS", "Client", "Verdict", "runs_in"]

Client = Literal["vLLM", "llama.cpp"]
Verdict = Literal["correct", "wrong", "refused", "unknown"]

CLIENTS: tuple[Client, ...] = ("vLLM", "llama.cpp")

_VERDICTS: dict[str, tuple[Verdict, Verdict]] = {
    "cohere": ("correct", "refused"),
    "gemma": ("correct", "correct"),
    "glm": ("correct", "refused"),
    "granite": ("correct", "refused"),
    "llama": ("correct", "correct"),
    "mistral": ("correct", "correct"),
    "mixtral": ("correct", "correct"),
    "nemotron": ("correct", "refused"),
    "olmo": ("correct", "refused"),
    "phi": ("correct", "refused"),
    "phi3": ("correct", "refused"),
    "qwen2": ("wrong", "refused"),
    "qwen2_moe": ("wrong", "refused"),
    "qwen3": ("correct", "correct"),
    "qwen3_moe": ("correct", "correct"),
    "smollm3": ("correct", "correct"),
    "starcoder2": ("correct", "refused"),
}
# programs that share the embedding table with the head whatever the config says
_ALWAYS_TIED: dict[tuple[str, Client], Verdict] = {("gemma", "llama.cpp"): "wrong", ("cohere", "vLLM"): "wrong"}
# of these classes the programs know one activation only
_SILU_ONLY: dict[Client, Verdict] = {"vLLM": "refused", "llama.cpp": "wrong"}
_SILU_TYPES = frozenset({"llama", "mistral"})


def runs_in(model_type: str, client: Client, is_tied: bool = False, activation: str = "silu") -> Verdict:
    """Say whether a program computes what transformers does, of a slice written as a class.

    Args:
        is_tied: Whether the slice shares one table between embedding and head.
        activation: Its `hidden_act`.
    """
    if model_type in _SILU_TYPES and activation != "silu":
        return _SILU_ONLY[client]
    if not is_tied and (model_type, client) in _ALWAYS_TIED:
        return _ALWAYS_TIED[model_type, client]
    if model_type not in _VERDICTS:
        return "unknown"
    return _VERDICTS[model_type][CLIENTS.index(client)]
