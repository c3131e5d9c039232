"""Reading the prompts of a batch into a cache, and the batch while it is decoded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PretrainedConfig

from spin_lightning.generation.base import Request
from spin_lightning.generation.kv_cache import PreallocatedCache
from spin_lightning.packing import group_by_length, pad_left
from spin_lightning.policies.base import RowRouting

# Logits after the last column, shape [n, vocabulary], from ids, mask, positions and a cache.
NextLogits = Callable[[Tensor, Tensor, Tensor, Cache], Tensor]

# Padded tokens of a pass over prompts: enough to keep a processor busy, and few enough that prompts
# of a pass have similar lengths and need little padding.
_PASS_TOKENS = {"cpu": 1024}
_PASS_TOKENS_ELSEWHERE = 8192


@dataclass
class Batch:
    """Rows that are decoded together, after their prompts.

    Attributes:
        routing: Routing of the rows to their policies.
        rows: Index of the request of each of k rows, int64, shape [k].
        cache: Keys and values of all columns so far.
        logits: After the last column, shape [k, vocabulary].
        mask: 1 where a column holds or will hold a token, int64, shape [k, all columns].
        columns: Number of columns so far.
        positions: Of the token in the last column, int64, shape [k].
    """

    routing: RowRouting
    rows: Tensor
    cache: Cache
    logits: Tensor
    mask: Tensor
    columns: int
    positions: Tensor

    def keep(self, staying: Tensor) -> None:
        """Drop the rows for which `staying`, bool of shape [k], is false."""
        self.cache.batch_select_indices(self.routing.keep(staying))
        self.rows, self.mask = self.rows[staying], self.mask[staying]
        self.positions = self.positions[staying]

    def step(self, tokens: Tensor, next_logits: NextLogits) -> None:
        """Feed one token per row, int64, shape [k], to the model."""
        self.columns += 1
        self.positions = self.positions + 1
        mask = self.mask[:, : self.columns]
        self.logits = next_logits(tokens[:, None], mask, self.positions[:, None], self.cache)


def read_prompts(
    requests: Sequence[Request],
    routing: RowRouting,
    next_logits: NextLogits,
    layers: int,
    pad_id: int,
) -> Batch:
    """Read prompts in passes of similar lengths; each policy reads equal prompts once.

    Args:
        requests: n requests.
        routing: Routing of their group.
        next_logits: The model.
        layers: Number of its layers, whose cache is keys and values only.
        pad_id: Any valid id.

    Returns:
        The batch, with memory for the responses.
    """
    slots = routing.assign([request.policy for request in requests])
    device = slots.rows.device
    batch = _unread(requests, routing, device)
    prompts = list(dict.fromkeys((r.prompt_ids, r.policy) for r in requests))
    most = _PASS_TOKENS.get(device.type, _PASS_TOKENS_ELSEWHERE)
    passes = [
        [prompts[i] for i in group]
        for group in group_by_length([len(ids) for ids, _ in prompts], most)
    ]
    number = {prompt: n for n, prompt in enumerate(chain.from_iterable(passes))}
    prompt_of = torch.tensor([number[r.prompt_ids, r.policy] for r in requests], device=device)
    wanted = (prompt_of[slots.rows], slots.is_base.long())
    cache = PreallocatedCache(layers, len(slots.rows), batch.columns, batch.mask.shape[1])
    after: list[Tensor] = []
    start = 0
    for group in passes:
        reading = routing.assign([policy for _, policy in group])
        read = DynamicCache()
        logits = next_logits(*_padded([ids for ids, _ in group], pad_id, device), read)
        after.append(logits.clone())  # maybe a view of the logits of all columns
        # Slot of this pass with the prompt of each slot of the batch; -1 if in another pass.
        found = torch.full((len(number), 2), -1, device=device)
        found[start + reading.rows, reading.is_base.long()] = torch.arange(
            len(reading.rows), device=device
        )
        start += len(group)
        sources = found[wanted]
        filled = (sources >= 0).nonzero().squeeze(-1)
        cache.place(read, filled, sources[filled])
    batch.logits = torch.cat(after).index_select(0, prompt_of)
    batch.cache = cache
    routing.assign([request.policy for request in requests])
    return batch


def read_equal_lengths(
    requests: Sequence[Request],
    routing: RowRouting,
    next_logits: NextLogits,
    config: PretrainedConfig,
) -> Batch:
    """Read prompts of one length in one pass, into the cache of transformers for a model.

    Args:
        requests: n requests.
        routing: Routing of their group.
        next_logits: The model.
        config: Its configuration.

    Returns:
        The batch.
    """
    device = routing.assign([request.policy for request in requests]).rows.device
    batch = _unread(requests, routing, device)
    batch.cache = DynamicCache(config=config)
    prompts = _padded([r.prompt_ids for r in requests], 0, device)
    batch.logits = next_logits(*prompts, batch.cache)
    return batch


def _unread(requests: Sequence[Request], routing: RowRouting, device: torch.device) -> Batch:
    """A batch whose prompts are not in the cache yet."""
    lengths = torch.tensor([len(request.prompt_ids) for request in requests], device=device)
    columns = int(lengths.max())
    every = columns + max(request.cap for request in requests)
    return Batch(
        routing=routing,
        rows=torch.arange(len(requests), device=device),
        cache=DynamicCache(),
        logits=torch.empty(0, device=device),
        mask=(torch.arange(every, device=device) >= (columns - lengths)[:, None]).long(),
        columns=columns,
        positions=lengths - 1,
    )


def _padded(
    prompts: Sequence[tuple[int, ...]], pad_id: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions of left-padded prompts."""
    ids, mask = (part.to(device) for part in pad_left(prompts, pad_id))
    return ids, mask, (mask.cumsum(dim=-1) - 1).clamp_min(0)
