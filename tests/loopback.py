"""A Hub on this machine, for reading: enough of the protocol for the real client to download models."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.models`, folders by id; ids in `server.gated` answer 403."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_args):
        pass

    def answer(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        name = "/".join(path.removeprefix("/api/models/").lstrip("/").split("/")[:2])
        if name in self.server.gated:
            return self.answer(403, b"{}", X_Error_Code="GatedRepo")
        if name not in self.server.models:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        folder = self.server.models[name]
        files = sorted(file for file in folder.iterdir() if file.is_file())
        if "/revision/" in path or path == f"/api/models/{name}":
            if path.rpartition("/revision/")[2] not in ("main", COMMIT, path):
                return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
            body = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file.name} for file in files]}
            return self.answer(200, json.dumps(body).encode())
        if "/tree/" in path:
            entries = [
                {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": self.digest(file)}
                for file in files
            ]
            return self.answer(200, json.dumps(entries).encode())
        file = folder / path.rpartition("/")[2]
        if not file.is_file():
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        return self.answer(200, file.read_bytes(), ETag=f'"{self.digest(file)}"', X_Repo_Commit=COMMIT)

    @staticmethod
    def digest(file: Path) -> str:
        return hashlib.sha1(file.read_bytes()).hexdigest()


@contextmanager
def loopback_hub(models: dict[str, Path], gated: tuple[str, ...] = ()) -> Iterator[ThreadingHTTPServer]:
    """Serve folders as Hub models; yields the server, whose `requests` lists what was asked."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.models, server.gated, server.requests = models, gated, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
