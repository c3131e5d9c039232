"""MixtureSPIN: play against the last few iterates."""

from __future__ import annotations

from typing import Any

from spin_lightning.mixtures import Against, Mixture, check_history, referenced, window
from spin_lightning.modules.base import SelfPlayModule


class MixtureSPIN(SelfPlayModule):
    """Self-play against an equal mixture of the last iterates, which averages out their errors.

    p_{t+1} minimizes E[ loss( [log p(y|x) - log mu(y|x)] - [log p(y'|x) - log mu(y'|x)] ) ] with y
    from the data set, y' ~ mu and mu(y|x) = (1/|H|) sum_{i in H} p_i(y|x), H the last `history`
    iterates up to t: an arithmetic mixture of whole responses. SPIN at `history` 1.

    Args:
        history: Number of iterates to mix; null for all.
        reference: opponent: log-ratios to mu. previous: log-ratios to p_t alone, while mu
            generates; with `history: 2` and `rows: union`, as in SPIN's released scripts.
        kwargs: Settings of `SelfPlayModule`.

    Reference: Alami et al., "Investigating Regularization of Self-Play Language Models"
    (https://arxiv.org/abs/2404.04291). We use the exact density of the mixture as the reference.
    """

    def __init__(
        self, history: int | None = 2, reference: Against = "opponent", **kwargs: Any
    ) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        check_history(history)
        self.history = history
        self.against = reference

    def opponent(self, t: int) -> Mixture:
        """Equal mixture of the last `history` iterates."""
        return window(t, self.history)

    def reference(self, t: int) -> Mixture:
        """The opponent's mixture, or iterate t alone."""
        return referenced(t, self.opponent(t), self.against)
