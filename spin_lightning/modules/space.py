"""SPACE: tell real from generated responses, each by itself."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from spin_lightning import losses
from spin_lightning.errors import SettingError, is_number
from spin_lightning.mixtures import Geometric, Level, Mixture, Reference, latest, pulled_to_base
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.modules.settings import at_iterate
from spin_lightning.types import PairLogps


class SPACE(SelfPlayModule):
    """Self-play by noise-contrastive estimation: real against generated, without a margin.

    p_{t+1} minimizes E[ -log s(r(y)) - mu log(1 - s(r(y'))) ] with r = log p - log R_t,
    s(z) = 1 / (1 + mu exp(-z)), y from the data set, y' ~ p_t and mu the `ratio`. One response is
    generated per real one, and the second term carries the weight mu.

    Since y and y' are scored apart, R_t has to be normalized: the base is mixed in token by token.

    Args:
        ratio: mu, weight of generated responses against real ones, > 0.
        alpha: Weight of the base policy, in [0, 1]; one value or one per iterate.
        mixture: token; `sequence` is refused with an `alpha` > 0, whose normalizer is not known.
        kwargs: Settings of `SelfPlayModule` but `beta` and `loss`.

    Raises:
        SettingError: A `ratio` that is not positive, or an `alpha` outside [0, 1].

    Reference: arXiv 2512.07175, whose formula we know from secondary sources only.
    """

    per_iterate: ClassVar[tuple[str, ...]] = (*SelfPlayModule.per_iterate, "alpha")
    normalizer_cancels: ClassVar[bool] = False
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
        if not is_number(ratio) or ratio <= 0:
            raise SettingError("ratio", ratio, "out of range", fix="give a number > 0")
        self.ratio = ratio
        self.alpha = alpha
        self.mixture = mixture
        for value in alpha if isinstance(alpha, list) else [alpha]:
            Geometric(latest(0), value)  # refuses what is out of range

    def opponent(self, t: int) -> Mixture:
        """Iterate t, mixed with the base at every token."""
        if self.mixture == "sequence":
            return latest(t)
        return pulled_to_base(latest(t), at_iterate(self.alpha, t))

    def reference(self, t: int) -> Reference:
        """The opponent."""
        if self.mixture == "sequence":
            return Geometric(latest(t), at_iterate(self.alpha, t))
        return self.opponent(t)

    def objective(self, logps: PairLogps) -> Tensor:
        """Mean of the noise-contrastive loss over the batch."""
        return losses.space(logps.real_log_ratio, logps.generated_log_ratio, self.ratio).mean()
