"""Loading a whole model to run it: to measure it, or to let it write."""

from __future__ import annotations

from typing import Any

from slicecli.errors import SourceError, reason_of
from slicecli.placement import compute_dtype, pick_device
from slicecli.processes import Processes
from slicecli.source import Source

__all__ = ["load_model"]


def load_model(source: Source, dtype: str | None = None, device_map: Any = "auto") -> Any:
    """Load a model to run it.

    Args:
        source: The model.
        dtype: Dtype to compute in; `None` takes the checkpoint's, or float32 on a CPU.
        device_map: As in transformers; a device name is one too.

    Raises:
        SourceError: transformers cannot load it, or its weights are not those of its config.
    """
    import torch
    import transformers

    processes = Processes.find()
    with processes.main_of_machine_first():
        source.fetch_weights()
    if isinstance(device_map, str) and device_map not in {"auto", "balanced", "balanced_low_0", "sequential"}:
        device = pick_device(device_map)
    else:
        device = pick_device("auto")
        if processes.count > 1:
            device_map = {"": device}  # each has the whole model
    source.check_describes_weights()
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            source.folder,
            trust_remote_code=source.trust_remote_code,
            local_files_only=True,
            use_safetensors=True,
            dtype=getattr(torch, dtype) if dtype else "auto",
            device_map=device_map,
            output_loading_info=True,
        )
    except Exception as error:
        raise SourceError(f"{source.name} cannot be loaded: {reason_of(error)}.", "Check its files.") from error
    source.check_is_complete(report)
    if dtype is None and device.type == "cpu":
        model = model.to(compute_dtype(model.dtype, device))
    return model.eval()
