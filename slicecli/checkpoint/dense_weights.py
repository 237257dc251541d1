"""Reading a checkpoint tensor by tensor, and how its families store what a model holds.

The weights are opened by transformers and accelerate with every module on the `disk` device: nothing is copied, and a
tensor is read from the checkpoint when it is asked for.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from slicecli.checkpoint.comparison import find_stored
from slicecli.checkpoint.load_report import check_report
from slicecli.checkpoint.source import Source
from slicecli.errors import SlicecliWarning, WeightsError, reason_of

if TYPE_CHECKING:
    import torch

__all__ = ["DenseWeights", "OffloadedWeights", "checkpoint_tensors", "stored_values"]


class DenseWeights:
    """The weights of a checkpoint, read tensor by tensor through transformers' own loading.

    Names are those of the model's modules, whatever the names on disk. Nothing stays in memory.

    Attributes:
        dtype: Dtype of the checkpoint.

    Warns:
        SlicecliWarning: The checkpoint holds tensors that its class leaves aside on purpose.
    """

    def __init__(self, source: Source, unused: Sequence[str] = ()) -> None:
        import transformers

        # accelerate would tell the user that weights are on disk, which is the point
        logging.getLogger("accelerate.big_modeling").setLevel(logging.ERROR)
        self._name = source.name
        self._scratch = tempfile.TemporaryDirectory(prefix="slicecli-")
        try:
            self._model, report = transformers.AutoModelForCausalLM.from_pretrained(
                source.folder,
                trust_remote_code=source.trust_remote_code,
                local_files_only=True,
                use_safetensors=True,
                dtype="auto",
                device_map={"": "disk"},
                offload_folder=self._scratch.name,
                output_loading_info=True,
            )
        except Exception as error:
            raise source.loading_error(error) from error
        stored = source.stored_tensors() or {}
        for text in check_report(source.name, report, stored, self._model, is_strict=True, unused=unused):
            warnings.warn(text, SlicecliWarning, stacklevel=2)
        own = dict(self._model.named_parameters())
        shared = {name for name, _ in self._model.named_parameters(remove_duplicate=False)} - own.keys()
        self._names = [name for name in self._model.state_dict() if name not in shared]
        # of two tied tensors the checkpoint may hold the second alone
        ties: dict[str, str] = getattr(self._model, "all_tied_weights_keys", {})
        self._stand_ins = {
            one: other for other, one in ties.items() if not find_stored(stored, one) and find_stored(stored, other)
        }
        self.dtype: torch.dtype = self._model.dtype

    def tensor(self, name: str) -> torch.Tensor:
        """Read one parameter or persistent buffer, on the CPU, in the checkpoint's dtype."""
        import torch
        from accelerate.utils import align_module_device

        from slicecli.linalg.normal_equations import is_finite

        path, _, leaf = self._stand_ins.get(name, name).rpartition(".")
        module = self._model.get_submodule(path)
        try:
            with align_module_device(module, torch.device("cpu")):
                tensor: torch.Tensor = getattr(module, leaf).detach()
            is_sound = is_finite(tensor)
        except Exception as error:
            raise WeightsError(
                f"{name} of {self._name} cannot be read: {reason_of(error)}.",
                "Check that config.json belongs to these weights.",
            ) from error
        if not is_sound:
            raise WeightsError(
                f"{name} of {self._name} holds NaN or infinity.", "The checkpoint is damaged: download it again."
            )
        return tensor

    def module(self, path: str) -> dict[str, torch.Tensor]:
        """Read all parameters and persistent buffers below a module, by their names inside it."""
        return {name: self.tensor(f"{path}.{name}") for name in self.names_in(path)}

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all parameters and persistent buffers, a shared one once."""
        return tuple(self._names)

    def names_in(self, path: str) -> list[str]:
        """Return the names of all parameters and persistent buffers below a module, inside it."""
        return [name.removeprefix(f"{path}.") for name in self._names if name.startswith(f"{path}.")]


class OffloadedWeights:
    """The weights of a checkpoint, each read once where it rests elsewhere than on disk."""

    def __init__(self, weights: DenseWeights, rest_of: Callable[[str], str]) -> None:
        self._weights = weights
        self._rest_of = rest_of
        self._kept: dict[str, torch.Tensor] = {}

    def tensor(self, name: str) -> torch.Tensor:
        """Return one parameter or persistent buffer, in the checkpoint's dtype, from where it rests."""
        if name in self._kept:
            return self._kept[name]
        tensor, rest = self._weights.tensor(name), self._rest_of(name)
        if rest != "disk":
            self._kept[name] = tensor = tensor.to(rest)
        return tensor

    def module(self, path: str) -> dict[str, torch.Tensor]:
        """Return all parameters and persistent buffers below a module, by their names inside it."""
        return {name: self.tensor(f"{path}.{name}") for name in self._weights.names_in(path)}


def stored_values(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what a checkpoint of a model holds, by the names of its parameters and buffers, a shared table once."""
    names = {name for name, _ in model.named_parameters()}
    shared = {name for name, _ in model.named_parameters(remove_duplicate=False)} - names
    yield from ((name, value) for name, value in model.state_dict().items() if name not in shared)


def checkpoint_tensors(model: Any, name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return a parameter as checkpoints of its family store it.

    Most are stored as they are; experts that transformers fuses into one tensor lie in the checkpoint one by one,
    which is how other programs expect them.
    """
    from transformers.core_model_loading import revert_weight_conversion

    stored: dict[str, torch.Tensor] = revert_weight_conversion(model, {name: tensor})
    return stored
