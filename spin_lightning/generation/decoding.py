"""Decoding requests in slots, with any mix of policies.

As soon as some rows have ended, the next requests take their slots.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig

from spin_lightning.generation.base import Request, Response
from spin_lightning.generation.kv_cache import holds_keys_and_values_alone
from spin_lightning.generation.model import RoutedModel
from spin_lightning.generation.sampler import Sampler
from spin_lightning.generation.slots import ColumnSlots, EqualSlots
from spin_lightning.generation.step_graph import StepGraph
from spin_lightning.generation.varlen_slots import VarlenSlots, fits
from spin_lightning.generation.written import Written
from spin_lightning.policies.base import RowRouting

# Free slots are refilled once one in so many is free: a pass over few prompts is slow.
_REFILL_SHARE = 16
# On a GPU: one in so many tokens of a response of 200 is computed in vain.
_STEPS_UNWATCHED = 16


@dataclass(frozen=True)
class Decoder:
    """Decodes requests with a model whose rows are routed to policies.

    Attributes:
        model: A causal language model of transformers, with or without adapters.
        sampler: Draws the tokens.
        stop_ids: A response ends with the first of these.
        pad_id: Any valid id; padded columns are masked.
        ends: Called with the ids of a response after each token: whether it ends there, too.
        cuda_graphs: Whether a step on a GPU becomes a CUDA graph where that is possible.
    """

    model: nn.Module
    sampler: Sampler
    stop_ids: tuple[int, ...]
    pad_id: int
    ends: Callable[[Sequence[int]], bool] | None = None
    cuda_graphs: bool = True

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        model: Any = self.model
        config: PretrainedConfig = model.config
        return config

    @cached_property
    def needs_equal_lengths(self) -> bool:
        """Whether all prompts must have the same length, and a slot each, which is slower.

        True if the model's cache holds more than keys and values: padding may then enter it, and
        rows cannot be taken out of it.
        """
        return not holds_keys_and_values_alone(self.config)

    def decode(
        self,
        requests: Sequence[Request],
        routing: RowRouting,
        slots: int | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """Decode requests to their end.

        Args:
            requests: They are decoded in this order. All of them are mixed with the base, or none
                is; their prompts have one length if `needs_equal_lengths`.
            routing: Routing of a group that contains the policies of all requests.
            slots: How many are decoded at once; by default, and if `needs_equal_lengths`, all.
            on_progress: Called with the number of responses that have just been completed.

        Returns:
            Responses in the order of the requests.
        """
        model = RoutedModel(self.model, self.config, routing, self.pad_id)
        written = Written(requests, self.stop_ids, model.device, self.ends)
        count = min(slots or len(requests), len(requests))
        kept = self.kind_of_slots(model, requests, count)
        rows = _Rows(requests, count, model.device)
        can_capture = kept.has_fixed_addresses and not self.sampler.waits and self.ends is None
        graph = StepGraph(enabled=self.cuda_graphs and can_capture)

        def step() -> None:
            logits = kept.step(rows.tokens)
            tokens, logps = self.sampler(logits, written.uniforms(rows.places))
            written.add(rows.places, tokens, logps)
            rows.tokens.copy_(tokens)

        while True:
            if filled := rows.fill():
                kept.fill(list(filled), [requests[row] for row in filled.values()])
            elif rows.are_complete:
                return written.responses()
            elif staying := rows.compact(kept.shrink_share):
                kept.keep(staying)
            for _ in range(self._steps_unwatched(model.device)):
                state = [rows.tokens, *kept.state, *written.state]
                graph.run(step, (len(rows.places), routing.form), state, written.logps)
            ended = rows.release(written.goes_on(rows.places).tolist())
            kept.free(ended)
            if ended and on_progress is not None:
                on_progress(len(ended))

    def columns_of(self, requests: Sequence[Request], *, refilled: bool) -> int:
        """Tokens that each slot needs room for, see `Slots.columns_of`."""
        columns = self.kind_of_slots.columns_of(requests, refilled=refilled)
        return columns * requests[0].policy.lanes

    @cached_property
    def kind_of_slots(self) -> type[EqualSlots | VarlenSlots | ColumnSlots]:
        """The fastest kind for the model and its device."""
        if self.needs_equal_lengths:
            return EqualSlots
        return VarlenSlots if fits(self.model) else ColumnSlots

    def _steps_unwatched(self, device: torch.device) -> int:
        """Steps until the host looks which rows have ended; to look means to wait for a GPU."""
        return 1 if device.type == "cpu" or self.ends is not None else _STEPS_UNWATCHED


class _Rows:
    """Which request is in each slot.

    Args:
        requests: n requests, which get a slot in this order.
        count: Number of slots.
        device: Where the model is.

    Attributes:
        places: Index of the request in each slot, n in a free one, int64, shape [slots].
        tokens: The next token that each slot feeds to the model, int64, shape [slots].
    """

    def __init__(self, requests: Sequence[Request], count: int, device: torch.device) -> None:
        """Start with free slots."""
        self._requests = requests
        self._waiting = deque(range(len(requests)))
        self._free = len(requests)
        self._rows = [self._free] * count
        self.places = torch.full((count,), self._free, device=device)
        self.tokens = torch.zeros_like(self.places)

    @property
    def are_complete(self) -> bool:
        """Whether all requests have been decoded."""
        return not self._waiting and not self._taken()

    def fill(self) -> dict[int, int]:
        """Give free slots, if there are enough, to the next requests; return each one's request."""
        free = [slot for slot, row in enumerate(self._rows) if row == self._free]
        if not self._waiting or len(free) * _REFILL_SHARE < len(self._rows):
            return {}
        filled = {slot: self._waiting.popleft() for slot in free[: len(self._waiting)]}
        for slot, row in filled.items():
            self._rows[slot] = row
        firsts = [self._requests[row].prompt_ids[-1] for row in filled.values()]
        slots = torch.tensor(list(filled), device=self.tokens.device)
        self.tokens[slots] = torch.tensor(firsts, device=self.tokens.device)
        self._show()
        return filled

    def compact(self, share: int) -> list[int]:
        """Give up free slots if there are many; return the slots that stay, in their new order.

        Args:
            share: One in so many slots has to be free; 0 for never.
        """
        taken = self._taken()
        if self._waiting or (len(self._rows) - len(taken)) * share < len(self._rows):
            return []
        # The last ones move into free slots, so that few move.
        moving = iter([slot for slot in taken if slot >= len(taken)])
        staying = [
            slot if self._rows[slot] != self._free else next(moving) for slot in range(len(taken))
        ]
        self._rows = [self._rows[slot] for slot in staying]
        self.tokens = self.tokens[torch.tensor(staying, device=self.tokens.device)]
        self._show()
        return staying

    def release(self, goes_on: Sequence[bool]) -> list[int]:
        """Free the slots whose rows are complete; return them.

        Args:
            goes_on: Of each slot, false where its row is complete.
        """
        ended = [slot for slot in self._taken() if not goes_on[slot]]
        for slot in ended:
            self._rows[slot] = self._free
        if ended:
            self._show()
        return ended

    def _taken(self) -> list[int]:
        return [slot for slot, row in enumerate(self._rows) if row != self._free]

    def _show(self) -> None:
        if len(self.places) == len(self._rows):
            self.places.copy_(torch.tensor(self._rows))
        else:
            self.places = torch.tensor(self._rows, device=self.places.device)
