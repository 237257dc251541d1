"""Reads what people write: paths, names of repositories, tokens, numbers.

The command line and the Python API read each kind by the one function here, before any work, so that nothing is
accepted in one place and refused in another.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from slicecli.errors import RequestError, SourceError, shown

__all__ = [
    "NUMPY_SEEDS",
    "check_count",
    "check_sampling",
    "check_seed",
    "describe_shadow",
    "find_folder",
    "is_repository_name",
    "local_path",
    "parse_bytes",
    "parse_count",
    "parse_names",
    "parse_prompt",
    "parse_repository",
    "parse_text",
    "parse_token",
    "parse_tokens",
]

MOST_COUNT = 10**9  # of rows, tokens or questions: more than anybody means
# the least and the largest seed of each library's random generators
TORCH_SEEDS = (-(2**63), 2**64 - 1)
NUMPY_SEEDS = (0, 2**32 - 1)
TEMPERATURES = (1e-6, 1e6)  # logits divided by them stay finite
REPOSITORY_RULE = "each of letters, digits, -, _ and . (without -- or ..), at most 96"
_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9, "T": 10**12}
_BYTE_SUFFIXES = {"": 1, "B": 1} | {
    f"{letter}{infix}B": base ** (power + 1)
    for power, letter in enumerate("KMGT")
    for infix, base in (("", 1000), ("I", 1024))
}
# what may stand before the owner in an address of the Hub
ADDRESS_BEGINNING = re.compile(
    r"(https?://[^/]+/|hf://|git@[^:]+:|(www\.)?(huggingface\.co|hf\.co)/)((models|datasets|spaces)/)?"
)


def parse_text(text: str) -> str:
    """Return a text that says something."""
    if not text.strip():
        raise RequestError("The value is empty.", "Pass a value, or leave out the option.")
    return parse_prompt(text)


def parse_prompt(text: str) -> str:
    """Return a text, which may be empty, for a model to continue."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise RequestError(f"{shown(text)} is not UTF-8 text.", "Check the terminal's encoding.") from None
    return text


def parse_names(text: str) -> tuple[str, ...]:
    """Return names with commas between them."""
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    if not names:
        raise RequestError(f"{shown(text)} contains no name.", "Pass a name, or leave out the option.")
    return names


def check_count(
    value: int | None, what: str, remedy: str, least: int = 1, words: tuple[str, str] = ("too small", "too large")
) -> None:
    """Refuse a number of something that is too small, or larger than anybody means."""
    if value is None or least <= value <= MOST_COUNT:
        return
    is_large = value > MOST_COUNT
    limit = f"{MOST_COUNT} or less" if is_large else f"{least} or more"
    raise RequestError(f"{what.format(shown(value))} {words[is_large]}.", f"{remedy} {limit}.")


def check_seed(seed: int, limits: tuple[int, int] = TORCH_SEEDS) -> None:
    """Refuse a seed that a random generator does not take."""
    least, most = limits
    if not least <= seed <= most:
        raise RequestError(f"The seed {shown(seed)} is out of range.", f"Use --seed from {least} to {most}.")


def check_sampling(max_new_tokens: int, temperature: float, seed: int) -> None:
    """Refuse what no text can be generated with."""
    check_count(max_new_tokens, "{} new tokens are", "Use --max-new-tokens", words=("too few", "too many"))
    check_seed(seed)
    least, most = TEMPERATURES
    if not (temperature == 0 or least <= temperature <= most):
        raise RequestError(
            f"The temperature {temperature} is out of range.",
            f"Use 0 to take the likeliest token each time, or {least:g} to {most:g} to sample.",
        )


def parse_token(text: str) -> str:
    """Return a Hub token that can be sent."""
    if not text:
        raise RequestError(
            "The token is empty.", "Leave it out to use the stored one, or check the variable that should hold it."
        )
    if not all("!" <= letter <= "~" for letter in text):
        kinds = {"a line break": "\r\n", "a space": " \t"}
        found = next((kind for kind, letters in kinds.items() if set(letters) & set(text)), "an invalid character")
        raise RequestError(f"The token contains {found}.", "Copy it as the Hub shows it: hf_ and letters.")
    return text


