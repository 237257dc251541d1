"""The spectrum of a model, as `slicecli spectrum` writes it and `slicecli estimate` reads it."""

from __future__ import annotations

from typing import Annotated

from pydantic import ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from slicecli.family.dimensions import MOST_WIDTH
from slicecli.record.schema import Width
from slicecli.runtime.json_object import JsonObject, Name

__all__ = ["SpectrumDocument"]


class WeightsAtDim(JsonObject):
    """What slices of some dim lose, to second order."""

    model_config = ConfigDict(extra="ignore")

    dim: Width = Field(description="The dim.")
    kept: float | None = Field(
        default=None, description="Share of the energy of the normalised stream inside the basis."
    )
    fisher: dict[Name, float] = Field(description="The Fisher weight of what is removed, by method.")
    fisher_of_sites: float | None = Field(
        default=None, description="The same by the directions of each norm site, that of the head included."
    )


class LossAtDim(JsonObject):
    """What the dense model loses when its stream is projected."""

    model_config = ConfigDict(extra="ignore")

    dim: Width = Field(description="The dim of the slice that keeps as many directions.")
    nll: float = Field(description="Nats per token.")


class Probe(JsonObject):
    """The dense model run with its stream projected."""

    model_config = ConfigDict(extra="ignore")

    dense_nll: float = Field(description="Nats per token as it is.")
    projected: Annotated[list[LossAtDim], Field(min_length=1, max_length=MOST_WIDTH)] = Field(
        description="An entry for each dim."
    )


class LostAtWidth(JsonObject):
    """What the MLPs lose at some width."""

    mlp_dim: Annotated[int, Field(ge=0, le=MOST_WIDTH)] = Field(description="The channels that stay.")
    lost: Annotated[float, Field(ge=0)] = Field(
        description="The least squared errors of all MLPs on so many channels, as shares of the stream behind them."
    )


class SpectrumDocument(JsonObject):
    """A model's spectrum; a document has other fields besides."""

    model_config = ConfigDict(extra="ignore")

    hidden_size: Width = Field(description="Hidden size of the dense model.")
    spectrum: Annotated[list[WeightsAtDim], Field(max_length=MOST_WIDTH)] = Field(description="An entry for each dim.")
    probe: Probe | None = Field(default=None, description="The dense model projected; null where that was not run.")
    channels: Annotated[list[LostAtWidth], Field(max_length=MOST_WIDTH)] = Field(
        default=[], description="An entry for each width of the MLPs; none where they cannot be sliced."
    )

    @field_validator("spectrum")
    @classmethod
    def _check_dims(cls, spectrum: list[WeightsAtDim], about: ValidationInfo) -> list[WeightsAtDim]:
        size = about.data.get("hidden_size", 0)
        if not any(one.dim < size for one in spectrum) or any(one.dim > size for one in spectrum):
            raise PydanticCustomError(
                "dims", "it should have only dims up to the hidden size, and at least one below it"
            )
        return spectrum

    @field_validator("probe")
    @classmethod
    def _check_probe(cls, probe: Probe | None, about: ValidationInfo) -> Probe | None:
        size = about.data.get("hidden_size", 0)
        if probe is not None and not any(0 < one.dim < size for one in probe.projected):
            raise PydanticCustomError("dims", "its probe should have a dim below the hidden size")
        return probe
