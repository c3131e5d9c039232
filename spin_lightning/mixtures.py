"""Opponents and references as data: which iterates, with which weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from spin_lightning.errors import SettingError


@dataclass(frozen=True)
class Mixture:
    """Arithmetic mixture of iterates: mu(y|x) = sum_i w_i p_i(y|x), over whole responses.

    It can be sampled (draw i with probability w_i, then y' ~ p_i) and its density is exact.
    It is not the average of per-token probabilities.

    Attributes:
        weights: Weight of each iterate, > 0, summing to 1, by ascending iterate index.

    Raises:
        SettingError: A negative or non-finite weight, a negative index, or weights whose sum is
            not 1 to 1e-9.

    Example:
        >>> Mixture({1: 0.5, 2: 0.5}).members
        (1, 2)
    """

    weights: Mapping[int, float]

    def __post_init__(self) -> None:
        """Check the weights and drop the members that have none."""
        for member, weight in self.weights.items():
            if member < 0 or not math.isfinite(weight) or weight < 0:
                raise SettingError(
                    "mixture weights",
                    dict(self.weights),
                    f"iterate {member} has weight {weight}",
                    fix="give iterates >= 0 finite weights >= 0",
                )
        total = math.fsum(self.weights.values())
        if abs(total - 1.0) > 1e-9:
            raise SettingError(
                "mixture weights",
                dict(self.weights),
                f"they sum to {total}, not to 1",
                fix="divide them by their sum, or build the mixture with Mixture.normalized",
            )
        kept = {i: self.weights[i] for i in sorted(self.weights) if self.weights[i] > 0}
        object.__setattr__(self, "weights", kept)

    @classmethod
    def normalized(cls, weights: Mapping[int, float]) -> Mixture:
        """Build a mixture from weights of any positive sum."""
        total = math.fsum(weights.values())
        if not total > 0:
            raise SettingError(
                "mixture weights", dict(weights), f"they sum to {total}", fix="give weights > 0"
            )
        return cls({member: weight / total for member, weight in weights.items()})

    @property
    def members(self) -> tuple[int, ...]:
        """The iterates that carry weight, ascending."""
        return tuple(self.weights)

    def draw(self, uniform: float) -> int:
        """Return the iterate that a uniform number in [0, 1) picks, by the inverse CDF."""
        cumulative = 0.0
        for member, weight in self.weights.items():
            cumulative += weight
            if uniform < cumulative:
                return member
        return self.members[-1]

    def logps(self, member_logps: Mapping[int, Tensor]) -> Tensor:
        """Return log mu(y|x) from log p_i(y|x) of each member, all of shape [...]."""
        stacked = torch.stack([member_logps[i] for i in self.members], dim=-1)
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        return mixture_logps(stacked, weights)

    def __str__(self) -> str:
        """Name the iterates; a range where consecutive ones weigh the same."""
        first, last, values = self.members[0], self.members[-1], list(self.weights.values())
        if last == first:
            return f"p{first}"
        if last - first + 1 == len(values) and max(values) - min(values) < 1e-9:
            return f"p{first}..p{last}"
        return "+".join(f"{weight:.3g}·p{i}" for i, weight in self.weights.items())


def latest(t: int) -> Mixture:
    """SPIN's opponent and reference: iterate t alone."""
    return Mixture({t: 1.0})


def uniform(members: range | list[int] | tuple[int, ...]) -> Mixture:
    """Equal weights over `members`."""
    return Mixture.normalized(dict.fromkeys(members, 1.0))


def window(t: int, history: int | None) -> Mixture:
    """Equal weights over the last `history` iterates up to t; None means all of them.

    Raises:
        SettingError: `history` below 1.
    """
    if history is not None and history < 1:
        raise SettingError(
            "history",
            history,
            "a history holds at least one iterate",
            fix="give 1 or more, or null for all",
        )
    first = 0 if history is None else max(0, t - history + 1)
    return uniform(range(first, t + 1))


def base() -> Mixture:
    """The base policy, iterate 0, alone: the reference of DPO."""
    return latest(0)


def mixture_logps(logps: Tensor, weights: Tensor | None = None) -> Tensor:
    """Exact log-density of an arithmetic mixture: logsumexp_i (log p_i + log w_i).

    Args:
        logps: log p_i(y|x) of each member, nats, shape [..., h].
        weights: Weights of the members, summing to 1, shape [h]; equal ones when None.

    Returns:
        log mu(y|x), nats, shape [...], in the dtype of `logps`.

    Example:
        >>> mixture_logps(torch.tensor([0.2, 0.4], dtype=torch.float64).log()).exp()
        tensor(0.3000, dtype=torch.float64)
    """
    if weights is None:
        weights = torch.full((logps.shape[-1],), 1.0 / logps.shape[-1], dtype=torch.float64)
    return torch.logsumexp(logps + weights.log().to(logps), dim=-1)
