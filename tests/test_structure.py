"""The rooms of the program: imports point down, and the top level stays small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import slicecli

ROOT = Path(__file__).parent.parent


def test_imports_point_down():
    command = [sys.executable, "-c", "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports())"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_top_level_has_at_most_eight_modules():
    assert len(list(Path(slicecli.__file__).parent.glob("*.py"))) <= 8


def test_every_room_says_in_a_sentence_what_it_is():
    for file in Path(slicecli.__file__).parent.glob("*/__init__.py"):
        text = file.read_text()
        assert text.startswith('"""'), file
        first = text.splitlines()[0]
        assert first.removesuffix('"""').endswith("."), file
