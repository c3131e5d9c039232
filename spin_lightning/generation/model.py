"""The model that decodes, whose rows are routed to policies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PretrainedConfig

from spin_lightning.logps import forward_arguments
from spin_lightning.policies.base import RowRouting


@dataclass(frozen=True)
class RoutedModel:
    """A causal language model of transformers, with or without adapters.

    Attributes:
        module: The model.
        config: Its configuration.
        routing: Routing of the group of all policies.
        pad_id: Any valid id; padded columns are masked.
    """

    module: nn.Module
    config: PretrainedConfig
    routing: RowRouting
    pad_id: int

    @cached_property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.module.parameters()).device

    def next_logits(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits after the last column, shape [n, vocabulary].

        Args:
            ids: The next tokens of n rows, shape [n, columns].
            mask: 1 where a column of the cache, or one of these, holds a token, shape [n, all].
            positions: Of the tokens, shape [n, columns].
            cache: Keys and values so far; these columns are added.
        """
        return self.logits(ids, mask, positions, past_key_values=cache, use_cache=True)

    def logits(self, ids: Tensor, mask: Tensor, positions: Tensor, **others: Any) -> Tensor:
        """Logits after the last column, with other arguments of the model's forward."""
        optional = {"position_ids": positions, "logits_to_keep": 1}
        accepted = {name: value for name, value in optional.items() if name in self._accepted}
        output = self.module(input_ids=ids, attention_mask=mask, **accepted, **others)
        logits: Tensor = output.logits[:, -1]
        return logits

    @cached_property
    def _accepted(self) -> frozenset[str]:
        return forward_arguments(self.module)
