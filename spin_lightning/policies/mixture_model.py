"""A mixture of iterates as one model, and how a policy computes a mixture member by member."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from spin_lightning.errors import SettingError
from spin_lightning.mixtures import Mixture
from spin_lightning.policies.base import Policy
from spin_lightning.types import SequenceBatch

T = TypeVar("T")


def by_member(policy: Policy, mixture: Mixture, score: Callable[[], T]) -> dict[int, T]:
    """Call `score` once per member of a mixture, with the policy acting as that member.

    Returns:
        The results by member, in the order of the members.
    """
    scores = {}
    for member in mixture.members:
        with policy.at(member):
            scores[member] = score()
    return scores


def write_by_member(
    policy: Policy, drawn: Sequence[int], write: Callable[[list[int]], Sequence[T]]
) -> list[T]:
    """Write each row with the member drawn for it, one call per member.

    Args:
        policy: The policy that acts as the members.
        drawn: The member of each of n rows.
        write: Called with the rows of one member while the policy acts as it; returns one result
            for each of these rows.

    Returns:
        The n results, in the order of the rows.
    """
    written: dict[int, T] = {}
    for member in sorted(set(drawn)):
        rows = [row for row, own in enumerate(drawn) if own == member]
        with policy.at(member):
            written.update(zip(rows, write(rows), strict=True))
    return [written[row] for row in range(len(drawn))]


class MixtureModel(nn.Module):
    """The policy mu(y|x) = sum_i w_i p_i(y|x) over whole responses.

    It has no next-token distribution. Each response is written by one iterate, drawn
    separately for every row; its probability is the weighted mean of the iterates' probabilities.

    Args:
        mixture: The iterates and their weights.
        policy: A policy that can act as these iterates.

    Raises:
        SettingError: The mixture is of token-level mixtures with the base.
    """

    def __init__(self, mixture: Mixture, policy: Policy) -> None:
        """Keep the mixture and the policy."""
        super().__init__()
        if mixture.token_alpha:
            raise SettingError(
                "mixture",
                str(mixture),
                "its members are mixed with the base at every token",
                fix="give a mixture without token_alpha",
            )
        self.mixture = mixture
        self.policy = policy

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Sample one response per row, each from an iterate drawn with torch's global random state.

        Args:
            input_ids: Left-padded prompts, int64, shape [n, length].
            attention_mask: 1 where a column holds a token, likewise; default all ones.
            kwargs: Arguments of transformers' `generate`; by default it samples at temperature 1
                without truncation.

        Returns:
            Prompts and responses, right-padded, int64, shape [n, longest].
        """
        model: Any = self.policy.model
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        options = {"do_sample": True, "top_k": 0, "top_p": 1.0, "temperature": 1.0, **kwargs}
        weights = torch.tensor(list(self.mixture.weights.values()), dtype=torch.float64)
        members = torch.tensor(self.mixture.members)
        drawn = members[torch.multinomial(weights, len(input_ids), replacement=True)]

        def write(rows: list[int]) -> list[Tensor]:
            chosen = torch.tensor(rows, device=input_ids.device)
            return list(
                model.generate(input_ids=input_ids[chosen], attention_mask=mask[chosen], **options)
            )

        written = write_by_member(self.policy, drawn.tolist(), write)
        pad = model.generation_config.pad_token_id
        return pad_sequence(written, batch_first=True, padding_value=pad or 0)

    @torch.no_grad()
    def response_logps(self, batch: SequenceBatch) -> Tensor:
        """log mu(y|x) of each sequence, nats, float64, shape [n]; exact."""
        scores = by_member(self.policy, self.mixture, lambda: self.policy.logps(batch))
        return self.mixture.logps(scores)
