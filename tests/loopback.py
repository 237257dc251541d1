"""A Hub on this machine, for reading: enough of the protocol for the real clients to download models and datasets."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Handler(BaseHTTPRequestHandler):
    """Serves `server.models`, folders by id (of models or datasets alike); ids in `server.gated` answer 403."""

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

    def do_POST(self):
        length = int(self.headers.get("Content-Length", 0))
        self.posted = self.rfile.read(length)
        self.do_GET()

    def do_GET(self):
        path = self.path.partition("?")[0]
        self.server.requests.append(f"{self.command} {path}")
        # a revision may hold slashes, which arrive quoted
        parts = [unquote(part) for part in path.split("/") if part not in ("", "api", "models", "datasets")]
        name, rest = "/".join(parts[:2]), parts[2:]
        if name in self.server.gated:
            return self.answer(403, b"{}", X_Error_Code="GatedRepo")
        if name not in self.server.models:
            return self.answer(404, b"{}", X_Error_Code="RepoNotFound")
        folder = self.server.models[name]
        verb, revision, inner = (*rest[:2], "/".join(rest[2:])) if len(rest) >= 2 else ("revision", "main", "")
        if revision not in ("main", "refs/convert/parquet", COMMIT):
            return self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        if verb == "revision":
            files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
            siblings = [{"rfilename": str(file.relative_to(folder))} for file in files]
            return self.answer_json({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})
        if verb == "tree":
            deep = "recursive=true" in self.path.lower()
            found = sorted((folder / inner).rglob("*") if deep else (folder / inner).glob("*"))
            return self.answer_json([self.entry(folder, file) for file in found])
        if verb == "paths-info":
            wanted = parse_qs(self.posted.decode()).get("paths", [])
            return self.answer_json([self.entry(folder, folder / path) for path in wanted if (folder / path).exists()])
        file = folder / inner
        if not file.is_file():
            return self.answer(404, b"{}", X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
        return self.answer(200, file.read_bytes(), ETag=f'"{self.digest(file)}"', X_Repo_Commit=COMMIT)

    def answer_json(self, document):
        self.answer(200, json.dumps(document).encode(), Content_Type="application/json")

    def entry(self, folder, path):
        inner = str(path.relative_to(folder))
        if path.is_dir():
            return {"type": "directory", "path": inner, "size": 0, "oid": COMMIT}
        return {"type": "file", "path": inner, "size": path.stat().st_size, "oid": self.digest(path)}

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
