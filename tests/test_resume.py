"""Killed at any moment, a run leaves nothing half-written, and goes on to the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest
from conftest import tiny_model

from slicecli.checkpoint.folder import file_digest

pytestmark = pytest.mark.slow

SLICES, SWEEPS = 6, 4  # of each method, killed twice; killed once


def digests(folder):
    """Hash all files of a slice whose content is the same each time."""
    found = {path.relative_to(folder).as_posix(): file_digest(path) for path in folder.rglob("*") if path.is_file()}
    assert not any(".journal" in name or ".lock" in name or "incomplete" in name for name in found), found
    return found


def in_child(words, log, kill_when=None, signal_number=signal.SIGKILL, **variables):
    """Run the command line in a fork of this process, where everything is imported; return its exit status.

    With `kill_when` it is killed as soon as that says so, unless it has ended before.
    """
    log.write_text("")
    child = os.fork()
    if child == 0:
        code = 70
        try:
            import sys

            from slicecli.cli import main

            stream = os.open(log, os.O_WRONLY | os.O_APPEND)
            os.dup2(stream, 1)
            os.dup2(stream, 2)
            sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
            os.environ.update(variables)
            sys.argv = ["slicecli", *map(str, words)]
            main()
            code = 0
        except SystemExit as leaving:
            code = leaving.code if isinstance(leaving.code, int) else 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    ended, status = 0, 0
    while kill_when is not None and not ended:
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended and kill_when():
            os.kill(child, signal_number)
            break
        time.sleep(0.001)
    if not ended:
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def after_lines(log, count, pause=0.0):
    """Say, from the moment on when so many lines are in a log and a pause has passed, that it is time."""

    def is_time():
        if log.read_text().count("\n") < count:
            return False
        time.sleep(pause)
        return True

    return is_time


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model of many blocks; everything that a run imports is imported here, before the forks."""
    import accelerate  # noqa: F401

    from slicecli.testing.checkpoints import save_checkpoint

    return save_checkpoint(tiny_model("llama", num_hidden_layers=10), tmp_path_factory.mktemp("many") / "model")


@pytest.fixture
def slice_command(model, slice_words):
    def words(output, *more):
        return ["slice", model, "--dim", "36", "-o", output, *slice_words, *more]

    return words


@pytest.mark.parametrize("method", ["refit", "slicegpt"])
def test_a_slice_that_was_killed_goes_on_to_the_same_bytes(slice_command, tmp_path, method):
    log = tmp_path / "log"
    words = ["--method", method, "--no-cache", "--max-shard-size", "100KB"]
    code = in_child(slice_command(tmp_path / "whole", *words), log, SLICECLI_JOURNAL_SECONDS="0")
    assert code == 0, log.read_text()
    lines = log.read_text().count("\n")
    expected = digests(tmp_path / "whole")
    generator = random.Random(method)
    resumed = 0
    for number in range(SLICES):
        output = tmp_path / f"out{number}"
        command = slice_command(output, *words, "--resume")
        # killed twice on its way, at moments drawn over the whole run
        for _ in range(2):
            moment = after_lines(log, generator.randrange(lines), generator.uniform(0, 0.03))
            in_child(command, log, kill_when=moment, SLICECLI_JOURNAL_SECONDS="0")
            if output.exists():
                break
        if not output.exists():
            code = in_child(command, log, SLICECLI_JOURNAL_SECONDS="0")
            assert code == 0, log.read_text()
            resumed += "done before" in log.read_text()
        assert digests(output) == expected
        assert not list(tmp_path.glob(".out*"))
    assert resumed, "no kill came where there was something to go on with"


def test_a_sweep_that_was_killed_goes_on_to_the_same_figures(model, text_file, slice_words, tmp_path):
    log = tmp_path / "log"
    measure = ["--perplexity", text_file, "--limit", "4", "--keep-slices", "--dims", "40,36,32", "--no-cache"]

    def words(output):
        return ["sweep", model, "-o", output, *slice_words, *measure]

    code = in_child(words(tmp_path / "whole"), log)
    assert code == 0, log.read_text()
    lines = log.read_text().count("\n")
    expected = json.loads((tmp_path / "whole" / "results.json").read_text())
    generator = random.Random(0)
    for number in range(SWEEPS):
        output = tmp_path / f"out{number}"
        moment = after_lines(log, generator.randrange(lines), generator.uniform(0, 0.03))
        in_child(words(output), log, kill_when=moment, SLICECLI_JOURNAL_SECONDS="0")
        code = in_child(words(output), log, SLICECLI_JOURNAL_SECONDS="0")
        assert code == 0, log.read_text()
        assert json.loads((output / "results.json").read_text()) == expected
        for dim in (40, 36, 32):
            place = f"slices/dim{dim}/model.safetensors"
            assert file_digest(output / place) == file_digest(tmp_path / "whole" / place)
        assert not list((output / "slices").glob(".*"))


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(slice_command, tmp_path, signal_number, code):
    log = tmp_path / "log"
    words = slice_command(tmp_path / "out", "--no-cache")
    assert in_child(slice_command(tmp_path / "whole", "--no-cache"), log) == 0
    partial = tmp_path / ".out.incomplete"
    found = in_child(
        words,
        log,
        kill_when=(partial / ".journal" / "state.json").exists,
        signal_number=signal_number,
        SLICECLI_JOURNAL_SECONDS="0",
    )
    assert found == code, log.read_text()
    assert "with --resume to continue" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert not (tmp_path / "out").exists()
    # another plan does not go on with it, and says why
    other = ["--dim", "32"]
    refused = in_child([*words, *other, "--resume"], log)
    assert refused == 1
    assert "its slices differed" in log.read_text()
    assert partial.exists()
    # nor another calibration
    refused = in_child([*words, "--seed", "7", "--resume"], log)
    assert refused == 1
    assert "calibration" in log.read_text()
    # without --resume it starts clean
    again = in_child(words, log)
    assert again == 0, log.read_text()
    assert "done before" not in log.read_text()
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")
    assert not partial.exists()


def test_two_runs_do_not_write_the_same_output(slice_command, tmp_path):
    from filelock import FileLock

    partial = tmp_path / ".out.incomplete"
    partial.mkdir()
    with FileLock(partial / ".lock"):
        log = tmp_path / "log"
        code = in_child(slice_command(tmp_path / "out"), log)
    assert code == 1
    assert "Another process is writing 'out'" in log.read_text()


def test_a_damaged_journal_starts_anew(slice_command, tmp_path):
    log = tmp_path / "log"
    for number, content in enumerate(("", "{", "[]", '{"fingerprint": {}}')):
        journal = tmp_path / f".out{number}.incomplete" / ".journal"
        journal.mkdir(parents=True)
        (journal / "state.json").write_text(content)
        code = in_child(slice_command(tmp_path / f"out{number}", "--resume"), log)
        if number < 3:
            assert code == 0, log.read_text()
        else:
            assert code == 1
            assert "cannot be resumed" in log.read_text()
