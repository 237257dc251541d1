"""Turning what the Hub's client raises into one clause a person can act on."""

from __future__ import annotations

import errno
from collections.abc import Mapping

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
        (errors.LocalTokenNotFoundError, "no token is given or stored"),
        (errors.OfflineModeIsEnabled, "offline mode is on (HF_HUB_OFFLINE) and it is not in the cache"),
    ):
        if any(isinstance(link, kind) for link in chain):
            return text
    for link in chain:
        if isinstance(link, errors.HfHubHTTPError) and link.response is not None:
            found = _of_status(link.response.status_code, link.response.headers)
            if found:
                return found
    for link in chain:
        number = getattr(link, "errno", None)
        if number in {errno.ENOSPC, errno.EDQUOT}:
            return "the disk became full"
        if number in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return "a folder cannot be written; HF_HOME says where the Hub's cache lies"
    names = {type(link).__name__ for link in chain}
    if any(isinstance(link, (ConnectionError, TimeoutError)) for link in chain) or any(
        part in name for name in names for part in ("Connect", "Timeout", "ReadError", "WriteError", "ProtocolError")
    ):
        return "the connection to the Hub broke off, or there is none"
    if any(isinstance(link, errors.LocalEntryNotFoundError) for link in chain):
        return "the Hub cannot be reached and it is not in the cache"
    if any(isinstance(link, errors.EntryNotFoundError) for link in chain):
        return "the repository lacks a file that is needed"
    return f"{type(error).__name__}: {reason_of(error)}"[:200]


def _of_status(status: int, headers: Mapping[str, str]) -> str:
    """Say what a status of the Hub means; nothing of those that other errors say better."""
    if status == 401:
        return "the Hub does not accept the token"
    if status == 403:
        return "the token does not give the right to do that"
    if status == 429:
        wait = headers.get("Retry-After", "")
        after = f" in {wait} seconds" if wait.isdecimal() else " later"
        return f"the Hub was asked too often (status 429); try again{after}"
    if status >= 500:
        return f"the Hub has a fault of its own (status {status}); try again later"
    return "" if status == 404 else f"the Hub refused with status {status}"
