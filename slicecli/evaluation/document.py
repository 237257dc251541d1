"""The document of a measured model, which `slicecli eval` and `slicecli sweep` write and `slicecli fit` reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from slicecli.family.dimensions import MOST_WIDTH
from slicecli.family.slice_plan import Method
from slicecli.record.schema import Calibration, ModelName, Perplexity, Sparsity, Task, Width
from slicecli.runtime.json_object import Count, Digest, JsonObject, Name, Size

__all__ = ["EvaluationDocument", "PerplexityResult", "Settings", "SourceIdentity", "TaskResult"]


class PerplexityResult(Perplexity):
    """A measured perplexity, and the name of its text."""

    text: str = Field(exclude=True)


class TaskResult(Task):
    """A measured task, or a group of tasks that lm-eval averages.

    Attributes:
        scores: The metric of each question, in the order of the task; empty for a group.
    """

    task: str = Field(exclude=True)
    scores: tuple[float, ...] = Field(exclude=True, repr=False)


class SourceIdentity(JsonObject):
    """What identifies the dense model that a slice was made from, or the measured model itself."""

    model: ModelName = Field(description="Hub id, or the folder's name.")
    commit: Annotated[str, Field(pattern="^[0-9a-f]{40}$")] | None = Field(description="Commit on the Hub.")
    content: Digest | None = Field(description="SHA-256 of what the model is, see docs/record.md.")


class Settings(JsonObject):
    """How a model was measured."""

    limit: Size | None = Field(description="Only the first so many rows or questions.")
    num_fewshot: Count | None = Field(description="Solved examples before each question.")
    sequence_length: Size | None = Field(description="Tokens per row of text.")
    seed: Count = Field(description="Seed of whatever a task draws.")
    dtype: Name = Field(description="Dtype that was computed in.")
    apply_chat_template: bool = Field(default=False, description="Tasks were asked through the chat template.")
    system_instruction: str | None = Field(default=None, description="System message that tasks began with.")
    fewshot_as_multiturn: bool = Field(default=False, description="Solved examples were turns of the conversation.")
    rows: Mapping[Name, Digest] = Field(description="SHA-256 of the token ids, by text.")


class EvaluationDocument(JsonObject):
    """A measured model; a document may have other fields besides."""

    model_config = ConfigDict(extra="ignore")

    model: Name = Field(description="Hub id, or the folder's name.")
    model_type: Name = Field(description="Its family; of a slice with code of its own, that of the dense model.")
    revision: Name | None = Field(description="Commit on the Hub.")
    perplexity: Mapping[Name, Perplexity] = Field(description="Perplexities by text.")
    tasks: Mapping[Name, Task] = Field(description="Tasks by name.")
    parameters: Size = Field(description="Number of parameters, shared ones once.")
    hidden_size: Width = Field(description="Hidden size of the dense model.")
    dim: Width = Field(description="Its own: less in a slice.")
    sparsity: Sparsity = Field(description="Fraction of the hidden size that was removed.")
    mlp_size: Size | None = Field(
        default=None, description="MLP channels of the dense model; null where they are all there."
    )
    mlp_dim: Size | None = Field(default=None, description="Those of the slice; likewise.")
    method: Method | None = Field(description="How a slice was made; null for a dense model.")
    source: SourceIdentity = Field(description="The dense model that a slice was made from, or the model itself.")
    calibration: Calibration | None = Field(description="What a slice was fitted to; null for a dense model.")
    evaluation: Settings = Field(description="How it was measured.")
    is_recovered: bool = Field(default=False, description="Whether a slice was trained after slicing.")

    @field_validator("dim")
    @classmethod
    def _check_dim(cls, dim: int, about: ValidationInfo) -> int:
        if dim > about.data.get("hidden_size", MOST_WIDTH):
            raise PydanticCustomError("dim", "it should be at most hidden_size")
        return dim

    @model_validator(mode="after")
    def _check_slice(self) -> EvaluationDocument:
        if self.dim < self.hidden_size and (self.method is None or self.calibration is None):
            raise PydanticCustomError("slice", "a slice has a method and a calibration")
        return self
