"""TPAW: play against each of the last iterates at once, with adaptive weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from spin_lightning import losses
from spin_lightning.errors import check_settings, is_number
from spin_lightning.mixtures import Mixture, check_history, latest, window
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.types import PairLogps


class TPAW(SelfPlayModule):
    """Self-play against a team of past iterates, weighted by how well the policy beats each.

    p_{t+1} minimizes E[ sum_j w_j loss( a_j r_j(y) - r_j(y') ) ] over the last `history` iterates
    j, with r_j = log p - log p_j; `loss` has the temperature beta (the paper's lambda).

    - w_j = softmax_j( -`opponent_weight` beta [r_j(y) - r_j(y')] ): the iterates that the policy
      beats the least count the most. No gradient flows through it.
    - a_j = `player_weight` where r_j(y) <= 0, and 1 elsewhere: real responses that the policy finds
      less likely than iterate j does are raised first.

    The weights of each pair are those of its own y and y'. y' is drawn from the equal mixture of
    the same iterates: our reading, as the source does not say which of them wrote it.

    Args:
        history: Number of iterates to play against; null for all.
        player_weight: a_j of a real response with r_j(y) <= 0, > 0; 1 switches it off.
        opponent_weight: Sharpness of the softmax, >= 0; 0 gives equal weights.
        kwargs: Settings of `SelfPlayModule`.

    Raises:
        SettingError: `history` is below 1, `player_weight` not positive, or `opponent_weight`
            negative.

    Reference: arXiv 2605.09922; the formula and the defaults are taken from a secondary source.
    """

    def __init__(
        self,
        history: int | None = 3,
        player_weight: float = 6.0,
        opponent_weight: float = 0.5,
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(**kwargs)
        self.history = history
        self.player_weight = player_weight
        self.opponent_weight = opponent_weight
        check_history(history)
        check_settings(
            self,
            {
                "player_weight": (is_number(player_weight) and player_weight > 0, "a number > 0"),
                "opponent_weight": (
                    is_number(opponent_weight) and opponent_weight >= 0,
                    "a number >= 0",
                ),
            },
        )

    def opponent(self, t: int) -> Mixture:
        """Equal mixture of the last `history` iterates."""
        return window(t, self.history)

    def reference(self, t: int) -> Mixture:
        """The last iterate, for the logged rewards; the objective has a reference per iterate."""
        return latest(t)

    def further_references(self, t: int) -> list[Mixture]:
        """Each of the last `history` iterates."""
        return [latest(j) for j in window(t, self.history).members]

    @property
    def normalizer_cancels(self) -> bool:
        """Real responses are weighted apart."""
        return False

    def objective(self, logps: PairLogps) -> Tensor:
        """Mean over the batch of the weighted losses against each iterate."""
        assert self.loss is not None
        assert logps.policy_generated is not None
        assert logps.further_real is not None
        assert logps.further_generated is not None
        real = logps.policy_real[:, None] - logps.further_real
        generated = logps.policy_generated[:, None] - logps.further_generated
        with torch.no_grad():
            margins = self.reward_scale * (real - generated)
            of_opponents = torch.softmax(-self.opponent_weight * margins, dim=-1)
            of_player = torch.where(real <= 0, self.player_weight, 1.0)
        each = losses.of_pairs(self.loss)(of_player * real, generated, self.reward_scale)
        return (of_opponents * each).sum(dim=-1).mean()
