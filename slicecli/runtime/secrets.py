"""What must never be published: tokens, and what tells of the machine and its user.

The kinds that are found are named in words; the secret itself is never repeated, because findings are printed.
"""

from __future__ import annotations

import getpass
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["find_paths", "find_secrets", "find_tokens"]

HUB_TOKEN = "a Hub token"
HOME_FOLDER = "the home folder"
USER_NAME = "the user's name in a path"
LOCAL_PATH = "a local path"
# shorter ones are no secrets and would be found in any text
LEAST_CHARACTERS = 8
_TOKENS = (
    (HUB_TOKEN, r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9]{30,}|hf_oauth_?[A-Za-z0-9_.-]{20,}|api_org_[A-Za-z0-9]{30,})"),
    ("a GitHub token", r"(?<![A-Za-z0-9])(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{40,})"),
    # words joined by hyphens look alike, but for digits and capitals
    ("an API key", r"(?<![A-Za-z0-9])sk-(?=[\w-]{0,99}\d)(?=[\w-]{0,99}[A-Z])[\w-]{32,}"),
    ("an AWS key", r"(?<![A-Za-z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Za-z0-9])"),
    ("a private key", r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
)
# where a path begins: not within another, nor in the address of a web page
_BEGIN = r"(?:(?<![\w.:/\\~-])|(?<=file://))"
_END = r"(?![\w.-])"
# in JSON the separators of Windows are doubled
_SEPARATOR = r"(?:\\{1,2}|/)"
_ESCAPED = re.compile(r"(?<!\\)\\(?:u([0-9a-fA-F]{4})|[bfnrt])")
_HOME_OF_SOMEBODY = re.compile(rf"{_BEGIN}/(?:home|Users)/[\w.-]+(?=/)|\b[A-Za-z]:{_SEPARATOR}Users{_SEPARATOR}[\w.-]+")
_PATH = re.compile(rf"{_BEGIN}(?:[A-Za-z]:)?(?:{_SEPARATOR}[\w.+@-]+)+")


def find_secrets(text: str, tokens: Sequence[str] = ()) -> list[str]:
    """Say what kinds of secrets are in a text."""
    return [*find_tokens(text, tokens), *find_paths(text)]


def find_tokens(text: str, tokens: Sequence[str] = ()) -> list[str]:
    """Say what kinds of tokens are in a text, see `find_secrets`."""
    return list(dict.fromkeys(_tokens_in(text, tokens)))


def _tokens_in(text: str, tokens: Sequence[str]) -> Iterator[str]:
    if any(token in text for token in {*tokens, *_stored_tokens()} if len(token) >= LEAST_CHARACTERS):
        yield HUB_TOKEN
    for kind, pattern in _TOKENS:
        if re.search(pattern, text):
            yield kind


def _stored_tokens() -> Iterator[str]:
    from huggingface_hub import get_token

    for token in (os.environ.get("HF_TOKEN"), os.environ.get("HUGGING_FACE_HUB_TOKEN"), get_token()):
        if token:
            yield token.strip()


def find_paths(text: str) -> list[str]:
    """Say what in a text tells of this machine, its user, or another's: the home folder, a name, a path."""
    # in JSON letters and the ends of lines are escaped, and would hide where a path begins
    texts = dict.fromkeys((text, _ESCAPED.sub(lambda found: chr(int(found[1], 16)) if found[1] else " ", text)))
    return list(dict.fromkeys(kind for one in texts for kind in _paths_in(one)))


def _paths_in(text: str) -> Iterator[str]:
    home = _home()
    if home is not None and _has_path(text, home):
        yield HOME_FOLDER
    user = _user()
    if user and any(user in re.split(r"[\\/]+", path) for path in _PATH.findall(text)):
        yield USER_NAME
    here = _working_folder()
    if (
        _HOME_OF_SOMEBODY.search(text)
        or (here is not None and _has_path(text, here))
        or _has_path(text, Path(tempfile.gettempdir()), rf"{_SEPARATOR}\w")
    ):
        yield LOCAL_PATH


def _has_path(text: str, path: Path, followed_by: str = _END) -> bool:
    pattern = re.escape(str(path)).replace(r"\\", _SEPARATOR)
    return re.search(f"{_BEGIN}{pattern}{followed_by}", text) is not None


def _home() -> Path | None:
    """Return the user's home folder; `None` where there is none but the root."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home if len(home.parts) > 1 else None


def _working_folder() -> Path | None:
    """Return the working folder; `None` where its name could stand in any text, or it is gone."""
    try:
        here = Path.cwd()
    except OSError:
        return None
    return here if len(here.parts) > 2 else None


def _user() -> str:
    """Return the user's login name; empty where the system does not know one."""
    try:
        return getpass.getuser()
    except (KeyError, OSError, ImportError):
        return ""
