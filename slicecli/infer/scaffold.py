"""Writing an inferred declaration as the source of a plugin package that others can install.

The package declares one family and tests it with the conformance suite. It is meant to be read and kept by a
person: only what differs from the defaults of a declaration is written.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slicecli.adapters import Adapter
from slicecli.checkpoint.folder import check_output, whole_folder
from slicecli.errors import SlicecliError, UnsupportedModelError
from slicecli.infer.inference import infer_adapter
from slicecli.runtime.versions import __version__

__all__ = ["package_files", "structural_switches", "write_package"]

WIDTH = 100

PYPROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "{distribution}"
version = "0.1.0"
description = "Slices {model_type} models with slicecli."
requires-python = ">=3.10"
dependencies = ["slicecli>={version}"]

[project.optional-dependencies]
test = ["pytest>=8"]

[project.entry-points.slicecli]
{name} = "{module}"

[tool.hatch.build.targets.wheel]
packages = ["{module}"]
"""

MODULE = '''\
"""Slices {model_type} models: the readers and writers of their residual stream.

Written by `slicecli adapters --scaffold` and proved on a small random model of the type.
"""

from __future__ import annotations

from slicecli import hookimpl
from slicecli.adapters import {imports}
{obstacle}
ADAPTER = {adapter}


@hookimpl
def slicecli_register_adapters(register):
    """Register the family."""
    register(ADAPTER)
'''

OBSTACLE = '''
# other values arrange the blocks differently from the inferred model
SEEN = {seen}


def obstacle(config):
    """Say why a config cannot be sliced; empty where it can."""
    for name, value in SEEN.items():
        if config.get(name, value) != value:
            return f"This config has {{name}} = {{config[name]!r}}, and only {{value!r}} is declared."
    return ""

'''

TEST = '''\
"""The declaration against the conformance suite."""

from {module} import ADAPTER
from slicecli.testing import AdapterTests


class Test{title}(AdapterTests):
    adapter = ADAPTER
'''

README = """\
# {distribution}

Lets slicecli slice models of type `{model_type}`.

```
pip install .
slicecli slice MODEL --dim N
```

`pip install ".[test]" && pytest` runs the conformance suite.
"""


def write_package(config: Any, folder: Path, trust_remote_code: bool = False) -> Adapter:
    """Infer a model's adapter and write it as a package."""
    import transformers

    if config.model_type not in transformers.CONFIG_MAPPING:
        raise UnsupportedModelError(
            f"Models of type {config.model_type!r} run code from their repository, so the package's test cannot "
            "build a small model.",
            "Write the plugin by hand; see docs/plugins.md.",
        )
    check_output(folder, overwrite=False)
    adapter = infer_adapter(config, trust_remote_code).adapter
    files = package_files(adapter, structural_switches(config, adapter, trust_remote_code))
    with whole_folder(folder) as partial:
        for name, text in files.items():
            path = partial / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    return adapter


def structural_switches(config: Any, adapter: Adapter, trust_remote_code: bool = False) -> dict[str, bool]:
    """Return the config's own switches that change the declaration, with the value for which it was inferred."""
    import transformers

    fields = config.to_dict()
    common = transformers.PretrainedConfig().to_dict().keys() | {"tie_word_embeddings", "use_cache"}
    switches = {}
    for name, value in fields.items():
        if not isinstance(value, bool) or name in common:
            continue
        try:
            other = type(config).from_dict(fields | {name: not value})
            is_same = infer_adapter(other, trust_remote_code).adapter == adapter
        except SlicecliError:
            is_same = False
        except Exception:  # config classes raise what they like
            continue  # the class does not allow the other value
        if not is_same:
            switches[name] = value
    return switches


def package_files(adapter: Adapter, switches: Mapping[str, bool]) -> dict[str, str]:
    """Return the text of each file of a plugin package."""
    model_type = adapter.model_types[0]
    name = re.sub(r"\W", "_", model_type)
    names = {
        "distribution": f"slicecli-{name.replace('_', '-')}",
        "module": f"slicecli_{name}",
        "name": name,
        "model_type": model_type,
        "title": "".join(part.capitalize() for part in name.split("_")),
        "version": __version__,
    }
    fields = _changed_fields(adapter)
    source = _call("Adapter", fields | ({"obstacle": _Name("obstacle")} if switches else {}), 0)
    used = sorted(set(re.findall(r"\b([A-Z]\w+)\(", source)))
    obstacle = OBSTACLE.format(seen=_source(dict(switches), 0)) if switches else ""
    return {
        "pyproject.toml": PYPROJECT.format(**names),
        "README.md": README.format(**names),
        f"{names['module']}/__init__.py": MODULE.format(
            imports=", ".join(used), adapter=source, obstacle=obstacle, **names
        ),
        f"tests/test_{name}.py": TEST.format(**names),
    }


@dataclasses.dataclass(frozen=True)
class _Name:
    """A name that stands in the source as it is."""

    name: str


def _changed_fields(value: Any) -> dict[str, Any]:
    """Return the fields of a declaration that differ from their defaults."""
    changed = {}
    for field in dataclasses.fields(value):
        found = getattr(value, field.name)
        default = field.default_factory() if callable(field.default_factory) else field.default
        if found != default:
            changed[field.name] = found
    return changed


def _source(value: Any, indent: int) -> str:
    """Return Python source for a value, over several lines where one is too long."""
    if isinstance(value, _Name):
        return value.name
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _call(type(value).__name__, _changed_fields(value), indent)
    if isinstance(value, Mapping):
        parts = [f"{_source(key, 0)}: {_source(item, indent + 4)}" for key, item in value.items()]
        return _joined("{", parts, "}", indent)
    if isinstance(value, tuple):
        parts = [_source(item, indent + 4) for item in value]
        return _joined("(", parts, ",)" if len(parts) == 1 else ")", indent)
    return json.dumps(value) if isinstance(value, str) else repr(value)


def _call(name: str, fields: Mapping[str, Any], indent: int) -> str:
    return _joined(f"{name}(", [f"{key}={_source(item, indent + 4)}" for key, item in fields.items()], ")", indent)


def _joined(start: str, parts: list[str], end: str, indent: int) -> str:
    line = f"{start}{', '.join(parts)}{end}"
    if "\n" not in line and len(line) + indent < WIDTH:
        return line
    inner = "".join(f"{' ' * (indent + 4)}{part},\n" for part in parts)
    return f"{start}\n{inner}{' ' * indent}{end.removeprefix(',')}"
