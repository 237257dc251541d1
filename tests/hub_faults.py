"""Letting things go wrong between this program and the Hub, with the real command line and the real client.

A scenario says which command meets which fault. `World.play` lets it happen and returns what was seen: what the command
said, what it left on the disk and on the Hub, and what the same command does once the fault is gone.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from programs import call_command, surroundings

from slicecli.testing.checkpoints import nonsense_text, save_checkpoint
from slicecli.testing.loopback_hub import Fault, LoopbackHub, Request

INSPECT = ("inspect", "{name}")
SLICE = (
    *("slice", "{name}", "--dim", "36", "-o", "out"),
    *("--calibration", "{text}", "--samples", "64", "--seq-len", "32", "--max-shard-size", "100KB"),
)
SLICE_AND_PUSH = ("slice", "lab/dense", *SLICE[2:], "--push", "{name}")
PUSH = ("push", "slice", "{name}")
CARD = "---\nlicense: apache-2.0\n---\n\n# A model\n"
# weight files of the model, and of the slice
SHARDS = 3
SHARD = "model-00002-of-00003.safetensors"
# what a push may change on this machine
DESCRIPTIONS = ("README.md", "slicecli.json")
PIECE = 2000  # bytes that the client takes from a connection at once, in place of 10 MB
ROOM = 20_000  # bytes of each download that go onto a disk before it is full


def small_pieces(patch: pytest.MonkeyPatch) -> None:
    """Let a download be kept in small pieces, as one of many gigabytes is in pieces of 10 MB."""
    patch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", PIECE)


def disk_becomes_full(patch: pytest.MonkeyPatch) -> None:
    """Let the disk take some bytes of a download and then no more."""
    from huggingface_hub import file_download

    class Full:
        def __init__(self, file: Any) -> None:
            self._file = file

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

        def write(self, content: bytes) -> Any:
            if self._file.tell() + len(content) > ROOM:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(content)

    get = file_download.http_get
    patch.setattr(file_download, "http_get", lambda url, file, **more: get(url, Full(file), **more))
    small_pieces(patch)


def disk_is_small(patch: pytest.MonkeyPatch) -> None:
    """Let the disk with the cache say that little is free."""
    usage = shutil.disk_usage

    def little(path: Any) -> Any:
        in_cache = os.fspath(path).startswith(os.environ["HF_HOME"])
        return usage(path)._replace(free=ROOM) if in_cache else usage(path)

    patch.setattr(shutil, "disk_usage", little)


def no_network(patch: pytest.MonkeyPatch) -> None:
    """Let the system find no way to any other machine."""

    def refuse(*_arguments: Any) -> None:
        raise OSError(errno.ENETUNREACH, os.strerror(errno.ENETUNREACH))

    patch.setattr(socket.socket, "connect", refuse)


def cache_cannot_be_written(patch: pytest.MonkeyPatch) -> None:
    """Let the system refuse every change below HF_HOME, as on a file system that is mounted for reading."""
    patch.setattr(ReadOnly, "folder", os.environ["HF_HOME"])
    if not ReadOnly.is_installed:
        sys.addaudithook(ReadOnly.refuse)  # for good: the system has no way to take one back
        ReadOnly.is_installed = True


class ReadOnly:
    """The folder in which the system refuses every change; none where it is empty."""

    folder = ""
    is_installed = False

    @classmethod
    def refuse(cls, event: str, arguments: Any) -> None:
        """Raise where something there is to be changed."""
        if not cls.folder:
            return
        if event == "open":
            path, changes = arguments[0], arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        elif event == "os.mkdir":
            path, changes = arguments[0], not Path(arguments[0]).exists()
        elif event in ("os.rename", "os.remove", "os.rmdir", "os.chmod"):
            path, changes = arguments[0], True
        elif event in ("os.symlink", "os.link"):
            path, changes = arguments[1], True
        else:
            return
        if changes and not isinstance(path, int) and os.fspath(path).startswith(cls.folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)


@dataclass(frozen=True)
class Scenario:
    """A fault.

    Attributes:
        name: A word for it, which its repository bears too.
        what: What happens, for the page.
        says: What the message must contain; empty where the command works all the same.
        words: The command.
        owner: Whose the repository is: `lab` is nobody's, so everyone may write.
        exists: Whether there is such a repository before.
        private: Whether it is private.
        gated: Whether it is gated.
        token: Whose token the user has, or a token; `None` is none.
        faults: What the Hub does; `{name}` and `{digest}` in paths stand for the repository and a weight file.
        circumstances: What is wrong with the machine.
        environment: More of the environment.
        first: A command that ran before, when all was well.
        prepare: What else is done before the command.
        mend: What is done after it, besides that the fault goes, the token is the owner's, and the machine is sound.
        note: What else was seen, for the page.
    """

    name: str
    what: str
    says: str = ""
    words: tuple[str, ...] = INSPECT
    owner: str = "lab"
    exists: bool = True
    private: bool = False
    gated: bool = False
    token: str | None = "me"
    faults: tuple[Fault, ...] = ()
    circumstances: tuple[Callable[[pytest.MonkeyPatch], None], ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    first: tuple[str, ...] = ()
    prepare: Callable[[World, Scenario], None] | None = None
    mend: Callable[[World, Scenario], None] | None = None
    note: Callable[[Outcome], str] | None = None

    @property
    def repository(self) -> str:
        """The id of its repository."""
        return f"{self.owner}/{self.name}"

    @property
    def publishes(self) -> bool:
        """Whether something is sent to the Hub."""
        return self.words[0] == "push" or "--push" in self.words

    @property
    def slice(self) -> str:
        """The folder of the slice that is published."""
        return "out" if "--push" in self.words else "slice"


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Attributes:
        code: Its exit code.
        out: Its standard output.
        err: Its standard error.
        waits: The seconds that it would have waited, one pause after the other.
        requests: What it asked the Hub for.
    """

    code: int
    out: str
    err: str
    waits: list[float]
    requests: list[Request]

    def asked(self, method: str, pattern: str) -> list[Request]:
        """Return the requests of a method with a path in which a regular expression is found."""
        return [one for one in self.requests if one.method == method and re.search(pattern, one.path)]


