"""Families whose residual stream cannot be sliced without loss, each with the reason."""

from __future__ import annotations

from collections.abc import Callable

from slicecli import hookimpl
from slicecli.adapters import Refusal

POST_NORM = Refusal(
    model_types=(
        "exaone4",
        "flex_olmo",
        "gemma2",
        "gemma3",
        "gemma3_text",
        "gemma3n",
        "gemma3n_text",
        "glm4",
        "olmo2",
        "olmo3",
    ),
    reason="its branches pass through a norm before they are added to the stream, and a norm's weight does not "
    "commute with a rotation.",
)
EMBEDDING_NORM = Refusal(
    model_types=("bloom",),
    reason="its embeddings pass through a norm before they enter the stream, and a norm's weight does not commute "
    "with a rotation.",
)


@hookimpl
def slicecli_register_adapters(register: Callable[[Refusal], None]) -> None:
    """Register the refusals."""
    register(POST_NORM)
    register(EMBEDDING_NORM)
