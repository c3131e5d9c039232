"""Opponents and references as data: which iterates, with which weights, how close to the base.

There are two ways to combine policies. An arithmetic mixture of whole responses can be sampled
(draw a member, then a response from it) and its density is exact. A geometric mixture with the base
is what a KL penalty towards the base turns a reference into. Over whole responses it is known up to
a normalizer that depends on the prompt alone; token by token it is normalized and can be sampled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from spin_lightning.errors import SettingError, is_number, is_whole

# The denominator of log-ratios: the opponent's own mixture, or the last iterate alone.
Against = Literal["opponent", "previous"]
# Whether a geometric mixture with the base is over whole responses or token by token.
Level = Literal["sequence", "token"]


@dataclass(frozen=True)
class Mixture:
    """Arithmetic mixture of iterates: mu(y|x) = sum_i w_i p_i(y|x), over whole responses.

    It can be sampled (draw i with probability w_i, then y' ~ p_i) and its density is exact.
    It is not the average of per-token probabilities.

    With a `token_alpha`, the members are not the iterates p_i but their geometric mixtures with the
    base at every token, g_i(y_s|x,y_<s) = softmax((1 - alpha) log p_i + alpha log p_0).

    Attributes:
        weights: Weight of each iterate, > 0, summing to 1, by ascending iterate index.
        token_alpha: Weight of the base at every token, in [0, 1]; 0 for the iterates themselves.

    Raises:
        SettingError: A weight is negative or non-finite, an index is negative, the weights do not
            sum to 1 within 1e-9, or `token_alpha` is outside [0, 1].

    Example:
        >>> Mixture({1: 0.5, 2: 0.5}).members
        (1, 2)
    """

    weights: Mapping[int, float]
    token_alpha: float = 0.0

    def __post_init__(self) -> None:
        """Check the weights and drop members of weight 0."""
        check_alpha(self.token_alpha)
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
        """Iterates with a positive weight, ascending."""
        return tuple(self.weights)

    @property
    def plain_members(self) -> tuple[int, ...]:
        """Iterates i whose log p_i the density depends on, ascending."""
        return () if self.token_alpha else self.members

    @property
    def token_members(self) -> tuple[int, ...]:
        """Iterates i whose log g_i the density depends on, ascending."""
        return self.members if self.token_alpha else ()

    def draw(self, uniform: float) -> int:
        """Map a uniform number in [0, 1) to an iterate by the inverse CDF of the weights."""
        cumulative = 0.0
        for member, weight in self.weights.items():
            cumulative += weight
            if uniform < cumulative:
                return member
        return self.members[-1]

    def logps(
        self,
        member_logps: Mapping[int, Tensor],
        token_logps: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Return log mu(y|x) of responses, shape [...].

        Args:
            member_logps: log p_i(y|x) of each plain member, nats, each of shape [...].
            token_logps: log g_i(y|x) of each token-level member, likewise.
        """
        scores = (token_logps or {}) if self.token_alpha else member_logps
        stacked = torch.stack([scores[i] for i in self.members], dim=-1)
        weights = torch.tensor(list(self.weights.values()), dtype=torch.float64)
        return mixture_logps(stacked, weights)

    def __str__(self) -> str:
        """The weighted iterates, as a range if they are consecutive and weigh the same."""
        near_base = f" ~{self.token_alpha:.3g}·p0" if self.token_alpha else ""
        return self._names() + near_base

    def _names(self) -> str:
        first, last, values = self.members[0], self.members[-1], list(self.weights.values())
        if last == first:
            return f"p{first}"
        if last - first + 1 == len(values) and max(values) - min(values) < 1e-9:
            return f"p{first}..p{last}"
        return "+".join(f"{weight:.3g}·p{i}" for i, weight in self.weights.items())


@dataclass(frozen=True)
class Geometric:
    """Geometric mixture of an arithmetic mixture and the base, over whole responses.

    log R(y|x) = (1 - alpha) log mu(y|x) + alpha log p_0(y|x), up to log Z(x), which is the same for
    every response to a prompt and cancels in losses of the margin. It cannot be sampled, so it can
    only be a reference.

    Attributes:
        mixture: mu, over plain iterates.
        alpha: Weight of the base, in [0, 1]; 0 gives the mixture itself, 1 the base.

    Raises:
        SettingError: `alpha` is outside [0, 1], or the mixture is already token-level.
    """

    mixture: Mixture
    alpha: float

    def __post_init__(self) -> None:
        """Check the weight."""
        check_alpha(self.alpha)
        if self.mixture.token_alpha:
            raise SettingError(
                "Geometric",
                str(self.mixture),
                "its members are already mixed with the base, token by token",
                fix="give a mixture without token_alpha",
            )

    @property
    def members(self) -> tuple[int, ...]:
        """Iterates with a positive weight, ascending."""
        mixed = self.mixture.members if self.alpha < 1 else ()
        return tuple(sorted({*mixed, 0} if self.alpha > 0 else mixed))

    @property
    def plain_members(self) -> tuple[int, ...]:
        """Iterates i whose log p_i the density depends on, ascending."""
        return self.members

    @property
    def token_members(self) -> tuple[int, ...]:
        """Empty: the density depends on plain log-probs only."""
        return ()

    @property
    def token_alpha(self) -> float:
        """Always 0: nothing is mixed token by token."""
        return 0.0

    @property
    def is_normalized(self) -> bool:
        """Whether log Z(x) is 0, as for an arithmetic mixture or the base alone."""
        return self.alpha in (0, 1) or self.mixture.members == (0,)

    def logps(
        self,
        member_logps: Mapping[int, Tensor],
        _token_logps: Mapping[int, Tensor] | None = None,
    ) -> Tensor:
        """Return log R(y|x) + log Z(x) of responses, shape [...].

        Args:
            member_logps: log p_i(y|x) of each member, nats, each of shape [...].
        """
        if self.alpha == 1:
            return member_logps[0]
        mixed = self.mixture.logps(member_logps)
        return mixed if self.alpha == 0 else (1 - self.alpha) * mixed + self.alpha * member_logps[0]

    def __str__(self) -> str:
        """The mixture and the weight of the base."""
        return f"({self.mixture})^{1 - self.alpha:.3g}·p0^{self.alpha:.3g}"


Reference = Mixture | Geometric


def check_alpha(alpha: float) -> None:
    """Check the weight of the base policy.

    Raises:
        SettingError: `alpha` is not a number in [0, 1].
    """
    if not is_number(alpha) or not 0 <= alpha <= 1:
        raise SettingError(
            "alpha",
            alpha,
            "it is the weight of the base policy",
            fix="give a number from 0 (no pull to the base) to 1 (the base alone)",
        )


def check_history(history: int | None) -> None:
    """Check the number of iterates to mix; None means all of them.

    Raises:
        SettingError: `history` is not a positive integer.
    """
    if history is not None and not is_whole(history, 1):
        raise SettingError(
            "history",
            history,
            "a history holds at least one iterate",
            fix="give 1 or more, or null for all",
        )


def latest(t: int) -> Mixture:
    """SPIN's opponent and reference: iterate t alone."""
    return Mixture({t: 1.0})


def uniform(members: range | list[int] | tuple[int, ...]) -> Mixture:
    """Equal weights over `members`."""
    return Mixture.normalized(dict.fromkeys(members, 1.0))


def window(t: int, history: int | None) -> Mixture:
    """Equal weights over the last `history` iterates up to t; None means all of them.

    Raises:
        SettingError: `history` is not a positive integer.
    """
    check_history(history)
    first = 0 if history is None else max(0, t - history + 1)
    return uniform(range(first, t + 1))


def referenced(t: int, opponent: Mixture, against: Against) -> Mixture:
    """The arithmetic part of a reference: the opponent's own mixture, or the last iterate alone.

    Args:
        t: Index of the last iterate.
        opponent: The mixture that generates.
        against: `opponent`, or `previous` as in SPIN's released scripts.
    """
    return opponent if against == "opponent" else latest(t)


def pulled_to_base(mixture: Mixture, alpha: float) -> Mixture:
    """A mixture of the iterates' token-level geometric mixtures with the base.

    Where that equals a mixture of plain iterates, the plain mixture is returned: the mixture itself
    at `alpha` 0, the base at `alpha` 1 or if the base is the only member.
    """
    if alpha == 1 or mixture.members == (0,):
        return base()
    return Mixture(mixture.weights, token_alpha=alpha)


def base() -> Mixture:
    """The base policy (iterate 0) alone, as in DPO's reference."""
    return latest(0)


def mixture_logps(logps: Tensor, weights: Tensor | None = None) -> Tensor:
    """Exact log-density of an arithmetic mixture: logsumexp_i (log p_i + log w_i).

    Args:
        logps: log p_i(y|x) of each member, nats, shape [..., h].
        weights: Weights of the members, summing to 1, shape [h]; default equal weights.

    Returns:
        log mu(y|x), nats, shape [...], in the dtype of `logps`.

    Example:
        >>> mixture_logps(torch.tensor([0.2, 0.4], dtype=torch.float64).log()).exp()
        tensor(0.3000, dtype=torch.float64)
    """
    if weights is None:
        weights = torch.full((logps.shape[-1],), 1.0 / logps.shape[-1], dtype=torch.float64)
    return torch.logsumexp(logps + weights.log().to(logps), dim=-1)
