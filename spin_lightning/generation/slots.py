"""What the model keeps of the rows that are decoded together: one row in each slot.

A slot is filled with the prompt of a request except its last token, which is the first that a step
feeds to the model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import DynamicCache

from spin_lightning.generation.base import Request
from spin_lightning.generation.kv_cache import ColumnCache
from spin_lightning.generation.model import RoutedModel
from spin_lightning.generation.prompts import read_prompts
from spin_lightning.types import PolicyId

# Columns beyond the longest request, at least, where slots are refilled.
_FEWEST_SPARE = 16


class Slots(ABC):
    """Keys and values of the rows in n slots.

    Args:
        model: The model.
        queue: Requests that will fill the slots. All of them are mixed with the base, or none is.
        count: Number of slots.

    Attributes:
        shrink_share: Once no request is waiting, slots are given up as soon as one in so many is
            free; 0 if they cannot be.
        has_fixed_addresses: Whether consecutive steps have the same kernels and addresses.
    """

    shrink_share: int
    has_fixed_addresses = False

    @abstractmethod
    def __init__(self, model: RoutedModel, queue: Sequence[Request], count: int) -> None:
        """Start with free slots."""

    @property
    def state(self) -> Sequence[Tensor]:
        """What a step changes and reads again; a repeated step writes the same keys and values.

        Empty without fixed addresses.
        """
        return ()

    @staticmethod
    def columns_of(queue: Sequence[Request], *, refilled: bool) -> int:  # noqa: ARG004
        """Tokens that a lane needs room for; by default those of the longest request.

        Args:
            queue: The requests that will fill the slots.
            refilled: Whether there are more of them than slots.
        """
        return max(request.total for request in queue)

    @abstractmethod
    def fill(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """Read the prompts of requests, without their last tokens, into slots that are free."""

    @abstractmethod
    def step(self, tokens: Tensor) -> Tensor:
        """Feed a token to every slot, int64, shape [n]; return logits, shape [n, vocabulary].

        What a free slot returns is finite and without meaning.
        """

    @abstractmethod
    def free(self, slots: Sequence[int]) -> None:
        """Give up the rows in some slots."""

    def keep(self, slots: Sequence[int]) -> None:
        """Reduce the slots to these, in this order; only where `shrink_share` is not 0."""
        raise NotImplementedError


def lanes_of(slots: Sequence[int], policies: Sequence[PolicyId], device: torch.device) -> Tensor:
    """Lanes of some slots, those of the base's copies last, int64.

    Args:
        slots: The slots.
        policies: The policy of every slot.
        device: Where the model is.
    """
    copies = range(policies[0].lanes)
    lanes = [slot + copy * len(policies) for copy in copies for slot in slots]
    return torch.tensor(lanes, device=device)


class ColumnSlots(Slots):
    """Slots whose rows end in the same column of a cache; a step adds a column to all of them.

    Args:
        model: The model; its cache holds keys and values only.
        queue: Requests that will fill the slots.
        count: Number of slots.
    """

    shrink_share = 8

    def __init__(self, model: RoutedModel, queue: Sequence[Request], count: int) -> None:
        """Set up the cache."""
        self._model = model
        self._policies = [queue[0].policy] * count
        self._longest = max(request.total for request in queue)
        self._longest_prompt = max(len(request.prompt_ids) for request in queue)
        self._columns = self.columns_of(queue, refilled=len(queue) > count)
        self._cache = ColumnCache(
            layers=len(DynamicCache(config=model.config).layers),
            lanes=count * queue[0].policy.lanes,
            columns=self._columns,
            end=self._longest_prompt - 1,
        )
        # Tokens of each row in the cache; of a free slot those that steps have added.
        self._lengths = [0] * count

    @staticmethod
    def columns_of(queue: Sequence[Request], *, refilled: bool) -> int:
        """See `Slots.columns_of`.

        In slots that are refilled, columns that no row needs any more are dropped, by a copy of all
        others; a quarter more columns make copies rare.
        """
        longest = max(request.total for request in queue)
        enough = longest + max(longest // 4, _FEWEST_SPARE)
        unmoved = max(len(r.prompt_ids) for r in queue) + max(r.cap for r in queue)
        return enough if refilled else min(enough, unmoved)

    def fill(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """See `Slots.fill`."""
        for slot, request in zip(slots, requests, strict=True):
            self._policies[slot] = request.policy
            self._lengths[slot] = len(request.prompt_ids) - 1
        for read in read_prompts(self._model, slots, requests, len(self._lengths)):
            self._cache.place(read.cache, read.lanes, read.sources)
        self._model.routing.assign(self._policies)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Slots.step`."""
        if self._cache.end == self._columns:
            needed = max(*self._lengths, self._longest_prompt - 1)
            self._cache.move_back(min(needed, self._columns - 1))
        self._lengths = [length + 1 for length in self._lengths]
        columns = min(max(self._lengths), self._cache.end + 1)
        self._cache.show(columns)
        device = self._model.device
        lengths = torch.tensor(self._lengths, device=device)[:, None]
        mask = (torch.arange(columns, device=device) >= columns - lengths).long()
        # A row that has ended can go on until the host looks again.
        positions = (lengths - 1).clamp_max(self._longest - 1)
        return self._model.next_logits(tokens[:, None], mask, positions, self._cache)

    def free(self, slots: Sequence[int]) -> None:
        """See `Slots.free`."""
        for slot in slots:
            self._lengths[slot] = 0

    def keep(self, slots: Sequence[int]) -> None:
        """See `Slots.keep`."""
        self._cache.select(lanes_of(slots, self._policies, self._model.device))
        self._policies = [self._policies[slot] for slot in slots]
        self._lengths = [self._lengths[slot] for slot in slots]
        self._model.routing.assign(self._policies)


class EqualSlots(Slots):
    """Slots of a model whose cache holds more than keys and values, filled once.

    Padding may enter such a cache, and rows cannot be taken out of it: all prompts have one length,
    and every row goes on until the last one has ended.

    Args:
        model: The model.
        _queue: Not needed.
        _count: Not needed.
    """

    shrink_share = 0

    def __init__(self, model: RoutedModel, _queue: Sequence[Request], _count: int) -> None:
        """Start with an empty cache."""
        self._model = model
        self._cache = DynamicCache(config=model.config)

    def fill(self, slots: Sequence[int], requests: Sequence[Request]) -> None:
        """See `Slots.fill`; all slots at once."""
        assert len(slots) == len(requests)
        self._model.routing.assign([request.policy for request in requests])
        prompts = torch.tensor([r.prompt_ids[:-1] for r in requests], dtype=torch.long)
        self._length = prompts.shape[1]
        if self._length:
            ids = prompts.to(self._model.device)
            positions = torch.arange(self._length, device=ids.device).expand_as(ids)
            self._model.next_logits(ids, torch.ones_like(ids), positions, self._cache)

    def step(self, tokens: Tensor) -> Tensor:
        """See `Slots.step`."""
        self._length += 1
        mask = tokens.new_ones(len(tokens), self._length)
        positions = torch.full_like(tokens, self._length - 1)[:, None]
        return self._model.next_logits(tokens[:, None], mask, positions, self._cache)

    def free(self, slots: Sequence[int]) -> None:
        """See `Slots.free`."""
