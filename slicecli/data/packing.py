"""From documents to rows of token ids, for calibration and for evaluation.

Documents are tokenised with the tokenizer's own special tokens, laid end to end, and cut into rows of equal
length, so that there is no padding anywhere and every position counts.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slicecli.data.text import Text, shuffled
from slicecli.errors import SourceError, TextError, reason_of

if TYPE_CHECKING:
    import torch

__all__ = [
    "Rows",
    "calibration_rows",
    "check_embedded",
    "check_vocabulary",
    "evaluation_rows",
    "monotony",
    "rows_at",
    "rows_unlike",
]

# below these, or above, a text is no sample of what a model reads
FEWEST_TOKENS = 10
MOST_OF_ONE_TOKEN = 0.5
LEAST_NEW_ROWS = 0.5
LEAST_NEW_STRETCHES = 0.2
STRETCH = 16
MOST_SHARED = 0.25  # of the stretches of a row that is not from a part of the text


@dataclass(frozen=True)
class Rows:
    """Packed token ids.

    Attributes:
        name: Name of the text they come from.
        ids: Token ids, int64 of shape (rows, sequence length).
        bytes_per_token: UTF-8 bytes of the text per token of it, to convert nats per token to bits per byte.
        digest: SHA-256 of the ids as little-endian int64, in hexadecimal.
        dataset: Id of the dataset on the Hub that the text comes from, if it comes from there.
        text_digest: Digest of the whole text, see `slicecli.data.text.Text`.
    """

    name: str
    ids: torch.Tensor
    bytes_per_token: float
    digest: str
    dataset: str | None = None
    text_digest: str | None = None

    @property
    def tokens(self) -> int:
        """Number of tokens in all rows."""
        return self.ids.numel()

    @property
    def sequence_length(self) -> int:
        """Tokens in a row."""
        return int(self.ids.shape[1])


def calibration_rows(text: Text, tokenizer: Any, samples: int, sequence_length: int, seed: int) -> Rows:
    """Sample rows of a text: documents in random order, packed, cut, and the rows drawn at random."""
    # one text in one piece (wikitext2) is tokenised whole, so that rows come from all of it; of many
    # documents only as many are tokenised as are needed
    wanted = samples * sequence_length if len(text.documents) > 1 else None
    ids, byte_count = _tokenise(shuffled(text.documents, seed), tokenizer, wanted)
    rows = _cut(ids, sequence_length, text)
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return _rows(text, [rows[index] for index in order[:samples]], byte_count / len(ids))


def evaluation_rows(text: Text, tokenizer: Any, sequence_length: int, samples: int | None = None) -> Rows:
    """Cut a whole text, in its own order, into rows that do not overlap; the remainder is dropped."""
    ids, byte_count = _tokenise(text.documents, tokenizer, None)
    rows = _cut(ids, sequence_length, text)
    return _rows(text, rows[:samples], byte_count / len(ids))


def rows_at(rows: Rows, numbers: Sequence[int]) -> Rows:
    """Return some of the rows."""
    ids = rows.ids[list(numbers)]
    return replace(rows, ids=ids, digest=_digest(ids))


def rows_unlike(rows: Rows, others: Rows) -> list[int]:
    """Return the numbers of the rows that are not from a part of the text that other rows are from."""
    import torch

    length = min(STRETCH, rows.sequence_length, others.sequence_length)
    is_known = torch.isin(_stretches(rows.ids, length), _stretches(others.ids, length).unique())
    return [number for number, share in enumerate(is_known.double().mean(1).tolist()) if share < MOST_SHARED]


def check_vocabulary(rows: Rows, name: str, vocabulary: int) -> None:
    """Refuse token ids for which the model has no embedding."""
    check_embedded(int(rows.ids.max()), vocabulary, name)


def check_embedded(largest: int, vocabulary: int, name: str = "") -> None:
    """Refuse token ids for which a model has no embedding."""
    if largest >= vocabulary:
        raise SourceError(
            f"The tokenizer{name and f' of {name}'} gives token {largest}, but the model has only {vocabulary}.",
            "Use the tokenizer that belongs to this model.",
        )


def monotony(rows: Rows) -> str:
    """Say in what way a text is so monotonous that activations on it tell little of a model; empty where it is not."""
    ids = rows.ids
    tokens, counts = ids.unique(return_counts=True)
    if len(tokens) < FEWEST_TOKENS:
        return f"it has {len(tokens)} different tokens in {rows.tokens:,}"
    share = int(counts.max()) / rows.tokens
    if share > MOST_OF_ONE_TOKEN:
        return f"one token makes up {share:.0%} of it"
    different = len({row.numpy().tobytes() for row in ids})
    if len(ids) > 1 and different <= LEAST_NEW_ROWS * len(ids):
        return f"{different} of its {len(ids)} rows are different"
    length = min(STRETCH, rows.sequence_length)
    stretches = _stretches(ids, length).flatten()
    different = len(stretches.unique())
    if different < LEAST_NEW_STRETCHES * len(stretches):
        return f"{different:,} of its {len(stretches):,} stretches of {length} tokens are different"
    return ""


def _stretches(ids: torch.Tensor, length: int) -> torch.Tensor:
    """Return a number for each stretch of so many tokens of each row, of equal stretches the same."""
    import torch

    # others, but for one in 2^64, have different sums
    factors = torch.randint(-(2**62), 2**62, (length,), generator=torch.Generator().manual_seed(0)) | 1
    sums: torch.Tensor = (ids.unfold(1, length, 1) * factors).sum(-1)
    return sums


def _tokenise(documents: Iterable[str], tokenizer: Any, wanted: int | None) -> tuple[list[int], int]:
    """Return the ids of the documents laid end to end, at least `wanted` if there are, and their UTF-8 bytes."""
    # a tokenizer that marks neither beginning nor end would run documents into each other
    adds_tokens = tokenizer.num_special_tokens_to_add() > 0
    separator = [] if adds_tokens else _encoded(tokenizer, "\n\n", add_special_tokens=False)
    ids: list[int] = []
    byte_count = 0
    for chunk in _chunks(documents, size=256):
        for document, encoded in zip(chunk, _encoded(tokenizer, chunk), strict=True):
            if ids:
                ids.extend(separator)
            ids.extend(encoded)
            byte_count += len(document.encode())
        if wanted is not None and len(ids) >= wanted:
            break
    return ids, byte_count


def _encoded(tokenizer: Any, text: str | list[str], **options: Any) -> Any:
    """Return the token ids of a text, or of each of several."""
    try:
        return tokenizer(text, verbose=False, **options)["input_ids"]
    except Exception as error:  # tokenizers are data of others, and fail in many ways
        raise SourceError(
            f"The tokenizer cannot process the text: {type(error).__name__}: {reason_of(error)}.",
            "Check tokenizer.json and tokenizer_config.json.",
        ) from error


def _chunks(documents: Iterable[str], size: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    for document in documents:
        chunk.append(document)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


def _cut(ids: list[int], sequence_length: int, text: Text) -> list[list[int]]:
    """Cut ids into rows; what does not fill a row is dropped."""
    count = len(ids) // sequence_length
    if count == 0:
        raise TextError(
            f"The text {text.name!r} has {len(ids)} tokens, fewer than one row of {sequence_length}.",
            "Use a longer text, or a smaller --seq-len.",
        )
    return [ids[index * sequence_length : (index + 1) * sequence_length] for index in range(count)]


def _rows(text: Text, rows: list[list[int]], bytes_per_token: float) -> Rows:
    import torch

    ids = torch.tensor(rows, dtype=torch.int64)
    return Rows(text.name, ids, bytes_per_token, _digest(ids), text.dataset, text.digest)


def _digest(ids: torch.Tensor) -> str:
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()
