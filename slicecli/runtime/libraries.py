"""What surrounds calls into other libraries: their output kept quiet, their errors put into words."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from slicecli.errors import RequestError, SlicecliError, SourceError, reason_of

__all__ = ["quiet_libraries", "running"]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Keep the warnings and bars of transformers and of the Hub's client out of the output, which has its own."""
    import huggingface_hub
    from transformers.utils import logging as transformers_logging

    hub_logging = huggingface_hub.utils.logging
    verbosity, had_bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    hub_verbosity = hub_logging.get_verbosity()
    # what they log as an error they raise, or go on without
    transformers_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if had_bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def running(name: str) -> Iterator[None]:
    """Let a model run, which is its family's code and may fail with whatever its config and weights hold."""
    import torch

    try:
        yield
    except (SlicecliError, OSError):
        raise
    except Exception as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise RequestError(
                f"There is not enough memory to run {name}.",
                "Use a smaller --batch-size or --seq-len, or another --device-map.",
            ) from error
        raise SourceError(
            f"{name} failed to run: {type(error).__name__}: {reason_of(error)}.",
            "Check its config.json; slicecli -v shows where it failed.",
        ) from error
