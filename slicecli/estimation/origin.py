"""The dense model that a slice was made from, as the slice itself describes it.

A slice's config differs from the dense one in few fields, and its record has the rest: enough to count the dense model
and other slices of it, without fetching anything else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slicecli.adapters import Adapter, Refusal, select_adapter
from slicecli.checkpoint.source import Source
from slicecli.family.dimensions import Dimensions
from slicecli.modeling import CONFIG_TYPE
from slicecli.record.record import read_sound_record

__all__ = ["Origin", "origin_of"]


@dataclass(frozen=True)
class Origin:
    """A slice seen as its dense model.

    Attributes:
        slice_name: Hub id or folder name of the slice.
        source: The dense model: its name and the fields of its config; the folder is the slice's.
    """

    slice_name: str
    source: Source
    record: Mapping[str, Any]

    @property
    def note(self) -> str:
        """What a reader should know."""
        mlp_dim = self.record["mlp_dim"]
        width = f"dim {self.record['dim']}" + ("" if mlp_dim is None else f" and MLP width {mlp_dim}")
        return (
            f"{self.slice_name} is a slice of {self.source.name} at {width}; the estimates are for slices of "
            f"{self.source.name}."
        )


def origin_of(
    source: Source, adapters: Mapping[str, Adapter], refusals: tuple[Refusal, ...], name: str | None = None
) -> Origin | None:
    """Return the dense model of a slice; `None` where a model is no slice, or its record is damaged."""
    record = read_sound_record(source.folder)
    if record is None:
        return None
    fields = dict(source.fields)
    if fields.get("model_type") == CONFIG_TYPE:
        inner = fields.get("dense_config")
        fields = dict(inner) if isinstance(inner, dict) else {}
    elif any(record["source"]["model_type"] in one.model_types for one in adapters.values()):
        fields["model_type"] = record["source"]["model_type"]  # it may be written in another class
    adapter = select_adapter(fields, adapters, name, refusals)
    fields[adapter.names.get("hidden_size", "hidden_size")] = record["hidden_size"]
    if record["mlp_size"] is not None:
        dense_widths = {name: one["dense"] for name, one in record.get("other_mlp_widths", {}).items()}
        dense_widths[Dimensions(adapter, fields).mlp_widths[0]] = record["mlp_size"]
        fields |= {adapter.names.get(name, name): width for name, width in dense_widths.items()}
    # a slice never shares its head with the embeddings; whether the dense model did shows in its count
    tied = {**fields, "tie_word_embeddings": True}
    if Dimensions(adapter, tied).parameters() == record["parameters"]["dense"]:
        fields = tied
    dense = dataclasses.replace(source, name=record["source"]["model"], fields=fields)
    return Origin(source.name, dense, record)
