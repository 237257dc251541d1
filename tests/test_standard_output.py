"""Where results are printed cannot be written: one sentence, and nothing is lost that also goes elsewhere."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from slicecli.cli import standard_output
from slicecli.data.demo import MODEL_FOLDER
from slicecli.errors import OutputError

FULL = Path("/dev/full")
needs_full_device = pytest.mark.skipif(not FULL.exists(), reason="there is no device that is always full")


def slicecli(*words, stdout, **environment):
    return subprocess.run(
        [sys.executable, "-m", "slicecli", *map(str, words)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        check=False,
    )


@needs_full_device
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "words",
    [
        ["-q", "inspect", MODEL_FOLDER],
        ["inspect", MODEL_FOLDER, "--format", "json"],
        ["-q", "estimate", MODEL_FOLDER, "--dim", "72"],
        ["adapters"],
        ["--help"],
        ["slice", "--help"],
        ["--version"],
    ],
    ids=lambda words: " ".join(str(word) for word in words if word != MODEL_FOLDER),
)
def test_a_full_disk_is_one_sentence(words, unbuffered):
    with FULL.open("w") as full:
        done = slicecli(*words, stdout=full, PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("Error: Standard output cannot be written: No space left on device.")


@needs_full_device
def test_shell_completion_says_so_too():
    with FULL.open("w") as full:
        # under its own name, after which the variable is called
        code = "import sys; sys.argv = ['slicecli']; from slicecli.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "_SLICECLI_COMPLETE": "bash_source"},
            check=False,
        )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "Standard output cannot be written" in done.stderr


def test_a_pipe_that_nobody_reads_any_more_is_quiet():
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = slicecli("-q", "inspect", MODEL_FOLDER, "--format", "json", stdout=writing)
    finally:
        os.close(writing)
    assert done.stderr == ""


def test_without_standard_output_commands_work():
    code = "import os, sys; os.close(1); os.execv(sys.executable, [sys.executable, '-m', 'slicecli', *sys.argv[1:]])"
    done = subprocess.run(
        [sys.executable, "-c", code, "-q", "inspect", str(MODEL_FOLDER)], stderr=subprocess.PIPE, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


class Full(io.StringIO):
    """A stream whose disk is full."""

    def write(self, _text):
        raise OSError(28, "No space left on device")


@pytest.fixture
def full_output(monkeypatch):
    def become():
        monkeypatch.setattr(sys, "stdout", Full())
        standard_output.guard_standard_output()

    return become


def test_no_write_after_a_failed_one_seems_to_succeed(full_output):
    full_output()
    for _ in range(2):
        with pytest.raises(OutputError, match="No space left"):
            sys.stdout.write("results")
    sys.stdout.flush()


def measuring(folder, text_file):
    return ["eval", str(folder), "--perplexity", str(text_file), "--seq-len", "32", "--limit", "2"]


def test_results_are_in_their_file_before_they_are_printed(checkpoints, text_file, tmp_path, full_output):
    from slicecli.cli import group

    results = tmp_path / "results.json"
    full_output()
    with pytest.raises(SystemExit) as ended:
        group.main(["-q", *measuring(checkpoints(), text_file), "-o", str(results)], prog_name="slicecli")
    assert ended.value.code == 1
    assert json.loads(results.read_text())["perplexity"][text_file.name]["value"] > 1


def test_results_are_printed_where_their_file_cannot_be_written(run, checkpoints, text_file, tmp_path):
    (tmp_path / ".results.json.incomplete").mkdir()
    done = run(*measuring(checkpoints(), text_file), "-o", tmp_path / "results.json", "--format", "json")
    assert done.exit_code == 1
    assert "cannot be written" in done.stderr
    assert json.loads(done.stdout)["perplexity"][text_file.name]["value"] > 1
