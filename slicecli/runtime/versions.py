"""The version of this program, and of the packages that a result depends on."""

from __future__ import annotations

import functools
import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__", "package_versions"]

__version__ = "0.1.0"


def package_versions() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    packages = ("torch", "transformers", "accelerate", "safetensors", "tokenizers")
    return {"python": platform.python_version(), **{package: _version(package) for package in packages}}


@functools.cache
def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
