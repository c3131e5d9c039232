"""SFT: supervised fine-tuning, as a control."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from spin_lightning import losses
from spin_lightning.mixtures import Mixture, latest
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.types import PairLogps


class SFT(SelfPlayModule):
    """Supervised fine-tuning through the same policy, data, steps and run folder.

    Minimizes the mean over examples of the negative log-likelihood per token of the real response,
    -log p(y|x) / |y|. No responses are generated for training. Responses to held-out examples are
    generated and scored as in self-play, so every validation metric is comparable. Rewards are
    log-ratios to the last iterate, with beta = 1.

    Takes every argument of `SelfPlayModule` except `beta`, `loss` and `real_nll_weight`.
    """

    without: ClassVar[frozenset[str]] = frozenset({"beta", "loss", "real_nll_weight"})

    def __init__(self, **kwargs: Any) -> None:
        """Keep the settings."""
        super().__init__(beta=None, loss=None, real_nll_weight=None, **kwargs)

    def opponent(self, t: int) -> None:
        """None: training uses real responses only."""
        return None

    def reference(self, t: int) -> Mixture:
        """Iterate t, for the rewards of validation pairs."""
        return latest(t)

    def objective(self, logps: PairLogps) -> Tensor:
        """Mean negative log-likelihood per token of the real responses."""
        return losses.real_nll(logps.policy_real, logps.real_lengths)
