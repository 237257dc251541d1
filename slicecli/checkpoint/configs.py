"""The config of a slice, in either layout.

A stock slice has its family's own config at a smaller hidden size. A slice with code of its own has the config of
`slicecli.modeling`: the dense config as it was, and where the stream is cut.
"""

from __future__ import annotations

from typing import Any

from slicecli.errors import RequestError, reason_of
from slicecli.family.dimensions import Dimensions
from slicecli.family.schedule import Schedule
from slicecli.modeling import AUTO_MAP
from slicecli.runtime.libraries import quiet_libraries

__all__ = ["custom_code_config", "stock_config"]

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


def custom_code_config(
    config: Any, dimensions: Dimensions, schedule: Schedule, has_shortcuts: bool, block_output_length: int, dtype: str
) -> Any:
    """Return the config of a slice with code of its own.

    Args:
        dtype: Dtype of the weights.
    """
    from slicecli.modeling.configuration_slicecli import SlicedConfig

    dense = _own_fields(config) | {"tie_word_embeddings": False, "dtype": dtype, "model_type": config.model_type}
    dense |= dimensions.mlp_fields()
    dense.pop("architectures", None)
    with quiet_libraries():
        return SlicedConfig(
            dense_config=dense,
            embedding_size=schedule.places[0],
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
            architectures=["SlicedForCausalLM"],
            auto_map=dict(AUTO_MAP),
            **{name: dense[name] for name in _GENERATION if name in dense},
        )


def _own_fields(config: Any) -> dict[str, Any]:
    fields: dict[str, Any] = config.to_dict()
    return {name: value for name, value in fields.items() if name not in _LOCAL}