@dataclass(frozen=True)
class Seen:
    """What came of a scenario.

    Attributes:
        outcome: Of the command.
        tries: How many requests there were of those that the fault is about, for the same thing.
        left: What there was afterwards, in words: in the cache, or on the Hub.
        kept: How many weight files that was.
        partial: Names of files and folders that were half written, in the user's folder.
        is_whole: Whether there was a slice on this machine, and as it was made.
        again: The outcome of the same command without the fault; `None` where the first worked.
        done: What that did, in words.
        moved: How many weight files it fetched, or sent.
    """

    outcome: Outcome
    tries: int
    left: str
    kept: int
    partial: list[str]
    is_whole: bool
    again: Outcome | None
    done: str
    moved: int


class World:
    """A Hub and a machine, a model on the one and a slice of it on the other.

    Args:
        root: An empty folder.
        hub: The Hub.
        model: The model.
    """

    def __init__(self, root: Path, hub: LoopbackHub, model: Any) -> None:
        self.root = root
        self.hub = hub
        self.home = root / "huggingface"
        self.model = save_checkpoint(model, root / "model")
        (self.model / "model.safetensors").unlink()
        model.save_pretrained(self.model, max_shard_size="120KB")
        (self.model / "README.md").write_text(CARD, encoding="utf-8")
        self.text = nonsense_text(root / "nonsense.jsonl")
        for folder in ("huggingface", "somebody"):
            (root / folder).mkdir()
        self.tokens = {"me": self.hub.token, "lab": self.hub.token, "them": self.hub.add_user("them")}
        self.environment = {**self.hub.environment(self.home, None), "HOME": str(root / "somebody")}
        self._seen: dict[str, Seen] = {}
        self.slice = root / "slice"
        self.hub.upload("lab/first", self.model)
        made = self.run(SLICE, Scenario("first", ""), root)
        assert made.code == 0, made.err
        (root / "out").rename(self.slice)
        self.digests = json.loads((self.slice / "slicecli.json").read_text(encoding="utf-8"))["weights"]

    def run(self, words: tuple[str, ...], scenario: Scenario, folder: Path) -> Outcome:
        """Run a command under the circumstances of a scenario."""
        known = {"name": scenario.repository, "text": os.path.relpath(self.text, folder)}
        words = ("-q", *(word.format_map(known) for word in words))
        token = {} if scenario.token is None else {"HF_TOKEN": self.tokens.get(scenario.token, scenario.token)}
        environment = {**self.environment, **token, **scenario.environment}
        before, waits = len(self.hub.requests), []
        with surroundings(environment, folder), pytest.MonkeyPatch.context() as patch:
            patch.setattr(time, "sleep", waits.append)
            for circumstance in scenario.circumstances:
                circumstance(patch)
            done = call_command(*words)
        return Outcome(done.returncode, done.stdout, done.stderr, waits, self.hub.requests[before:])

    def play(self, scenario: Scenario) -> Seen:
        """Let a fault happen, once, and return what was seen."""
        if scenario.name not in self._seen:
            self._seen[scenario.name] = self._play(scenario)
        return self._seen[scenario.name]

    def folder(self, scenario: Scenario) -> Path:
        """Return the folder in which the commands of a scenario run."""
        return self.root / "folders" / scenario.name

    def cached(self, name: str) -> set[str]:
        """Return the files of a repository that are in the cache."""
        folder = self.home / "hub" / f"models--{name.replace('/', '--')}"
        return {path.name for path in folder.glob("snapshots/*/*") if path.is_file()}

    def _play(self, scenario: Scenario) -> Seen:
        folder = self.folder(scenario)
        folder.mkdir(parents=True)
        self._set_up(scenario, folder)
        sound = replace(scenario, token=scenario.owner, circumstances=(), environment={})
        if scenario.first:
            first = self.run(scenario.first, sound, folder)
            assert first.code == 0, first.err
        path = {"{name}": re.escape(scenario.repository), "{digest}": self.digests[SHARD]}
        faults = [replace(fault, path=_filled(fault.path, path)) for fault in scenario.faults]
        self.hub.faults[:] = faults
        outcome = self.run(scenario.words, scenario, folder)
        self.hub.faults.clear()
        met = [one for one in outcome.requests if any(fault.fits(one.method, one.path) for fault in faults)]
        tries = max(Counter(one.path for one in met).values(), default=0)
        left, kept = self._published(scenario) if scenario.publishes else self._downloaded(scenario)
        partial = [path.name for path in folder.rglob("*") if "incomplete" in path.name]
        is_whole = self._is_whole(folder / scenario.slice)
        if outcome.code == 0:
            return Seen(outcome, tries, left, kept, partial, is_whole, None, "", 0)
        if scenario.mend:
            scenario.mend(self, scenario)
        is_made = "--push" in scenario.words and (folder / "out").exists()
        again = self.run(("push", "out", "{name}") if is_made else scenario.words, sound, folder)
        moved = len(again.asked("PUT", "^/lfs/") if scenario.publishes else again.asked("GET", r"\.safetensors$"))
        done = "works" if again.code == 0 else "fails"
        if scenario.words[0] != "inspect":
            done += f": {_files(moved)} {'sent' if scenario.publishes else 'fetched'}"
        return Seen(outcome, tries, left, kept, partial, is_whole, again, done, moved)

    def _set_up(self, scenario: Scenario, folder: Path) -> None:
        if scenario.words[0] == "push":
            shutil.copytree(self.slice, folder / "slice")
        if "--push" in scenario.words:
            self.hub.upload("lab/dense", self.model)
        if scenario.exists:
            self.hub.create(scenario.repository, private=scenario.private, gated=scenario.gated)
            if not scenario.publishes:
                self.hub.upload(scenario.repository, self.model)
        if scenario.prepare:
            scenario.prepare(self, scenario)

    def _downloaded(self, scenario: Scenario) -> tuple[str, int]:
        """Say what is in the cache of a scenario's model, and count the weight files."""
        arrived, of_model = self.cached(scenario.repository), set(contents(self.model))
        weights = sum(name.endswith(".safetensors") for name in arrived)
        if not arrived or arrived == of_model:
            return ("all files" if arrived else "nothing"), weights
        is_all = len(arrived) - weights == len(of_model) - SHARDS
        text = "the small files" if is_all else "some of the small files"
        return (f"{text}, {_files(weights)}" if weights else text), weights

    def _published(self, scenario: Scenario) -> tuple[str, int]:
        """Say what is on the Hub of the slice that a scenario publishes, and count the weight files."""
        try:
            repository = self.hub.repository(scenario.repository)
        except KeyError:
            return "no repository", 0
        stored = sum(digest in repository.objects for digest in self.digests.values())
        there = self.hub.files(scenario.repository)
        if not there:
            return "an empty repository" + (f"; {_files(stored)} stored for it" if stored else ""), stored
        here = contents(self.folder(scenario) / scenario.slice)
        differing = [name for name in here if there.get(name) != here[name]]
        return (f"the slice, but for {', '.join(differing)}" if differing else "the slice"), stored

    def _is_whole(self, folder: Path) -> bool:
        made, there = contents(self.slice), contents(folder)
        same = {name: content == there.get(name) for name, content in made.items() if name not in DESCRIPTIONS}
        return made.keys() == there.keys() and all(same.values())


def contents(folder: Path) -> dict[str, bytes]:
    """Return the contents of the files of a folder by their paths; of a folder that is not there, none."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def _files(count: int) -> str:
    return f"{count or 'none'} of {SHARDS} weight files"


def _filled(pattern: str, values: dict[str, str]) -> str:
    for name, value in values.items():
        pattern = pattern.replace(name, value)
    return pattern
