"""A variant whose log-probs are NaN or infinite for some examples during training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from spin_lightning import SelfPlayModule
from spin_lightning.mixtures import Mixture, latest
from spin_lightning.types import PairBatch, PairLogps


class PoisonedSPIN(SelfPlayModule):
    """SPIN with factors on the log-probs of some examples.

    Args:
        poison: Factors as example:value, such as `3:nan 5:inf`.
        kwargs: Settings of `SelfPlayModule`.
    """

    def __init__(self, poison: str = "", **kwargs: Any) -> None:
        super().__init__(**kwargs)
        pairs = (part.split(":") for part in poison.split())
        self.poison = {int(example): float(value) for example, value in pairs}

    def opponent(self, t: int) -> Mixture:
        return latest(t)

    def reference(self, t: int) -> Mixture:
        return latest(t)

    def pair_logps(self, batch: PairBatch) -> PairLogps:
        logps = super().pair_logps(batch)
        if not self.trainer.training:
            return logps
        factor = [self.poison.get(example, 1.0) for example, _ in batch.row_ids]
        return replace(
            logps, policy_real=logps.policy_real * torch.tensor(factor, dtype=torch.float64)
        )
