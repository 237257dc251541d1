"""A model's config held against the headers of its weight files: what is loaded is what the files hold.

Names in files are mostly those of the model, with or without the prefix of its base model; where a family stores
its parameters otherwise, nothing is concluded from a name that is not found.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slicecli.adapters import Adapter
from slicecli.checkpoint.load_report import some_of
from slicecli.checkpoint.weight_headers import StoredTensor, have_same_values
from slicecli.errors import WeightsError
from slicecli.family.dimensions import Dimensions

__all__ = ["Comparison", "compare", "find_stored", "loaded_fields"]

TIE = "tie_word_embeddings"


@dataclass(frozen=True)
class Comparison:
    """How the weight files differ from what a config describes.

    Attributes:
        unused: Tensors in the files that a model of the config does not have.
        lacking: Parameters that the files do not hold.
    """

    unused: tuple[str, ...]
    lacking: tuple[str, ...]

    def remarks(self, name: str) -> list[str]:
        """Say what differs, in sentences."""
        kinds = (
            (self.unused, "hold", "tensors that its config does not account for"),
            (self.lacking, "lack", "parameters that its config requires"),
        )
        return [
            f"The weight files of {name} {verb} {len(names):,} {what}: {some_of(names)}."
            for names, verb, what in kinds
            if names
        ]


def find_stored(tensors: Mapping[str, StoredTensor], parameter: str) -> str | None:
    """Return the name under which a parameter is stored: its own, or its own without the base model's prefix."""
    candidates = [parameter]
    while "." in candidates[-1]:
        candidates.append(candidates[-1].partition(".")[2])
    # a bare `weight` would be anybody's
    return next((name for name in candidates if "." in name and name in tensors), None)


def loaded_fields(
    adapter: Adapter, fields: Mapping[str, Any], folder: Path, tensors: Mapping[str, StoredTensor] | None
) -> Mapping[str, Any]:
    """Return the fields of a config as they are once the weights are loaded.

    A head that the checkpoint holds beside the embeddings, with other values, is loaded as a head of its own whatever
    `tie_word_embeddings` says.
    """
    if tensors is None or not Dimensions(adapter, fields).is_tied:
        return fields
    head, table = (find_stored(tensors, f"{path}.weight") for path in (adapter.head.path, adapter.embeddings[0].path))
    if head is None or table is None or have_same_values(folder, tensors[head], tensors[table]):
        return fields
    return {**fields, TIE: False}


def compare(dimensions: Dimensions, tensors: Mapping[str, StoredTensor], name: str) -> Comparison:
    """Compare what a config describes with what the weight files hold, as far as their headers tell."""
    found: set[str] = set()
    lacking = []
    # one of the two is enough
    tied = {f"{path}.weight" for path in (dimensions.adapter.head.path, dimensions.adapter.embeddings[0].path)}
    if not any(find_stored(tensors, one) for one in tied):
        tied = set()
    for parameter in dimensions.declared_parameters():
        stored = find_stored(tensors, parameter.name)
        if stored is None:
            if not (dimensions.is_tied and parameter.name in tied):
                lacking.append(parameter.name)
            continue
        found.add(stored)
        if parameter.role != "passed_through" and tensors[stored].elements != parameter.elements(
            dimensions.hidden_size
        ):
            shape = tuple(dimensions.hidden_size if size is None else size for size in parameter.shape)
            raise WeightsError(
                f"{stored} is {tensors[stored].shape} in the weight files of {name}, but config.json implies {shape}.",
                "Check that config.json belongs to these weights.",
            )
    if dimensions.is_tied and (head := find_stored(tensors, f"{dimensions.adapter.head.path}.weight")):
        found.add(head)
    unused = sorted(tensors.keys() - found)
    if unused and lacking:  # stored in a way of the family's own
        return Comparison((), ())
    return Comparison(tuple(unused), tuple(lacking))
