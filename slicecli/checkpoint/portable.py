"""Tensors of a family's own class as those of a portable class that computes the same.

They are converted one by one as they come, so that memory holds one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from slicecli.adapters import ask
from slicecli.checkpoint.meta_model import parameter_shapes
from slicecli.family.written_class import WrittenClass

if TYPE_CHECKING:
    import torch

__all__ = ["Conversion", "converting_sink"]


class Conversion:
    """Turns the tensors of slices in their family's own class into those of the class they are written in."""

    def __init__(self, written: WrittenClass) -> None:
        own, portable = written.own, written.portable
        assert portable is not None
        self._portable = portable
        self._blocks = [f"{own.adapter.blocks}.{index}." for index in range(own.blocks)]
        self._scales = {path: ask(own.adapter.name, scale, own) for path, scale in portable.scales.items()}
        self._rows = {
            path: [(linear.path, own.width(linear.width)) for linear in linears]
            for path, linears in portable.splits.items()
        }
        self._stream_axis = {
            one.name: one.shape.index(None)
            for one in own.declared_parameters()
            if portable.centres_stream and one.role in ("embedding", "writer")
        }

    @property
    def keeps_values(self) -> bool:
        """Whether every number of the own class's tensors is kept as it is."""
        return not self._stream_axis and all(scale == 1 for scale in self._scales.values())

    def convert(self, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return what a tensor of the own class becomes: names and values."""
        block = next((prefix for prefix in self._blocks if name.startswith(prefix)), "")
        path, _, leaf = name.removeprefix(block).rpartition(".")
        converted = tensor
        if name in self._stream_axis:
            exact = tensor.double()
            converted = (exact - exact.mean(self._stream_axis[name], keepdim=True)).to(tensor.dtype)
        if self._scales.get(path, 1.0) != 1:
            converted = (converted.double() * self._scales[path]).to(tensor.dtype)
        if path not in self._rows:
            return {name: converted}
        paths, sizes = zip(*self._rows[path], strict=True)
        parts = converted.split(sizes)
        return {f"{block}{part}.{leaf}": rows.contiguous() for part, rows in zip(paths, parts, strict=True)}

    def constants(
        self, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that the own class lacks.

        Args:
            shapes: Shapes of all tensors of the class that is written.
        """
        import torch

        for path, value in self._portable.constants.items():
            for name in [path] if path in shapes else [f"{block}{path}" for block in self._blocks]:
                yield name, torch.full(shapes[name], value, dtype=dtype)


def converting_sink(
    written: WrittenClass, model: Any, dtype: torch.dtype, sink: Callable[[str, torch.Tensor], None]
) -> Callable[[str, torch.Tensor], None]:
    """Return a sink for tensors of the family's own class, which gives another those of the class that is written.

    What the own class lacks goes to the other at once.

    Args:
        model: An empty model of the class that is written.
    """
    conversion = Conversion(written)
    for name, tensor in conversion.constants(parameter_shapes(model), dtype):
        sink(name, tensor)

    def convert(name: str, tensor: torch.Tensor) -> None:
        for part, value in conversion.convert(name, tensor).items():
            sink(part, value)

    return convert
