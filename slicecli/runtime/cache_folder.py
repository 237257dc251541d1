"""Where files lie that save time the next time."""

from __future__ import annotations

import os
from pathlib import Path

from slicecli.runtime.inputs import local_path

__all__ = ["CACHE_VARIABLE", "cache_folder"]

CACHE_VARIABLE = "SLICECLI_CACHE"


def cache_folder() -> Path:
    """Return `SLICECLI_CACHE`, or `slicecli` in the user's cache folder."""
    from platformdirs import user_cache_path

    given = os.environ.get(CACHE_VARIABLE)
    return local_path(given) if given else user_cache_path("slicecli", appauthor=False)
