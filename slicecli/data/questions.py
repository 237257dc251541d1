"""Multiple-choice questions of the user's own: a file with one question per line.

A line is a JSON object `{"query": "...", "choices": ["...", "..."], "gold": 0}`: what the model reads, the texts
among which it chooses, and the index of the right one, from 0. Lines may have different numbers of choices.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicecli.errors import TextError, reason_of
from slicecli.runtime.text_files import numbered_lines, read_text_file

__all__ = ["Question", "read_questions"]

FORM = 'Write one object per line, for example {"query": "2 + 2 =", "choices": ["3", "4"], "gold": 1}.'


@dataclass(frozen=True)
class Question:
    """A question with its choices.

    Attributes:
        query: What the model reads first; may be empty.
    """

    query: str
    choices: tuple[str, ...]
    gold: int

    @property
    def prompt(self) -> str:
        """The text that each choice is laid behind, as it is.

        A space is added to the query, unless the query is empty or ends in whitespace or a choice brings its own.
        """
        if not self.query.strip():
            return ""
        is_joined = self.query[-1].isspace() or any(choice[0].isspace() for choice in self.choices)
        return self.query if is_joined else f"{self.query} "


def read_questions(path: Path) -> tuple[Question, ...]:
    """Read a file of questions."""
    if not path.exists():
        raise TextError(f"There is no question file {str(path)!r}.", "Check the path.")
    questions = []
    for number, line in numbered_lines(read_text_file(path)):
        fault, question = _parse(line)
        if question is None:
            raise TextError(f"Line {number} of {path.name!r} is not a question: {fault}.", FORM)
        questions.append(question)
    if not questions:
        raise TextError(f"The file {path.name!r} has no questions.", FORM)
    return tuple(questions)


def _parse(line: str) -> tuple[str, Question | None]:
    """Return the question on a line, or what is wrong with it."""
    try:
        fields: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        return f"it is not JSON ({reason_of(error)})", None
    if not isinstance(fields, dict):
        return "it is not a JSON object", None
    query, choices, gold = fields.get("query"), fields.get("choices"), fields.get("gold")
    if not isinstance(query, str):
        return "`query` is not a string", None
    if not isinstance(choices, list) or len(choices) < 2:
        return "`choices` is not a list of two or more", None
    if not all(isinstance(choice, str) and choice.strip() for choice in choices):
        return "a choice is not a string, or is empty", None
    if not all(_is_text(one) for one in (query, *choices)):
        return "it contains half of a surrogate pair", None
    if not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < len(choices):
        return f"`gold` is not the index of a choice, 0 to {len(choices) - 1}", None
    return "", Question(query, tuple(choices), gold)


def _is_text(text: str) -> bool:
    """Say whether a string is text: JSON can hold half a character, a surrogate without its other."""
    return not any("\ud800" <= letter <= "\udfff" for letter in text)
