"""Properties of the text that the demo makes: stable, in two disjoint parts, ASCII prose, enough of it."""

from __future__ import annotations

import subprocess
import sys
from itertools import chain

import pytest

from slicecli.data.demo import documents, text


def paragraphs(part: text.Part) -> list[str]:
    """Return all paragraphs of one part."""
    return list(chain.from_iterable(document.split("\n") for document in documents(part)))


def test_two_processes_make_the_same_text() -> None:
    program = (
        "import hashlib; from slicecli.data.demo.text import documents; "
        "print(hashlib.sha256('\\0'.join(documents('train') + documents('heldout')).encode()).hexdigest())"
    )
    digests = {
        subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout
        for _ in range(2)
    }
    assert len(digests) == 1


def test_callers_get_their_own_list() -> None:
    documents("train").clear()
    assert documents("train")


def test_parts_share_no_paragraph() -> None:
    training = {text.normalised(paragraph) for paragraph in paragraphs("train")}
    held_out = {text.normalised(paragraph) for paragraph in paragraphs("heldout")}
    assert not training & held_out


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_no_paragraph_occurs_twice(part: text.Part) -> None:
    found = [text.normalised(paragraph) for paragraph in paragraphs(part)]
    assert len(found) == len(set(found))


@pytest.mark.parametrize("part", ["train", "heldout"])
def test_text_is_ascii_prose(part: text.Part) -> None:
    for document in documents(part):
        assert document.isascii()
        assert document == document.strip()
    for paragraph in paragraphs(part):
        letters = sum(character.isalpha() or character == " " for character in paragraph)
        assert len(paragraph) >= 40
        assert ">>>" not in paragraph
        assert "  " not in paragraph
        assert letters > 0.8 * len(paragraph)


def test_there_is_enough_text() -> None:
    assert sum(map(len, documents("train"))) >= 600_000
    assert sum(map(len, documents("heldout"))) >= 150_000


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(ValueError, match="'train' or 'heldout'"):
        documents("test")  # type: ignore[arg-type]


def test_a_python_without_documentation_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    from slicecli.errors import SlicecliError

    monkeypatch.setattr(text, "_parts", lambda: ((), ()))
    with pytest.raises(SlicecliError, match="too few docstrings"):
        documents("train")


def test_prose_leaves_out_what_is_not_prose() -> None:
    docstring = """Return the *first* item of ``items`` that satisfies :func:`~package.wanted`, or none.

    Parameters
    ----------
    items : list of object, optional
        The objects to look through, in the order in which they are to be tried.

    A block of code follows this paragraph, and is not a part of what is returned::

        value = first(items, default=None)
        this line looks like a sentence but is indented under two colons.

    - The first entry of a list of remarks, which
      continues on a second line.

    >>> first([1, 2, 3])
    1

    ======  ======
    left    right
    ======  ======
    """
    assert text.prose(docstring) == [
        "Return the first item of items that satisfies package.wanted, or none.",
        "The objects to look through, in the order in which they are to be tried.",
        "A block of code follows this paragraph, and is not a part of what is returned:",
        "The first entry of a list of remarks, which continues on a second line.",
    ]


def test_docstrings_are_read_without_running_the_module() -> None:
    source = b'"""Own."""\nraise SystemExit\nclass Thing:\n    "Class."\n    def act(self):\n        "Method."\n'
    assert text.docstrings(source) == ["Own.", "Class.", "Method."]
    assert text.docstrings(b'"""not closed') == []
