"""Repositories of the Hub for tests, in memory: files, commits, branches, tags, pull requests, and what a card says.

Nothing here knows of HTTP or of users' rights. Where the Hub has rules about content, they are the Hub's: which files
are kept apart as large ones, what identifies a file, which tags a card's metadata gives. A new repository has one
commit without files. Time does not pass by the clock but by one second a commit, so the same calls give the same ids.
"""

from __future__ import annotations

import codecs
import fnmatch
import hashlib
import itertools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from functools import cached_property
from typing import Any

__all__ = [
    "Commit",
    "PullRequest",
    "Repository",
    "Store",
    "StoredFile",
    "UnknownRevision",
    "card_problem",
    "card_tags",
    "is_large",
    "read_card",
]

# what the .gitattributes that the Hub puts into a new model repository keeps in large-file storage
LARGE_NAMES = (
    *("*.7z", "*.arrow", "*.bin", "*.bz2", "*.ckpt", "*.ftz", "*.gz", "*.h5", "*.joblib", "*.lfs.*", "*.mlmodel"),
    *("*.model", "*.msgpack", "*.npy", "*.npz", "*.onnx", "*.ot", "*.parquet", "*.pb", "*.pickle", "*.pkl", "*.pt"),
    *("*.pth", "*.rar", "*.safetensors", "*.tar", "*.tar.*", "*.tflite", "*.tgz", "*.wasm", "*.xz", "*.zip", "*.zst"),
    "*tfevents*",
)
LARGE_BYTES = 10 * 2**20
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
_CARD = re.compile(r"\s*---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


class UnknownRevision(LookupError):
    """There is no branch, tag, pull request or commit of that name."""


@dataclass(frozen=True)
class StoredFile:
    """A file as a repository keeps it.

    Attributes:
        content: Its bytes.
        large: Whether it lies in large-file storage, and git holds a pointer to it.
    """

    content: bytes = field(repr=False)
    large: bool

    @cached_property
    def sha256(self) -> str:
        """The digest of the content, in hexadecimal."""
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        """The text that git holds in place of a large file."""
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @cached_property
    def blob(self) -> str:
        """The id of the git object: of the content, or of the pointer to it."""
        held = self.pointer if self.large else self.content
        return hashlib.sha1(b"blob %d\0" % len(held) + held).hexdigest()

    @property
    def identity(self) -> str:
        """What the Hub compares an upload with and names downloads by."""
        return self.sha256 if self.large else self.blob


@dataclass(frozen=True)
class Commit:
    """One state of a repository; `parent` is None for the first."""

    id: str
    parent: str | None
    message: str
    description: str
    author: str
    date: datetime
    files: Mapping[str, StoredFile] = field(repr=False)


@dataclass(frozen=True)
class PullRequest:
    """A pull request; its newest commit is that of the revision `ref`."""

    number: int
    title: str
    description: str
    author: str
    base: str

    @property
    def ref(self) -> str:
        """The revision that holds its commits."""
        return f"refs/pr/{self.number}"


class Repository:
    """A repository.

    Attributes:
        name: Its id, `owner/name`.
        kind: `model` or `dataset`.
        private: Whether only those who may write to it see it.
        gated: Whether only its owner may read files.
        commits: Every commit, the oldest first.
        pull_requests: Every pull request, the oldest first.
        tags: Commit ids by tag.
        objects: Large files that were uploaded, by their sha256, whether a commit holds them or not.
    """

    def __init__(self, name: str, kind: str, dates: Iterator[datetime], private: bool, gated: bool) -> None:
        self.name = name
        self.kind = kind
        self.private = private
        self.gated = gated
        self.commits: list[Commit] = []
        self.pull_requests: list[PullRequest] = []
        self.tags: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self._dates = dates
        self._heads: dict[str, str] = {}
        self._record("main", None, {}, "initial commit", "", "system")

    @property
    def owner(self) -> str:
        """The user or organisation it belongs to."""
        return self.name.partition("/")[0]

    @property
    def branches(self) -> dict[str, str]:
        """Commit ids by branch."""
        return {name: head for name, head in self._heads.items() if not name.startswith("refs/pr/")}

    @property
    def heads(self) -> dict[str, str]:
        """Commit ids by everything that takes commits: branches and pull requests."""
        return dict(self._heads)

    def find(self, revision: str) -> Commit:
        """Return the commit that a branch, tag, pull request, commit id or the first characters of one stand for.

        Raises:
            UnknownRevision: There is none.
        """
        wanted = self._heads.get(revision) or self.tags.get(revision) or revision
        for commit in self.commits:
            if commit.id == wanted or (len(wanted) >= 7 and commit.id.startswith(wanted)):
                return commit
        raise UnknownRevision(revision)

    def history(self, commit: Commit) -> list[Commit]:
        """Return a commit and those before it, the newest first."""
        line = [commit]
        while line[-1].parent is not None:
            line.append(self.find(line[-1].parent))
        return line

    def branch(self, name: str, revision: str = "main") -> None:
        """Let a new branch begin at a revision."""
        self._heads[name] = self.find(revision).id

    def commit(
        self, ref: str, files: Mapping[str, StoredFile], message: str, description: str = "", author: str = ""
    ) -> Commit:
        """Add a commit to a branch or pull request.

        Args:
            ref: The branch, or `refs/pr/N`.
            files: All that the repository holds from then on, by path.
            message: First line of the message.
            description: The rest of it.
            author: Who made it; default: the owner.

        Raises:
            UnknownRevision: There is no such branch or pull request.
        """
        if ref not in self._heads:
            raise UnknownRevision(ref)
        return self._record(ref, self._heads[ref], files, message, description, author or self.owner)

    def propose(
        self,
        base: str,
        parent: Commit,
        files: Mapping[str, StoredFile],
        message: str,
        description: str,
        author: str,
    ) -> tuple[PullRequest, Commit]:
        """Open a pull request on a branch with one commit that follows `parent`."""
        request = PullRequest(len(self.pull_requests) + 1, message, description, author, base)
        self.pull_requests.append(request)
        return request, self._record(request.ref, parent.id, files, message, description, author)

    def _record(
        self,
        ref: str,
        parent: str | None,
        files: Mapping[str, StoredFile],
        message: str,
        description: str,
        author: str,
    ) -> Commit:
        date = next(self._dates)
        tree = sorted((path, file.blob) for path, file in files.items())
        identity = repr((self.kind, self.name, parent, message, description, author, date.isoformat(), tree))
        commit_id = hashlib.sha1(identity.encode()).hexdigest()
        commit = Commit(commit_id, parent, message, description, author, date, dict(files))
        self.commits.append(commit)
        self._heads[ref] = commit_id
        self.objects.update({file.sha256: file.content for file in files.values() if file.large})
        return commit


class Store:
    """All repositories, found by kind and name."""

    def __init__(self) -> None:
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._dates = (START + timedelta(seconds=second) for second in itertools.count())

    def create(self, name: str, kind: str, private: bool = False, gated: bool = False) -> Repository:
        """Make a repository, or begin one anew in its place."""
        made = Repository(name, kind, self._dates, private, gated)
        self._repositories[kind, name] = made
        return made

    def find(self, name: str, kind: str) -> Repository | None:
        """Return a repository, or None."""
        return self._repositories.get((kind, name))

    def delete(self, repository: Repository) -> None:
        """Forget a repository."""
        del self._repositories[repository.kind, repository.name]

    def newest_first(self, kind: str) -> list[Repository]:
        """Return the repositories of a kind, the last changed first."""
        found = [repository for repository in self._repositories.values() if repository.kind == kind]
        return sorted(found, key=lambda one: one.find("main").date, reverse=True)


def is_large(path: str, sample: bytes, size: int) -> bool:
    """Tell whether the Hub keeps a file in large-file storage: by its name, its size, or because it is binary.

    Args:
        path: Where it lies in the repository.
        sample: Its first bytes.
        size: How many it has.
    """
    if size == 0:
        return False
    name = path.rpartition("/")[2]
    if size > LARGE_BYTES or path.startswith("saved_model/"):
        return True
    if any(fnmatch.fnmatchcase(name, pattern) for pattern in LARGE_NAMES):
        return True
    if b"\0" in sample:
        return True
    try:
        # a sample may end inside a character
        codecs.getincrementaldecoder("utf-8")().decode(sample)
    except UnicodeDecodeError:
        return True
    return False


def read_card(content: bytes) -> dict[str, Any]:
    """Return the metadata at the top of a README, empty where there is none.

    Raises:
        ValueError: It is not YAML, or not a mapping.
    """
    import yaml

    try:
        found = _CARD.match(content.decode("utf-8"))
        metadata = yaml.safe_load(found.group(1)) if found else {}
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"the metadata is not YAML: {error}") from error
    if metadata is not None and not isinstance(metadata, dict):
        raise ValueError("the metadata is not a mapping")
    return metadata or {}


def card_problem(content: bytes) -> str | None:
    """Say what is wrong with the metadata of a README, None where nothing is."""
    try:
        read_card(content)
    except ValueError as error:
        return str(error)
    return None


def card_tags(card: Mapping[str, Any]) -> list[str]:
    """Return the tags that the Hub derives from a card's metadata."""
    relation = card.get("base_model_relation")
    tags = [text for key in ("library_name", "pipeline_tag", "tags", "language") for text in _texts(card.get(key))]
    for key, prefix in (("datasets", "dataset"), ("license", "license"), ("base_model", "base_model")):
        tags += [f"{prefix}:{text}" for text in _texts(card.get(key))]
    if relation:
        tags += [f"base_model:{relation}:{text}" for text in _texts(card.get("base_model"))]
    return list(dict.fromkeys(tags))


def _texts(value: Any) -> list[str]:
    return [str(one) for one in (value if isinstance(value, list) else [value]) if one is not None]
