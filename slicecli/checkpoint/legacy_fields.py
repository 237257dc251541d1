"""The fields of a config as transformers 4 spelled them, beside those of transformers 5.

transformers 5 writes `rope_parameters` and `dtype`. Version 4, and programs that read configs as it wrote them, look
for `rope_theta`, `rope_scaling`, `partial_rotary_factor` and `torch_dtype`, and silently take defaults where those are
missing. transformers 5 reads both spellings.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["with_legacy_fields"]

# what version 4 had beside `rope_scaling`, not in it
_TOP_LEVEL = ("rope_theta", "partial_rotary_factor")
_TRAINED_LENGTH = "original_max_position_embeddings"


def with_legacy_fields(fields: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a config, with those of transformers 4 added.

    Args:
        fields: The fields as transformers 5 writes them; those of the dense model may be nested in `dense_config`.
        names: The family's own names of fields, by the usual name.
    """
    legacy: dict[str, Any] = {}
    if isinstance(fields.get("dtype"), str):
        legacy["torch_dtype"] = fields["dtype"]
    if "num_local_experts" in fields:
        legacy["num_experts"] = fields["num_local_experts"]
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:  # else it has one set for each kind of layer
        legacy |= {names.get(name, name): rope[name] for name in _TOP_LEVEL if name in rope}
        legacy["rope_scaling"] = _rope_scaling(rope, fields)
    if isinstance(fields.get("dense_config"), dict):
        legacy["dense_config"] = with_legacy_fields(fields["dense_config"], names)
    return {**fields, **legacy}


def _rope_scaling(rope: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any] | None:
    kind = rope.get("rope_type", "default")
    if kind == "default":
        return None
    scaling = {name: value for name, value in rope.items() if name not in _TOP_LEVEL}
    if kind == "longrope" and _TRAINED_LENGTH in fields:
        # Phi-3 had the length at the top level, and rejected all but three fields here
        scaling = {name: value for name, value in scaling.items() if name not in ("rope_type", _TRAINED_LENGTH)}
        scaling["type"] = kind
    return scaling
