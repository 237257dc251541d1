"""What is seen when the Hub, the network or the disk fails: every fault with the real command line and the real client.

`docs/faults.md` is written from what is seen here, by `pytest tests/test_hub_faults.py --write-faults-page`.
"""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path

import huggingface_hub
import pytest
from conftest import tiny_model
from hub_faults import (
    INSPECT,
    PUSH,
    SHARD,
    SHARDS,
    SLICE,
    SLICE_AND_PUSH,
    Scenario,
    World,
    cache_cannot_be_written,
    contents,
    disk_becomes_full,
    disk_is_small,
    no_network,
    small_pieces,
)
from programs import run_python

from slicecli.runtime.hub_client import PAUSES
from slicecli.testing.loopback_hub import Fault, LoopbackHub

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parent.parent / "docs" / "faults.md"
# requests for one weight file and for any, for a revision's files, for a commit
FETCH = rf"^/{{name}}/resolve/.*/{SHARD}$"
FETCH_ANY = r"^/{name}/resolve/.*[.]safetensors$"
SEND = r"^/lfs/models/{name}/{digest}$"
SEND_ANY = r"^/lfs/models/{name}/"
ASK = r"^/api/models/{name}/revision/"
COMMIT = r"^/api/models/{name}/commit/"
RATE = {"Retry-After": "7"}
LIMIT = {"RateLimit": '"api";r=0;t=7'}  # what the Hub itself sends
# how often the client asks for what it asks for again, and its pauses
CLIENT_PAUSES = [1, 2, 4, 8, 8]
SECRET = "hf_" + "Qm7" * 12
OFFLINE = {"HF_HUB_OFFLINE": "1"}


def once(method, path, **what):
    return (Fault(method, path, **what),)


def forever(method, path, **what):
    return (Fault(method, path, times=None, **what),)


def bytes_not_repeated(outcome):
    (part,) = [one for one in outcome.requests if one.status == 206]
    begun = int(part.range.removeprefix("bytes=").removesuffix("-"))
    return f"of its {begun + part.sent_bytes:,} bytes the first {begun:,} are not asked for again"


def upload(world, scenario):
    world.hub.upload(scenario.repository, world.model)


def upload_revision(world, scenario):
    world.hub.upload(scenario.repository, world.model, revision="v2")


