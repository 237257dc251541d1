"""What the Hub for tests answers: each function below is one route, from a request to an answer, without a socket.

The routes, fields and error codes are those that `huggingface_hub` uses to publish and to read models and datasets,
so that its own exceptions come out of it. Not served: spaces, buckets, xet storage, `.gitignore` rules, discussions.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, quote, unquote

from slicecli.testing.loopback_storage import (
    Commit,
    Repository,
    Store,
    StoredFile,
    UnknownRevision,
    card_problem,
    card_tags,
    is_large,
    read_card,
)

__all__ = ["Answer", "Call", "HubApi"]


@dataclass(frozen=True)
class Call:
    """A request: the path without the query and still quoted, header names in lower case."""

    method: str
    path: str
    query: Mapping[str, list[str]]
    headers: Mapping[str, str]
    body: bytes

    def json(self) -> Any:
        """Return what the body says.

        Raises:
            Refusal: It is not JSON.
        """
        try:
            return json.loads(self.body)
        except ValueError:
            raise Refusal(400, "The body is not JSON") from None

    def flag(self, name: str) -> bool:
        """Tell whether a query parameter is given and true."""
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass(frozen=True)
class Answer:
    """A response; the length is added when it is sent."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, document: Any, status: int = 200, **headers: str) -> Answer:
        """Make one of a JSON document; underscores in names of headers stand for hyphens."""
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        body = json.dumps(document, default=str).encode()
        return cls(status, body, {"Content-Type": "application/json", **named})


