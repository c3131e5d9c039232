"""A mixture of iterates as one model: to generate from, and to ask for exact log-probs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from spin_lightning.logps import response_logps
from spin_lightning.mixtures import Mixture
from spin_lightning.policies.loading import acting_as
from spin_lightning.types import SequenceBatch


class MixtureModel(nn.Module):
    """The policy mu(y|x) = sum_i w_i p_i(y|x) over whole responses.

    It is no model of next tokens with weights of its own: a response is written by one iterate,
    drawn anew for every row, and its probability is the mean of theirs.

    Args:
        mixture: The iterates and their weights.
        model: One base with an adapter per iterate.
    """

    def __init__(self, mixture: Mixture, model: nn.Module) -> None:
        """Keep mixture and model."""
        super().__init__()
        self.mixture = mixture
        self.model = model

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Sample a response per row, each from an iterate of its own (torch's global seed counts).

        Args:
            input_ids: Left-padded prompts, int64, shape [n, length].
            attention_mask: 1 where a column holds a token, likewise; all ones if not given.
            kwargs: What `transformers.generate` takes; it samples at temperature 1 without
                truncation if nothing else is said.

        Returns:
            Prompts and responses, right-padded, int64, shape [n, longest].
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **kwargs}
        weights = torch.tensor(list(self.mixture.weights.values()), dtype=torch.float64)
        members = torch.tensor(self.mixture.members)
        drawn = members[torch.multinomial(weights, len(input_ids), replacement=True)]
        model: Any = self.model
        rows: dict[int, Tensor] = {}
        for member in self.mixture.members:
            chosen = (drawn == member).nonzero().squeeze(-1)
            if not len(chosen):
                continue
            with acting_as(model, member):
                at = chosen.to(input_ids.device)
                written = model.generate(
                    input_ids=input_ids[at], attention_mask=mask[at], **options
                )
            rows.update(zip(chosen.tolist(), written, strict=True))
        pad = model.generation_config.pad_token_id
        return pad_sequence(
            [rows[i] for i in range(len(input_ids))], batch_first=True, padding_value=pad or 0
        )

    @torch.no_grad()
    def response_logps(self, batch: SequenceBatch) -> Tensor:
        """log mu(y|x) of each sequence, nats, float64, shape [n]; exact."""
        scores = {}
        for member in self.mixture.members:
            with acting_as(self.model, member):
                scores[member] = response_logps(self.model, batch)
        return self.mixture.logps(scores)
