"""Killed at any moment, a run leaves nothing half-written, and goes on to the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress

import pytest
from conftest import tiny_model
from programs import SLICECLI, start_program

from slicecli.checkpoint.folder import file_digest

pytestmark = pytest.mark.slow

SLICES, SWEEPS = 4, 2  # of each method, killed twice; killed once


def digests(folder):
    """Hash all files of a slice whose content is the same each time."""
    found = {path.relative_to(folder).as_posix(): file_digest(path) for path in folder.rglob("*") if path.is_file()}
    assert not any(".journal" in name or ".lock" in name or "incomplete" in name for name in found), found
    return found


def in_child(words, log, kill_when=None, signal_number=signal.SIGKILL, **variables):
    """Run the command line in a process of its own; return its exit status.

    With `kill_when` it is killed as soon as that says so, unless it has ended before.
    """
    log.write_text("")
    child = start_program((*SLICECLI, *words), log, log, env={**os.environ, **variables}, kind="warm")
    while kill_when is not None and child.is_alive():
        if kill_when():
            with suppress(ProcessLookupError):  # it has ended by itself
                os.kill(child.pid, signal_number)
            break
        time.sleep(0.003)
    child.join()
    return child.exitcode


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
    """A tiny model of many blocks."""
    from slicecli.testing.checkpoints import save_checkpoint

    return save_checkpoint(tiny_model("llama", num_hidden_layers=6), tmp_path_factory.mktemp("many") / "model")


@pytest.fixture
def slice_command(model, slice_words):
    def words(output, *more):
        width = () if "--target-params" in more else ("--dim", "36")
        return ["slice", model, *width, "-o", output, *slice_words, *more]

    return words


@pytest.mark.parametrize(
    "how",
    [("--method", "refit"), ("--method", "slicegpt"), ("--mlp-dim", "61"), ("--target-params", "110k")],
    ids=" ".join,
)
def test_a_slice_that_was_killed_goes_on_to_the_same_bytes(slice_command, tmp_path, how):
    log = tmp_path / "log"
    words = [*how, "--no-cache", "--max-shard-size", "100KB"]
    code = in_child(slice_command(tmp_path / "whole", *words), log, SLICECLI_JOURNAL_SECONDS="0")
    assert code == 0, log.read_text()
    lines = log.read_text().count("\n")
    expected = digests(tmp_path / "whole")
    generator = random.Random(" ".join(how))
    resumed = 0
    for number in range(SLICES):
        output = tmp_path / f"out{number}"
        command = slice_command(output, *words, "--resume")
        # killed twice on its way, at moments drawn over each part of the run
        for _ in range(2):
            line = int(lines * (number + generator.random()) / SLICES)
            moment = after_lines(log, line, generator.uniform(0, 0.03))
            in_child(command, log, kill_when=moment, SLICECLI_JOURNAL_SECONDS="0")
            resumed += "done before" in log.read_text()
            if output.exists():
                break
        if not output.exists():
            code = in_child(command, log, SLICECLI_JOURNAL_SECONDS="0")
            assert code == 0, log.read_text()
            resumed += "done before" in log.read_text()
        assert digests(output) == expected
        assert not list(tmp_path.glob(".out*"))
    assert resumed, "no kill came where there was something to go on with"


def test_the_pass_that_widths_are_chosen_by_goes_on_to_the_same_bytes(run, slice_command, tmp_path):
    words = ("--target-params", "110k", "--no-cache")
    assert in_child(slice_command(tmp_path / "whole", *words), tmp_path / "log") == 0
    expected = digests(tmp_path / "whole")
    state = tmp_path / ".out.statistics" / ".journal" / "state.json"
    variables = {"SLICECLI_JOURNAL_SECONDS": "0"}
    command = slice_command(tmp_path / "out", *words)
    in_child(command, tmp_path / "log", kill_when=state.exists, **variables)
    assert state.exists()
    refused = run(*command, "--seed", "7", "--resume")
    assert "calibration" in refused.stderr
    done = run(*command, "--resume")
    assert done.exit_code == 0, done.output
    assert "done before" in done.output
    assert digests(tmp_path / "out") == expected
    assert not list(tmp_path.glob(".out*"))


def test_a_sweep_that_was_killed_goes_on_to_the_same_figures(model, text_file, slice_words, tmp_path):
    log = tmp_path / "log"
    measure = ["--perplexity", text_file, "--limit", "4", "--keep-slices", "--dims", "40,32", "--no-cache"]

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
        for dim in (40, 32):
            place = f"slices/dim{dim}/model.safetensors"
            assert file_digest(output / place) == file_digest(tmp_path / "whole" / place)
        assert not list((output / "slices").glob(".*"))


@pytest.fixture
def interrupt(slice_command, tmp_path):
    """A function that interrupts a run by a signal, and returns its exit code; and the words of the run."""
    words = slice_command(tmp_path / "out", "--no-cache")

    def call(signal_number):
        state = tmp_path / ".out.incomplete" / ".journal" / "state.json"
        variables = {"SLICECLI_JOURNAL_SECONDS": "0"}
        return in_child(words, tmp_path / "log", kill_when=state.exists, signal_number=signal_number, **variables)

    return call, words


@pytest.mark.parametrize(("signal_number", "code"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on(interrupt, tmp_path, signal_number, code):
    found, said = interrupt[0](signal_number), (tmp_path / "log").read_text()
    assert found == code, said
    assert "with --resume to continue" in said
    assert "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("more", "says"), [(["--dim", "32"], "its slices differed"), (["--seed", "7"], "calibration")], ids=["dim", "seed"]
)
def test_another_plan_does_not_go_on_and_says_why(run, interrupt, tmp_path, more, says):
    call, words = interrupt
    call(signal.SIGINT)
    refused = run(*words, *more, "--resume")
    assert refused.exit_code == 1
    assert says in refused.stderr
    assert (tmp_path / ".out.incomplete").exists()


def test_without_resume_a_run_starts_clean(run, interrupt, slice_command, tmp_path):
    call, words = interrupt
    call(signal.SIGINT)
    again = run(*words)
    assert again.exit_code == 0, again.output
    assert "done before" not in again.output
    assert not (tmp_path / ".out.incomplete").exists()
    assert run(*slice_command(tmp_path / "whole", "--no-cache")).exit_code == 0
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


def test_two_runs_do_not_write_the_same_output(run, slice_command, tmp_path):
    from filelock import FileLock

    partial = tmp_path / ".out.incomplete"
    partial.mkdir()
    with FileLock(partial / ".lock"):
        done = run(*slice_command(tmp_path / "out"))
    assert done.exit_code == 1
    assert "Another process is writing 'out'" in done.stderr


def leave_journal(tmp_path, content):
    journal = tmp_path / ".out.incomplete" / ".journal"
    journal.mkdir(parents=True)
    (journal / "state.json").write_text(content)


@pytest.mark.parametrize("content", ["", "{", "[]"])
def test_a_damaged_journal_starts_anew(run, slice_command, tmp_path, content):
    leave_journal(tmp_path, content)
    done = run(*slice_command(tmp_path / "out", "--resume"))
    assert done.exit_code == 0, done.output


def test_a_journal_of_another_run_is_not_gone_on_with(run, slice_command, tmp_path):
    leave_journal(tmp_path, '{"fingerprint": {}}')
    done = run(*slice_command(tmp_path / "out", "--resume"))
    assert done.exit_code == 1
    assert "cannot be resumed" in done.stderr
