"""How the Hub's client is called: without remarks of its own, and again where it gives up at the first fault.

huggingface_hub sends a large file again that broke off, asks again about a file, and goes on with a download from where
it ended. Everything else, above all the body of a file and the commit of a push, fails at the first status such as 503.
What is begun again here asks only for what has not arrived, and sends only what the Hub does not have.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from slicecli.runtime.hub_errors import is_transient, seconds_to_wait

__all__ = ["patiently", "quiet_client"]

PAUSES = (2.0, 8.0)  # seconds before the second and the third attempt
LONGEST_PAUSE = 60  # seconds; for longer the Hub's wish is a matter for the user
Result = TypeVar("Result")


def patiently(call: Callable[[], Result]) -> Result:
    """Call, and call again after a pause where the fault may pass; the last error is raised."""
    for pause in PAUSES:
        try:
            return call()
        except Exception as error:
            asked = seconds_to_wait(error)
            if not is_transient(error) or (asked or 0) > LONGEST_PAUSE:
                raise
            # a second more, since the Hub states whole ones
            time.sleep(pause if asked is None else asked + 1)
    return call()


@contextmanager
def quiet_client() -> Iterator[None]:
    """Keep the client's remarks, which have addresses and paths in them, out of the output.

    Whoever sets HF_HUB_VERBOSITY sees them. A file that the disk has no room for is an error here, before its first
    byte, and not a remark.
    """
    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    with warnings.catch_warnings():
        if "HF_HUB_VERBOSITY" not in os.environ:
            logger.setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module="huggingface_hub")
        warnings.filterwarnings("error", message="Not enough free disk space", category=UserWarning)
        try:
            yield
        finally:
            logger.setLevel(level)
