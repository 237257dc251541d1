"""The code that travels with a slice whose family's own class cannot describe it.

`configuration_slicecli.py` and `modeling_slicecli.py` are copied beside the weights. They import torch and
transformers only, so a slice loads with `trust_remote_code=True` where slicecli is not installed. Where it is,
importing it makes transformers use the files of this package instead, and no remote code runs.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["AUTO_MAP", "CODE_FILES", "CONFIG_TYPE", "register_when_needed"]

CONFIG_TYPE = "slicecli"
"""`model_type` of the config of such a slice."""

CODE_FILES = tuple(Path(__file__).parent / name for name in ("configuration_slicecli.py", "modeling_slicecli.py"))
"""The files to copy."""

AUTO_MAP = {
    "AutoConfig": "configuration_slicecli.SlicedConfig",
    "AutoModel": "modeling_slicecli.SlicedModel",
    "AutoModelForCausalLM": "modeling_slicecli.SlicedForCausalLM",
}
"""Where transformers finds the classes, for `config.json`."""

# which of our modules has the classes that belong into which of transformers'
_CONFIGS = ("transformers.models.auto.configuration_auto", f"{__name__}.configuration_slicecli")
_MODELS = ("transformers.models.auto.modeling_auto", f"{__name__}.modeling_slicecli")


def register_when_needed() -> None:
    """Register the classes with transformers' auto classes: now if those are loaded, else as soon as they are.

    transformers has no entry points for model classes, and importing it for the sake of a registration would cost
    seconds at every start.
    """
    sys.meta_path.insert(0, _AfterImport())
    for pair in (_CONFIGS, _MODELS):
        if pair[0] in sys.modules:
            importlib.import_module(pair[1])


def _after_import(name: str) -> None:
    """Go on after one of the four modules: import ours after transformers', register the classes after ours."""
    for theirs, ours in (_CONFIGS, _MODELS):
        # ours may be what imports theirs, and then goes on by itself
        if name == theirs and ours not in sys.modules:
            importlib.import_module(ours)
    if name == _CONFIGS[1]:
        from transformers import AutoConfig

        AutoConfig.register(CONFIG_TYPE, sys.modules[name].SlicedConfig, exist_ok=True)
    elif name == _MODELS[1]:
        from transformers import AutoModel, AutoModelForCausalLM

        config_class = sys.modules[_CONFIGS[1]].SlicedConfig
        AutoModel.register(config_class, sys.modules[name].SlicedModel, exist_ok=True)
        AutoModelForCausalLM.register(config_class, sys.modules[name].SlicedForCausalLM, exist_ok=True)


class _AfterImport(MetaPathFinder):
    """Finds the four modules as Python would, and goes on once they have run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in (*_CONFIGS, *_MODELS):
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(Loader):
    """A module's own loader, and what comes after it."""

    def __init__(self, own: Any) -> None:
        self._own = own

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        module: ModuleType | None = self._own.create_module(spec)
        return module

    def exec_module(self, module: ModuleType) -> None:
        self._own.exec_module(module)
        _after_import(module.__name__)

    def __getattr__(self, name: str) -> Any:
        # what else a loader can do (give its source, for one) stays as it was
        return getattr(self._own, name)