def local_path(text: str | os.PathLike[str]) -> Path:
    """Return the path that a text names, with `~` and `~name` replaced by home folders."""
    given = os.fspath(text)
    if not given.strip():
        raise RequestError("The path is empty.", "Pass a file or folder; . is the working folder.")
    expanded = os.path.expanduser(given)  # noqa: PTH111  # pathlib's raises where there is no such user
    if expanded.startswith("~"):
        user = re.split(r"[/\\]", expanded)[0]
        raise RequestError(f"The home folder of {user!r} is not known.", f"Write ./{user} for a file with that name.")
    path = Path(expanded)
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise RequestError(f"The path {shown(given)} cannot be used: {reason}.", "Use another path.") from None
    return path


def parse_repository(text: str, needs_owner: bool = True) -> str:
    """Return the id of a repository on the Hub."""
    if is_repository_name(text, needs_owner):
        return text
    offer = _id_inside(text)
    if offer != text and is_repository_name(offer, needs_owner):
        remedy = f"Use {offer}."
    elif is_repository_name(text):
        remedy = f"Use owner/{text}, where owner is a user or an organisation."
    else:
        remedy = f"Use owner/name, {REPOSITORY_RULE}."
    raise RequestError(f"{shown(text)} is not a valid Hub id.", remedy)


def _id_inside(text: str) -> str:
    """Return the id of a repository in an address of the Hub, or in an id with too many slashes or spaces."""
    address = ADDRESS_BEGINNING.match(text.strip())
    rest = re.split(r"[?#]", text.strip()[address.end() if address else 0 :])[0]
    parts = [part for part in rest.split("/") if part]
    # what follows in an address is a branch or a file
    return "/".join(parts[:2] if address else parts).removesuffix(".git")


def is_repository_name(text: str, needs_owner: bool = False) -> bool:
    """Say whether a repository on the Hub can have a name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    # the client's own check takes letters of all languages
    return text.isascii() and ("/" in text or not needs_owner)


def find_folder(text: str) -> Path | None:
    """Return the folder of a model that a text names, `None` where it is the name of a repository on the Hub.

    A folder comes first, as in transformers.
    """
    path = local_path(text)
    if path.is_dir():
        return path
    if path.exists():
        raise SourceError(f"{shown(text)} is a file.", "Pass the folder of a model, or a Hub id such as owner/name.")
    if text.startswith((".", "/", "~")):
        raise SourceError(f"There is no folder {shown(text)}.", "Check the path, or pass a Hub id such as owner/name.")
    try:
        parse_repository(text, needs_owner=False)
    except RequestError as error:
        raise SourceError(f"{shown(text)} is neither an existing folder nor a valid Hub id.", error.remedy) from None
    return None


def describe_shadow(text: str) -> str:
    """Say in a sentence how to get a repository whose name is that of a folder here; empty where that is not so."""
    if not is_repository_name(text):  # such as ./model
        return ""
    return f"{text} is a folder here, and local folders come first; for {text} on the Hub, run the command elsewhere."


def parse_count(text: str) -> int:
    """Read a number of parameters such as `6B`, `750M` or `1234567`."""
    return _parse(text, _SUFFIXES, "a number of parameters such as 6B or 750M")


def parse_tokens(text: str) -> int:
    """Read a number of tokens such as `2M`, `500k` or `1234567`."""
    return _parse(text, _SUFFIXES, "a number of tokens such as 2M or 500k")


def parse_bytes(text: str) -> int:
    """Read a size such as `12GiB` or `500MB`."""
    return _parse(text, _BYTE_SUFFIXES, "a size such as 12GiB or 500MB")


def _parse(text: str, suffixes: dict[str, int], what: str) -> int:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?(?:[eE]\d+)?)\s*([A-Za-z]*)\s*", text)
    if match is None or match[2].upper() not in suffixes:
        raise RequestError(f"{text!r} is not {what}.")
    value = float(match[1]) * suffixes[match[2].upper()]
    if not 1 <= value < 1e18:
        raise RequestError(f"{text!r} is not {what}: it is out of range.")
    return int(value)
