"""A key-value cache whose memory is allocated once, with rows that come and go."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class ColumnLayer(DynamicLayer):
    """Keys and values of one layer: every row ends in the same column, each step adds one column.

    Args:
        lanes: Number of lanes.
        columns: Number of columns.
        end: Number of columns that are taken at first.

    Attributes:
        start: First column that is shown.
        end: Number of columns so far.
    """

    def __init__(self, lanes: int, columns: int, end: int) -> None:
        """Allocate nothing yet: the shape depends on the first keys."""
        super().__init__()
        self._lanes, self._columns = lanes, columns
        self.start, self.end = 0, end

    def place(self, keys: Tensor, values: Tensor, lanes: Tensor, sources: Tensor) -> None:
        """Copy sequences from another cache, so that they end in the last column.

        Args:
            keys: Keys of m sequences of one length, shape [m, heads, length, width].
            values: Values, likewise.
            lanes: Lanes of this cache to fill, shape [k].
            sources: Index of the sequence for each of these lanes, shape [k].
        """
        self._allocate(keys, values)
        start = self.end - keys.shape[-2]
        for memory, part in zip(self._memory, (keys, values), strict=True):
            # Padded columns are masked, but 0 times uninitialized memory can be NaN.
            memory[lanes, :, :start] = 0
            memory[lanes, :, start : self.end] = part[sources]

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Append columns to every lane; return the columns that are shown."""
        self._allocate(key_states, value_states)
        before, self.end = self.end, self.end + key_states.shape[-2]
        for memory, part in zip(self._memory, (key_states, value_states), strict=True):
            memory[: self._lanes, :, before : self.end] = part
        shown = (m[: self._lanes, :, self.start : self.end] for m in self._memory)
        self.keys, self.values = shown
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Number of columns that are shown."""
        return self.end - self.start

    def move_back(self, end: int) -> None:
        """Move the last columns to the front of the memory, up to column `end`."""
        for memory in self._memory if self.is_initialized else ():
            memory[: self._lanes, :, :end] = memory[
                : self._lanes, :, self.end - end : self.end
            ].clone()
        self.end = end

    def select(self, lanes: Tensor) -> None:
        """Reduce the cache to some of its lanes, each once; only lanes that move are copied."""
        moved = (lanes != torch.arange(len(lanes), device=lanes.device)).nonzero().squeeze(-1)
        for memory in self._memory:
            memory[moved, :, : self.end] = memory[lanes[moved], :, : self.end]
        self._lanes = len(lanes)

    def _allocate(self, keys: Tensor, values: Tensor) -> None:
        if self.is_initialized:
            return
        self.lazy_initialization(keys, values)
        self._memory = []
        for part in (keys, values):
            _, heads, _, width = part.shape
            memory = part.new_empty(self._lanes, heads, self._columns, width)
            memory[:, :, : self.end] = 0
            self._memory.append(memory)


class ColumnCache(Cache):
    """A cache of `ColumnLayer`.

    Layers with a sliding window keep all their keys; the model's masks apply the window.

    Args:
        layers: Number of layers.
        lanes: Number of lanes.
        columns: Number of columns.
        end: Number of columns that are taken at first.
    """

    def __init__(self, layers: int, lanes: int, columns: int, end: int) -> None:
        """Create the layers."""
        self.columns: list[ColumnLayer] = [ColumnLayer(lanes, columns, end) for _ in range(layers)]
        super().__init__(list(self.columns))

    @property
    def end(self) -> int:
        """Number of columns so far."""
        return self.columns[0].end

    def show(self, columns: int) -> None:
        """Show so many columns, the last ones, with the one that the next step adds."""
        for layer in self.columns:
            layer.start = layer.end + 1 - columns

    def place(self, other: Cache, lanes: Tensor, sources: Tensor) -> None:
        """Copy sequences from a cache of plain layers, see `ColumnLayer.place`."""
        for layer, read in zip(self.columns, other.layers, strict=True):
            assert isinstance(read, DynamicLayer)
            assert read.keys is not None
            assert read.values is not None
            layer.place(read.keys, read.values, lanes, sources)

    def move_back(self, end: int) -> None:
        """See `ColumnLayer.move_back`."""
        for layer in self.columns:
            layer.move_back(end)

    def select(self, lanes: Tensor) -> None:
        """See `ColumnLayer.select`."""
        for layer in self.columns:
            layer.select(lanes)


def holds_keys_and_values_alone(config: PretrainedConfig) -> bool:
    """Whether a model's cache holds keys and values of every layer and nothing else."""
    known = (DynamicLayer, DynamicSlidingWindowLayer)
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) in known for layer in layers)