DOWNLOADING = (
    Scenario(
        name="missing",
        what="the repository does not exist",
        says="the repository does not exist, or it is private and the token has no access",
        exists=False,
        mend=upload,
    ),
    Scenario(
        name="revision",
        what="there is no such revision",
        says="no such revision",
        words=(*INSPECT, "--revision", "v2"),
        mend=upload_revision,
    ),
    Scenario(
        name="private",
        what="it is private and somebody else's",
        says="it is private and the token has no access",
        owner="them",
        private=True,
    ),
    Scenario(
        name="private-no-token",
        what="it is private, and there is no token",
        says="it is private and no token was sent",
        owner="them",
        private=True,
        token=None,
    ),
    Scenario(name="gated", what="it is gated", says="gated, and the token has no access", owner="them", gated=True),
    Scenario(
        name="gated-no-token",
        what="it is gated, and there is no token",
        says="gated, and no token was sent",
        owner="them",
        gated=True,
        token=None,
    ),
    Scenario(name="token", what="the token is not valid", says="rejects the token", token="hf_nobodys"),
    Scenario(
        name="rate",
        what="status 429 with `Retry-After: 7`, always",
        says="rate limit was exceeded (status 429). Run it again in 7 seconds",
        faults=forever("GET", ASK, status=429, headers=RATE),
    ),
    Scenario(
        name="rate-once",
        what="the same, once",
        faults=once("GET", ASK, status=429, headers=RATE),
    ),
    Scenario(
        name="rate-long",
        what="status 429 with `Retry-After: 300`, always",
        says="rate limit was exceeded (status 429). Run it again in 300 seconds",
        faults=forever("GET", ASK, status=429, headers={"Retry-After": "300"}),
    ),
    Scenario(
        name="status",
        what="status 503, always",
        says="an internal error (status 503)",
        faults=forever("GET", ASK, status=503),
    ),
    Scenario(name="status-once", what="the same, once", faults=once("GET", ASK, status=503)),
    Scenario(
        name="status-cached",
        what="status 503, always, and the files are in the cache",
        first=INSPECT,
        faults=forever("GET", ASK, status=503),
    ),
    Scenario(
        name="file-status",
        what="status 503 for the weight files, always",
        says="an internal error (status 503)",
        words=SLICE,
        faults=forever("GET", FETCH_ANY, status=503),
    ),
    Scenario(
        name="file-status-once", what="the same for one, once", words=SLICE, faults=once("GET", FETCH, status=503)
    ),
    Scenario(
        name="break",
        what="the connection breaks off within a weight file, always",
        says="the connection to the Hub was lost",
        words=SLICE,
        faults=(*once("GET", FETCH, drop_after=50_000), *forever("GET", FETCH, drop_after=0)),
        circumstances=(small_pieces,),
    ),
    Scenario(
        name="break-once",
        what="the same, once",
        words=SLICE,
        faults=once("GET", FETCH, drop_after=50_000),
        circumstances=(small_pieces,),
        note=bytes_not_repeated,
    ),
    Scenario(
        name="short",
        what="the weight files come short, always",
        says="arrived incomplete",
        words=SLICE,
        faults=forever("GET", FETCH_ANY, status=200, body=b"short"),
    ),
    Scenario(
        name="damaged",
        what="a weight file comes with a wrong byte",
        says=f"The weight file {SHARD} of lab/damaged arrived damaged",
        words=SLICE,
        faults=once("GET", FETCH, corrupt=True),
    ),
    Scenario(
        name="damaged-all",
        what="all weight files come with a wrong byte",
        says="The weight file model-00001-of-00003.safetensors and 2 more of lab/damaged-all arrived damaged",
        words=SLICE,
        faults=forever("GET", FETCH_ANY, corrupt=True),
    ),
    Scenario(
        name="damaged-and-break",
        what="one comes with a wrong byte, and for another the connection breaks off, always",
        says="the connection to the Hub was lost",
        words=SLICE,
        faults=(
            *once("GET", r"^/{name}/resolve/.*00001-of-00003\.safetensors$", corrupt=True),
            *forever("GET", FETCH, drop_after=0),
        ),
    ),
    Scenario(name="network", what="there is no network", says="cannot be reached", circumstances=(no_network,)),
    Scenario(
        name="network-cached",
        what="the same, and the files are in the cache",
        first=SLICE,
        words=(*SLICE, "--overwrite"),
        circumstances=(no_network,),
    ),
    Scenario(name="offline", what="`HF_HUB_OFFLINE` is set", says="offline mode is on", environment=OFFLINE),
    Scenario(
        name="offline-cached",
        what="the same, and the files are in the cache",
        first=INSPECT,
        environment=OFFLINE,
    ),
    Scenario(
        name="full",
        what="the disk becomes full within the weight files",
        says="the disk is full",
        words=SLICE,
        circumstances=(disk_becomes_full,),
    ),
    Scenario(
        name="small",
        what="the disk has less room than a weight file takes",
        says="too little space",
        words=SLICE,
        circumstances=(disk_is_small,),
    ),
    Scenario(
        name="read-only",
        what="the cache is not writable",
        says="cache is not writable",
        circumstances=(cache_cannot_be_written,),
    ),
    Scenario(
        name="read-only-cached",
        what="the same, and the files are in it",
        first=INSPECT,
        circumstances=(cache_cannot_be_written,),
    ),
)


def store_otherwise(change):
    """Let the Hub keep something else than what is committed."""

    def prepare(world, scenario):
        repository = world.hub.repository(scenario.repository)
        commit = repository.commit
        repository.commit = lambda ref, files, *more: commit(ref, change(dict(files)), *more)

    def mend(world, scenario):
        del world.hub.repository(scenario.repository).commit

    return {"prepare": prepare, "mend": mend}


def other_bytes(files):
    file = files[SHARD]
    return {**files, SHARD: dataclasses.replace(file, content=file.content[:-1] + b"?")}


def without_one(files):
    del files["config.json"]
    return files


