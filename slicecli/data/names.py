"""What texts and tasks are called in reports, records and curves: names that tell them apart, and show no more.

A text of the Hub or a task of lm-eval has one name, which identifies it. A file has its own name, which another file
may have too: it is shown with as many of the folders above it as tell it from all others; its content identifies it.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from slicecli.errors import RequestError, shown

__all__ = ["ANOTHER", "Named", "are_of_one_file", "distinct_names", "most_telling", "without_repeats"]

ANOTHER = ""  # instead of the digest of something that is certainly not the same
LONGEST_NAME = 255
DIGEST_CHARACTERS = 8
_HOMES = {"home", "Users"}
_BY_DIGEST = re.compile(rf" \([0-9a-f]{{{DIGEST_CHARACTERS}}}\)$")


@dataclass(frozen=True)
class Named:
    """A text or a task that is to get a name.

    Attributes:
        name: Its own name; of a file, without folders.
        digest: What identifies its content; `None` where its name does.
        folders: The folders above a file that its name may show, the nearest last.
    """

    name: str
    digest: str | None = None
    folders: tuple[str, ...] = ()

    @classmethod
    def file(cls, path: Path, digest: str) -> Named:
        """Return that of a file."""
        absolute = Path(os.path.abspath(path))  # noqa: PTH100  links keep their own names
        return cls(_printable(absolute.name), digest, tuple(map(_printable, _public(absolute.parent.parts[1:]))))

    def candidates(self) -> Iterator[str]:
        """Yield the names it may get, the shortest first."""
        for count in range(len(self.folders) + 1):
            name = "/".join((*self.folders[len(self.folders) - count :], self.name))
            if len(name) <= LONGEST_NAME:
                yield name
        if self.digest:
            suffix = f" ({self.digest[:DIGEST_CHARACTERS]})"
            yield self.name[-(LONGEST_NAME - len(suffix)) :] + suffix


def distinct_names(wanted: Sequence[Named], taken: Mapping[str, str | None] | None = None) -> list[str]:
    """Decide what texts, or tasks, are called: each by the shortest name that no other of them may get and none has.

    Args:
        wanted: Different texts. Two get the same name only where their content is the same, and so is all that may be
            shown of their paths.

    Example:
        >>> distinct_names([Named("t.txt", "1f", ("books", "en")), Named("t.txt", "2e", ("books", "de")), Named("c4")])
        ['en/t.txt', 'de/t.txt', 'c4']
    """
    taken = taken or {}
    candidates = [tuple(one.candidates()) for one in wanted]
    names = []
    for index, one in enumerate(wanted):
        others = {name for at, some in enumerate(candidates) if at != index for name in some}
        free = [name for name in candidates[index] if taken.get(name, one.digest) == one.digest]
        name = next((name for name in free if name not in others), free[-1] if free and one.digest else None)
        if name is None:
            raise RequestError(f"Two different texts or tasks are named {shown(one.name)}.", "Rename one of them.")
        names.append(name)
    return names


def most_telling(names: Iterable[str]) -> str:
    """Return that of several names of one text, or task, which shows most folders, and nothing else if it need not."""
    return max(names, key=lambda name: (name.count("/"), -len(name), name))


def are_of_one_file(name: str, other: str) -> bool:
    """Say whether two names may be those of one file, with more and with fewer of its folders."""
    own, others = (_BY_DIGEST.sub("", one).rpartition("/")[2] for one in (name, other))
    return own == others


def without_repeats(given: Iterable[str], is_file: Callable[[str], bool]) -> list[str]:
    """Return names of texts or tasks, each once; of several paths of one file the first."""
    first: dict[object, str] = {}
    for name in given:
        first.setdefault(_identity(Path(name).expanduser()) if is_file(name) else name, name)
    return list(first.values())


def _identity(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:  # whoever reads it says so
        return path.absolute()
    # a link with another suffix is read in another way
    return found.st_dev, found.st_ino, path.suffix.lower()


def _public(folders: Sequence[str]) -> Sequence[str]:
    """Return the folders of a path below whatever tells whose it is."""
    private = set()
    with contextlib.suppress(RuntimeError):
        private.add(Path.home().name)
    with contextlib.suppress(KeyError, OSError, ImportError):
        private.add(getpass.getuser())
    below = 2 if folders and folders[0] in _HOMES else 0
    return folders[max([below, *(at for at, folder in enumerate(folders, start=1) if folder in private)]) :]


def _printable(name: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in name)
