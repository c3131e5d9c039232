"""The attention heads of a model, from its config."""

from __future__ import annotations

from typing import NamedTuple

from transformers import PretrainedConfig


class Heads(NamedTuple):
    """The heads of a layer.

    Attributes:
        queries: Number of query heads.
        keys: Number of key heads, as many as of the value heads.
        size: Numbers in a head.
    """

    queries: int
    keys: int
    size: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Heads:
        """Read them; configs leave out what follows from other fields."""
        text = config.get_text_config()
        queries = text.num_attention_heads
        keys = getattr(text, "num_key_value_heads", None) or queries
        return cls(queries, keys, getattr(text, "head_dim", None) or text.hidden_size // queries)
