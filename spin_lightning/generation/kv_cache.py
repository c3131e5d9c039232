"""A key-value cache whose memory is allocated once per batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class PreallocatedLayer(DynamicLayer):
    """Keys and values of one layer: prompts end in the same column, each step adds one column.

    Args:
        rows: Number of rows.
        prompt: Columns of the longest prompt.
        columns: Columns of prompt and response together.
    """

    def __init__(self, rows: int, prompt: int, columns: int) -> None:
        """Allocate nothing yet: the shape depends on the first keys."""
        super().__init__()
        self._rows, self._filled, self._columns = rows, prompt, columns

    def place(self, keys: Tensor, values: Tensor, rows: Tensor, sources: Tensor) -> None:
        """Copy prompts from another cache.

        Args:
            keys: Keys of prompts that end in the last column, shape [m, heads, length, width].
            values: Values, likewise.
            rows: Rows of this cache to fill, shape [k].
            sources: Index of the prompt for each of these rows, shape [k].
        """
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self._memory = [self._allocate(part) for part in (keys, values)]
        start = self._filled - keys.shape[-2]
        for memory, part in zip(self._memory, (keys, values), strict=True):
            # Padded columns are masked, but 0 times uninitialized memory can be NaN.
            memory[rows, :, :start] = 0
            memory[rows, :, start : self._filled] = part[sources]
        self._show()

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns to every row; return all columns so far."""
        start, self._filled = self._filled, self._filled + key_states.shape[-2]
        for memory, part in zip(self._memory, (key_states, value_states), strict=True):
            memory[: self._rows, :, start : self._filled] = part
        return self._show()

    def get_seq_length(self) -> int:
        """Number of columns so far."""
        return self._filled

    def batch_select_indices(self, indices: Tensor) -> None:
        """Reduce the cache to some of its rows, without repeats; only rows that move are copied."""
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(-1)
        for memory in self._memory:
            memory[moved, :, : self._filled] = memory[indices[moved], :, : self._filled]
        self._rows = len(indices)
        self._show()

    def _allocate(self, part: Tensor) -> Tensor:
        _, heads, _, width = part.shape
        return part.new_empty(self._rows, heads, self._columns, width)

    def _show(self) -> tuple[Tensor, Tensor]:
        """Set `keys` and `values`, as in other cache layers, to the columns so far."""
        keys, values = (m[: self._rows, :, : self._filled] for m in self._memory)
        self.keys, self.values = keys, values
        return keys, values


class PreallocatedCache(Cache):
    """A cache of `PreallocatedLayer`.

    Layers with a sliding window keep all their keys; the model's masks apply the window.

    Args:
        layers: Number of layers.
        rows: Number of rows.
        prompt: Columns of the longest prompt.
        columns: Columns of prompt and response together.
    """

    def __init__(self, layers: int, rows: int, prompt: int, columns: int) -> None:
        """Create the layers."""
        super().__init__([PreallocatedLayer(rows, prompt, columns) for _ in range(layers)])

    def place(self, other: Cache, rows: Tensor, sources: Tensor) -> None:
        """Copy prompts from a cache of plain layers, see `PreallocatedLayer.place`."""
        for layer, read in zip(self.layers, other.layers, strict=True):
            assert isinstance(layer, PreallocatedLayer)
            assert isinstance(read, DynamicLayer)
            assert read.keys is not None
            assert read.values is not None
            layer.place(read.keys, read.values, rows, sources)


def holds_keys_and_values_alone(config: PretrainedConfig) -> bool:
    """Whether a model's cache holds keys and values of every layer and nothing else."""
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) in known for layer in layers)