class Refusal(Exception):
    """An error of the Hub's: status, message and the code that the client goes by."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str) -> None:
        super().__init__(message)
        line = " ".join(message.split()).encode("ascii", "replace").decode()
        named = {"X_Error_Message": line, **({"X_Error_Code": code} if code else {}), **headers}
        self.answer = Answer.of({"error": message}, status, **named)


Route = Callable[..., Answer]
_ROUTES: list[tuple[str, re.Pattern[str], Route]] = []

_NAME = r"(?P<name>[^/]+?(?:/[^/]+?)??)"
_API = rf"/api/(?P<kind>models|datasets)/{_NAME}"
_SITE = rf"/(?:(?P<kind>datasets)/)?{_NAME}"
_REVISION = r"(?P<revision>[^/]+)"
_UPLOAD = rf"/lfs/(?P<kind>models|datasets)/{_NAME}/(?P<oid>[0-9a-f]{{64}})"
_LFS_TYPE = {"Content-Type": "application/vnd.git-lfs+json"}


def _route(method: str, pattern: str) -> Callable[[Route], Route]:
    """Serve a method of `HubApi` at the paths that a pattern matches; its groups become arguments, unquoted."""

    def register(function: Route) -> Route:
        _ROUTES.append((method, re.compile(pattern), function))
        return function

    return register


class HubApi:
    """The Hub's routes on a store.

    Attributes:
        users: Names by token.
        multipart_bytes: Larger files are asked for in parts of this size.
    """

    def __init__(self, store: Store, endpoint: str) -> None:
        self.users: dict[str, str] = {}
        self.multipart_bytes = 16 * 2**20
        self._store = store
        self._endpoint = endpoint
        # uploads that were offered and have not come, by their path: size, and the parts that came
        self._offers: dict[str, int] = {}
        self._parts: dict[str, dict[int, bytes]] = {}

    def answer(self, call: Call) -> Answer:
        """Answer a request."""
        for method, pattern, function in _ROUTES:
            match = pattern.fullmatch(call.path) if method == call.method else None
            if match:
                arguments = {name: unquote(text) for name, text in match.groupdict().items() if text is not None}
                if "name" in arguments:
                    arguments["kind"] = arguments.get("kind", "models").removesuffix("s")
                try:
                    return function(self, call, **arguments)
                except Refusal as refusal:
                    return refusal.answer
        return Refusal(404, f"The Hub for tests does not serve {call.method} {unquote(call.path)}").answer

    # who asks, and what they may

    def _user(self, call: Call) -> str | None:
        header = call.headers.get("authorization")
        if header is None:
            return None
        user = self.users.get(header.removeprefix("Bearer "))
        if user is None:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return user

    def _known_user(self, call: Call) -> str:
        user = self._user(call)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        return user

    def _may_write(self, user: str | None, owner: str) -> bool:
        """Tell whether it is the user's own, or belongs to nobody here: an organisation that everyone is in."""
        return user is not None and (user == owner or owner not in self.users.values())

    def _readable(self, call: Call, kind: str, name: str) -> Repository:
        """Find a repository and let those pass who may know of it."""
        user = self._user(call)
        repository = self._store.find(name, kind)
        if repository is None or (repository.private and not self._may_write(user, repository.owner)):
            # The Hub does not tell apart what is missing and what is hidden, and sends no code to those without a
            # token; the client takes the status alone for one only over https, hence the code here.
            if user is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repository

    def _writable(self, call: Call, kind: str, name: str, by_request: bool = False) -> Repository:
        """Find a repository and let those pass who may write, or `by_request` those who may open pull requests."""
        repository = self._readable(call, kind, name)
        user = self._user(call)
        if user is None:
            raise Refusal(401, "Invalid username or password.", "RepoNotFound")
        if not by_request and not self._may_write(user, repository.owner):
            raise Refusal(403, "You do not have write access: pass `create_pr=1` to open a pull request")
        return repository

    def _pass_gate(self, call: Call, repository: Repository) -> None:
        user = self._user(call)
        if not repository.gated or user == repository.owner:
            return
        restricted = f"Access to {repository.kind} {repository.name} is restricted"
        if user is None:
            raise Refusal(401, f"{restricted}. You must be authenticated to access it.", "GatedRepo")
        raise Refusal(403, f"{restricted} and you are not in the authorized list.", "GatedRepo")

    @staticmethod
    def _commit_of(repository: Repository, revision: str) -> Commit:
        try:
            return repository.find(revision)
        except UnknownRevision:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound") from None

    def _page(self, repository: Repository) -> str:
        prefix = "" if repository.kind == "model" else f"{repository.kind}s/"
        return f"{self._endpoint}/{prefix}{repository.name}"

    # accounts and repositories

    @_route("GET", "/api/whoami-v2")
    def whoami(self, call: Call) -> Answer:
        """Say whose token it is."""
        user = self._known_user(call)
        auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
        person = {"name": user, "fullname": user, "email": f"{user}@example.com", "emailVerified": True}
        return Answer.of({"type": "user", "id": user, **person, "isPro": False, "orgs": [], "auth": auth})

    def _named(self, call: Call) -> tuple[str, str, str]:
        """Return user, name and kind of the repository that is to be created or deleted."""
        user = self._known_user(call)
        wish = call.json()
        owner, kind = wish.get("organization") or user, wish.get("type") or "model"
        if kind not in ("model", "dataset"):
            raise Refusal(400, f"The Hub for tests has no repositories of type {kind}")
        if not self._may_write(user, owner):
            raise Refusal(403, f'You don\'t have the rights to change a {kind} under the namespace "{owner}"')
        return user, f"{owner}/{wish['name']}", kind

    @_route("POST", "/api/repos/create")
    def create(self, call: Call) -> Answer:
        """Create a repository."""
        _user, name, kind = self._named(call)
        wish = call.json()
        existing = self._store.find(name, kind)
        if existing is not None:
            message = f"You already created this {kind} repo"
            return Answer.of({"error": message, "url": self._page(existing)}, 409, X_Error_Message=message)
        private = bool(wish.get("private")) or wish.get("visibility") == "private"
        return Answer.of({"name": name, "url": self._page(self._store.create(name, kind, private))})

    @_route("DELETE", "/api/repos/delete")
    def delete(self, call: Call) -> Answer:
        """Delete a repository."""
        _user, name, kind = self._named(call)
        repository = self._store.find(name, kind)
        if repository is None:
            raise Refusal(404, "Repository not found", "RepoNotFound")
        self._store.delete(repository)
        return Answer.of({})

    @_route("PUT", rf"{_API}/settings")
    def settings(self, call: Call, kind: str, name: str) -> Answer:
        """Change who may see a repository."""
        repository = self._writable(call, kind, name)
        wish = call.json()
        if "private" in wish or "visibility" in wish:
            repository.private = bool(wish.get("private")) or wish.get("visibility") == "private"
        if "gated" in wish:
            repository.gated = bool(wish["gated"])
        return Answer.of({"private": repository.private, "gated": repository.gated})

    @_route("GET", rf"{_API}/auth-check(?P<writing>/write)?")
    def auth_check(self, call: Call, kind: str, name: str, writing: str = "") -> Answer:
        """Say whether somebody may read files, or write."""
        repository = self._writable(call, kind, name) if writing else self._readable(call, kind, name)
        self._pass_gate(call, repository)
        return Answer.of({})

    # reading

    @_route("GET", r"/api/(?P<kind>models|datasets)")
    def listing(self, call: Call, kind: str) -> Answer:
        """List the repositories that fit, the last changed first."""
        user = self._user(call)
        search = call.query.get("search", [""])[0].lower()
        author = call.query.get("author", [""])[0]
        tags = set(call.query.get("filter", []))
        found = []
        for repository in self._store.newest_first(kind.removesuffix("s")):
            about = self._about(repository, repository.find("main"))
            if repository.private and not self._may_write(user, repository.owner):
                continue
            if search not in repository.name.lower() or author not in ("", repository.owner):
                continue
            if tags <= set(about["tags"]):
                extra = {"cardData": call.flag("cardData") or call.flag("full"), "siblings": call.flag("full")}
                found.append({key: value for key, value in about.items() if extra.get(key, True)})
        limit = call.query.get("limit")
        return Answer.of(found[: int(limit[0])] if limit else found)

    def _about(self, repository: Repository, commit: Commit, blobs: bool = False) -> dict[str, Any]:
        """Describe a repository at a commit."""
        readme = commit.files.get("README.md")
        card = read_card(readme.content) if readme and not card_problem(readme.content) else {}
        siblings = []
        for path, file in sorted(commit.files.items()):
            size: dict[str, Any] = {"size": len(file.content), "blobId": file.blob} if blobs else {}
            large = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
            siblings.append({"rfilename": path, **size, **({"lfs": large} if blobs and file.large else {})})
        about: dict[str, Any] = {
            "_id": hashlib.sha1(f"{repository.kind} {repository.name}".encode()).hexdigest()[:24],
            "id": repository.name,
            "author": repository.owner,
            "sha": commit.id,
            "createdAt": _time(repository.commits[0]),
            "lastModified": _time(commit),
            "private": repository.private,
            "gated": "auto" if repository.gated else False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card_tags(card),
            "cardData": card,
            "siblings": siblings,
        }
        if repository.kind == "model":
            about["modelId"] = repository.name
            about.update({key: card[key] for key in ("library_name", "pipeline_tag") if key in card})
        return about

    @_route("GET", rf"{_API}/tree/{_REVISION}(?:/(?P<path>.+))?")
    def tree(self, call: Call, kind: str, name: str, revision: str, path: str = "") -> Answer:
        """List a folder, or all that is under it."""
        commit = self._commit_of(self._readable(call, kind, name), revision)
        inside = f"{path}/" if path else ""
        entries = _entries(commit)
        under = [entry for entry in entries if entry["path"].startswith(inside)]
        if path and not under:
            raise _no_entry(path, commit)
        deep = call.flag("recursive")
        return Answer.of([entry for entry in under if deep or "/" not in entry["path"][len(inside) :]])

    @_route("POST", rf"{_API}/paths-info/{_REVISION}")
    def paths_info(self, call: Call, kind: str, name: str, revision: str) -> Answer:
        """Describe those of the named paths that exist."""
        commit = self._commit_of(self._readable(call, kind, name), revision)
        wanted = {path.strip("/") for path in parse_qs(call.body.decode()).get("paths", [])}
        return Answer.of([entry for entry in _entries(commit) if entry["path"] in wanted])

    @_route("GET", rf"{_API}/refs")
    def refs(self, call: Call, kind: str, name: str) -> Answer:
        """List branches, tags and pull requests."""
        repository = self._readable(call, kind, name)

        def described(heads: Mapping[str, str], prefix: str) -> list[dict[str, str]]:
            return [
                {"name": ref.removeprefix("refs/convert/"), "ref": f"{prefix}{ref}", "targetCommit": head}
                for ref, head in heads.items()
            ]

        branches = repository.branches
        converts = {ref: head for ref, head in branches.items() if ref.startswith("refs/convert/")}
        document = {
            "branches": described({ref: head for ref, head in branches.items() if ref not in converts}, "refs/heads/"),
            "converts": described(converts, ""),
            "tags": described(repository.tags, "refs/tags/"),
        }
        if call.flag("include_prs"):
            heads = repository.heads
            document["pullRequests"] = [
                {"name": str(one.number), "ref": one.ref, "targetCommit": heads[one.ref]}
                for one in repository.pull_requests
            ]
        return Answer.of(document)

    @_route("GET", rf"{_API}/commits/{_REVISION}")
    def commits(self, call: Call, kind: str, name: str, revision: str) -> Answer:
        """List the commits before a revision, the newest first."""
        repository = self._readable(call, kind, name)
        line = repository.history(self._commit_of(repository, revision))
        return Answer.of(
            [
                {
                    "id": commit.id,
                    "title": commit.message,
                    "message": commit.description,
                    "authors": [{"user": commit.author}],
                    "date": _time(commit),
                }
                for commit in line
            ]
        )

    @_route("GET", rf"{_SITE}/resolve/{_REVISION}/(?P<path>.+)")
    @_route("HEAD", rf"{_SITE}/resolve/{_REVISION}/(?P<path>.+)")
    def resolve(self, call: Call, kind: str, name: str, revision: str, path: str) -> Answer:
        """Serve a file or a range of it."""
        repository = self._readable(call, kind, name)
        self._pass_gate(call, repository)
        commit = self._commit_of(repository, revision)
        file = commit.files.get(path)
        if file is None:
            raise _no_entry(path, commit)
        headers = {
            "ETag": f'"{file.identity}"',
            "X-Repo-Commit": commit.id,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        if file.large:
            headers.update({"X-Linked-ETag": f'"{file.identity}"', "X-Linked-Size": str(len(file.content))})
        size = len(file.content)
        asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
        if asked is None or asked.groups() == ("", ""):
            return Answer(200, file.content, headers)
        first, last = asked.groups()
        begin = int(first) if first else max(size - int(last), 0)
        end = min(int(last) + 1, size) if first and last else size
        if begin >= end:
            raise Refusal(416, "Range not satisfiable", Content_Range=f"bytes */{size}")
        return Answer(206, file.content[begin:end], {**headers, "Content-Range": f"bytes {begin}-{end - 1}/{size}"})

    # writing

    @_route("POST", "/api/validate-yaml")
    def validate_yaml(self, call: Call) -> Answer:
        """Check the metadata of a card."""
        content = call.json()["content"].encode()
        problem = card_problem(content)
        if problem:
            return Answer.of({"errors": [{"message": problem}], "warnings": []}, 400)
        warnings = [] if read_card(content) else [{"message": "empty or missing yaml metadata in repo card"}]
        return Answer.of({"errors": [], "warnings": warnings})

    @_route("POST", rf"{_API}/preupload/{_REVISION}")
    def preupload(self, call: Call, kind: str, name: str, revision: str) -> Answer:
        """Say how each file is to be sent, and what lies in its place."""
        repository = self._writable(call, kind, name, by_request=call.flag("create_pr"))
        files = self._commit_of(repository, revision).files
        answers = []
        for wish in call.json()["files"]:
            large = is_large(wish["path"], base64.b64decode(wish["sample"]), wish["size"])
            there = files.get(wish["path"])
            answers.append(
                {
                    "path": wish["path"],
                    "uploadMode": "lfs" if large else "regular",
                    "shouldIgnore": False,
                    "oid": there.identity if there else None,
                }
            )
        return Answer.of({"files": answers})

    @_route("POST", rf"{_SITE}\.git/info/lfs/objects/batch")
    def batch(self, call: Call, kind: str, name: str) -> Answer:
        """Say where large files that are missing are to be sent."""
        wish = call.json()
        # the client names no branch where it is going to open a pull request
        repository = self._writable(call, kind, name, by_request="ref" not in wish)
        objects = []
        for entry in wish["objects"]:
            oid, size = entry["oid"], entry["size"]
            path = f"/lfs/{kind}s/{quote(name)}/{oid}"
            upload: dict[str, Any] = {"href": f"{self._endpoint}{path}"}
            if size > self.multipart_bytes:
                count = -(-size // self.multipart_bytes)
                parts = {str(number): f"{upload['href']}/{number}" for number in range(1, count + 1)}
                upload["header"] = {"chunk_size": str(self.multipart_bytes), **parts}
            verify = {"href": f"{self._page(repository)}.git/info/lfs/objects/verify"}
            there = oid in repository.objects
            if not there:
                self._offers[path] = size
            objects.append({**entry, **({} if there else {"actions": {"upload": upload, "verify": verify}})})
        transfer = "multipart" if any(entry["size"] > self.multipart_bytes for entry in wish["objects"]) else "basic"
        answer = Answer.of({"transfer": transfer, "objects": objects})
        return Answer(answer.status, answer.body, _LFS_TYPE)

    def _keep(self, path: str, kind: str, name: str, oid: str, content: bytes) -> Answer:
        """Take what was sent for an offer if it is what was announced."""
        repository = self._store.find(name, kind)
        size = self._offers.get(path)
        if repository is None or size is None:
            raise Refusal(403, "This upload was not offered, or is done")
        if len(content) != size or hashlib.sha256(content).hexdigest() != oid:
            raise Refusal(400, "The content is not what was announced: its size or sha256 differs")
        repository.objects[oid] = content
        del self._offers[path]
        return Answer.of({}, ETag=f'"{oid}"')

    @_route("PUT", _UPLOAD)
    def upload(self, call: Call, kind: str, name: str, oid: str) -> Answer:
        """Take a large file; as with storage behind signed addresses, without a token."""
        return self._keep(call.path, kind, name, oid, call.body)

    @_route("PUT", rf"{_UPLOAD}/(?P<number>\d+)")
    def upload_part(self, call: Call, kind: str, name: str, oid: str, number: str) -> Answer:
        """Take a part of a large file."""
        path = call.path.rpartition("/")[0]
        if path not in self._offers:
            raise Refusal(403, "This upload was not offered, or is done")
        self._parts.setdefault(path, {})[int(number)] = call.body
        return Answer.of({}, ETag=f'"{hashlib.sha256(call.body).hexdigest()}"')

    @_route("POST", _UPLOAD)
    def complete(self, call: Call, kind: str, name: str, oid: str) -> Answer:
        """Join the parts of a large file."""
        parts = self._parts.get(call.path, {})
        listed = call.json()["parts"]
        for part in listed:
            content = parts.get(part["partNumber"])
            if content is None or part["etag"].strip('"') != hashlib.sha256(content).hexdigest():
                raise Refusal(400, f"Part {part['partNumber']} has not come")
        joined = b"".join(parts[part["partNumber"]] for part in listed)
        answer = self._keep(call.path, kind, name, oid, joined)
        self._parts.pop(call.path, None)
        return answer

    @_route("POST", rf"{_SITE}\.git/info/lfs/objects/verify")
    def verify(self, call: Call, kind: str, name: str) -> Answer:
        """Say whether a large file has come whole."""
        wish = call.json()
        content = self._readable(call, kind, name).objects.get(wish["oid"])
        if content is None or len(content) != wish["size"]:
            raise Refusal(404, "The object has not been uploaded")
        return Answer.of({})

    @_route("POST", rf"{_API}/commit/{_REVISION}")
    def commit(self, call: Call, kind: str, name: str, revision: str) -> Answer:
        """Commit to a branch or pull request, or open a pull request."""
        proposed = call.flag("create_pr")
        repository = self._writable(call, kind, name, by_request=proposed)
        if revision not in repository.heads:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        try:
            lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        except ValueError:
            raise Refusal(400, "The body is not lines of JSON") from None
        header = next((line["value"] for line in lines if line["key"] == "header"), None)
        if header is None:
            raise Refusal(400, "The commit has no header")
        head = self._commit_of(repository, revision)
        parent = self._commit_of(repository, header["parentCommit"]) if header.get("parentCommit") else head
        if parent != head and not proposed:
            raise Refusal(412, "A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            _apply(repository, files, line["key"], line["value"])
        readme = files.get("README.md")
        problem = card_problem(readme.content) if readme and readme != parent.files.get("README.md") else None
        if problem:
            raise Refusal(400, f"Invalid metadata in README.md: {problem}")
        message = (header["summary"], header.get("description") or "", self._known_user(call))
        document = {"success": True, "hookOutput": ""}
        if proposed:
            request, made = repository.propose(revision, parent, files, *message)
            document["pullRequestUrl"] = f"{self._page(repository)}/discussions/{request.number}"
        else:
            made = repository.commit(revision, files, *message)
        return Answer.of({**document, "commitOid": made.id, "commitUrl": f"{self._page(repository)}/commit/{made.id}"})

    @_route("POST", rf"{_API}/branch/(?P<branch>[^/]+)")
    def branch(self, call: Call, kind: str, name: str, branch: str) -> Answer:
        """Let a branch begin."""
        repository = self._writable(call, kind, name)
        if branch.startswith("refs/"):
            raise Refusal(400, f"Invalid reference for a branch: {branch}")
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: refs/heads/{branch}")
        start = (call.json() if call.body else {}).get("startingPoint") or "main"
        repository.branch(branch, self._commit_of(repository, start).id)
        return Answer.of({})

    @_route("POST", rf"{_API}/tag/{_REVISION}")
    def tag(self, call: Call, kind: str, name: str, revision: str) -> Answer:
        """Tag a revision."""
        repository = self._writable(call, kind, name)
        tag = call.json()["tag"]
        if tag in repository.tags:
            raise Refusal(409, f"Tag reference exists already: {tag}")
        repository.tags[tag] = self._commit_of(repository, revision).id
        return Answer.of({})

    # last, because a bare name makes its pattern fit the paths of others
    @_route("GET", rf"{_API}(?:/revision/{_REVISION})?")
    def info(self, call: Call, kind: str, name: str, revision: str = "main") -> Answer:
        """Describe a repository; a gated one too."""
        repository = self._readable(call, kind, name)
        return Answer.of(self._about(repository, self._commit_of(repository, revision), call.flag("blobs")))


def _time(commit: Commit) -> str:
    return commit.date.strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _no_entry(path: str, commit: Commit) -> Refusal:
    return Refusal(404, f"Entry not found: {quote(path)}", "EntryNotFound", X_Repo_Commit=commit.id)


def _entries(commit: Commit) -> list[dict[str, Any]]:
    """Describe every file and folder of a commit, sorted by path."""
    entries: dict[str, dict[str, Any]] = {}
    for path, file in commit.files.items():
        size = len(file.content)
        lfs = {"lfs": {"oid": file.sha256, "size": size, "pointerSize": len(file.pointer)}} if file.large else {}
        entries[path] = {"type": "file", "path": path, "size": size, "oid": file.blob, **lfs}
        steps = path.split("/")[:-1]
        for depth in range(1, len(steps) + 1):
            folder = "/".join(steps[:depth])
            if folder not in entries:
                inside = sorted((name, one.blob) for name, one in commit.files.items() if name.startswith(f"{folder}/"))
                digest = hashlib.sha1(repr(inside).encode()).hexdigest()
                entries[folder] = {"type": "directory", "path": folder, "size": 0, "oid": digest}
    return [entries[path] for path in sorted(entries)]


def _apply(repository: Repository, files: dict[str, StoredFile], key: str, value: Mapping[str, Any]) -> None:
    """Change what a commit holds by one of its lines."""
    if key == "header":
        return
    path = value["path"].rstrip("/")
    if key == "file":
        files[path] = StoredFile(base64.b64decode(value["content"]), large=False)
    elif key == "lfsFile":
        content = repository.objects.get(value["oid"])
        if content is None or len(content) != value.get("size", len(content)):
            raise Refusal(400, f"The pointer of {quote(path)} points to a file that was not uploaded")
        files[path] = StoredFile(content, large=True)
    elif key == "deletedFile":
        if files.pop(path, None) is None:
            raise Refusal(404, "A file with this name doesn't exist", "EntryNotFound")
    elif key == "deletedFolder":
        inside = [name for name in files if name.startswith(f"{path}/")]
        if not inside:
            raise Refusal(404, "A folder with this name doesn't exist", "EntryNotFound")
        for name in inside:
            del files[name]
    else:
        raise Refusal(400, f"The Hub for tests knows no operation {key}")
