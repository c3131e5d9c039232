"""SPIN: play against the last iterate."""

from __future__ import annotations

from spin_lightning.mixtures import Mixture, latest
from spin_lightning.modules.base import SelfPlayModule


class SPIN(SelfPlayModule):
    """Self-play fine-tuning: the opponent and the reference are both the last iterate.

    p_{t+1} minimizes E[ loss( [log p(y|x) - log p_t(y|x)] - [log p(y'|x) - log p_t(y'|x)] ) ] with
    y from the data set and y' ~ p_t.

    Reference: Chen et al., "Self-Play Fine-Tuning Converts Weak Language Models to Strong Language
    Models", eq. 4.7 (https://arxiv.org/abs/2401.01335). Unlike the paper, we train an adapter
    instead of all weights, sample at temperature 1 without truncation, and train on the rows of
    iterate t alone, where the released scripts add those of iterate t - 1.
    """

    def opponent(self, t: int) -> Mixture:
        """Iterate t."""
        return latest(t)

    def reference(self, t: int) -> Mixture:
        """Iterate t."""
        return latest(t)
