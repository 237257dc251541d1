"""The config of a slice that needs code of its own: the dense model's config, and where the stream is cut.

This file travels with the slice. It imports transformers only.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

__all__ = ["SlicedConfig"]


class SlicedConfig(PreTrainedConfig):
    """Config of a sliced decoder language model.

    What it does not have itself it answers from the dense model's config, so that `config.num_hidden_layers` and the
    like are there under the family's own names.

    Attributes:
        text_config: Config of the dense model, of its family's own class.
        embedding_size: Width of the embeddings of the slice; `hidden_size` is the dense model's, from which the code of
            its family may take the width of a head.
        slicing: How the stream is sliced:

            * `hidden_size`: width of the dense stream;
            * `declaration`: the modules that read and write the stream, by name;
            * `widths`: for each block the width of the stream where each of its steps reads it;
            * `head_width`: its width before the head;
            * `has_shortcuts`: whether the basis changes from step to step, so that matrices lead from one to the next
              and the norms divide by the dense width; else all widths are equal and the blocks are the family's own;
            * `block_output_length`: length of the tuple that a block of the family returns; 0 for a tensor.
    """

    model_type = "slicecli"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        text_config: dict[str, Any] | PreTrainedConfig | None = None,
        embedding_size: int = 0,
        slicing: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(text_config, dict):
            text_config = AutoConfig.for_model(**text_config)
        self.text_config = text_config
        self.embedding_size = embedding_size
        self.slicing = slicing
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def __getattr__(self, name: str) -> Any:
        dense = self.__dict__.get("text_config")
        if name.startswith("_") or not isinstance(dense, PreTrainedConfig) or not hasattr(dense, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(dense, name)


SlicedConfig.register_for_auto_class()
