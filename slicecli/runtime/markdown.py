"""Escapes untrusted text in Markdown.

Names of models, texts and tasks come from configs, file names and records that anybody may have written. Each goes into
a card as code, in which nothing is markup, a link or a script, and out of which nothing leads; or, inside sentences,
with every character escaped that could be one of these.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["code", "code_block", "heading", "prose", "visible"]

MOST_CHARACTERS = 200
_PLAIN_NAME = re.compile(r"(?!www\.)[A-Za-z0-9]+([.-][A-Za-z0-9]+)*")
_MARKUP = re.compile(r"([\\`*_{}\[\]|~!])")
_HTML = {"&": "&amp;", "<": "&lt;", ">": "&gt;", "@": "&#64;", "://": "&#58;//", "www.": "www&#46;"}
_INVISIBLE = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def code(text: object) -> str:
    """Return a text as code within a line, or within a cell of a table; without invisible characters, and not long."""
    line = visible(" ".join(str(text).split()))
    if len(line) > MOST_CHARACTERS:
        line = line[: MOST_CHARACTERS - 1] + "…"
    if not line:
        return "` `"
    fence = _fence(line, 1)
    space = " " if line.startswith("`") or line.endswith("`") else ""
    # a cell of a table ends at a bar even inside code; a look-alike does not depend on where this is used
    return f"{fence}{space}{line.replace('|', '¦')}{space}{fence}"


def code_block(text: str, language: str = "") -> str:
    """Return a text as a block of code, whatever fences it holds."""
    lines = [visible(line) for line in text.splitlines()]
    fence = _fence("\n".join(lines), 3)
    return "\n".join([f"{fence}{language}", *lines, fence])


def heading(name: str) -> str:
    """Return a name for a heading: as it is where it is plain, else as code."""
    return name if _PLAIN_NAME.fullmatch(name) and len(name) <= MOST_CHARACTERS else code(name)


def prose(text: str) -> str:
    """Return sentences that may quote names of others, on one line, with everything in them shown as it is."""
    line = visible(" ".join(text.split()))
    for one, entity in _HTML.items():
        line = line.replace(one, entity)
    return _MARKUP.sub(r"\\\1", line)


def _fence(text: str, least: int) -> str:
    """Return more backticks than the text has in a row."""
    return "`" * max([least, *(len(run) + 1 for run in re.findall("`+", text))])


def visible(line: str) -> str:
    """Return a line without control and direction characters, which can show it as something else."""
    return "".join(letter for letter in line if unicodedata.category(letter) not in _INVISIBLE)
