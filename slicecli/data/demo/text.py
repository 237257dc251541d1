"""Text for calibration and evaluation, made at run time from the standard library that runs this program.

It is the prose of the docstrings (read by ``ast``, no module is imported for it) and of the language topics
in ``pydoc_data``. Nothing is downloaded or stored; documents are divided into a training and a held-out part
by the SHA-256 of their names, so that the division is the same everywhere.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

Part = Literal["train", "heldout"]

HELD_OUT_SHARE = 0.2
"""Share of document names held out. Documents differ much in length; see the sizes in the model card."""

MINIMUM_TRAINING_BYTES = 200_000
MINIMUM_HELD_OUT_BYTES = 50_000

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib-dynload",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
        "__phello__",
    }
)

_ASCII_FORMS = str.maketrans(
    {
        "\u2018": "'",
        "\u2019": "'",
        "\u201c": '"',
        "\u201d": '"',
        "\u2013": "-",
        "\u2014": "-",
        "\u2026": "...",
        "\u00a0": " ",
        "\t": "        ",
    }
)
_RULE = re.compile(r"^([=\-~^*#+\"'`.:_])\1{2,}[\s=\-+]*$")
_BULLET = re.compile(r"^(?:[-*+o]|\(?\d{1,2}[.)]|\(?[a-z][)])\s+(?=\S)")
_CODE_DIRECTIVE = re.compile(
    r"^\.\.\s+(?:code|code-block|codeauthor|contents|currentmodule|data|doctest|figure|function|highlight|image|index"
    r"|ipython|literalinclude|math|module|parsed-literal|plot|prompt|raw|sourcecode|table|testcode|testoutput"
    r"|testsetup|toctree|csv-table|list-table|autoclass|autofunction|automodule|automethod|autosummary)\b"
)
_DIRECTIVE = re.compile(r"^\.\.(?:\s|$)")
_FIELD = re.compile(r"^(?::[a-zA-Z][^:]{0,60}:|@[a-z]+(?:\s+\w+)?:)\s*")
_ROLE = re.compile(r":[a-zA-Z][\w+.-]*(?::[a-zA-Z][\w+.-]*)*:`([^`]+)`")
_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]*>`_{0,2}")
_LITERAL = re.compile(r"``([^`]+)``")
_INTERPRETED = re.compile(r"`([^`]+)`_{0,2}")
_MARKDOWN_LINK = re.compile(r"!?\[([^\]]+)\]\([^)]*\)")
_REFERENCE = re.compile(r"\s*\[(?:\d+|#\w*|[A-Z][\w+]*\d+[a-z]?)\]_")
_STRONG = re.compile(r"(?<![\w*])\*{1,2}(?=\S)([^*]+?)(?<=\S)\*{1,2}(?![\w*])")
_WORD = re.compile(r"^[(\"']*[A-Za-z][A-Za-z'-]*[)\"']*[.,;:!?]*[)\"']*$")
_NORMAL = re.compile(r"[^a-z0-9]+")


def normalised(paragraph: str) -> str:
    """Return the form in which two paragraphs are compared: lower case, letters and digits only."""
    return _NORMAL.sub(" ", paragraph.lower()).strip()


def _without_markup(text: str) -> str:
    """Return a paragraph without reStructuredText and Markdown inline markup."""
    if "`" in text:
        text = _ROLE.sub(lambda match: match.group(1).split(" <")[0].lstrip("~!"), text)
        text = _LINK.sub(r"\1", text)
        text = _LITERAL.sub(r"\1", text)
        text = _INTERPRETED.sub(r"\1", text)
    if "[" in text:
        text = _MARKDOWN_LINK.sub(r"\1", text)
        text = _REFERENCE.sub("", text)
    if "*" in text:
        text = _STRONG.sub(r"\1", text)
    if text.endswith("::"):
        text = text[:-1]
    return " ".join(text.split())


def _is_prose(text: str) -> bool:
    """Say whether a one-line paragraph reads as sentences: ASCII, long enough, ended, and mostly of words."""
    if len(text) < 40 or not text.isascii() or text[-1] not in '.!?:)"':
        return False
    if not (text[0].isalpha() or text[0] in "\"'("):
        return False
    if "://" in text or "|" in text or "\\" in text or ">>>" in text or "{" in text:
        return False
    words = text.split(" ")
    if len(words) < 7:
        return False
    plain = sum(1 for word in words if _WORD.match(word))
    if plain < 0.78 * len(words):
        return False
    letters = sum(1 for character in text if character.isalpha() or character == " ")
    return letters >= 0.88 * len(text)


def _pieces(text: str) -> Iterator[str]:
    """Yield the runs of lines that belong together, as raw one-line strings, code and tables left out."""
    lines = [line.rstrip() for line in text.splitlines()]
    piece: list[str] = []
    piece_indent = 0
    dropped_under: int | None = None
    fenced = False
    count = len(lines)
    for number, line in enumerate(lines):
        body = line.lstrip()
        if body.startswith("```"):
            fenced = not fenced
            body = ""
        elif fenced:
            continue
        if not body:
            if piece:
                yield " ".join(piece)
                # A literal block follows a paragraph that ends with two colons.
                if piece[-1].endswith("::") and dropped_under is None:
                    dropped_under = piece_indent
                piece = []
            continue
        indent = len(line) - len(body)
        if dropped_under is not None:
            if indent > dropped_under:
                continue
            dropped_under = None
        follower = lines[number + 1].lstrip() if number + 1 < count else ""
        is_title = bool(_RULE.match(follower)) and len(follower) >= len(body) - 2
        unwanted = is_title or body.startswith((">>>", "...", "+--", "|", "#", "<", "$ ", "In [", "Out["))
        if unwanted or _RULE.match(body) or _DIRECTIVE.match(body):
            if piece:
                yield " ".join(piece)
                piece = []
            if _CODE_DIRECTIVE.match(body):
                dropped_under = indent
            continue
        marker = _BULLET.match(body) or _FIELD.match(body)
        if marker:
            if piece:
                yield " ".join(piece)
            body = body[marker.end() :]
            piece = [body] if body else []
            piece_indent = indent + marker.end()
        elif piece and indent != piece_indent:
            # A hanging indent under a marker continues it; any other change starts something else.
            yield " ".join(piece)
            piece, piece_indent = [body], indent
        else:
            piece.append(body)
            piece_indent = indent
    if piece:
        yield " ".join(piece)


def prose(text: str) -> list[str]:
    """Return the prose paragraphs of one docstring or documentation text."""
    text = inspect.cleandoc(text.translate(_ASCII_FORMS))
    return [clean for clean in map(_without_markup, _pieces(text)) if clean and _is_prose(clean)]


def _docstrings_under(body: Iterable[ast.AST]) -> Iterator[str]:
    """Yield the docstrings of the classes and functions in a body of statements, in source order."""
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            docstring = ast.get_docstring(node, clean=False)
            if docstring:
                yield docstring
            if isinstance(node, ast.ClassDef):
                yield from _docstrings_under(node.body)
        elif isinstance(node, (ast.If, ast.Try)):
            yield from _docstrings_under(node.body)
            yield from _docstrings_under(node.orelse)


def docstrings(source: bytes) -> list[str]:
    """Return the docstrings of a module's source, its own first; none where the source does not parse."""
    if b'"""' not in source and b"'''" not in source:
        return []
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    own = ast.get_docstring(tree, clean=False)
    return ([own] if own else []) + list(_docstrings_under(tree.body))


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield the dotted name and the path of every standard library module, sorted by folder and name."""
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(
            name
            for name in folders
            if name not in SKIPPED_FOLDERS and not name.startswith("config-") and "." not in name
        )
        prefix = Path(folder).relative_to(root).parts
        for name in sorted(files):
            if name.endswith(".py"):
                stem = name[:-3]
                dotted = ".".join(prefix if stem == "__init__" and prefix else (*prefix, stem))
                yield dotted, Path(folder) / name


def _topics() -> dict[str, str]:
    """Return the language topics that ``help()`` shows, empty where this Python has none."""
    try:
        # This module is one literal dictionary: importing it runs nothing else, and is faster than parsing.
        from pydoc_data.topics import topics
    except ImportError:
        return {}
    return dict(topics)


def is_held_out(name: str) -> bool:
    """Say whether the document of this name belongs to the held-out part."""
    first_bytes = hashlib.sha256(name.encode("utf-8")).digest()[:4]
    return int.from_bytes(first_bytes, "big") < HELD_OUT_SHARE * 2**32


@functools.lru_cache(maxsize=1)
def _parts() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Read the standard library once and return the training and the held-out documents."""
    named: list[tuple[str, list[str]]] = []
    for name, path in _modules(Path(sysconfig.get_path("stdlib"))):
        try:
            source = path.read_bytes()
        except OSError:
            continue
        paragraphs = [paragraph for docstring in docstrings(source) for paragraph in prose(docstring)]
        named.append((name, paragraphs))
    for topic, text in sorted(_topics().items()):
        named.append((f"topic:{topic}", prose(text)))

    seen: set[str] = set()
    chosen: dict[bool, list[str]] = {False: [], True: []}
    # The training part goes first: a paragraph found in both stays there and leaves the held-out part.
    for held_out in (False, True):
        for name, paragraphs in named:
            if is_held_out(name) is not held_out:
                continue
            kept = []
            for paragraph in paragraphs:
                key = normalised(paragraph)
                if key not in seen:
                    seen.add(key)
                    kept.append(paragraph)
            if kept:
                chosen[held_out].append("\n".join(kept))
    return tuple(chosen[False]), tuple(chosen[True])


def documents(part: Part) -> list[str]:
    """Return the documents of one part, in an order fixed by this Python's standard library alone."""
    if part not in ("train", "heldout"):
        raise ValueError(f"part must be 'train' or 'heldout', not {part!r}")
    training, held_out = _parts()
    if sum(map(len, training)) < MINIMUM_TRAINING_BYTES or sum(map(len, held_out)) < MINIMUM_HELD_OUT_BYTES:
        from slicecli.errors import SlicecliError

        raise SlicecliError(
            "The standard library of this Python has too few docstrings for the demo text "
            f"({sum(map(len, training))} bytes to calibrate on, {sum(map(len, held_out))} to evaluate on).",
            "Use a Python installed with its sources and docstrings, or pass your own text file.",
        )
    return list(training if part == "train" else held_out)
