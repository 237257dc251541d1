"""Turning what the Hub's client raises into a clause that says what is wrong, and a sentence that says what to do."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from typing import Any

from slicecli.errors import reason_of

__all__ = [
    "describe_hub_error",
    "is_not_in_cache",
    "is_of_settings",
    "is_transient",
    "remedy_of_hub_error",
    "seconds_to_wait",
]

TRANSIENT_STATUSES = frozenset({408, 429, 500, 502, 503, 504})
LOG_IN = "Log in with `hf auth login`, or pass a --token"
LOCAL = "write a local folder as a path, for example ./model."
AGAIN = "Run it again later."
OTHER_DISK = "Free some space, or set HF_HOME to a folder on another disk."
OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
MOST_CHARACTERS = 200


def describe_hub_error(error: BaseException) -> str:
    """Say in one clause what went wrong between this machine and the Hub."""
    return _explain(error)[0]


def remedy_of_hub_error(error: BaseException) -> str:
    """Say in one sentence what a person can do about what `describe_hub_error` says."""
    return _explain(error)[1]


def is_transient(error: BaseException) -> bool:
    """Tell whether the same may go well a little later: a fault of the Hub's own, or of a connection that was there."""
    if (response := _response(error)) is not None:
        return int(response.status_code) in TRANSIENT_STATUSES
    if is_of_settings(error) or _is_unreachable(error):
        return False
    return _is_broken_off(error) or _is_incomplete(error) or _find(error, json.JSONDecodeError)


def is_of_settings(error: BaseException) -> bool:
    """Tell whether a setting on this machine is at fault: offline mode, HF_ENDPOINT, or a token that cannot be sent."""
    return _is_offline(error) or _is_bad_token(error) or _is_bad_address(error)


def is_not_in_cache(error: BaseException) -> bool:
    """Tell whether the Hub could not be asked, and the cache does not have what was wanted."""
    from huggingface_hub import errors

    return _find(error, errors.LocalEntryNotFoundError)


def seconds_to_wait(error: BaseException) -> int | None:
    """Return after how many seconds the Hub wants to be asked again, `None` where it does not say."""
    from huggingface_hub.utils import parse_ratelimit_headers  # type: ignore[attr-defined]

    response = _response(error)
    if response is None:
        return None
    limit = parse_ratelimit_headers(response.headers) if response.status_code == 429 else None
    if limit is not None and limit.remaining == 0:
        return int(limit.reset_in_seconds)
    text = response.headers.get("Retry-After", "")
    return int(text) if text.isdecimal() else None


def _explain(error: BaseException) -> tuple[str, str]:
    """Return cause and remedy."""
    from huggingface_hub import errors

    response = _response(error)
    has_token = response is None or "authorization" in response.request.headers
    if _find(error, errors.GatedRepoError):
        if has_token:
            return "it is gated, and the token has no access", "Request access on its Hub page."
        return (
            "it is gated, and no token was sent",
            f"Accept its terms on its Hub page, then {_small(LOG_IN)}.",
        )
    if _find(error, errors.RevisionNotFoundError):
        return "there is no such revision", "Use another --revision: a branch, tag or commit."
    if _find(error, errors.RepositoryNotFoundError):
        missing = "the repository does not exist, or it is private"
        if has_token:
            return f"{missing} and the token has no access", f"Check the name; {LOCAL}"
        return f"{missing} and no token was sent", f"Check the name; if it is private, {_small(LOG_IN)}; {LOCAL}"
    if _find(error, errors.HFValidationError):
        return "it is not a valid Hub id (owner/name)", f"Check the name; {LOCAL}"
    if _find(error, errors.LocalTokenNotFoundError):
        return "no token was passed or stored", f"{LOG_IN}."
    if _is_offline(error):
        variables = " and ".join(name for name in OFFLINE_VARIABLES if os.environ.get(name)) or OFFLINE_VARIABLES[0]
        lacking = ", and the cache is incomplete" if _find(error, errors.LocalEntryNotFoundError) else ""
        return f"offline mode is on ({variables}){lacking}", f"Unset {variables}."
    if _is_bad_token(error):
        return (
            "the token contains an invalid character, such as a line break",
            f"{LOG_IN} as the Hub shows it; HF_TOKEN, if set, takes precedence over the stored token.",
        )
    if _find(error, errors.RemoteEntryNotFoundError):
        return "the repository lacks a required file", "Check the name and the --revision."
    if response is not None:
        return _explain_status(error, response, has_token)
    return _explain_machine(error)