def damage_shard(world, scenario):
    path = world.folder(scenario) / "slice" / SHARD
    path.write_bytes(path.read_bytes()[:-1] + b"?")


def plant_secret(world, scenario):
    path = world.folder(scenario) / "slice" / "README.md"
    path.write_text(path.read_text() + f"\nMine: {SECRET}\n")


def restore(world, scenario):
    for name, content in contents(world.slice).items():
        (world.folder(scenario) / "slice" / name).write_bytes(content)


PUBLISHING = (
    Scenario(
        name="no-token",
        what="there is no token",
        says="no token was passed or stored",
        words=PUSH,
        exists=False,
        token=None,
    ),
    Scenario(
        name="wrong-token",
        what="the token is not valid",
        says="rejects the token",
        words=PUSH,
        exists=False,
        token="hf_nobodys",
    ),
    Scenario(
        name="foreign",
        what="the repository is somebody else's",
        says="the token has no write access",
        words=PUSH,
        owner="them",
    ),
    Scenario(
        name="foreign-new",
        what="it is to be made under somebody else's name",
        says="refused the request (status 403",
        words=PUSH,
        owner="them",
        exists=False,
    ),
    Scenario(
        name="push-rate",
        what='status 429 with `RateLimit: "api";r=0;t=7` for the commit, always',
        says="rate limit was exceeded (status 429)",
        words=PUSH,
        faults=forever("POST", COMMIT, status=429, headers=LIMIT),
    ),
    Scenario(
        name="push-rate-once",
        what="the same, once",
        words=PUSH,
        faults=once("POST", COMMIT, status=429, headers=LIMIT),
    ),
    Scenario(
        name="push-status",
        what="status 503 for the commit, always",
        says="an internal error (status 503)",
        words=PUSH,
        faults=forever("POST", COMMIT, status=503),
    ),
    Scenario(name="push-status-once", what="the same, once", words=PUSH, faults=once("POST", COMMIT, status=503)),
    Scenario(
        name="proposal-status",
        what="the same, always, with `--create-pr`",
        says="`slicecli push slice lab/proposal-status --create-pr`",
        words=(*PUSH, "--create-pr"),
        faults=forever("POST", COMMIT, status=503),
    ),
    Scenario(
        name="html",
        what="a page in HTML comes instead of an answer about the card, always",
        says="the Hub's response is not valid JSON",
        words=PUSH,
        faults=forever("POST", "^/api/validate-yaml$", status=502, body=b"<html></html>"),
    ),
    Scenario(
        name="who-status-once",
        what="status 503 to the question whose token it is, once",
        words=PUSH,
        faults=once("GET", "^/api/whoami-v2$", status=503),
    ),
    Scenario(
        name="push-break",
        what="the connection breaks off within a weight file, always",
        says="the connection to the Hub was lost",
        words=PUSH,
        faults=forever("PUT", SEND, drop_after=20_000),
    ),
    Scenario(name="push-break-once", what="the same, once", words=PUSH, faults=once("PUT", SEND, drop_after=20_000)),
    Scenario(
        name="refused",
        what="the Hub refuses the weight files",
        says="refused the request (status 400: The checksum differs)",
        words=PUSH,
        faults=forever("PUT", SEND_ANY, status=400, headers={"X-Error-Message": "The checksum differs"}),
    ),
    Scenario(
        name="conflict",
        what="somebody else pushes at the same time",
        says="someone else changed the repository",
        words=PUSH,
        faults=once("POST", COMMIT, status=412),
    ),
    Scenario(
        name="other-bytes",
        what="the Hub keeps other bytes than were sent",
        says=f"differ from those sent: {SHARD}.",
        words=PUSH,
        **store_otherwise(other_bytes),
    ),
    Scenario(
        name="dropped",
        what="the Hub drops a file",
        says="differ from those sent: config.json.",
        words=PUSH,
        **store_otherwise(without_one),
    ),
    Scenario(
        name="push-network",
        what="there is no network",
        says="cannot be reached",
        words=PUSH,
        exists=False,
        circumstances=(no_network,),
    ),
    Scenario(
        name="damaged-slice",
        what="a weight file of the slice is damaged",
        says="cannot be published",
        words=PUSH,
        exists=False,
        prepare=damage_shard,
        mend=restore,
    ),
    Scenario(
        name="secret",
        what="a token stands in the card",
        says="cannot be published",
        words=PUSH,
        exists=False,
        prepare=plant_secret,
        mend=restore,
    ),
    Scenario(
        name="slice-no-token",
        what="`slice --push` without a token",
        says="no token was passed or stored",
        words=SLICE_AND_PUSH,
        exists=False,
        token=None,
    ),
    Scenario(
        name="slice-break",
        what="`slice --push`, and the connection breaks off within a weight file, always",
        says="`slicecli push out lab/slice-break`",
        words=SLICE_AND_PUSH,
        exists=False,
        faults=forever("PUT", SEND, drop_after=20_000),
    ),
)
SCENARIOS = (*DOWNLOADING, *PUBLISHING)
# faults that are found before anything is sent
NOTHING_SENT = ("no-token", "wrong-token", "foreign", "push-network", "damaged-slice", "secret", "slice-no-token")
NO_SLICE = ("damaged-slice", "slice-no-token")

