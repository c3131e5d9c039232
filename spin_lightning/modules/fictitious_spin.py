"""FictitiousSPIN: play against all past iterates."""

from __future__ import annotations

from typing import Any

from spin_lightning.mixtures import Against, Mixture, referenced, window
from spin_lightning.modules.base import SelfPlayModule


class FictitiousSPIN(SelfPlayModule):
    """Fictitious play: the opponent is the equal mixture of all iterates so far.

    This is `MixtureSPIN` with the whole history, mu_t(y|x) = (1/(t+1)) sum_{i<=t} p_i(y|x). Under
    exact best responses mu_t converges as well as the last iterate; evaluate both (`load_mixture`
    returns mu_t).

    Args:
        reference: opponent: log-ratios to mu_t. previous: log-ratios to p_t alone, while mu_t
            generates.
        kwargs: Settings of `SelfPlayModule`.

    Reference: Alami et al., "Investigating Regularization of Self-Play Language Models"
    (https://arxiv.org/abs/2404.04291). We use the exact density of the mixture as the reference.
    """

    def __init__(self, reference: Against = "opponent", **kwargs: Any) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.against = reference

    def opponent(self, t: int) -> Mixture:
        """Equal mixture of all iterates up to t."""
        return window(t, history=None)

    def reference(self, t: int) -> Mixture:
        """The opponent's mixture, or iterate t alone."""
        return referenced(t, self.opponent(t), self.against)
