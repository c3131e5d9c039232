"""Decoding one batch to completion, with any mix of policies."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PretrainedConfig

from spin_lightning.generation.base import Request, Response
from spin_lightning.generation.kv_cache import holds_keys_and_values_alone
from spin_lightning.generation.prompts import Batch, read_equal_lengths, read_prompts
from spin_lightning.generation.sampler import Sampler
from spin_lightning.keyed import position_uniforms
from spin_lightning.logps import forward_arguments
from spin_lightning.policies.base import RowRouting


class Written:
    """The tokens that n rows have generated so far.

    Args:
        caps: Maximum number of tokens of each row, int64, shape [n].
        stops: A response ends with the first of these.
        ends: Called with the ids of an unfinished response: whether it ends there all the same.
    """

    def __init__(
        self, caps: Tensor, stops: Tensor, ends: Callable[[Sequence[int]], bool] | None = None
    ) -> None:
        """Start with empty rows."""
        self._caps, self._stops, self._ends = caps, stops, ends
        self._ids = caps.new_zeros(len(caps), int(caps.max()))
        self._logps = torch.zeros_like(caps, dtype=torch.float64)
        self._lengths = torch.zeros_like(caps)
        self._finished = torch.zeros_like(caps, dtype=torch.bool)

    def add(self, step: int, rows: Tensor, tokens: Tensor, logps: Tensor) -> Tensor:
        """Append the tokens of one step to rows that are not complete.

        Returns:
            Which of these rows continue, bool.
        """
        writing = ~self._finished[rows] & (step < self._caps[rows])
        self._ids[rows, step] = tokens
        self._logps[rows] += torch.where(writing, logps, 0.0)
        self._lengths[rows] += writing
        self._finished[rows] |= writing & torch.isin(tokens, self._stops)
        if self._ends is not None:
            for row in rows[writing & ~self._finished[rows]].tolist():
                self._finished[row] = self._ends(self._ids[row, : step + 1].tolist())
        return ~self._finished[rows] & (step + 1 < self._caps[rows])

    def responses(self) -> list[Response]:
        """The responses, in the order of the rows."""
        columns = (self._ids, self._lengths, self._finished, self._logps)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [Response(tuple(ids[:length]), done, logp) for ids, length, done, logp in rows]


@dataclass(frozen=True)
class Decoder:
    """Decodes batches with a model whose rows are routed to policies.

    Attributes:
        model: A causal language model of transformers, with or without adapters.
        sampler: Draws the tokens.
        stop_ids: A response ends with the first of these.
        pad_id: Any valid id; padded columns are masked.
        ends: Called with the ids of a response after each token: whether it ends there, too.
    """

    model: nn.Module
    sampler: Sampler
    stop_ids: tuple[int, ...]
    pad_id: int
    ends: Callable[[Sequence[int]], bool] | None = None

    @property
    def config(self) -> PretrainedConfig:
        """The model's configuration."""
        model: Any = self.model
        config: PretrainedConfig = model.config
        return config

    @cached_property
    def needs_equal_lengths(self) -> bool:
        """Whether the prompts of a batch must have the same length, which is slower.

        True if the model's cache holds more than keys and values: padding may then enter it, and
        rows cannot be taken out of it.
        """
        return not holds_keys_and_values_alone(self.config)

    def decode(self, requests: Sequence[Request], routing: RowRouting) -> list[Response]:
        """Decode a batch to its end.

        Args:
            requests: A batch; its prompts have one length if `needs_equal_lengths`.
            routing: Routing of a group that contains the policies of all requests.

        Returns:
            Responses in the order of the requests.
        """
        batch = self._read(requests, routing)
        device = batch.rows.device
        caps = torch.tensor([request.cap for request in requests], device=device)
        most = int(caps.max())
        uniforms = torch.from_numpy(
            np.stack([position_uniforms(request.key, most) for request in requests])
        ).to(device)
        written = Written(caps, torch.tensor(self.stop_ids, device=device), self.ends)
        for step in range(most):
            tokens, logps = self.sampler(batch.logits, uniforms[batch.rows, step])
            going_on = written.add(step, batch.rows, tokens, logps)
            left = int(going_on.sum())
            if not left:
                break
            if left < len(going_on) and not self.needs_equal_lengths:
                batch.keep(going_on)
                tokens = tokens[going_on]
            batch.step(tokens, self._next_logits)
        return written.responses()

    def _read(self, requests: Sequence[Request], routing: RowRouting) -> Batch:
        if self.needs_equal_lengths:
            return read_equal_lengths(requests, routing, self._next_logits, self.config)
        layers = len(DynamicCache(config=self.config).layers)
        return read_prompts(requests, routing, self._next_logits, layers, self.pad_id)

    def _next_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits after the last column, shape [n, vocabulary]."""
        accepted = self._accepted
        optional = {"position_ids": positions, "logits_to_keep": 1}
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **{name: value for name, value in optional.items() if name in accepted},
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    @cached_property
    def _accepted(self) -> frozenset[str]:
        return forward_arguments(self.model)
