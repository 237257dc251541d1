"""Finding slices that others have published, by the tag that every card has."""

from __future__ import annotations

from dataclasses import dataclass

from slicecli.errors import SourceError
from slicecli.hub.metadata import TAGS
from slicecli.runtime.hub_errors import describe_hub_error, remedy_of_hub_error
from slicecli.runtime.inputs import check_count, parse_repository

__all__ = ["PublishedSlice", "find_slices"]

BASE_MODEL_TAG = "base_model:"


@dataclass(frozen=True)
class PublishedSlice:
    """A slice on the Hub.

    Attributes:
        base_model: Hub id of the model it was made from, if its card names one.
        downloads: How often it was downloaded in the last 30 days.
        modified: Day of its last change, as YYYY-MM-DD.
    """

    repository: str
    base_model: str | None
    downloads: int
    modified: str


def find_slices(
    text: str | None = None, base_model: str | None = None, limit: int = 20, token: str | None = None
) -> list[PublishedSlice]:
    """Return slices on the Hub, those downloaded most first."""
    from huggingface_hub import HfApi

    check_count(limit, "A limit of {} is", "Use --limit")
    if base_model is not None:
        parse_repository(base_model, needs_owner=False)
    tags = [TAGS[0], *([] if base_model is None else [f"{BASE_MODEL_TAG}{base_model}"])]
    try:
        found = list(HfApi(token=token).list_models(filter=tags, search=text, sort="downloads", limit=limit))
    except Exception as error:
        raise SourceError(
            f"The Hub cannot be searched: {describe_hub_error(error)}.", remedy_of_hub_error(error)
        ) from error
    return [
        PublishedSlice(
            repository=model.id,
            base_model=_base_model(model.tags or []),
            downloads=model.downloads or 0,
            modified="" if model.last_modified is None else model.last_modified.date().isoformat(),
        )
        for model in found
    ]


def _base_model(tags: list[str]) -> str | None:
    """Return the base model that tags name; the tag with a relation between says the same again."""
    names = [tag.removeprefix(BASE_MODEL_TAG) for tag in tags if tag.startswith(BASE_MODEL_TAG)]
    return next((name for name in names if ":" not in name), None)
