"""The config of a slice, in either layout.

A stock slice has its family's own config at a smaller hidden size, or that of a portable class which computes the same.
A slice with code of its own has the config of `slicecli.modeling`: the dense config as it was, and where the stream is
cut.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from slicecli.errors import PluginError, RequestError, reason_of
from slicecli.family.dimensions import Dimensions
from slicecli.family.schedule import Schedule
from slicecli.family.written_class import WrittenClass, values_of_fields
from slicecli.modeling import AUTO_MAP
from slicecli.runtime.libraries import quiet_libraries

__all__ = ["custom_code_config", "portable_config", "resized_config", "stock_config"]

# what belongs to the machine or the library that made a config, not to the model
_LOCAL = ("_name_or_path", "transformers_version", "transformers_weights")
# what transformers looks for in the outer config alone when it generates
_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")


def stock_config(config: Any, dimensions: Dimensions, dim: int, dtype: str, has_code: bool = False) -> Any:
    """Return the config of a stock slice.

    Args:
        dtype: Dtype of the weights.
    """
    fields = _own_fields(config) | dimensions.sliced_fields(dim) | {"dtype": dtype}
    if not has_code:
        fields.pop("auto_map", None)
    try:
        with quiet_libraries():
            sliced = type(config).from_dict(fields)
    except Exception as error:  # config classes raise what they like
        raise RequestError(f"{type(config).__name__} rejects a hidden size of {dim}: {reason_of(error)}.") from error
    if has_code:
        sliced.name_or_path = config.name_or_path  # where transformers finds the code; it is not written
    return sliced


def portable_config(config: Any, written: WrittenClass, dim: int, dtype: str) -> Any:
    """Return the config of a stock slice in another class than its family's own.

    It has the fields of the family's own config but for those that only its class has.

    Args:
        dtype: Dtype of the weights.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    own, portable = written.own, written.portable
    assert portable is not None
    kind = portable.model_type
    try:
        cls = transformers.CONFIG_MAPPING[kind]
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind]
    except KeyError:
        raise PluginError(f"transformers {transformers.__version__} has no class for models of type {kind}.") from None
    only_own = {*_declared(type(config)), "model_type", "auto_map"} - _declared(cls)
    fields = {name: value for name, value in _own_fields(config).items() if name not in only_own}
    fields |= own.sliced_fields(dim) | {"dtype": dtype, "architectures": [architecture]}
    fields |= values_of_fields(own, portable, own.adapter.name)
    try:
        with quiet_libraries():
            return cls.from_dict(fields)
    except Exception as error:  # config classes raise what they like
        raise RequestError(f"{cls.__name__} rejects a hidden size of {dim}: {reason_of(error)}.") from error


def resized_config(config: Any, dimensions: Dimensions, dim: int, dtype: str) -> Any:
    """Return the config of a stock slice in its family's own class, to compute with only.

    Some classes refuse a hidden size that the modules they build can have; here they get it all the same.

    Args:
        dtype: Dtype of the weights.
    """
    if dim in dimensions.legal_dims():
        return stock_config(config, dimensions, dim, dtype)
    resized = stock_config(config, dimensions, dimensions.hidden_size, dtype)
    for name, value in dimensions.sliced_fields(dim).items():
        setattr(resized, name, value)
    return resized


def _declared(cls: type[Any]) -> set[str]:
    """Return the fields that a config class declares."""
    return {one.name for one in dataclasses.fields(cls)}


def custom_code_config(
    config: Any, dimensions: Dimensions, schedule: Schedule, has_shortcuts: bool, block_output_length: int, dtype: str
) -> Any:
    """Return the config of a slice with code of its own.

    Args:
        has_shortcuts: The slice is one by the published method, which unties.
        dtype: Dtype of the weights.
    """
    from slicecli.modeling.configuration_slicecli import SlicedConfig

    is_tied = dimensions.keeps_tie and not has_shortcuts
    dense = _own_fields(config) | {"tie_word_embeddings": is_tied, "dtype": dtype, "model_type": config.model_type}
    dense |= dimensions.mlp_fields()
    dense.pop("architectures", None)
    with quiet_libraries():
        return SlicedConfig(
            dense_config=dense,
            embedding_size=schedule.site_widths[0],
            hidden_size=schedule.head,
            head_dim=dimensions.head_dim,
            slicing={
                "hidden_size": dimensions.hidden_size,
                "declaration": dimensions.declaration(),
                "widths": [list(block) for block in schedule.blocks],
                "head_width": schedule.head,
                "has_shortcuts": has_shortcuts,
                "block_output_length": block_output_length,
            },
            dtype=dtype,
            tie_word_embeddings=is_tied,
            architectures=["SlicedForCausalLM"],
            auto_map=dict(AUTO_MAP),
            **{name: dense[name] for name in _GENERATION if name in dense},
        )


def _own_fields(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = config.to_dict()
    return {name: value for name, value in fields.items() if name not in _LOCAL}
