"""TSPIN: triplets with the base's own response, and no reference."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from spin_lightning import losses
from spin_lightning.errors import SettingError, check_settings, is_number
from spin_lightning.mixtures import Mixture, latest
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.types import PairLogps


class TSPIN(SelfPlayModule):
    """Self-play with triplets: the policy also learns how far it is from where it started.

    p_{t+1} minimizes E[ loss( log p(y|x) - log p(y'|x) ) + b loss( log p(y'|x) - log p(y0|x) ) ]
    with y from the data set, y' ~ p_t, y0 ~ p_0 and b the `first_weight`; `loss` has the
    temperature beta. y0 is the response that iterate 0 gave in its own rows, drawn once. At iterate
    0 it is y' itself, and the second term is constant.

    There is no reference. Rewards are logged against iterate t, as for SPIN.

    Args:
        first_weight: b, weight of the term that compares y' with y0, >= 0.
        kwargs: Settings of `SelfPlayModule`, except that `rows` is draw.

    Raises:
        SettingError: `first_weight` is negative, `rows` is union, or `loss` is not one of the
            margin.

    Reference: arXiv 2601.08198; the formula is taken from secondary sources, which do not give the
    weight of the second term: 1 is ours.
    """

    uses_first_responses: ClassVar[bool] = True

    def __init__(self, first_weight: float = 1.0, **kwargs: Any) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.first_weight = first_weight
        is_valid = is_number(first_weight) and first_weight >= 0
        check_settings(self, {"first_weight": (is_valid, "a number >= 0")})
        if self.rows != "draw":
            raise SettingError(
                "rows",
                self.rows,
                "TSPIN has one opponent, whose rows have the numbers of iterate 0's",
                fix="leave rows out (draw)",
            )
        if self.loss is not None and not losses.depends_on_margin(self.loss):
            raise SettingError(
                "loss",
                self.loss,
                "TSPIN compares log-probs without a reference",
                fix="give a loss of the margin, such as logistic",
            )

    def opponent(self, t: int) -> Mixture:
        """Iterate t."""
        return latest(t)

    def reference(self, t: int) -> Mixture:
        """Iterate t, for the logged rewards alone."""
        return latest(t)

    def objective(self, logps: PairLogps) -> Tensor:
        """Mean over the batch of the losses of both comparisons."""
        assert self.loss is not None
        assert logps.policy_generated is not None
        assert logps.policy_first is not None
        loss = losses.of_pairs(self.loss)
        won = loss(logps.policy_real, logps.policy_generated, self.reward_scale)
        gained = loss(logps.policy_generated, logps.policy_first, self.reward_scale)
        return (won + self.first_weight * gained).mean()