def _explain_status(error: BaseException, response: Any, has_token: bool) -> tuple[str, str]:
    """Return cause and remedy of a status that no other error says better."""
    status = response.status_code
    if status == 401:
        remedy = f"{LOG_IN} that is valid; HF_TOKEN, if set, takes precedence over the stored token."
        return "the Hub rejects the token", remedy
    if status == 429:
        wait = seconds_to_wait(error)
        when = AGAIN if wait is None else f"Run it again in {wait} seconds."
        remedy = when if has_token else f"{when[:-1]}; the limit is higher with a token."
        return "the Hub's rate limit was exceeded (status 429)", remedy
    if status == 412:
        return "someone else changed the repository at the same time (status 412)", "Run it again."
    if status in TRANSIENT_STATUSES or status >= 500:
        return f"the Hub has an internal error (status {status})", AGAIN
    said = next(filter(None, (getattr(link, "server_message", None) for link in _chain(error))), "")
    reason = f": {said.splitlines()[0].rstrip('.')}"[:MOST_CHARACTERS] if said else ""
    remedy = f"{LOG_IN} that has permission." if status == 403 else "Fix that and run it again."
    return f"the Hub refused the request (status {status}{reason})", remedy


def _explain_machine(error: BaseException) -> tuple[str, str]:
    """Return cause and remedy of what went wrong on this machine, or on the way."""
    from huggingface_hub import errors

    for link in _chain(error):
        number = getattr(link, "errno", None)
        if number in {errno.ENOSPC, errno.EDQUOT}:
            return "the disk is full", OTHER_DISK
        if number in {errno.EACCES, errno.EPERM, errno.EROFS}:
            return "the Hub cache is not writable", "Set HF_HOME to a writable folder."
        if isinstance(link, UserWarning) and "disk space" in str(link):
            return "the disk has too little space", OTHER_DISK
    if _is_bad_address(error):
        return "HF_ENDPOINT is not a URL", "Set it to a URL such as https://huggingface.co, or unset it."
    if _is_unreachable(error):
        return "the Hub cannot be reached", "Check the network, and HF_ENDPOINT if it is set."
    if _is_broken_off(error):
        return "the connection to the Hub was lost", "Run it again."
    if _is_incomplete(error):
        return "a file arrived incomplete", "Run it again."
    if _find(error, json.JSONDecodeError):
        # such as a page in HTML, where something between here and the Hub fails
        return "the Hub's response is not valid JSON", AGAIN
    if _find(error, errors.LocalEntryNotFoundError):
        return "the Hub cannot be reached, and it is not in the cache", "Check the network."
    for link in _chain(error):
        if isinstance(link, OSError) and link.strerror:
            # without the path
            return f"{type(link).__name__}: {link.strerror}", AGAIN
    return f"{type(error).__name__}: {reason_of(error)}"[:MOST_CHARACTERS], AGAIN


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and those that led to it, the last first."""
    seen: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in seen:
        seen.append(link)
        yield link
        link = link.__cause__ or link.__context__


def _find(error: BaseException, kind: type[BaseException]) -> bool:
    return any(isinstance(link, kind) for link in _chain(error))


def _response(error: BaseException) -> Any:
    """Return the answer of the Hub that an error is about, `None` where there was none."""
    from huggingface_hub import errors

    for link in _chain(error):
        if isinstance(link, errors.HfHubHTTPError) and link.response is not None:
            return link.response
    return None


def _is_offline(error: BaseException) -> bool:
    """Say whether nothing was asked of the Hub because offline mode forbids it."""
    from huggingface_hub import errors

    # datasets raises an error of its own without the one that led to it, and names that in its text
    return any(
        isinstance(link, errors.OfflineModeIsEnabled)
        or (isinstance(link, ConnectionError) and errors.OfflineModeIsEnabled.__name__ in str(link))
        for link in _chain(error)
    )


def _is_bad_token(error: BaseException) -> bool:
    """Say whether the token cannot be sent in a header, which is the only one of ours that a user's text is in."""
    return any(
        (type(link).__name__ == "LocalProtocolError" and "header" in str(link).lower())
        or (isinstance(link, UnicodeEncodeError) and link.encoding == "ascii")
        for link in _chain(error)
    )


def _is_bad_address(error: BaseException) -> bool:
    names = ("UnsupportedProtocol", "InvalidURL")
    return any(
        type(link).__name__ in names or (isinstance(link, ValueError) and str(link).startswith("Port out of range"))
        for link in _chain(error)
    )


def _is_unreachable(error: BaseException) -> bool:
    names = ("ConnectError", "ConnectTimeout", "ProxyError")
    return any(
        isinstance(link, ConnectionRefusedError)
        or type(link).__name__ in names
        # datasets raises an error of its own without the one that led to it, and names that in its text
        or (isinstance(link, ConnectionError) and any(f"({name})" in str(link) for name in names))
        for link in _chain(error)
    )


def _is_broken_off(error: BaseException) -> bool:
    # by name: the client has changed from one HTTP library to another, and datasets have theirs
    parts = ("Connect", "Timeout", "ReadError", "WriteError", "ProtocolError")
    return any(
        isinstance(link, (ConnectionError, TimeoutError)) or any(part in type(link).__name__ for part in parts)
        for link in _chain(error)
    )


def _is_incomplete(error: BaseException) -> bool:
    return any(isinstance(link, OSError) and "Consistency check failed" in str(link) for link in _chain(error))


def _small(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
