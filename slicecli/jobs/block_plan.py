"""What training block by block needs beyond a plan: how the slice and its teacher are run, and where activations go."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.dense_weights import DenseWeights, OffloadedWeights
from slicecli.checkpoint.meta_model import build_runnable_meta_model
from slicecli.errors import RequestError
from slicecli.family.dimensions import Dimensions
from slicecli.jobs.plan import find_adapter, full_fields
from slicecli.modeling import CONFIG_TYPE
from slicecli.runtime.placement import ActivationPlan, Placement, compute_dtype, decide_placement, place_activations

if TYPE_CHECKING:
    from slicecli.checkpoint.source import Source
    from slicecli.jobs.options import RecoverOptions
    from slicecli.runtime.distributed import Processes
    from slicecli.slicing.context import DenseModel

__all__ = ["BlockPlan", "plan_blocks"]


@dataclass(frozen=True)
class RunBlockwise:
    """A model that is run block by block.

    Attributes:
        meta_model: The model with all parameters on `meta`.
        dimensions: Its sizes, and with them its family's declaration.
    """

    meta_model: Any
    dimensions: Dimensions

    @property
    def blocks(self) -> list[Any]:
        """Its blocks in order."""
        return list(self.meta_model.get_submodule(self.dimensions.adapter.blocks))


@dataclass(frozen=True)
class BlockPlan:
    """How a slice is trained block by block.

    Attributes:
        placement: Where the teacher's weights rest, and what computes.
        scale, has_one_basis: As of `slicecli.recovery.blocks.Slicing`.
    """

    teacher: RunBlockwise
    student: RunBlockwise
    placement: Placement
    activations: ActivationPlan
    scale: float
    has_one_basis: bool

    @property
    def block_parameters(self) -> int:
        """Parameters of the slice's largest block."""
        return max(sum(int(value.numel()) for value in block.parameters()) for block in self.student.blocks)

    def describe(self) -> str:
        """Say in a line what computes, and where weights and activations are kept."""
        return f"{self.placement.describe()}; {self.activations.describe()}"

    def open(
        self, source: Source, weights: DenseWeights, processes: Processes, folder: Path | None
    ) -> tuple[DenseModel, DenseModel]:
        """Make ready to read the weights of the teacher and of the slice.

        Args:
            source: The teacher.
            weights: Those of the slice.
            folder: Where activations go that are kept on disk; `None` takes the system's for temporary files.
        """
        from slicecli.slicing.activations import ActivationStore
        from slicecli.slicing.context import DenseModel

        device = self.placement.device
        store = ActivationStore(device, self.activations.place, folder)
        own = DenseWeights(source, self.teacher.dimensions.adapter.unused_tensors)
        resting = own if self.placement.is_plain else OffloadedWeights(own, self.placement.rest_of)
        dtype = compute_dtype(own.dtype, device)
        teacher, student = self.teacher, self.student
        return (
            DenseModel(teacher.meta_model, resting, teacher.dimensions, device, dtype, processes, store),
            DenseModel(student.meta_model, weights, student.dimensions, device, dtype, processes, store),
        )


def plan_blocks(
    source: Source, record: Mapping[str, Any], teacher: Source, options: RecoverOptions, tokens: int
) -> BlockPlan:
    """Decide how a slice is trained block by block; refuse a teacher that does not have the same blocks.

    Args:
        tokens: Tokens whose activations are cached.
    """
    import torch

    dense = _open(teacher)
    is_like_teacher = source.fields.get("model_type") in {CONFIG_TYPE, teacher.fields.get("model_type")}
    # the code of a custom-code slice names its modules as the dense model does
    sliced = _open(source, dense.dimensions if is_like_teacher else None)
    if len(sliced.blocks) != len(dense.blocks) or dense.dimensions.hidden_size < record["dim"]:
        raise RequestError(
            f"{source.name} has {len(sliced.blocks)} blocks of width {record['dim']}, the teacher {teacher.name} "
            f"{len(dense.blocks)} of width {dense.dimensions.hidden_size}, so they cannot learn from each other one by "
            "one.",
            "Use the model that the slice was made from as --teacher, or --mode full.",
        )
    stored = getattr(torch, teacher.stored_dtype())
    blocks = dense.dimensions.adapter.blocks
    placement = decide_placement(options.device_map, options.max_memory, dense.meta_model, blocks, stored)
    resting_bytes: Counter[str] = Counter()
    for name, value in dense.meta_model.named_parameters():
        resting_bytes[placement.rest_of(name)] += value.numel() * stored.itemsize
    width = dense.dimensions.hidden_size + 2 * record["dim"]
    needed_bytes = tokens * width * compute_dtype(stored, placement.device).itemsize
    activations = place_activations(options.activations, placement, needed_bytes, resting_bytes)
    is_refitted = record["method"] == "refit"
    scale = math.sqrt(record["dim"] / dense.dimensions.hidden_size) if is_refitted else 1.0
    return BlockPlan(dense, sliced, placement, activations, scale, is_refitted)


def _open(source: Source, dimensions: Dimensions | None = None) -> RunBlockwise:
    """Build a model without weights; the declaration is that of the dense model where it is given."""
    config = source.config()
    if dimensions is None:
        adapter = find_adapter(source).adapter
        dimensions = Dimensions(adapter, source.loaded_fields(adapter, full_fields(source, config)))
        config.tie_word_embeddings = dimensions.is_tied  # as the weight files have it
    return RunBlockwise(build_runnable_meta_model(config, source.trust_remote_code), dimensions)