HEAD = """\
# Faults

What a user sees when the Hub, the network or the disk fails. This page is generated by

```
pytest tests/test_hub_faults.py --write-faults-page
```

from real runs of the command line, with huggingface_hub {version}, against a
[Hub for tests](testing.md#a-hub-for-tests) with injected faults. Without that option the same tests fail if this page
differs from what they observe.

An error is one line on standard error that starts with `Error:`; the exit code is 1. It never contains a token, the
home folder or the temporary folder. `-v` before the command shows the traceback instead; `HF_HUB_VERBOSITY=info` shows
what the Hub client does. Whatever the Hub does, a slice on this machine is complete or absent, never partial.

## Retries

- When the upload of a large file is interrupted or meets a status such as 503, the client sends it again up to five
  times, after {first_pauses} and {last_pause} seconds.
- The client resumes an interrupted download, in chunks of 10 MB, until five attempts in a row, a second apart, have
  brought nothing.
- slicecli repeats an operation that failed for a transient reason up to twice, after {second} and {third} seconds, or
  when the Hub says so if that is within a minute. Each repetition includes all retries of the client. Opening a pull
  request is not repeated, since that could open two.
- The next command reuses files that are complete in the cache or on the Hub. An incomplete file starts over: the client
  keeps no partial files between commands.

"Always" and "once" say how often the Hub fails; "tries" gives the number of requests for the same thing, and the total
of the pauses between them. The tests skip the pauses and use chunks of 2 kB. A full or read-only disk and a missing
network are simulated: the test refuses what the system would refuse.

Xet is not covered: if `hf_xet` is installed, the real Hub and the client use it for large files, with its own retries.
`HF_HUB_DISABLE_XET=1` turns it off.
"""
SECTIONS = {
    "Downloading": (
        DOWNLOADING,
        "With `slicecli inspect`, or `slicecli slice` where weights matter, of a model in {shards} weight files.",
        "in the cache",
    ),
    "Publishing": (
        PUBLISHING,
        "With `slicecli push`, unless stated otherwise, of a slice in {shards} weight files.",
        "on the Hub",
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    with LoopbackHub() as hub:
        yield World(tmp_path_factory.mktemp("faults"), hub, tiny_model("llama-3"))


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_fault_is_one_sentence_and_passes_without_a_trace(world, scenario):
    seen = world.play(scenario)
    outcome, again = seen.outcome, seen.again
    if scenario.says:
        assert outcome.code == 1
        (line,) = outcome.err.splitlines()
        assert line.startswith("Error: ")
        assert scenario.says in line
        # once the fault is gone
        assert (again.code, again.err) == (0, "")
    else:
        assert (outcome.code, outcome.err) == (0, "")
    printed = "".join(one.out + one.err for one in (outcome, again) if one is not None)
    private = (*world.tokens.values(), SECRET, str(Path.home()), str(world.root), tempfile.gettempdir())
    assert not [text for text in (*private, "Traceback") if text in printed]
    assert seen.partial == []
    if not scenario.publishes:
        assert (world.folder(scenario) / "out").exists() == (scenario.words[0] == "slice")
        return
    assert seen.is_whole == (scenario.name not in NO_SLICE)
    if scenario.name in NOTHING_SENT:
        assert {request.method for request in outcome.requests} <= {"GET"}
    revision = "refs/pr/1" if "--create-pr" in scenario.words else "main"
    assert world.hub.files(scenario.repository, revision) == contents(world.folder(scenario) / scenario.slice)


def test_a_slice_that_cannot_be_pushed_is_not_begun(world):
    (scenario,) = [one for one in PUBLISHING if one.name == "slice-no-token"]
    # not even the model was looked for
    assert world.play(scenario).outcome.requests == []


@pytest.mark.parametrize(
    "scenario",
    [one for one in SCENARIOS if one.says and one.words[0] != "inspect"],
    ids=lambda scenario: scenario.name,
)
def test_what_arrived_does_not_travel_again(world, scenario):
    seen = world.play(scenario)
    assert seen.kept + seen.moved == SHARDS


def test_the_commands_here_are_the_program(world):
    """A command in this process says what a Python of its own says."""
    here = world.run(INSPECT, Scenario(name="missing-too", what="", exists=False), world.root)
    token = {"HF_TOKEN": world.hub.token}
    program = run_python(
        "-m", "slicecli", "-q", "inspect", "lab/missing-too", cwd=world.root, env=world.environment | token
    )
    assert (here.code, here.out, here.err) == (program.returncode, program.stdout, program.stderr)


def test_the_pauses_are_those_that_the_page_states(world):
    played = {scenario.name: world.play(scenario).outcome for scenario in SCENARIOS}
    first, second = PAUSES
    assert played["push-break"].waits == [*CLIENT_PAUSES, first, *CLIENT_PAUSES, second, *CLIENT_PAUSES]
    assert played["break"].waits == [*[1] * 5, first, *[1] * 5, second, *[1] * 5]
    assert played["status"].waits == [first, second]
    assert played["rate"].waits == [8, 8]  # what the Hub asked for, and a second
    assert played["rate-long"].waits == []


def test_the_page_is_what_was_seen(world, request):
    page = _page(world)
    if request.config.getoption("write_faults_page"):
        PAGE.write_text(page, encoding="utf-8")
    written = PAGE.read_text(encoding="utf-8")
    if f"huggingface_hub {_version()}," not in written:
        # another client may try more often, or less
        page, written = _without_tries(page), _without_tries(written)
    assert written == page, "Look at what changed, then write the page with --write-faults-page."


def _page(world):
    parts = [
        HEAD.format(
            version=_version(),
            first_pauses=", ".join(map(str, CLIENT_PAUSES[:-1])),
            last_pause=CLIENT_PAUSES[-1],
            second=f"{PAUSES[0]:g}",
            third=f"{PAUSES[1]:g}",
        )
    ]
    for title, (scenarios, text, place) in SECTIONS.items():
        head = ("what happens", "tries", "what is seen", f"what is left {place}", "the same command again")
        rows = [head, ("---",) * len(head), *(_row(scenario, world.play(scenario)) for scenario in scenarios)]
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        parts.append(f"## {title}\n\n{text.format(shards=SHARDS)}\n\n{table}\n")
    return "\n".join(parts)


def _row(scenario, seen):
    outcome = seen.outcome
    pauses = f", {sum(outcome.waits):g} s" if outcome.waits else ""
    tries = f"{seen.tries}{pauses}" if scenario.faults else ""
    said = outcome.err.strip().removeprefix("Error: ") or "nothing: it works"
    said = said.replace(scenario.repository, f"{scenario.owner}/{'slice' if scenario.publishes else 'model'}")
    note = f"; {scenario.note(outcome)}" if scenario.note else ""
    return scenario.what, tries, said + note, seen.left, seen.done


def _version():
    return ".".join(huggingface_hub.__version__.split(".")[:2])


def _without_tries(page):
    return re.sub(r"(?m)^(\| [^|]* \|)[^|]*", r"\1", re.sub(r"huggingface_hub [\d.]+", "", page))
