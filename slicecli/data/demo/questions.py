"""Multiple-choice questions for the embedded model, made from the held-out part of the demo's text.

A question is the beginning of a passage; the choices are how it goes on and how three other passages go on, cut to
the same number of words. Whoever has learnt what such prose is about tells them apart more often than not.
"""

from __future__ import annotations

import random

from slicecli.data.demo.text import documents
from slicecli.data.questions import Question

__all__ = ["questions"]

QUERY_WORDS = 16
CHOICE_WORDS = 8
CHOICES = 4
MOST_QUESTIONS = 300
SEED = 0


def questions() -> tuple[Question, ...]:
    """Return the questions, the same ones for the same standard library."""
    length = QUERY_WORDS + CHOICE_WORDS
    passages = [
        (words[:QUERY_WORDS], words[QUERY_WORDS:length])
        for document in documents("heldout")
        for words in (paragraph.split() for paragraph in document.split("\n"))
        if len(words) >= length
    ]
    generator = random.Random(SEED)
    generator.shuffle(passages)
    made = []
    for index, (beginning, end) in enumerate(passages[:MOST_QUESTIONS]):
        others = generator.sample([other for at, (_, other) in enumerate(passages) if at != index], CHOICES - 1)
        gold = generator.randrange(CHOICES)
        ends = [*others[:gold], end, *others[gold:]]
        made.append(Question(" ".join(beginning), tuple(" ".join(words) for words in ends), gold))
    return tuple(made)
