"""Where the prompts and responses of a packed row lie, in the form that each kernel takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from spin_lightning.policies import flex_attention
from spin_lightning.types import PromptBatch

# Sorting pieces by shape copies the row; it is done where it saves at least half of the calls.
_MOST_SHAPES = 0.5


@dataclass(frozen=True)
class Varlen:
    """The pieces of a row in the form of kernels for sequences of unequal length.

    Attributes:
        keys: Tokens that each piece attends to, piece by piece, int64, shape [keys]; a prompt is
            repeated before each further response.
        query_starts: Start of each piece in the row, and the row's end, int32, shape [pieces + 1].
        key_starts: Start of each piece in `keys`, likewise.
        most_queries: Length of the longest piece.
        most_keys: Largest number of keys of a piece.
    """

    keys: Tensor
    query_starts: Tensor
    key_starts: Tensor
    most_queries: int
    most_keys: int


@dataclass(frozen=True)
class Alike:
    """The pieces of a row sorted by shape, for one call per shape instead of one per piece.

    Attributes:
        queries: The row's tokens in that order, int64, shape [tokens].
        keys: Tokens that each piece attends to, likewise, int64, shape [keys].
        back: Where each token of the row has gone, int64, shape [tokens].
        shapes: Number of pieces, queries and keys of a piece, for each shape.
    """

    queries: Tensor
    keys: Tensor
    back: Tensor
    shapes: list[tuple[int, int, int]]


@dataclass
class Layout:
    """Where prompts and responses lie in a row, with the derived inputs of the kernels.

    Attributes:
        batch: The prompts and responses.
        masks: Cached masks by number of queries, number of keys and window.
        block_masks: Cached masks of the whole row by window.
    """

    batch: PromptBatch
    masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)
    block_masks: dict[int | None, BlockMask] = field(default_factory=dict)

    @property
    def pieces(self) -> list[int]:
        """Lengths of [prompt and first response], [second response], … of every prompt."""
        groups = zip(self.batch.prompt_lengths, self.batch.response_lengths, strict=True)
        return [n for prompt, (first, *others) in groups for n in (prompt + first, *others)]

    def mask(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """Whether a query, at one of the last positions, sees a key, bool, [queries, keys]."""
        shape = queries, keys, window
        if shape not in self.masks:
            offset = keys - queries
            mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(offset)
            self.masks[shape] = mask if window is None else mask.triu(offset - window + 1)
        return self.masks[shape]

    def block_mask(self, window: int | None) -> BlockMask:
        """Which tokens of the row see which, for FlexAttention; the same for all layers."""
        batch = self.batch
        if window not in self.block_masks:
            seen = flex_attention.seen_keys(batch.prompt_lengths, batch.response_lengths, window)
            self.block_masks[window] = flex_attention.block_mask(seen, batch.input_ids.device)
        return self.block_masks[window]

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest prompt with one of its responses."""
        groups = zip(self.batch.prompt_lengths, self.batch.response_lengths, strict=True)
        return max(prompt + max(responses) for prompt, responses in groups)

    @cached_property
    def keys(self) -> list[Tensor]:
        """Tokens that each piece attends to: for a further response, its prompt's and its own."""
        keys, start = list[Tensor](), 0
        for prompt, (first, *others) in zip(
            self.batch.prompt_lengths, self.batch.response_lengths, strict=True
        ):
            shared, end = torch.arange(start, start + prompt), start + prompt + first
            keys.append(torch.arange(start, end))
            for n in others:
                keys.append(torch.cat([shared, torch.arange(end, end + n)]))
                end += n
            start = end
        return keys

    @cached_property
    def varlen(self) -> Varlen:
        """All pieces of the batch at once, on the device of its ids."""
        lengths, counts = self.pieces, [len(piece) for piece in self.keys]
        device = self.batch.input_ids.device
        query_starts, key_starts = (
            torch.tensor([0, *accumulate(numbers)], dtype=torch.int32, device=device)
            for numbers in (lengths, counts)
        )
        index = torch.cat(self.keys).to(device)
        return Varlen(index, query_starts, key_starts, max(lengths), max(counts))

    @cached_property
    def alike(self) -> Alike | None:
        """The pieces by shape; None if few have the same one, and sorting would not pay."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for piece, (length, keys) in enumerate(zip(self.pieces, self.keys, strict=True)):
            by_shape.setdefault((length, len(keys)), []).append(piece)
        if len(by_shape) > _MOST_SHAPES * len(self.pieces):
            return None
        order = [piece for pieces in by_shape.values() for piece in pieces]
        tokens = torch.arange(sum(self.pieces)).split(self.pieces)
        queries = torch.cat([tokens[piece] for piece in order])
        device = self.batch.input_ids.device
        return Alike(
            queries=queries.to(device),
            keys=torch.cat([self.keys[piece] for piece in order]).to(device),
            back=queries.argsort().to(device),
            shapes=[(len(pieces), *shape) for shape, pieces in by_shape.items()],
        )
