"""AlphaSPIN: stay close to the base."""

from __future__ import annotations

from typing import Any, ClassVar

from spin_lightning.mixtures import (
    Against,
    Geometric,
    Level,
    Mixture,
    Reference,
    check_alpha,
    check_history,
    pulled_to_base,
    referenced,
    window,
)
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.modules.settings import all_values, at_iterate


class AlphaSPIN(SelfPlayModule):
    """Self-play with a KL penalty towards the base, which makes the reference a geometric mixture.

    p_{t+1} minimizes E[ loss( [log p(y|x) - log R_t(y|x)] - [log p(y'|x) - log R_t(y'|x)] ) ] with
    log R_t = (1 - alpha) log mu_t + alpha log p_0 and mu_t the mixture of the last `history`
    iterates. At `alpha` 0 this is SPIN or MixtureSPIN; at 1 the reference is always the base, as in
    DPO.

    Args:
        alpha: Weight of the base policy, in [0, 1]; one value or one per iterate.
        history: Number of iterates to mix; null for all.
        mixture: sequence: as in the paper, y' ~ mu_t and R_t is over whole responses, known up to a
            factor per prompt that cancels in the margin. token: every member is mixed with the base
            at every token, y' is sampled from that mixture and R_t is its exact density.
        reference: opponent: as above. previous: p_t instead of mu_t in the reference.
        kwargs: Settings of `SelfPlayModule`.

    Raises:
        SettingError: `alpha` is outside [0, 1], or `history` is below 1.

    Reference: Alami et al., "Investigating Regularization of Self-Play Language Models"
    (https://arxiv.org/abs/2404.04291). The token-level mixture goes beyond the paper.
    """

    per_iterate: ClassVar[tuple[str, ...]] = (*SelfPlayModule.per_iterate, "alpha")

    def __init__(
        self,
        alpha: float | list[float],
        history: int | None = 1,
        mixture: Level = "sequence",
        reference: Against = "opponent",
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.alpha = alpha
        self.history = history
        self.mixture = mixture
        self.against = reference
        check_history(history)
        for value in all_values(alpha):
            check_alpha(value)

    def opponent(self, t: int) -> Mixture:
        """Equal mixture of the last `history` iterates, at the token level each with the base."""
        past = window(t, self.history)
        return past if self.mixture == "sequence" else pulled_to_base(past, self._alpha(t))

    def reference(self, t: int) -> Reference:
        """The geometric mixture of the opponent's iterates, or of iterate t, with the base."""
        past = referenced(t, window(t, self.history), self.against)
        if self.mixture == "sequence":
            return Geometric(past, self._alpha(t))
        return pulled_to_base(past, self._alpha(t))

    def _alpha(self, t: int) -> float:
        return at_iterate(self.alpha, t)
