"""SPACE: tell real from generated responses, each on its own."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from spin_lightning import losses
from spin_lightning.errors import check_settings, is_number
from spin_lightning.mixtures import (
    Geometric,
    Level,
    Mixture,
    Reference,
    check_alpha,
    latest,
    pulled_to_base,
)
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.modules.settings import all_values, at_iterate
from spin_lightning.types import PairLogps


class SPACE(SelfPlayModule):
    """Self-play by noise-contrastive estimation: real against generated, without a margin.

    p_{t+1} minimizes E[ -log s(r(y)) - mu log(1 - s(r(y'))) ] with r = log p - log R_t,
    s(z) = 1 / (1 + mu exp(-z)), y from the data set, y' ~ p_t and mu the `ratio`. One response is
    generated per real one, and the second term has the weight mu.

    Since y and y' are scored separately, R_t has to be normalized: the base is mixed in token by
    token.

    Args:
        ratio: mu, weight of generated responses relative to real ones, > 0.
        alpha: Weight of the base policy, in [0, 1]; one value or one per iterate.
        mixture: token; `sequence` needs `alpha: 0`, because its normalizer is unknown otherwise.
        kwargs: Settings of `SelfPlayModule` except `beta` and `loss`.

    Raises:
        SettingError: `ratio` is not positive, or `alpha` is outside [0, 1].

    Reference: arXiv 2512.07175; the formula is taken from secondary sources.
    """

    per_iterate: ClassVar[tuple[str, ...]] = (*SelfPlayModule.per_iterate, "alpha")
    without: ClassVar[frozenset[str]] = frozenset({"beta", "loss"})

    def __init__(
        self,
        ratio: float = 1.0,
        alpha: float | list[float] = 0.0,
        mixture: Level = "token",
        **kwargs: Any,
    ) -> None:
        """Keep the settings."""
        super().__init__(beta=None, loss=None, **kwargs)
        self.ratio = ratio
        check_settings(self, {"ratio": (is_number(ratio) and ratio > 0, "a number > 0")})
        self.alpha = alpha
        self.mixture = mixture
        for value in all_values(alpha):
            check_alpha(value)

    @property
    def normalizer_cancels(self) -> bool:
        """Responses are scored each on its own."""
        return False

    def opponent(self, t: int) -> Mixture:
        """Iterate t, mixed with the base at every token."""
        if self.mixture == "sequence":
            return latest(t)
        return pulled_to_base(latest(t), at_iterate(self.alpha, t))

    def reference(self, t: int) -> Reference:
        """The opponent's density."""
        if self.mixture == "sequence":
            return Geometric(latest(t), at_iterate(self.alpha, t))
        return self.opponent(t)

    def objective(self, logps: PairLogps) -> Tensor:
        """Mean of the noise-contrastive loss over the batch."""
        return losses.space(logps.real_log_ratio, logps.generated_log_ratio, self.ratio).mean()
