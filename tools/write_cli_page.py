"""Write docs/cli.md from the help texts of the commands, so that the page cannot differ from the program.

Usage: python tools/write_cli_page.py
"""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner

from slicecli.cli import COMMANDS, group

PAGE = Path(__file__).parent.parent / "docs" / "cli.md"
HEAD = """\
# Command line

MODEL is a Hub id or a folder, everywhere. Results go to standard output, everything else to standard error;
`--format json` prints one JSON document. The exit code is 0 for success, 1 for failure, 2 for wrong usage.

This page is written by `python tools/write_cli_page.py`.
"""


def page() -> str:
    """Return the page: the help of the group, then of every built-in command."""
    parts = [HEAD]
    for words in ([], *([name] for name in COMMANDS)):
        options = {"prog_name": "slicecli", "terminal_width": 100, "catch_exceptions": False}
        shown = CliRunner().invoke(group, [*words, "--help"], **options)
        parts.append(f"\n## {' '.join(['slicecli', *words])}\n\n```\n{shown.output.rstrip()}\n```\n")
    return "".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
