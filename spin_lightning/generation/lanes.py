"""Keys and values of rows side by side in one block of memory, each row read up to its length."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from spin_lightning.generation.prompts import Read
from spin_lightning.policies.varlen import varlen_attention


@dataclass
class Lanes:
    """Keys and values of all lanes, and what the attention of every layer needs in a step.

    Attributes:
        columns: Tokens that a lane has room for.
        lengths: Tokens of each lane, int32, shape [lanes].
        starts: 0, 1, 2, … for the queries of a step, int32, shape [lanes + 1].
        key_starts: The start of each lane in the memory, and its end, likewise.
        ends: Where the next token of each lane goes in the memory, int64, shape [lanes].
        memory: Keys and values by layer, each of shape [lanes × columns, heads, head size].
    """

    columns: int
    lengths: Tensor
    starts: Tensor
    key_starts: Tensor
    ends: Tensor
    memory: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @classmethod
    def empty(cls, count: int, columns: int, device: torch.device) -> Lanes:
        """Lanes without tokens."""
        starts = torch.arange(count + 1, dtype=torch.int32, device=device)
        lengths = torch.zeros(count, dtype=torch.int32, device=device)
        ends = torch.zeros_like(lengths, dtype=torch.long)
        return cls(columns, lengths, starts, starts * columns, ends)

    def of_layer(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The memory of a layer; at first it is allocated for keys, [n, heads, length, size]."""
        if layer not in self.memory:
            rows = len(self.lengths) * self.columns
            shapes = ((rows, part.shape[1], part.shape[3]) for part in (keys, values))
            self.memory[layer] = (keys.new_zeros(next(shapes)), values.new_zeros(next(shapes)))
        return self.memory[layer]

    def place(self, read: Read) -> None:
        """Copy prompts to the start of their lanes."""
        longest = read.cache.get_seq_length()
        columns = torch.arange(longest, device=self.lengths.device)
        # The tokens of a left-padded prompt, then its last one repeated, which is not read.
        taken = (columns + (longest - read.lengths)[:, None]).clamp_max(longest - 1)
        into = read.lanes[:, None] * self.columns + columns
        for number, layer in enumerate(read.cache.layers):
            assert isinstance(layer, DynamicLayer)
            assert layer.keys is not None
            assert layer.values is not None
            memory = self.of_layer(number, layer.keys, layer.values)
            for part, to in zip((layer.keys, layer.values), memory, strict=True):
                to[into] = part.transpose(1, 2)[read.sources[:, None], taken]
        self.lengths[read.lanes] = read.lengths.to(self.lengths.dtype)

    def advance(self) -> None:
        """Take one more token into every lane. A full one, whose row has ended, stays full."""
        self.ends.copy_(self.lengths).clamp_(max=self.columns - 1)
        self.ends.add_(self.key_starts[:-1])
        self.lengths.add_(1).clamp_(max=self.columns)

    def attend(
        self,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        scaling: float | None,
        sliding_window: int | None,
    ) -> Tensor:
        """Attention of a token of each lane over its lane, of shape [lanes, heads, head size]."""
        starts, longest = (self.starts, self.key_starts), (1, self.columns)
        return varlen_attention(
            query, keys, values, starts, longest, scaling, sliding_window, used=self.lengths
        )

    def select(self, lanes: Tensor) -> Lanes:
        """Some of the lanes."""
        chosen = Lanes.empty(len(lanes), self.columns, self.lengths.device)
        chosen.lengths.copy_(self.lengths[lanes])
        for layer, parts in self.memory.items():
            keys, values = (p.unflatten(0, (-1, self.columns))[lanes].flatten(0, 1) for p in parts)
            chosen.memory[layer] = keys, values
        return chosen
