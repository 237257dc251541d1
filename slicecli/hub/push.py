"""Publishing a slice: checked before anything is sent, and compared with what the Hub has afterwards.

huggingface_hub does the transfer: it retries, and what the Hub has already is not sent again. Whatever goes wrong, the
slice stays whole on this machine, and pushing again completes what is missing.
"""

from __future__ import annotations

import glob
import hashlib
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.folder import RECORD_FILE, file_digest
from slicecli.errors import OutputError, PublishError
from slicecli.hub.card import CARD_FILE
from slicecli.hub.options import PushOptions
from slicecli.hub.writing import enter_repository, own_files
from slicecli.runtime.hub_client import patiently, quiet_client
from slicecli.runtime.hub_errors import describe_hub_error, remedy_of_hub_error
from slicecli.runtime.inputs import parse_repository

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

__all__ = ["Publication", "check_can_push", "check_publishable", "push_slice"]

# of what an earlier slice in the same repository may have left; other files there are its owner's
REPLACED = ["*.safetensors", "*.safetensors.index.json", "configuration_slicecli.py", "modeling_slicecli.py", "plots/*"]


@dataclass(frozen=True)
class Publication:
    """A published slice.

    Attributes:
        url: Where it can be looked at: the commit, or the pull request.
        pull_request: Number of the pull request, if it is one.
        files: Size in bytes of each file, by name.
    """

    repository: str
    url: str
    commit: str
    pull_request: int | None
    files: dict[str, int]


def check_can_push(repository: str, options: PushOptions) -> None:
    """Refuse early what could not be pushed later: an id that is none, a token that is missing or opens nothing."""
    parse_repository(repository)
    api = _client(options)
    try:
        with quiet_client():
            patiently(api.whoami)
            may_write = options.create_pr or _may_write(api, repository)
    except Exception as error:
        raise PublishError(
            f"Nothing can be pushed to {repository}: {describe_hub_error(error)}.", remedy_of_hub_error(error)
        ) from error
    if not may_write:
        raise PublishError(
            f"Nothing can be pushed to {repository}: the token has no write access.",
            "Use a --token with write access, or open a pull request with --create-pr.",
        )


def check_publishable(folder: Path, options: PushOptions) -> dict[str, int]:
    """Check a slice before it is sent; return the size of each file that would go."""
    from slicecli.hub.verify import verify_folder

    faults = [one for one in verify_folder(folder, [options.token] if options.token else []) if one.is_error]
    if faults:
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise OutputError(
            f"{folder.resolve().name!r} cannot be published: {faults[0].text}{more}.",
            "`slicecli verify` lists every fault; if only the card differs, `slicecli card` rewrites it.",
        )
    names = [*own_files(folder), RECORD_FILE, CARD_FILE]
    return {name: (folder / name).stat().st_size for name in sorted(names)}


def push_slice(folder: Path, repository: str, options: PushOptions) -> Publication:
    """Publish a slice and make sure that the Hub has it as it is here."""
    again = _again(folder, repository, options)
    try:
        check_can_push(repository, options)
    except PublishError as error:
        raise PublishError(error.cause, f"{error.remedy[:-1]}; then {again}.") from error
    check_publishable(folder, options)
    enter_repository(folder, repository)
    files = check_publishable(folder, options)
    api = _client(options)
    try:
        with quiet_client():
            if not options.create_pr:
                patiently(lambda: api.create_repo(repository, private=options.private or None, exist_ok=True))
                if options.revision is not None:
                    branch = options.revision
                    patiently(lambda: api.create_branch(repository, branch=branch, exist_ok=True))

            def send() -> CommitInfo:
                return api.upload_folder(
                    repo_id=repository,
                    folder_path=folder,
                    commit_message=options.commit_message or _message(folder),
                    revision=options.revision,
                    create_pr=options.create_pr,
                    allow_patterns=[glob.escape(file) for file in files],
                    delete_patterns=REPLACED,
                )

            # a second attempt could open a second pull request
            commit = send() if options.create_pr else patiently(send)
            revision = commit.pr_revision or options.revision or "main"
            differing = _differences(api, repository, revision, folder, files)
    except Exception as error:
        raise PublishError(
            f"{folder.resolve().name!r} could not be pushed to {repository}: {describe_hub_error(error)}.",
            f"The slice on this machine is complete: {again}.",
        ) from error
    if differing:
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise PublishError(
            f"The files in {repository} differ from those sent: {', '.join(differing[:3])}{more}.",
            f"The slice on this machine is complete: {again}.",
        )
    return Publication(repository, _url(commit), commit.oid, commit.pr_num, files)


def _client(options: PushOptions) -> HfApi:
    from huggingface_hub import HfApi

    return HfApi(token=options.token, library_name="slicecli")


def _message(folder: Path) -> str:
    from slicecli.family.slice_plan import sliced_widths
    from slicecli.record.record import read_record

    record = read_record(folder) or {}
    recovered = " and recovered" if "recovery" in record else ""
    return f"{record['source']['model']} sliced to {' and '.join(sliced_widths(record))}{recovered}"


def _may_write(api: HfApi, repository: str) -> bool:
    """Ask whether a repository may be changed; one that does not exist is made when the slice is sent."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        patiently(lambda: api.auth_check(repository, write=True))
    except HfHubHTTPError as error:
        return bool(error.response.status_code != 403)
    return True


def _again(folder: Path, repository: str, options: PushOptions) -> str:
    """Say in a clause how a push is completed; the token stays out of it."""
    words = ["slicecli", "push", str(folder), repository]
    words += ["--private"] if options.private else []
    words += ["--create-pr"] if options.create_pr else []
    words += ["--revision", options.revision] if options.revision else []
    words += ["--commit-message", options.commit_message] if options.commit_message else []
    return f"`{shlex.join(words)}` sends what is still missing"


def _url(commit: CommitInfo) -> str:
    return str(commit.pr_url or commit.commit_url)


def _differences(api: HfApi, repository: str, revision: str, folder: Path, files: dict[str, int]) -> list[str]:
    """Return the files that the Hub does not have, or has otherwise."""
    there: dict[str, Any] = {
        entry.path: entry
        for entry in api.list_repo_tree(repository, recursive=True, revision=revision)
        if hasattr(entry, "blob_id")
    }
    return [name for name in files if name not in there or not _is_same(there[name], folder / name)]


def _is_same(entry: Any, path: Path) -> bool:
    if entry.lfs is not None:
        return str(entry.lfs.sha256) == file_digest(path)
    return str(entry.blob_id) == _git_digest(path)


def _git_digest(path: Path) -> str:
    """Return what git calls the content of a file: the SHA-1 of it behind its kind and size."""
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
