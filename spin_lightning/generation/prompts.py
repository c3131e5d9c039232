"""Reading prompts into a cache, in passes of similar lengths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from spin_lightning.generation.base import Request
from spin_lightning.generation.model import RoutedModel
from spin_lightning.packing import group_by_length, pad_left
from spin_lightning.types import PolicyId

# Padded tokens of a pass over prompts: enough to keep a processor busy, and few enough that prompts
# of a pass have similar lengths and need little padding.
_PASS_TOKENS = {"cpu": 1024}
_PASS_TOKENS_ELSEWHERE = 8192


@dataclass(frozen=True)
class Read:
    """What a pass has read.

    Attributes:
        cache: Keys and values of the prompts, left-padded to one length.
        lanes: Lanes that get a prompt, int64, shape [k].
        sources: Index of each one's prompt in the cache, likewise.
        lengths: Tokens of each one's prompt, likewise.
    """

    cache: DynamicCache
    lanes: Tensor
    sources: Tensor
    lengths: Tensor


def read_prompts(
    model: RoutedModel, slots: Sequence[int], requests: Sequence[Request], count: int
) -> Iterator[Read]:
    """Read prompts without their last tokens; each policy reads equal ones once.

    Args:
        model: Its cache holds keys and values only.
        slots: A slot for each request.
        requests: All of them are mixed with the base, or none is.
        count: Number of slots, of which each has two lanes where rows are mixed with the base.

    Yields:
        What each pass has read.
    """
    places: dict[tuple[PolicyId, tuple[int, ...]], list[int]] = {}
    for slot, request in zip(slots, requests, strict=True):
        if len(request.prompt_ids) > 1:
            places.setdefault((request.policy, request.prompt_ids[:-1]), []).append(slot)
    prompts, device = list(places), model.device
    most = _PASS_TOKENS.get(device.type, _PASS_TOKENS_ELSEWHERE)
    for group in group_by_length([len(ids) for _, ids in prompts], most):
        # Policy by policy, so that each adapter has one product.
        together = sorted((prompts[i] for i in group), key=lambda prompt: prompt[0])
        model.routing.assign([policy for policy, _ in together])
        cache = DynamicCache()
        ids, mask = (p.to(device) for p in pad_left([ids for _, ids in together], model.pad_id))
        model.next_logits(ids, mask, (mask.cumsum(dim=-1) - 1).clamp_min(0), cache)
        filled = [
            (slot + copy * count, i + copy * len(together), len(prompt[1]))
            for copy in range(together[0][0].lanes)
            for i, prompt in enumerate(together)
            for slot in places[prompt]
        ]
        columns = (torch.tensor(part, device=device) for part in zip(*filled, strict=True))
        yield Read(cache, *columns)
