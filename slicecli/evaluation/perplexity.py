"""Perplexity by the field's protocol: rows that do not overlap, every token but a row's first predicted.

The perplexity is exp of the mean negative log-likelihood over all predicted tokens. Its standard error comes from
the spread of the rows' means, carried through exp. Bits per byte divides by the text's bytes instead of by its
tokens, so that models with different tokenizers compare.
"""

from __future__ import annotations

import math
from typing import Any, Protocol

import torch

from slicecli.data.packing import Rows
from slicecli.errors import WeightsError
from slicecli.evaluation.answers import NO_ANSWERS, Answers
from slicecli.evaluation.document import PerplexityResult
from slicecli.runtime.distributed import ALONE, Processes
from slicecli.runtime.microbatch import MicroBatches

__all__ = ["measure_perplexity"]


class _Progress(Protocol):
    def start(self, phase: str, total: int) -> None: ...

    def advance(self, detail: str = "") -> None: ...


@torch.no_grad()
def measure_perplexity(
    model: Any,
    rows: Rows,
    batch_size: int,
    progress: _Progress | None = None,
    processes: Processes = ALONE,
    answers: Answers = NO_ANSWERS,
) -> PerplexityResult:
    """Measure a causal language model's perplexity on packed rows.

    Args:
        answers: What was measured before an interruption, and where to store what is.
    """
    device = model.get_input_embeddings().weight.device
    if device.type == "meta":
        device = torch.device("cpu")  # offloaded: accelerate's hooks move the ids to where they are needed
    share = processes.share(len(rows.ids), batch_size)
    batches = () if share.processes.is_idle else rows.ids[share.rows].split(batch_size)
    if progress is not None:
        progress.start("perplexity", len(batches))

    def measure(ids: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=ids.to(device), use_cache=False).logits
        return _row_sums(logits, ids.to(logits.device)).cpu()

    row_sums, micro_batches = [], MicroBatches()
    for number, batch in enumerate(batches):
        question = ("perplexity", rows.digest, batch_size, number)
        known = answers.get(question)
        if known is None:
            known = torch.cat([sums for _, sums in micro_batches.run(measure, batch)]).tolist()
            answers.add(question, known)
        row_sums.append(torch.tensor(known, dtype=torch.float64))
        if progress is not None:
            progress.advance()
    predicted = rows.sequence_length - 1
    row_means = torch.cat([sums for part in processes.gather(row_sums) for sums in part]) / predicted
    nll = float(row_means.mean())
    if not math.isfinite(nll):
        raise WeightsError("The model's logits are NaN or infinite.", "Try --dtype float32.")
    value = math.exp(min(nll, 700.0))
    spread = float(row_means.std()) / math.sqrt(len(row_means)) if len(row_means) > 1 else None
    return PerplexityResult(
        text=rows.name,
        value=value,
        nll=nll,
        stderr=None if spread is None else value * spread,
        tokens=predicted * len(row_means),
        seq_len=rows.sequence_length,
        bits_per_byte=nll / math.log(2) / rows.bytes_per_token,
        rows_sha256=rows.digest,
        text_sha256=rows.text_digest,
    )


def _row_sums(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Return each row's summed negative log-likelihood in float64, a row at a time to bound the float32 logits."""
    sums = [
        torch.nn.functional.cross_entropy(row[:-1].float(), targets[1:], reduction="none").double().sum()
        for row, targets in zip(logits, ids, strict=True)
    ]
    return torch.stack(sums)
