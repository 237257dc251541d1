"""Turning what the Hub's client raises into one clause a person can act on."""

from __future__ import annotations

from slicecli.errors import reason_of

__all__ = ["describe_hub_error"]


def describe_hub_error(error: BaseException) -> str:
    """Say in one clause what went wrong between this machine and the Hub.

    Args:
        error: Anything raised by `huggingface_hub`, `datasets`, or the HTTP client under them.
    """
    from huggingface_hub import errors

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    for kind, text in (
        (errors.GatedRepoError, "access to it is gated: accept its terms on the Hub and pass a token"),
        (errors.RevisionNotFoundError, "there is no such revision"),
        (errors.RepositoryNotFoundError, "there is no such repository, or it is private and the token lacks access"),
        (errors.HFValidationError, "that is not a valid Hub id (owner/name)"),
        (errors.OfflineModeIsEnabled, "offline mode is on (HF_HUB_OFFLINE) and it is not in the cache"),
        (errors.LocalEntryNotFoundError, "the Hub cannot be reached and it is not in the cache"),
        (errors.EntryNotFoundError, "the repository lacks a file that is needed"),
    ):
        if any(isinstance(link, kind) for link in chain):
            return text
    for link in chain:
        if isinstance(link, errors.HfHubHTTPError) and link.response is not None:
            return f"the Hub answered with status {link.response.status_code}"
    if any(isinstance(link, (ConnectionError, TimeoutError)) for link in chain) or any(
        "Connect" in type(link).__name__ or "Timeout" in type(link).__name__ for link in chain
    ):
        return "the Hub cannot be reached"
    return f"{type(error).__name__}: {reason_of(error)}"[:200]
