"""Where files lie that save time the next time."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slicecli.errors import OutputError
from slicecli.runtime.inputs import local_path

__all__ = ["CACHE_VARIABLE", "cache_folder", "digest_of", "remove_cached"]

CACHE_VARIABLE = "SLICECLI_CACHE"


def cache_folder() -> Path:
    """Return `SLICECLI_CACHE`, or `slicecli` in the user's cache folder."""
    from platformdirs import user_cache_path

    given = os.environ.get(CACHE_VARIABLE)
    return local_path(given) if given else user_cache_path("slicecli", appauthor=False)


def digest_of(identity: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what identifies something; what is not JSON counts by its text."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()


def remove_cached(paths: Iterable[Path]) -> int:
    """Remove files from the cache; return their bytes."""
    freed = 0
    for path in paths:
        try:
            freed += path.stat().st_size
            path.unlink()
        except OSError as error:
            raise OutputError(f"The cache cannot be cleared: {error.strerror}.", "Remove its folder.") from None
    return freed
