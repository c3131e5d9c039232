"""Slots on a GPU: a step has the same kernels, shapes and addresses whatever is in them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface
from transformers.cache_utils import DynamicLayer

from spin_lightning.generation.base import Request
from spin_lightning.generation.model import RoutedModel
from spin_lightning.generation.prompts import Read, read_prompts
from spin_lightning.policies.shared_prefix import ARCHITECTURES, attending
from spin_lightning.policies.varlen import has_varlen

_NAME = "spin_lightning_slots"


def fits(model: Any) -> bool:
    """Whether a model's steps run on torch's kernel for sequences of unequal length."""
    config = model.config.get_text_config()
    weights: Tensor = model.get_input_embeddings().weight
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        config.model_type in ARCHITECTURES
        and not getattr(config, "attn_logit_softcapping", None)
        and has_varlen(weights.device, weights.dtype, size)
    )


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

    def select(self, lanes: Tensor) -> Lanes:
        """Some of the lanes."""
        chosen = Lanes.empty(len(lanes), self.columns, self.lengths.device)
        chosen.lengths.copy_(self.lengths[lanes])
        for layer, parts in self.memory.items():
            keys, values = (p.unflatten(0, (-1, self.columns))[lanes].flatten(0, 1) for p in parts)
            chosen.memory[layer] = keys, values
        return chosen


class VarlenSlots:
    """Slots with room for the longest request each, read up to the length of their row.

    Args:
        model: A model that `fits`.
        queue: Requests that will fill the slots.
        count: Number of slots.
    """

    shrink_share = 2

    def __init__(self, model: RoutedModel, queue: Sequence[Request], count: int) -> None:
        """Start with empty slots."""
        self._model = model
        self._copies = 2 if queue[0].policy.mixes_base else 1
        self._policies = [queue[0].policy] * count
        columns = self.columns_of(queue, refilled=True)
        self._lanes = Lanes.empty(count * self._copies, columns, model.device)
        # With a mask of four dimensions, transformers does not build one.
        self._mask = torch.empty(1, 1, 1, 1, device=model.device)

    @staticmethod
    def columns_of(queue: Sequence[Request], *, refilled: bool) -> int:  # noqa: ARG004
        """See `Slots.columns_of`."""
        return max(request.total for request in queue)

    def fill(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """See `Slots.fill`."""
        for slot, request in zip(slots, requests, strict=True):
            self._policies[slot] = request.policy
        for read in read_prompts(self._model, slots, requests, len(self._policies)):
            self._lanes.place(read)
        self._model.routing.assign(self._policies)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Slots.step`."""
        self._lanes.advance()
        positions = self._lanes.lengths[: len(tokens)] - 1
        with attending(self._model.config, _NAME):
            return self._model.logits(
                tokens[:, None], self._mask, positions[:, None], use_cache=False, lanes=self._lanes
            )

    def free(self, slots: Sequence[int]) -> None:
        """See `Slots.free`."""
        if slots:
            self._lanes.lengths[self._lanes_of(slots)] = 0

    def keep(self, slots: Sequence[int]) -> None:
        """See `Slots.keep`."""
        self._lanes = self._lanes.select(self._lanes_of(slots))
        self._policies = [self._policies[slot] for slot in slots]
        self._model.routing.assign(self._policies)

    def _lanes_of(self, slots: Sequence[int]) -> Tensor:
        count = len(self._policies)
        lanes = [slot + copy * count for copy in range(self._copies) for slot in slots]
        return torch.tensor(lanes, device=self._model.device)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    _mask: Tensor | None,
    *,
    lanes: Lanes,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of the new token of each lane over its lane.

    Args:
        module: The layer.
        query: Shape [lanes, heads, 1, head size].
        key: Shape [lanes, key heads, 1, head size].
        value: Likewise.
        lanes: The lanes.
        scaling: Factor of the attention scores.
        sliding_window: Number of positions that a query sees, including its own.

    Returns:
        Shape [lanes, 1, heads, head size], and None in place of attention weights.
    """
    layer: Any = module.layer_idx
    keys, values = lanes.of_layer(layer, key, value)
    keys.index_copy_(0, lanes.ends, key.squeeze(2))
    values.index_copy_(0, lanes.ends, value.squeeze(2))
    attended: Any = varlen_attn(
        query.squeeze(2),
        keys,
        values,
        lanes.starts,
        lanes.key_starts,
        1,
        lanes.columns,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
        seqused_k=lanes.lengths,
    )
    return attended[:, None], None


AttentionInterface.register(_NAME, _attend)
