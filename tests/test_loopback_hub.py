"""The Hub for tests, with the real client: what is published comes back, what is refused is refused as by the Hub."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import socket
import subprocess
import sys
import types
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPConnection
from pathlib import Path

import numpy
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, constants, errors, file_download, get_token
from huggingface_hub.utils import _http
from safetensors.numpy import save

from slicecli.testing.loopback_hub import Fault, LoopbackHub

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # of the client's own

CARD = """---
license: llama3.1
base_model: meta-llama/Llama-3-8B
base_model_relation: quantized
tags:
- slicecli
- width
library_name: transformers
---
# A slice
"""
WEIGHTS = random.Random(0).randbytes(50_000)


@pytest.fixture
def hub(loopback_hub, monkeypatch):
    """The hub, with a client that waits for nothing."""
    waits = []
    clock = types.SimpleNamespace(sleep=waits.append)
    monkeypatch.setattr(_http, "time", clock)
    monkeypatch.setattr(file_download, "time", clock)
    loopback_hub.waits = waits
    return loopback_hub


@pytest.fixture
def folder(tmp_path):
    """A slice as it is published: a card, a config, weights in two sizes, a picture, an empty file, a folder."""
    root = tmp_path / "slice"
    contents = {
        "README.md": CARD.encode(),
        "config.json": b'{"model_type": "llama"}',
        "model-00001-of-00002.safetensors": WEIGHTS,
        "model-00002-of-00002.safetensors": WEIGHTS[::-1][:20_000],
        "plots/curve.png": b"\x89PNG\0" + WEIGHTS[:300],
        "empty.txt": b"",
        "notes/déjà vu.txt": "ünïcödé\n".encode() * 100,
    }
    for path, content in contents.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(content)
    return root


def contents(folder):
    paths = [path for path in Path(folder).rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def asked(hub, method, ending=""):
    return [request for request in hub.requests if request.method == method and request.path.endswith(ending)]


def send(hub, path, body, method="PUT", **headers):
    connection = HTTPConnection(hub.endpoint.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


# there and back


@pytest.mark.parametrize("kind", ["model", "dataset"])
def test_what_is_uploaded_comes_back_byte_for_byte(hub, folder, kind, tmp_path):
    hub.multipart_bytes = 30_000  # between the two files of weights
    api = hub.api()
    url = api.create_repo("me/slice", repo_type=kind, private=True)
    assert (url.repo_id, url.repo_type) == ("me/slice", kind)
    commit = api.upload_folder(repo_id="me/slice", repo_type=kind, folder_path=folder, commit_message="Add a slice")
    stored = contents(folder)
    assert hub.files("me/slice", kind=kind) == stored
    assert hub.files("me/slice", commit.oid, kind) == stored
    assert contents(api.snapshot_download("me/slice", repo_type=kind)) == stored
    assert contents(api.snapshot_download("me/slice", repo_type=kind, local_dir=tmp_path / "local")) == stored
    repository = hub.repository("me/slice", kind)
    assert repository.private
    assert repository.branches == {"main": commit.oid}
    first, second = repository.commits
    assert (second.id, second.parent, second.message, second.author) == (commit.oid, first.id, "Add a slice", "me")
    # weights and the picture went to large-file storage, one of them in two parts, and without a token
    puts = asked(hub, "PUT")
    assert sorted(request.received_bytes for request in puts) == [305, 20_000, 20_000, 30_000]
    assert {request.authorization for request in puts} == {None}
    assert {request.authorization for request in asked(hub, "GET")} == {f"Bearer {hub.token}"}
    assert hub.token not in repr(hub.requests)
    assert not [request for request in hub.requests if request.status >= 400]


def test_a_second_upload_sends_nothing(hub, folder):
    api = hub.api()
    api.create_repo("me/slice")
    first = api.upload_folder(repo_id="me/slice", folder_path=folder)
    hub.requests.clear()
    assert api.create_repo("me/slice", exist_ok=True).repo_id == "me/slice"
    second = api.upload_folder(repo_id="me/slice", folder_path=folder)
    assert second.oid == first.oid
    assert not asked(hub, "PUT")
    assert not [request for request in hub.requests if "/commit/" in request.path]
    assert len(hub.repository("me/slice").commits) == 2
    # one file changes: it alone is in the next commit
    (folder / "config.json").write_text("{}")
    third = api.upload_folder(repo_id="me/slice", folder_path=folder)
    assert third.oid != first.oid
    (request,) = asked(hub, "POST", "/commit/main")
    assert request.body.count(b'"path"') == 1
    assert not asked(hub, "PUT")
    # a file that another commit held is not sent again
    api.upload_file(repo_id="me/slice", path_in_repo="again.safetensors", path_or_fileobj=WEIGHTS)
    assert hub.files("me/slice")["again.safetensors"] == WEIGHTS
    assert not asked(hub, "PUT")


def test_the_client_knows_files_by_the_digests_it_computes(hub, folder):
    api = hub.api()
    hub.upload("me/slice", folder)
    entries = {entry.path: entry for entry in api.list_repo_tree("me/slice", recursive=True)}
    assert set(entries) == {*contents(folder), "plots", "notes"}
    config, weights = entries["config.json"], entries["model-00001-of-00002.safetensors"]
    done = subprocess.run(
        ["git", "hash-object", folder / "config.json"], capture_output=True, text=True, check=False, cwd=folder
    )
    if done.returncode == 0:
        assert config.blob_id == done.stdout.strip()
    assert config.lfs is None
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()
    pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{weights.lfs.sha256}\nsize 50000\n".encode()
    assert weights.blob_id == hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest()
    assert (weights.size, weights.lfs.size, weights.lfs.pointer_size) == (50_000, 50_000, len(pointer))
    assert {entry.path for entry in api.list_repo_tree("me/slice", "plots")} == {"plots/curve.png"}
    assert {entry.path for entry in api.list_repo_tree("me/slice")} & {"plots", "plots/curve.png"} == {"plots"}
    found = api.get_paths_info("me/slice", ["notes/déjà vu.txt", "plots", "nothing"])
    assert {entry.path for entry in found} == {"notes/déjà vu.txt", "plots"}
    downloaded = api.snapshot_download("me/slice")
    assert not api.verify_repo_checksums("me/slice", local_dir=downloaded).mismatches


def test_numbers_of_weights_are_read_from_a_range(hub):
    weights = save({"embeddings": numpy.zeros((300, 200), dtype=numpy.float32)})
    hub.upload("me/slice", {"model.safetensors": weights})
    assert hub.api().get_safetensors_metadata("me/slice").parameter_count == {"F32": 60_000}
    (request,) = asked(hub, "GET", "model.safetensors")
    assert (request.status, request.range, request.sent_bytes) == (206, "bytes=0-100000", 100_001)
    assert request.sent_bytes < len(weights)


@pytest.mark.parametrize(
    ("path", "content", "large"),
    [
        ("a.safetensors", b"text", True),
        ("deep/a.bin", b"text", True),
        ("a.json", b"{}", False),
        ("a.json", b" " * (10 * 2**20 + 1), True),
        ("a.dat", b"\0", True),
        ("a.dat", b"\xff\xfe", True),
        ("a.txt", "é".encode() * 300 + b"x", False),  # the sample ends inside a character
        ("a.txt", b"x" + "é".encode() * 300, False),
        ("a.safetensors", b"", False),
    ],
)
def test_the_hub_decides_which_files_are_large(hub, path, content, large):
    api = hub.api()
    api.create_repo("me/slice")
    api.upload_file(repo_id="me/slice", path_in_repo=path, path_or_fileobj=content)
    assert hub.files("me/slice") == {path: content}
    assert bool(asked(hub, "PUT")) == large
    # straight into the store it is the same
    hub.upload("me/direct", {path: content})
    (entry,) = [entry for entry in api.list_repo_tree("me/direct", recursive=True) if entry.path == path]
    assert (entry.lfs is not None) == large


# revisions


def test_a_pull_request_leaves_main_alone_and_takes_more_commits(hub, folder):
    api = hub.api()
    base = hub.upload("someone/model", {"README.md": b"# Theirs\n"})
    made = api.upload_folder(repo_id="someone/model", folder_path=folder, create_pr=True, commit_message="A slice")
    assert (made.pr_num, made.pr_revision) == (1, "refs/pr/1")
    assert made.pr_url == f"{hub.endpoint}/someone/model/discussions/1"
    assert hub.files("someone/model") == {"README.md": b"# Theirs\n"}
    assert hub.files("someone/model", "refs/pr/1") == contents(folder)
    more = api.upload_file(
        repo_id="someone/model", path_in_repo="more.txt", path_or_fileobj=b"more", revision="refs/pr/1"
    )
    assert hub.files("someone/model", "refs/pr/1")["more.txt"] == b"more"
    assert contents(api.snapshot_download("someone/model", revision="refs/pr/1"))["more.txt"] == b"more"
    repository = hub.repository("someone/model")
    (request,) = repository.pull_requests
    assert (request.title, request.author, request.base) == ("A slice", "me", "main")
    assert repository.branches == {"main": base}
    refs = api.list_repo_refs("someone/model", include_pull_requests=True)
    assert [(one.ref, one.target_commit) for one in refs.pull_requests] == [("refs/pr/1", more.oid)]
    assert [one.commit_id for one in api.list_repo_commits("someone/model", revision="refs/pr/1")][:2] == [
        more.oid,
        made.oid,
    ]


def test_who_may_not_write_may_open_a_pull_request(hub):
    other = hub.api(hub.add_user("other"))
    hub.upload("me/model", {"config.json": b"{}"})
    words = {"repo_id": "me/model", "path_in_repo": "w.bin", "path_or_fileobj": b"weights"}
    with pytest.raises(errors.HfHubHTTPError, match="write access") as refused:
        other.upload_file(**words)
    assert refused.value.response.status_code == 403
    assert "w.bin" not in hub.files("me/model")
    assert other.upload_file(**words, create_pr=True).pr_num == 1
    assert hub.files("me/model", "refs/pr/1")["w.bin"] == b"weights"
    assert hub.repository("me/model").pull_requests[0].author == "other"
    with pytest.raises(errors.HfHubHTTPError, match="rights"):
        other.create_repo("me/new")


def test_branches_tags_and_commits_are_revisions(hub):
    api = hub.api()
    first = hub.upload("me/model", {"config.json": b"1"})
    api.create_branch("me/model", branch="dim/3072")
    api.create_branch("me/model", branch="dim/3072", exist_ok=True)
    with pytest.raises(errors.HfHubHTTPError, match="exists"):
        api.create_branch("me/model", branch="dim/3072")
    with pytest.raises(errors.BadRequestError):
        api.create_branch("me/model", branch="refs/pr/7")
    api.create_tag("me/model", tag="v1")
    second = api.upload_file(
        repo_id="me/model", path_in_repo="config.json", path_or_fileobj=b"2", revision="dim/3072"
    ).oid
    for revision, content in (("main", b"1"), ("v1", b"1"), (first, b"1"), ("dim/3072", b"2"), (second, b"2")):
        assert Path(api.hf_hub_download("me/model", "config.json", revision=revision)).read_bytes() == content
        assert hub.files("me/model", revision) == {"config.json": content}
    assert api.model_info("me/model", revision="dim/3072").sha == second
    assert hub.repository("me/model").branches == {"main": first, "dim/3072": second}
    refs = api.list_repo_refs("me/model")
    assert {one.name for one in refs.branches} == {"main", "dim/3072"}
    assert [(one.name, one.target_commit) for one in refs.tags] == [("v1", first)]
    for call in (
        api.model_info,
        api.snapshot_download,
        lambda *_, **more: api.upload_file(repo_id="me/model", path_in_repo="x", path_or_fileobj=b"x", **more),
    ):
        with pytest.raises(errors.RevisionNotFoundError):
            call("me/model", revision="missing")


def test_a_commit_on_a_parent_that_is_no_longer_the_head_is_refused(hub):
    api = hub.api()
    old = hub.upload("me/model", {"config.json": b"1"})
    hub.upload("me/model", {"config.json": b"2"})
    words = {"repo_id": "me/model", "path_in_repo": "new.txt", "path_or_fileobj": b"new", "parent_commit": old}
    with pytest.raises(errors.HfHubHTTPError, match="A commit has happened since") as refused:
        api.upload_file(**words)
    assert refused.value.response.status_code == 412
    assert hub.files("me/model") == {"config.json": b"2"}
    # a pull request may begin there
    api.upload_file(**words, create_pr=True)
    assert hub.files("me/model", "refs/pr/1") == {"config.json": b"1", "new.txt": b"new"}


def test_files_folders_and_repositories_are_deleted(hub, folder):
    api = hub.api()
    hub.upload("me/slice", folder)
    api.create_commit(
        "me/slice",
        [CommitOperationDelete("plots/"), CommitOperationDelete("empty.txt"), CommitOperationAdd("new.txt", b"new")],
        commit_message="Tidy",
    )
    expected = {path: content for path, content in contents(folder).items() if not path.startswith(("plots/", "empty"))}
    assert hub.files("me/slice") == {**expected, "new.txt": b"new"}
    for path in ("empty.txt", "plots/"):
        with pytest.raises(errors.EntryNotFoundError, match="doesn't exist"):
            api.create_commit("me/slice", [CommitOperationDelete(path)], commit_message="Again")
    api.upload_folder(repo_id="me/slice", folder_path=folder, delete_patterns="*.txt", allow_patterns="README.md")
    assert not [path for path in hub.files("me/slice") if path.endswith(".txt")]
    api.delete_repo("me/slice")
    assert not api.repo_exists("me/slice")
    with pytest.raises(KeyError, match="me/slice"):
        hub.repository("me/slice")
    with pytest.raises(errors.RepositoryNotFoundError):
        api.delete_repo("me/slice")


# who may


def test_a_private_repository_is_as_good_as_none(hub):
    other, nobody, wrong = hub.api(hub.add_user("other")), hub.api(None), hub.api("hf_made_up")
    hub.upload("me/secret", {"config.json": b"{}"})
    hub.create("me/new", private=True)
    hub.repository("me/secret").private = True
    for client, status in ((other, 404), (nobody, 401)):
        for name in ("me/secret", "me/missing"):
            for call in (client.model_info, client.snapshot_download, client.list_repo_files):
                with pytest.raises(errors.RepositoryNotFoundError) as refused:
                    call(name)
                assert refused.value.response.status_code == status
            assert not client.repo_exists(name)
        assert [model.id for model in client.list_models()] == []
    assert {model.id for model in hub.api().list_models()} == {"me/secret", "me/new"}
    assert hub.api().model_info("me/secret").private
    assert hub.api().hf_hub_download("me/secret", "config.json")
    hub.repository("me/secret").private = False
    assert nobody.repo_exists("me/secret")
    for call in (wrong.model_info, wrong.list_repo_files, lambda _: wrong.whoami()):
        with pytest.raises(errors.HfHubHTTPError, match="Invalid") as refused:
            call("me/secret")
        assert refused.value.response.status_code == 401
        assert not isinstance(refused.value, errors.RepositoryNotFoundError)


def test_somebody_without_a_token_reads_and_does_not_write(hub):
    nobody = hub.api(None)
    hub.upload("me/model", {"config.json": b"{}"})
    assert nobody.hf_hub_download("me/model", "config.json")
    with pytest.raises(errors.RepositoryNotFoundError):
        nobody.upload_file(repo_id="me/model", path_in_repo="x", path_or_fileobj=b"x")
    with pytest.raises(errors.HfHubHTTPError):
        nobody.create_repo("me/new")
    assert {request.authorization for request in hub.requests} == {None}
    assert len(hub.repository("me/model").commits) == 2
    assert hub.api().whoami()["name"] == "me"


def test_a_gated_repository_shows_itself_but_not_its_files(hub):
    hub.create("meta-llama/gated", gated=True)
    hub.upload("meta-llama/gated", {"README.md": CARD.encode(), "w.safetensors": WEIGHTS})
    owner = hub.api(hub.add_user("meta-llama"))
    for client, status in ((hub.api(), 403), (hub.api(None), 401)):
        about = client.model_info("meta-llama/gated")
        assert about.gated == "auto"
        assert "w.safetensors" in {sibling.rfilename for sibling in about.siblings}
        for call in (
            lambda client=client: client.hf_hub_download("meta-llama/gated", "w.safetensors"),
            lambda client=client: client.snapshot_download("meta-llama/gated"),
            lambda client=client: client.auth_check("meta-llama/gated"),
        ):
            with pytest.raises(errors.GatedRepoError) as refused:
                call()
            assert refused.value.response.status_code == status
    assert Path(owner.hf_hub_download("meta-llama/gated", "w.safetensors")).read_bytes() == WEIGHTS
    owner.update_repo_settings("meta-llama/gated", gated=False)
    owner.auth_check("meta-llama/gated", write=True)
    assert hub.api().hf_hub_download("meta-llama/gated", "w.safetensors")
    with pytest.raises(errors.HfHubHTTPError, match="403"):
        hub.api().update_repo_settings("meta-llama/gated", private=True)
    owner.update_repo_settings("meta-llama/gated", private=True)
    assert hub.repository("meta-llama/gated").private


def test_a_missing_file_is_a_missing_file(hub):
    hub.upload("me/model", {"folder/config.json": b"{}"})
    for path in ("nothing.json", "folder"):
        with pytest.raises(errors.RemoteEntryNotFoundError):
            hub.api().hf_hub_download("me/model", path)
    assert not hub.api().file_exists("me/model", "nothing.json")
    assert hub.api().file_exists("me/model", "folder/config.json")
    # the client remembers the absence, which takes the commit in the answer
    cache = Path(constants.HF_HUB_CACHE) / "models--me--model" / ".no_exist"
    assert {path.name for path in cache.rglob("*") if path.is_file()} == {"nothing.json", "folder"}


# cards


def test_models_are_found_by_what_their_cards_say(hub, folder):
    hub.upload("me/older", {"README.md": b"---\ntags: [slicecli]\n---\n"})
    hub.upload("other/slice", folder)
    hub.upload("other/plain", {"config.json": b"{}"})
    hub.upload("me/data", {"README.md": CARD.encode()}, kind="dataset")
    api = hub.api()

    def found(**words):
        return [model.id for model in api.list_models(**words)]

    assert found() == ["other/plain", "other/slice", "me/older"]
    assert found(filter="slicecli") == ["other/slice", "me/older"]
    assert found(filter=["slicecli", "base_model:meta-llama/Llama-3-8B"]) == ["other/slice"]
    assert found(filter="base_model:quantized:meta-llama/Llama-3-8B") == ["other/slice"]
    assert found(filter="license:llama3.1", author="me") == []
    assert found(search="SLICE") == ["other/slice"]
    assert found(limit=1) == ["other/plain"]
    assert [data.id for data in api.list_datasets(filter="slicecli")] == ["me/data"]
    (model,) = api.list_models(search="slice", cardData=True)
    assert model.card_data.base_model == "meta-llama/Llama-3-8B"
    about = api.model_info("other/slice", files_metadata=True)
    assert {"slicecli", "width", "transformers", "license:llama3.1"} <= set(about.tags)
    assert about.card_data.license == "llama3.1"
    assert about.library_name == "transformers"
    assert about.last_modified > about.created_at
    (weights,) = [one for one in about.siblings if one.rfilename == "model-00001-of-00002.safetensors"]
    assert weights.lfs.sha256 == hashlib.sha256(WEIGHTS).hexdigest()


@pytest.mark.parametrize(
    ("text", "complaint"),
    [("tags: [unclosed\nlicense: mit", "YAML"), ("a: b: c", "YAML"), ("\tlicense: mit", "YAML"), ("- one", "mapping")],
)
def test_a_card_with_damaged_metadata_is_refused(hub, folder, text, complaint):
    api = hub.api()
    api.create_repo("me/slice")
    (folder / "README.md").write_text(f"---\n{text}\n---\n# A slice\n")
    with pytest.raises(ValueError, match=complaint):
        api.upload_folder(repo_id="me/slice", folder_path=folder)
    assert hub.files("me/slice") == {}
    assert not asked(hub, "PUT")
    # and by a client that does not ask first
    content = base64.b64encode((folder / "README.md").read_bytes()).decode()
    lines = [
        {"key": "header", "value": {"summary": "Add", "description": ""}},
        {"key": "file", "value": {"path": "README.md", "content": content, "encoding": "base64"}},
    ]
    token = {"Authorization": f"Bearer {hub.token}"}
    commit = "\n".join(map(json.dumps, lines))
    assert send(hub, "/api/models/me/slice/commit/main", commit, "POST", **token) == 400
    assert hub.files("me/slice") == {}


@pytest.mark.parametrize("text", ["# No metadata\n", "---\n---\n# Empty\n"])
def test_a_card_without_metadata_is_warned_of(hub, text):
    hub.create("me/slice")
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        hub.api().upload_file(repo_id="me/slice", path_in_repo="README.md", path_or_fileobj=text.encode())
    assert hub.files("me/slice") == {"README.md": text.encode()}


# faults


def test_of_a_download_that_broke_off_only_the_rest_is_sent_again(hub, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.upload("me/slice", {"model.safetensors": WEIGHTS})
    hub.faults.append(Fault(method="GET", path=r"model\.safetensors$", drop_after=30_500))
    path = hub.api().hf_hub_download("me/slice", "model.safetensors")
    assert Path(path).read_bytes() == WEIGHTS
    first, second = asked(hub, "GET", "model.safetensors")
    assert (first.status, first.sent_bytes, first.range) == (200, 30_500, None)
    # the client keeps what it got in whole pieces
    assert (second.status, second.sent_bytes, second.range) == (206, 20_000, "bytes=30000-")
    assert len(hub.waits) == 1


def test_a_corrupt_download_has_the_right_length_and_digest_in_its_headers(hub):
    hub.upload("me/slice", {"model.safetensors": WEIGHTS})
    hub.faults.append(Fault(method="GET", path="safetensors", corrupt=True))
    path = Path(hub.api().hf_hub_download("me/slice", "model.safetensors"))
    assert path.read_bytes() != WEIGHTS
    assert path.read_bytes()[:-1] == WEIGHTS[:-1]
    assert path.resolve().name == hashlib.sha256(WEIGHTS).hexdigest()
    path = hub.api().hf_hub_download("me/slice", "model.safetensors", force_download=True)
    assert Path(path).read_bytes() == WEIGHTS


def test_a_fault_begins_and_ends(hub):
    hub.upload("me/slice", {"config.json": b"{}"})
    hub.faults.append(Fault(method="GET", path="/api/models/", status=403, times=2, after=1))
    outcomes = []
    for _ in range(5):
        try:
            hub.api().model_info("me/slice")
            outcomes.append(200)
        except errors.HfHubHTTPError as error:
            outcomes.append(error.response.status_code)
    assert outcomes == [200, 403, 403, 200, 200]
    assert [request.status for request in hub.requests] == outcomes
    # of two that fit, the first that is active
    hub.faults[:] = [
        Fault(method="GET", path="slice$", status=403, times=1),
        Fault(method="GET", path="models", status=410, times=None),
        Fault(method="POST", path="models", status=418, times=None),
    ]
    for status in (403, 410, 410):
        with pytest.raises(errors.HfHubHTTPError) as refused:
            hub.api().model_info("me/slice")
        assert refused.value.response.status_code == status


def test_a_status_comes_with_the_headers_and_body_that_the_client_reads(hub):
    hub.upload("me/slice", {"config.json": b"{}"})
    waiting = {"Retry-After": "7", "X-Error-Message": "Slow down"}
    hub.faults.append(Fault(method="PUT", path="^/lfs/", status=429, headers=waiting))
    hub.api().upload_file(repo_id="me/slice", path_in_repo="model.safetensors", path_or_fileobj=WEIGHTS)
    assert hub.files("me/slice")["model.safetensors"] == WEIGHTS
    assert hub.waits == [8.0]  # a second more than it was told
    hub.faults.append(Fault(method="GET", path="models/me", status=403, headers={"X-Error-Code": "GatedRepo"}))
    with pytest.raises(errors.GatedRepoError):
        hub.api().model_info("me/slice")
    hub.faults.append(Fault(method="GET", path="models/me", status=500, body=b'{"error": "on fire"}'))
    with pytest.raises(errors.HfHubHTTPError, match="on fire"):
        hub.api().model_info("me/slice")
    hub.faults.append(Fault(method="GET", path="models/me", status=403, headers={"X-Error-Message": "Slow down"}))
    with pytest.raises(errors.HfHubHTTPError, match="Slow down"):
        hub.api().model_info("me/slice")


@pytest.mark.parametrize("parts", [1, 3])
def test_of_an_upload_that_broke_off_the_broken_part_is_sent_again(hub, parts):
    content = random.Random(1).randbytes(3_000_000)
    hub.multipart_bytes = 1_000_000 if parts > 1 else 10_000_000
    hub.create("me/slice")
    hub.faults.append(Fault(method="PUT", path="^/lfs/", drop_after=400_000, after=parts - 1))
    hub.api().upload_file(repo_id="me/slice", path_in_repo="model.safetensors", path_or_fileobj=content)
    assert hub.files("me/slice") == {"model.safetensors": content}
    size = len(content) // parts
    received = [(request.status, request.received_bytes) for request in asked(hub, "PUT")]
    assert received == [(200, size)] * (parts - 1) + [(0, 400_000), (200, size)]
    assert len(hub.waits) == 1


@pytest.mark.parametrize("drop_after", [0, 10, 10**9])
def test_a_commit_that_broke_off_changes_nothing(hub, drop_after):
    hub.create("me/slice")
    hub.faults.append(Fault(method="POST", path="/commit/main$", drop_after=drop_after))
    hub.faults.append(Fault(method="POST", path="/commit/main$", status=500))
    api = hub.api()
    words = {"repo_id": "me/slice", "path_in_repo": "config.json", "path_or_fileobj": b"{}"}
    with pytest.raises(Exception, match=r".") as broken:
        api.upload_file(**words)
    assert not isinstance(broken.value, errors.HfHubHTTPError)
    (request,) = asked(hub, "POST", "/commit/main")
    assert request.status == 0
    assert request.received_bytes == len(request.body) <= drop_after
    with pytest.raises(errors.HfHubHTTPError, match="500"):
        api.upload_file(**words)
    assert hub.files("me/slice") == {}
    api.upload_file(**words)
    assert hub.files("me/slice") == {"config.json": b"{}"}


@pytest.mark.parametrize("words", [{}, {"status": 500, "corrupt": True}, {"status": 500, "drop_after": 0}])
def test_a_fault_does_one_thing(words):
    with pytest.raises(ValueError, match="exactly one"):
        Fault(method="GET", path="", **words)


# the store guards itself


def test_large_files_must_be_offered_whole_and_there_before_a_commit(hub):
    hub.create("me/slice")
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    token = {"Authorization": f"Bearer {hub.token}"}
    header = {"key": "header", "value": {"summary": "Add", "description": ""}}
    large = {"key": "lfsFile", "value": {"path": "w.bin", "algo": "sha256", "oid": digest, "size": len(WEIGHTS)}}
    commit = "\n".join(map(json.dumps, (header, large)))
    target = f"/lfs/models/me/slice/{digest}"
    assert send(hub, target, WEIGHTS) == 403
    batch = json.dumps({"operation": "upload", "objects": [{"oid": digest, "size": len(WEIGHTS)}]})
    assert send(hub, "/me/slice.git/info/lfs/objects/batch", batch, "POST", **token) == 200
    assert send(hub, target, WEIGHTS[::-1]) == 400
    assert send(hub, target, WEIGHTS[:-1]) == 400
    verify = json.dumps({"oid": digest, "size": len(WEIGHTS)})
    assert send(hub, "/me/slice.git/info/lfs/objects/verify", verify, "POST", **token) == 404
    assert send(hub, "/api/models/me/slice/commit/main", commit, "POST", **token) == 400
    assert hub.files("me/slice") == {}
    assert send(hub, target, WEIGHTS) == 200
    assert send(hub, "/me/slice.git/info/lfs/objects/verify", verify, "POST", **token) == 200
    assert send(hub, "/api/models/me/slice/commit/main", commit, "POST", **token) == 200
    assert hub.files("me/slice") == {"w.bin": WEIGHTS}
    assert send(hub, "/api/spaces/me/slice", None, "GET") == 404
    assert send(hub, "/me/slice/resolve/main/w.bin", None, "GET", Range="bytes=60000-") == 416


def test_parts_that_were_not_sent_do_not_make_a_file(hub):
    hub.create("me/slice")
    hub.multipart_bytes = 30_000
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    batch = json.dumps({"operation": "upload", "objects": [{"oid": digest, "size": len(WEIGHTS)}]})
    token = {"Authorization": f"Bearer {hub.token}"}
    assert send(hub, "/me/slice.git/info/lfs/objects/batch", batch, "POST", **token) == 200
    target = f"/lfs/models/me/slice/{digest}"
    parts = [WEIGHTS[:30_000], WEIGHTS[30_000:]]
    listed = [{"partNumber": n, "etag": hashlib.sha256(part).hexdigest()} for n, part in enumerate(parts, 1)]
    assert send(hub, f"{target}/1", parts[0]) == 200
    assert send(hub, target, json.dumps({"oid": digest, "parts": listed}), "POST") == 400
    assert send(hub, f"{target}/2", parts[1][::-1]) == 200
    assert send(hub, target, json.dumps({"oid": digest, "parts": listed}), "POST") == 400
    assert send(hub, f"{target}/2", parts[1]) == 200
    assert send(hub, target, json.dumps({"oid": digest, "parts": listed[:1]}), "POST") == 400
    wrong = [listed[0], {"partNumber": 2, "etag": listed[0]["etag"]}]
    assert send(hub, target, json.dumps({"oid": digest, "parts": wrong}), "POST") == 400
    assert send(hub, target, json.dumps({"oid": digest, "parts": listed}), "POST") == 200
    assert send(hub, target, WEIGHTS) == 403


def test_half_a_request_is_none(hub):
    hub.create("me/slice")
    header, file = (
        {"key": "header", "value": {"summary": "Add", "description": ""}},
        {"key": "file", "value": {"path": "a.txt", "content": "YQ==", "encoding": "base64"}},
    )
    body = "\n".join(map(json.dumps, (header, file))).encode()
    start = f"POST /api/models/me/slice/commit/main HTTP/1.1\r\nAuthorization: Bearer {hub.token}\r\n"
    for length in (f"Content-Length: {len(body) + 1}", "Transfer-Encoding: chunked"):
        with socket.create_connection(("127.0.0.1", int(hub.endpoint.rpartition(":")[2])), timeout=10) as connection:
            connection.sendall(f"{start}{length}\r\n\r\n".encode())
            # a client that goes after all of its lines, but before the end that it announced
            connection.sendall(body if "Length" in length else b"%x\r\n%s\r\n" % (len(body), body))
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(100) == b""
    assert hub.files("me/slice") == {}
    assert [(request.status, request.received_bytes) for request in hub.requests] == [(0, len(body))] * 2


def test_the_same_calls_give_the_same_commits():
    ids = []
    for _ in range(2):
        with LoopbackHub() as hub:
            hub.upload("me/one", {"config.json": b"1"})
            ids.append([hub.upload("me/two", {"config.json": b"1"}), hub.upload("me/two", {"config.json": b"2"})])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


def test_many_clients_at_once_lose_nothing(hub):
    api = hub.api()
    hub.create("me/slice")

    def push(number):
        api.upload_file(repo_id="me/slice", path_in_repo=f"{number}.bin", path_or_fileobj=bytes([number]) * 1000)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(push, range(16)))
    assert hub.files("me/slice") == {f"{number}.bin": bytes([number]) * 1000 for number in range(16)}
    assert len(asked(hub, "POST", "/commit/main")) == 16


# the environment of children, and the fixture

CHILD = """
import huggingface_hub, os
from huggingface_hub import constants
print(constants.ENDPOINT, constants.HF_HUB_DISABLE_XET, huggingface_hub.get_token(), constants.HF_HUB_CACHE)
path = huggingface_hub.hf_hub_download("me/slice", "config.json")
print(open(path).read())
"""


def test_a_child_of_the_test_uses_the_hub_as_it_is(loopback_hub, isolated_hub_cache):
    assert os.environ["HF_TOKEN"] == loopback_hub.token == get_token()
    loopback_hub.upload("me/slice", {"config.json": b"from the hub"})
    done = subprocess.run([sys.executable, "-c", CHILD], capture_output=True, text=True, check=True)
    about, text = done.stdout.splitlines()
    assert about.split() == [loopback_hub.endpoint, "True", loopback_hub.token, str(isolated_hub_cache / "hub")]
    assert text == "from the hub"


def test_an_environment_leads_nowhere_else(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    for name in ("HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_TOKEN_PATH"):
        monkeypatch.setenv(name, "1")
    with LoopbackHub() as hub:
        hub.upload("me/slice", {"config.json": b"from the hub"})
        environment = hub.environment(tmp_path, token=None)
        assert constants.HF_HUB_DISABLE_XET
        done = subprocess.run(
            [sys.executable, "-c", CHILD], env=environment, capture_output=True, text=True, check=True
        )
        assert done.stdout.split()[2:4] == ["None", str(tmp_path / "hub")]
        assert hub.environment(tmp_path)["HF_TOKEN"] == hub.token
        assert {request.authorization for request in hub.requests} == {None}
    assert not constants.HF_HUB_DISABLE_XET
    with pytest.raises(OSError, match="refused"):
        send(hub, "/", None, "GET")


def test_it_is_online_where_the_process_is_not_and_leaves_it_so(monkeypatch, folder, tmp_path):
    from datasets import config

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    with LoopbackHub() as hub:
        hub.api().create_repo("me/slice")
        hub.api().upload_folder(repo_id="me/slice", folder_path=folder)
        assert hub.api().snapshot_download("me/slice", cache_dir=tmp_path)
        assert not config.HF_HUB_OFFLINE
    assert constants.HF_HUB_OFFLINE
    assert config.HF_HUB_OFFLINE
    with pytest.raises(errors.OfflineModeIsEnabled):
        hub.api().whoami()


def test_datasets_that_are_first_imported_inside_are_offline_again_afterwards():
    code = (
        "import sys; from slicecli.testing.loopback_hub import LoopbackHub\n"
        "with LoopbackHub(): from datasets import config; print(config.HF_HUB_OFFLINE)\n"
        "print(config.HF_HUB_OFFLINE)"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "True"]


def test_the_page_about_it_shows_tests_that_pass(pytester, monkeypatch):
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p no:cacheprovider")
    page = (Path(__file__).parent.parent / "docs" / "testing.md").read_text()
    section = page.partition("## A Hub for tests")[2].partition("\n## ")[0]
    pytester.makepyfile(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)[0])
    pytester.runpytest_subprocess().assert_outcomes(passed=3)
