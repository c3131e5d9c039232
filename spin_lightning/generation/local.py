"""Generation in this process, with keyed inverse-CDF sampling."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    PretrainedConfig,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from spin_lightning.generation.base import Generator, Request, Response
from spin_lightning.keyed import position_uniforms
from spin_lightning.logps import last_logits
from spin_lightning.packing import group_by_length, pad_left
from spin_lightning.policies.base import Policy
from spin_lightning.sampling import GenerationSettings

_CACHE_BYTES = 1 << 31
_MOST_BATCH_TOKENS = 1 << 17
# Finished rows are taken out of the batch when at most this share is still being written.
_COMPACT_BELOW = 0.75


@dataclass(frozen=True)
class LocalGenerator(Generator):
    """Decodes in this process, one batch after the other.

    Attributes:
        config: Configuration of the model.
        stop_ids: A response ends with the first of these.
        pad_id: Any valid id; padded columns are masked.
        settings: Sampling settings and batch size.
    """

    config: PretrainedConfig
    stop_ids: tuple[int, ...]
    pad_id: int
    settings: GenerationSettings

    def generate(self, policy: Policy, requests: Sequence[Request]) -> list[Response]:
        """Sample one response per request, iterate by iterate, longest prompts first."""
        responses: dict[int, Response] = {}

        def acting(i: int) -> tuple[int, float]:
            return requests[i].opponent, requests[i].token_alpha

        by_opponent = sorted(range(len(requests)), key=lambda i: (*acting(i), i))
        for opponent, group in groupby(by_opponent, key=acting):
            indices = list(group)
            with policy.at(*opponent):
                for batch in self._batches([requests[i] for i in indices]):
                    decoded = self._decode(policy, [requests[indices[i]] for i in batch])
                    responses.update(zip((indices[i] for i in batch), decoded, strict=True))
        return [responses[i] for i in range(len(requests))]

    def _batches(self, requests: Sequence[Request]) -> list[list[int]]:
        lengths = [len(request.prompt_ids) + request.cap for request in requests]
        budget = self.settings.batch_tokens or default_batch_tokens(self.config)
        return list(group_by_length(lengths, budget))

    def _decode(self, policy: Policy, requests: Sequence[Request]) -> list[Response]:
        """Decode one batch to its end."""
        device = policy.device
        input_ids, mask = (
            part.to(device) for part in pad_left([r.prompt_ids for r in requests], self.pad_id)
        )
        caps = torch.tensor([request.cap for request in requests])
        uniforms = torch.from_numpy(
            np.stack([position_uniforms(r.key, int(caps.max())) for r in requests])
        ).to(device)
        stops = torch.tensor(self.stop_ids, device=device)
        written: list[list[int]] = [[] for _ in requests]
        finished = [False] * len(requests)
        rows = torch.arange(len(requests))
        cache = DynamicCache(config=self.config)
        for step in range(int(caps.max())):
            logits = last_logits(
                policy.model, input_ids, mask, keep=1, past_key_values=cache, use_cache=True
            )
            tokens = self._sample(logits[:, -1], uniforms[rows.to(device), step])
            stopped = torch.isin(tokens, stops)
            alive = torch.ones(len(rows), dtype=torch.bool)
            for i, (row, token, stop) in enumerate(
                zip(rows.tolist(), tokens.tolist(), stopped.tolist(), strict=True)
            ):
                if not finished[row] and len(written[row]) < requests[row].cap:
                    written[row].append(token)
                    finished[row] = stop
                alive[i] = not finished[row] and len(written[row]) < requests[row].cap
            if not alive.any():
                break
            if alive.float().mean() <= _COMPACT_BELOW:
                keep = alive.nonzero().squeeze(-1)
                rows = rows[keep]
                keep = keep.to(device)
                tokens, mask = tokens[keep], mask[keep]
                cache.batch_select_indices(_copies(keep, len(alive), cache))
            input_ids = tokens[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=-1)
        return [Response(tuple(ids), done) for ids, done in zip(written, finished, strict=True)]

    def _sample(self, logits: Tensor, uniforms: Tensor) -> Tensor:
        """Next tokens by inverse CDF, shape [n], from logits [n, vocabulary] and uniforms [n]."""
        logits = logits.float()
        for warper in self._warpers:
            logits = warper(torch.empty(0), logits)
        cumulative = logits.softmax(dim=-1).cumsum(dim=-1, dtype=torch.float64)
        # Scaled by the total, which rounding leaves a little off 1; `right` so that a uniform of
        # exactly 0 cannot pick a token of probability 0.
        thresholds = (uniforms * cumulative[:, -1])[:, None]
        tokens = torch.searchsorted(cumulative, thresholds, right=True).squeeze(-1)
        return tokens.clamp_max(logits.shape[-1] - 1)

    @property
    def _warpers(self) -> list[Callable[[Tensor, Tensor], Tensor]]:
        settings = self.settings
        warpers: list[Callable[[Tensor, Tensor], Tensor]] = []
        if settings.temperature != 1.0:
            warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            warpers.append(TopKLogitsWarper(settings.top_k))
        if settings.top_p < 1.0:
            warpers.append(TopPLogitsWarper(settings.top_p))
        return warpers


def _copies(keep: Tensor, rows: int, cache: DynamicCache) -> Tensor:
    """Which rows of the cache to keep: a mixture with the base caches every row twice."""
    layer: Any = cache.layers[0]
    copies = len(layer.keys) // rows
    return torch.cat([keep + copy * rows for copy in range(copies)])


def default_batch_tokens(config: PretrainedConfig) -> int:
    """Tokens whose keys and values fill 2 GiB, from the model's size alone."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    bytes_per_token = 2 * text.num_hidden_layers * heads * head_dim * 4
    return int(min(_MOST_BATCH_TOKENS, max(1, _CACHE_BYTES // bytes_per_token)))
