"""The mean loss of an epoch, over all of its batches and ranks, also after a resume within it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from torch import Tensor


@dataclass
class EpochLoss:
    """Sum and weight of the losses of an epoch so far, of this rank.

    Attributes:
        epoch: The epoch.
        total: Sum over pairs and number of pairs, float64, shape [2].
    """

    epoch: int = 0
    total: Tensor = field(default_factory=lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, epoch: int, loss: Tensor, pairs: float) -> None:
        """Add a batch.

        Args:
            epoch: Its epoch; that of another epoch starts a new sum.
            loss: Its mean loss, shape [].
            pairs: Number of its pairs.
        """
        if epoch != self.epoch:
            self.epoch, self.total = epoch, torch.zeros_like(self.total)
        loss = loss.detach().double()
        added = torch.stack([loss * pairs, loss.new_tensor(pairs)])
        self.total = self.total.to(loss.device) + added

    @property
    def has_batches(self) -> bool:
        """Whether a batch was added since the last mean was taken."""
        return bool(self.total[1])

    def take(self, trainer: L.Trainer) -> float | None:
        """The mean over all ranks, and start again; None without a batch. All ranks call it."""
        total = self._of_ranks(trainer).sum(dim=0)
        self.total = torch.zeros_like(self.total)
        return float(total[0] / total[1]) if total[1] else None

    def state(self, trainer: L.Trainer) -> dict[str, Any]:
        """The sums of all ranks as plain values. All ranks call it."""
        return {"epoch": self.epoch, "ranks": self._of_ranks(trainer).tolist()}

    def restore(self, state: Mapping[str, Any] | None, trainer: L.Trainer | None) -> None:
        """Continue from a state; None, as in checkpoints of older versions, starts from 0.

        Args:
            state: What `state` returned.
            trainer: The trainer, if there is one. With another number of ranks than in the state,
                rank 0 continues from the sum of all.
        """
        self.epoch, total = 0, torch.zeros(2, dtype=torch.float64)
        if state is not None:
            self.epoch, ranks = state["epoch"], torch.tensor(state["ranks"], dtype=torch.float64)
            rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
            if len(ranks) == world_size:
                total = ranks[rank]
            elif rank == 0:
                total = ranks.sum(dim=0)
        self.total = total

    def _of_ranks(self, trainer: L.Trainer) -> Tensor:
        """Sum and weight of each rank, shape [ranks, 2]."""
        device = trainer.strategy.root_device
        gathered: Tensor = trainer.strategy.all_gather(self.total.to(device))
        return gathered.reshape(-1, 2).cpu()
