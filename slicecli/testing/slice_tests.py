"""Gating a slice: whole, loadable, deterministic, and as good as its record says."""

from __future__ import annotations

import functools
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from slicecli.checkpoint.folder import RECORD_FILE
from slicecli.checkpoint.source import Source
from slicecli.family.context_length import context_length_of_config, default_length
from slicecli.record.record import read_record
from slicecli.testing.serving_client import MOST_DIFFERENCE, ask, compare, why_missing

if TYPE_CHECKING:
    from slicecli.estimation.curves import Curve
    from slicecli.evaluation.document import PerplexityResult
    from slicecli.hub.verify import Finding

__all__ = ["SliceTests", "SliceUnderTest"]

SERVED_TOKENS = 200


@dataclass(frozen=True)
class SliceUnderTest:
    """A slice, and how good it must be.

    Attributes:
        source: The slice as a model.
        record: Its record.
        text: Text for its perplexity; `None` takes the one in the record.
        tolerance: How much worse than recorded the perplexity may be, as a fraction.
        max_perplexity: The largest perplexity that passes; `None` takes the recorded one.
        device: Where to compute.
        program: The program that serves it, `llama.cpp` or `vllm`.
    """

    source: Source
    record: dict[str, Any]
    text: str | None = None
    tolerance: float = 0.02
    max_perplexity: float | None = None
    device: str = "cpu"
    program: str = ""

    @classmethod
    def find(cls, name: str, **options: Any) -> SliceUnderTest:
        """Find a slice by folder or Hub id, with its weights.

        Raises:
            SlicecliError: It does not exist or cannot be reached.
        """
        source = Source.find(name)
        record = read_record(source.folder)
        if record is None:
            pytest.fail(f"{source.name} has no readable {RECORD_FILE}: it is not a slice, or its record is damaged")
        source.fetch_weights()
        return cls(source, record, **options)

    @property
    def folder(self) -> Path:
        """The local folder with its files."""
        return self.source.folder

    @property
    def model(self) -> Any:
        """The slice, loaded without code from its folder."""
        return _load(self.folder, self.device)

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer."""
        return self.source.tokenizer()

    def predictions(self, tokens: list[int]) -> list[tuple[int, float]]:
        """Return the most probable next token after each token, in float32, and its log probability."""
        import copy

        import torch

        model = copy.deepcopy(self.model).float()
        with torch.no_grad():
            logits = model(torch.tensor([tokens], device=model.device), use_cache=False).logits[0].float()
        values, best = logits.log_softmax(-1).max(-1)
        return list(zip(best.tolist(), values.tolist(), strict=True))

    def faults(self, *checks: str) -> list[str]:
        """Return what `slicecli verify` finds wrong in its record, and by some other checks.

        Args:
            *checks: Names of `slicecli.hub.verify.CHECKS`.
        """
        source = self.source
        is_folder = source.commit is None or source.cache is not None
        found = _verify(self.folder, None if is_folder else source.name, source.commit, source.token)
        return [one.text for one in found if one.is_error and one.check in ("record", *checks)]

    @property
    def recorded(self) -> dict[str, dict[str, Any]]:
        """The perplexities in the record, by text."""
        found = self.record.get("results", {}).get("perplexity", {})
        return found if isinstance(found, dict) else {}

    def _recorded_of(self, digest: str) -> dict[str, Any] | None:
        """Return the recorded perplexity on the text of a file, by its digest."""
        return next((figure for figure in self.recorded.values() if figure.get("text_sha256") == digest), None)

    def _curve(self) -> Curve | None:
        """Return the fitted curve of the perplexity in the record, if it has one."""
        from slicecli.estimation.results import read_curves

        if not self.record.get("curve"):
            return None
        found = (one for one in read_curves(self.record["curve"]) if one.series.quantity == "perplexity")
        return next(found, None)

    def perplexity(self) -> tuple[PerplexityResult, float]:
        """Measure the perplexity as it was recorded, and return it with the largest that passes.

        That is the recorded one and the tolerance; without one, the upper end of what the record's curve predicts.
        """
        from slicecli.data.text import read_text
        from slicecli.estimation.relations import quoted_by
        from slicecli.evaluation.measure import EvaluationSet, measure_loaded
        from slicecli.evaluation.options import EvaluationOptions
        from slicecli.runtime.libraries import quiet_libraries

        curve = self._curve()
        name = self.text
        if name is None:
            name = next(iter(self.recorded), None if curve is None else curve.series.evaluation)
        if name is None:
            pytest.fail(
                "the record has no perplexity to compare with: enter one with `slicecli eval DIR --record`, or give a "
                "text and max_perplexity to the marker"
            )
        digest = read_text(name, "evaluation", self.source.token).digest
        entry = self.recorded.get(name) if digest is None else self._recorded_of(digest)
        limit = self.max_perplexity
        if limit is None:
            if entry is not None:
                limit = float(entry["value"]) * (1 + self.tolerance)
            elif curve is not None and digest == curve.series.digest and (digest or name == curve.series.evaluation):
                limit = quoted_by("perplexity")(curve.predict(float(self.record["sparsity"])).high)
            else:
                known = ", ".join(self.recorded) or "nothing"
                pytest.fail(f"the record has no perplexity on {name} as it is here, only on {known}")
        # the same rows as were recorded, be they the whole text or only its beginning
        length, samples = None, None
        if entry is not None:
            length = int(entry["seq_len"])
            samples = int(entry["tokens"]) // (length - 1)
        elif curve is not None:
            length, samples = curve.settings.get("sequence_length"), curve.settings.get("limit")
        options = EvaluationOptions(texts=(name,), limit=samples, sequence_length=length)
        with quiet_libraries():
            tokenizer = self.tokenizer
            prepared = EvaluationSet.prepare(options, self.source, tokenizer)
            measured = measure_loaded(self.model, tokenizer, self.source, prepared, options)
        return next(iter(measured.perplexity.values())), limit


@functools.lru_cache(maxsize=1)
def _load(folder: Path, device: str) -> Any:
    from slicecli.checkpoint.loading import load_model

    return load_model(Source.find(str(folder)), device_map=device)


@functools.lru_cache(maxsize=1)
def _verify(folder: Path, repository: str | None, commit: str | None, token: str | None) -> list[Finding]:
    from slicecli.hub.verify import verify_folder, verify_repository

    return verify_folder(folder) if repository is None else verify_repository(repository, commit, token)


@pytest.mark.slicecli_suite
class SliceTests:
    """Everything that a slice must be before it is published or served."""

    def test_its_record_is_complete(self, slice_under_test: SliceUnderTest) -> None:
        """The record says where the slice comes from and how it can be made again."""
        faults = slice_under_test.faults()
        assert not faults, "; ".join(faults)

    def test_its_weights_are_those_of_the_record(self, slice_under_test: SliceUnderTest) -> None:
        """Every file is there, has the recorded hash, and is recorded; so are the numbers of parameters and bytes."""
        faults = slice_under_test.faults("files", "counts", "config")
        assert not faults, "; ".join(faults)

    def test_its_card_is_complete(self, slice_under_test: SliceUnderTest) -> None:
        """The card can be parsed and says what the record does."""
        faults = slice_under_test.faults("card")
        assert not faults, "; ".join(faults)

    def test_it_loads_as_the_record_says(self, slice_under_test: SliceUnderTest) -> None:
        """It has the recorded widths and parameters; a stock slice is of a class of transformers."""
        record, model = slice_under_test.record, slice_under_test.model
        if record["layout"] == "stock":
            assert type(model).__module__.startswith("transformers."), f"{type(model)} is not a class of transformers"
        schedule = record.get("schedule")
        first = schedule["blocks"][0][0] if schedule else record["dim"]
        width = model.get_input_embeddings().weight.shape[1]
        assert width == first, f"the embeddings are {width} wide, {first} recorded"
        count = sum(value.numel() for value in model.parameters())
        assert count == record["parameters"]["sliced"], f"{count:,} parameters, {record['parameters']} recorded"

    def test_generation_is_deterministic(self, slice_under_test: SliceUnderTest) -> None:
        """Greedy text is the same twice, and the same with and without cache."""
        import torch

        model = slice_under_test.model
        ids = slice_under_test.tokenizer("The", return_tensors="pt")["input_ids"].to(model.device)
        room = default_length(context_length_of_config(model.config)) - ids.shape[1]
        options = {"max_new_tokens": min(16, room), "do_sample": False, "pad_token_id": 0}
        options["attention_mask"] = torch.ones_like(ids)
        with torch.no_grad():
            first, second = (model.generate(ids, **options) for _ in range(2))
            plain = model.generate(ids, use_cache=False, **options)
        assert torch.equal(first, second), "two greedy runs differ"
        if model.dtype == torch.float32:
            assert torch.equal(first, plain), "greedy text with and without cache differs"

    def test_its_perplexity_is_no_worse_than_recorded(
        self, slice_under_test: SliceUnderTest, record_property: Any
    ) -> None:
        """Measured again on the recorded text and rows, it is within the tolerance."""
        measured, limit = slice_under_test.perplexity()
        record_property("perplexity", measured.value)
        record_property("limit", limit)
        assert measured.value <= limit, f"perplexity {measured.value:.3f} on {measured.text}, the limit is {limit:.3f}"

    def test_the_program_that_serves_it_predicts_as_transformers_does(
        self, slice_under_test: SliceUnderTest, record_property: Any
    ) -> None:
        """After each of up to 200 random tokens the program's most probable next token is that of transformers."""
        client = {"llama.cpp": "llama.cpp", "vllm": "vLLM"}[slice_under_test.program]
        if missing := why_missing(client):
            pytest.skip(missing)
        config = slice_under_test.model.config
        length = min(SERVED_TOKENS, default_length(context_length_of_config(config)) - 1)
        chosen = random.Random(0)
        tokens = [chosen.randrange(config.vocab_size) for _ in range(length)]
        folder = str(slice_under_test.folder.resolve())
        answer = ask(client, [folder], tokens, has_code=slice_under_test.record["needs_remote_code"])[folder]
        assert "predicted" in answer, f"{client} does not run it: {answer['error']}"
        agreement, difference = compare(answer["predicted"], slice_under_test.predictions(tokens))
        record_property("agreement", agreement)
        assert agreement == 1, f"in {client} only {agreement:.0%} of the next tokens are those of transformers"
        assert difference < MOST_DIFFERENCE, f"log probabilities in {client} differ by {difference:.3f}"
