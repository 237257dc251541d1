"""A Hugging Face Hub on this machine for tests: publish to it and read from it with the real client, without a network.

    with LoopbackHub() as hub:
        hub.upload("me/slice", folder)
        hub.faults.append(Fault(method="GET", path=r"safetensors$", drop_after=1000))
        hub.api().snapshot_download("me/slice")

Repositories live in memory and are gone with the hub. This module is the server: it reads requests, breaks what faults
ask it to break, keeps a list of what was asked, and answers by `slicecli.testing.loopback_api`.
"""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import socketserver
import sys
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING
from unittest.mock import patch
from urllib.parse import parse_qs, unquote

from slicecli.testing.loopback_api import Answer, Call, HubApi
from slicecli.testing.loopback_storage import Repository, Store, StoredFile, UnknownRevision, is_large

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Fault", "LoopbackHub", "Request"]

# a token of nobody's, known in advance so that it can be a default
TOKEN = "hf_loopback_me"
# what would lead a client past the hub, past the cache, or past the token that a test means
UNWANTED = (
    *("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
    *("HF_TOKEN_PATH", "HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_ASSETS_CACHE", "HF_DATASETS_CACHE"),
    *("HF_HUB_DISABLE_IMPLICIT_TOKEN", "HUGGINGFACE_CO_STAGING"),
)


@dataclass(frozen=True, eq=False)
class Fault:
    """An injected fault. A request meets the first active fault in `hub.faults` that matches it.

    Exactly one of `status`, `drop_after` and `corrupt` says what happens.

    Attributes:
        method: The method of the requests.
        path: A regular expression that is searched in their path, unquoted and without the query.
        status: Answer this status.
        headers: Headers of that answer, such as `Retry-After`, `X-Error-Code` or `X-Error-Message`.
        body: Its body; default: an error in JSON, as the Hub sends.
        drop_after: Close the connection after so many bytes of the body: of what is uploaded, where the request has a
            body, and it has no effect; otherwise of what is downloaded.
        corrupt: Change the last byte of what is downloaded; headers stay those of the true file.
        times: How many requests it strikes; None: all.
        after: How many requests that fit pass before.
    """

    method: str
    path: str
    status: int | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    times: int | None = 1
    after: int = 0
    drop_after: int | None = None
    corrupt: bool = False

    def __post_init__(self) -> None:
        if (self.status is not None) + (self.drop_after is not None) + self.corrupt != 1:
            raise ValueError("A fault has exactly one of status, drop_after and corrupt.")

    def fits(self, method: str, path: str) -> bool:
        """Tell whether a request is one of those that it is about."""
        return method == self.method and re.search(self.path, path) is not None

    def strikes(self, number: int) -> bool:
        """Tell whether it is active for the request that fits it as number so-and-so, counted from 0."""
        return number >= self.after and (self.times is None or number < self.after + self.times)

    def answer(self) -> Answer:
        """Return the answer of a fault with a status."""
        status = self.status or 500
        reason = self.headers.get("X-Error-Message") or http.client.responses.get(status, "Error")
        body = self.body or json.dumps({"error": reason}).encode()
        return Answer(status, body, {"Content-Type": "application/json", **self.headers})


@dataclass(frozen=True)
class Request:
    """A request that the hub answered or interrupted.

    Attributes:
        method: `GET`, `HEAD`, `POST`, `PUT` or `DELETE`.
        path: Its path, unquoted and without the query.
        query: The query, as sent.
        status: What was answered; 0 where nothing was.
        received_bytes: Bytes of its body that were read.
        sent_bytes: Bytes of the body of the answer.
        range: The header `Range`.
        authorization: The header `Authorization`.
        body: What was read of its body; files of commits stand in it in base64.
    """

    method: str
    path: str
    query: str
    status: int
    received_bytes: int
    sent_bytes: int
    range: str | None
    # the one who ran the test may have sent their own
    authorization: str | None = field(repr=False)
    body: bytes = field(repr=False)


class LoopbackHub:
    """A Hub that serves models and datasets at 127.0.0.1 while its `with` block lasts.

    Every user may write to their own repositories and to those of owners who are no users here; private repositories
    are seen by those who may write to them, and files of gated ones by their owner. Inside the block the client in
    this process uploads without xet storage, which is not served, and is online whatever `HF_HUB_OFFLINE` says.

    Attributes:
        token: A token of the user `me`.
        faults: What is to go wrong; add to it at any time.
        requests: What was asked, in the order of the answers.
    """

    def __init__(self) -> None:
        self.token = TOKEN
        self.faults: list[Fault] = []
        self.requests: list[Request] = []
        self._lock = threading.RLock()
        self._struck: Counter[Fault] = Counter()
        self._store = Store()
        self._server = _Server(self)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._api = HubApi(self._store, self.endpoint)
        self._api.users[TOKEN] = "me"

    def __enter__(self) -> LoopbackHub:
        self._scope = ExitStack()
        self._scope.enter_context(_online())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._scope.close()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def multipart_bytes(self) -> int:
        """Large files above this size are uploaded in parts of it."""
        return self._api.multipart_bytes

    @multipart_bytes.setter
    def multipart_bytes(self, size: int) -> None:
        self._api.multipart_bytes = size

    def add_user(self, name: str) -> str:
        """Add a user and return a token of theirs."""
        token = f"hf_loopback_{name}"
        self._api.users[token] = name
        return token

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Return the environment for a child process that uses this hub.

        Args:
            home: Its `HF_HOME`: cache and settings.
            token: Its token; None: it has none.
        """
        kept = {name: value for name, value in os.environ.items() if name not in UNWANTED}
        return {
            **kept,
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
            **({"HF_TOKEN": token} if token is not None else {}),
        }

    def api(self, token: str | None = TOKEN) -> HfApi:
        """Return a client for this process; a token of `None` makes it anonymous."""
        from huggingface_hub import HfApi

        return HfApi(endpoint=self.endpoint, token=False if token is None else token)

    def create(self, name: str, kind: str = "model", private: bool = False, gated: bool = False) -> Repository:
        """Create a repository without files.

        Raises:
            ValueError: It exists.
        """
        with self._lock:
            if self._store.find(name, kind) is not None:
                raise ValueError(f"The {kind} {name} exists.")
            return self._store.create(name, kind, private, gated)

    def upload(
        self,
        name: str,
        files: Path | str | Mapping[str, bytes],
        kind: str = "model",
        revision: str = "main",
        message: str = "Upload files",
    ) -> str:
        """Commit files directly to a repository, without any check; its other files stay.

        Args:
            name: The repository; made where it is missing.
            files: A folder, or contents by path.
            kind: `model` or `dataset`.
            revision: A branch, begun at main where it is missing, or `refs/pr/N`.
            message: The message of the commit.

        Returns:
            The id of the commit.
        """
        if not isinstance(files, Mapping):
            folder = Path(files)
            found = sorted(path for path in folder.rglob("*") if path.is_file())
            files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}
        with self._lock:
            repository = self._store.find(name, kind) or self._store.create(name, kind)
            if revision not in repository.heads:
                repository.branch(revision)
            added = {
                path: StoredFile(content, is_large(path, content[:512], len(content)))
                for path, content in files.items()
            }
            return repository.commit(revision, {**repository.find(revision).files, **added}, message).id

    def files(self, name: str, revision: str = "main", kind: str = "model") -> dict[str, bytes]:
        """Return the contents of all files at a revision, by path.

        Raises:
            KeyError: There is no such repository, or no such revision.
        """
        with self._lock:
            try:
                commit = self.repository(name, kind).find(revision)
            except UnknownRevision:
                raise KeyError(f"The {kind} {name} has no revision {revision}.") from None
            return {path: file.content for path, file in sorted(commit.files.items())}

    def repository(self, name: str, kind: str = "model") -> Repository:
        """Return a repository: whether it is `private` or `gated`, `branches`, `commits`, `pull_requests`, `tags`.

        Raises:
            KeyError: There is none.
        """
        found = self._store.find(name, kind)
        if found is None:
            raise KeyError(f"There is no {kind} {name}.")
        return found

    def _fault(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if fault.fits(method, path):
                    number = self._struck[fault]
                    self._struck[fault] += 1
                    if fault.strikes(number):
                        return fault
        return None

    def _answer(self, call: Call) -> Answer:
        with self._lock:
            return self._api.answer(call)


@contextmanager
def _online() -> Iterator[None]:
    """Let the clients in this process ask, without xet storage; afterwards they are what they were."""
    from huggingface_hub import constants

    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
    was_offline, had_datasets = constants.HF_HUB_OFFLINE, "datasets.config" in sys.modules
    with ExitStack() as stack:
        stack.enter_context(patch.object(constants, "HF_HUB_DISABLE_XET", True))
        stack.enter_context(patch.object(constants, "HF_HUB_OFFLINE", False))
        for name in names if had_datasets else ():
            stack.enter_context(patch.object(sys.modules["datasets.config"], name, False))
        yield
    if was_offline and not had_datasets and "datasets.config" in sys.modules:
        for name in names:  # which have been read meanwhile
            setattr(sys.modules["datasets.config"], name, True)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, hub: LoopbackHub) -> None:
        self.hub = hub
        self._open: set[socket.socket] = set()
        super().__init__(("127.0.0.1", 0), _Handler)

    def server_bind(self) -> None:
        # without the look-up of this machine's name that HTTPServer makes
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "127.0.0.1", self.server_address[1]

    def get_request(self) -> tuple[socket.socket, tuple[str, int]]:
        connection, address = super().get_request()
        self._open.add(connection)
        return connection, address

    def close_request(self, request: socket.socket | tuple[bytes, socket.socket]) -> None:
        super().close_request(request)
        self._open.discard(request)

    def server_close(self) -> None:
        super().server_close()
        # clients keep connections open and would find them dead only by waiting
        for connection in list(self._open):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: object, client_address: object) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _serve(self) -> None:
        hub = self.server.hub
        path, _, query = self.path.partition("?")
        fault = hub._fault(self.command, unquote(path))
        drop_after = fault.drop_after if fault else None
        uploads = "Transfer-Encoding" in self.headers or self.headers.get("Content-Length", "0") != "0"
        body, whole = self._receive(drop_after if uploads else None)
        if not whole:
            self._note(0, body, 0)
            self._drop()
            return
        if fault and fault.status is not None:
            answer = fault.answer()
        else:
            headers = {name.lower(): value for name, value in self.headers.items()}
            answer = hub._answer(Call(self.command, path, parse_qs(query), headers, body))
        content = b"" if self.command == "HEAD" else answer.body
        if fault and fault.corrupt:
            content = content[:-1] + bytes(255 - byte for byte in content[-1:])
        content = content[:drop_after]
        # noted before it is sent: whoever has the answer finds the request in the list
        self._note(answer.status, body, len(content))
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        self.wfile.write(content)
        if drop_after is not None:
            self._drop()

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _note(self, status: int, body: bytes, sent: int) -> None:
        path, _, query = self.path.partition("?")
        wanted, authorization = self.headers.get("Range"), self.headers.get("Authorization")
        request = Request(self.command, unquote(path), query, status, len(body), sent, wanted, authorization, body)
        self.server.hub.requests.append(request)

    def _drop(self) -> None:
        """Close the connection, so that the client gets what was sent and then an end that it did not expect."""
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def _receive(self, limit: int | None) -> tuple[bytes, bool]:
        """Read the body, or `limit` bytes of it; return it and whether it may be answered."""
        pieces: list[bytes] = []
        left = sys.maxsize if limit is None else limit
        with suppress(ConnectionError):
            for size in self._sections():
                piece = self.rfile.read(min(size, left))
                pieces.append(piece)
                left -= len(piece)
                if len(piece) < size:
                    return b"".join(pieces), False
            return b"".join(pieces), limit is None
        return b"".join(pieces), False

    def _sections(self) -> Iterator[int]:
        """Yield how many bytes of the body come next, each time they have been read, until it ends."""
        if "chunked" in self.headers.get("Transfer-Encoding", "").lower():
            while size := int(self._line().split(b";")[0], 16):
                yield size
                self._line()
            self._line()
        elif length := int(self.headers.get("Content-Length", 0)):
            yield length

    def _line(self) -> bytes:
        line = self.rfile.readline()
        if not line:
            raise ConnectionError("the client is gone")
        return line.strip()
