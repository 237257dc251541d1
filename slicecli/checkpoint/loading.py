"""Loading a whole model to run it: to measure it, or to let it write."""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

from slicecli.checkpoint.load_report import check_report
from slicecli.checkpoint.meta_model import build_meta_model
from slicecli.checkpoint.source import Source
from slicecli.errors import SlicecliWarning
from slicecli.runtime.distributed import Processes
from slicecli.runtime.placement import (
    NAMED_MAPS,
    DeviceMap,
    MaxMemory,
    check_sizes,
    compute_dtype,
    computing_device,
    pick_device,
    spread_map,
)

__all__ = ["load_model"]


def load_model(
    source: Source,
    dtype: str | None = None,
    device_map: DeviceMap = "auto",
    max_memory: MaxMemory | None = None,
) -> Any:
    """Load a model to run it.

    Args:
        dtype: Dtype to compute in; `None` takes the checkpoint's, or float32 on a CPU.
        device_map: As in transformers; a device name is one too. Parts on `cpu` or `disk` are brought to the first
            GPU of the map when they run, if it has one.
        max_memory: The most bytes of weights by device, for the maps that are named.

    Warns:
        SlicecliWarning: The checkpoint holds tensors that are not used.
    """
    import torch
    import transformers

    check_sizes(device_map, max_memory)
    processes = Processes.find()
    with processes.main_of_machine_first():
        source.fetch_weights()
    places: Any = device_map
    if isinstance(device_map, str) and device_map not in NAMED_MAPS:
        device = pick_device(device_map)
    elif isinstance(device_map, str):
        uses_gpu = max_memory is None or any(isinstance(name, int) for name in max_memory)
        device = pick_device("auto" if uses_gpu else "cpu")
        if processes.count > 1:
            places = {"": device}  # each has the whole model
    else:
        places = spread_map(device_map, build_meta_model(source.config(), source.trust_remote_code))
        device = computing_device(places)
    source.check_describes_weights()
    stored = getattr(torch, source.stored_dtype())
    scratch = tempfile.TemporaryDirectory(prefix="slicecli-")
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder,
            trust_remote_code=source.trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            dtype=getattr(torch, dtype) if dtype else compute_dtype(stored, device),
            device_map=places,
            max_memory=None if max_memory is None else dict(max_memory),
            offload_folder=scratch.name,
            output_loading_info=True,
        )
    except Exception as error:
        raise source.loading_error(error) from error
    for text in check_report(source.name, report, source.stored_tensors() or (), model, is_strict=False):
        warnings.warn(text, SlicecliWarning, stacklevel=2)
    model._slicecli_scratch = scratch  # what is offloaded in another dtype lies there for as long as the model lives
    return model.eval()
