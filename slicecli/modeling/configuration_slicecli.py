"""The config of a slice that needs code of its own: the dense model's config, and where the stream is cut.

This file travels with the slice. It imports transformers only.
"""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PretrainedConfig

__all__ = ["SlicedConfig"]


class SlicedConfig(PretrainedConfig):
    """Config of a sliced decoder language model.

    What it does not have itself it answers from the dense model's config, so that `config.num_hidden_layers` and the
    like are there under the family's own names. Serving programs size the embeddings by `embedding_size`, the head by
    `hidden_size` and the cache by `head_dim`.

    Attributes:
        dense_config: Config of the dense model, of its family's own class.
        embedding_size: Width of the embeddings of the slice.
        hidden_size: Width of its stream before the head; the dense model's is in `dense_config`, from which the code of
            its family may take the width of a head.
        head_dim: Width of an attention head.
        use_cache: Whether generation uses a cache unless it is told.
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
    sub_configs = {"dense_config": AutoConfig}  # noqa: RUF012

    def __init__(
        self,
        dense_config: dict[str, Any] | PretrainedConfig | None = None,
        embedding_size: int = 0,
        slicing: dict[str, Any] | None = None,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> None:
        if isinstance(dense_config, dict):
            dense_config = AutoConfig.for_model(**dense_config)
        self.dense_config: Any = dense_config
        self.embedding_size = embedding_size
        self.slicing = slicing
        self.use_cache = use_cache  # which the base class drops
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def __getattr__(self, name: str) -> Any:
        dense = self.__dict__.get("dense_config")
        if name.startswith("_") or not isinstance(dense, PretrainedConfig) or not hasattr(dense, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(dense, name)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, kept in the dense model's config."""
        return self.__getattr__("vocab_size")

    @vocab_size.setter
    def vocab_size(self, value: int) -> None:
        self.dense_config.vocab_size = value


SlicedConfig.register_for_auto_class()
