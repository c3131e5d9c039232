"""Typed access to what Lightning's Trainer holds untyped or private."""

from __future__ import annotations

import math
from typing import cast

import lightning as L

from spin_lightning.types import DataForModule


def datamodule_of(trainer: L.Trainer) -> DataForModule:
    """The data module of the run; `SelfPlay.setup` has checked that there is one."""
    # A connector sets the attribute, where mypy does not see it.
    return cast(DataForModule, trainer.datamodule)  # type: ignore[attr-defined]


def is_mid_step(trainer: L.Trainer) -> bool:
    """Whether gradients have accumulated that no optimizer step has used yet."""
    return trainer.fit_loop._should_accumulate()


def steps_per_epoch(trainer: L.Trainer, t: int) -> int:
    """Optimizer steps in an epoch on the rows of iterate t, which need not be made yet."""
    batches = datamodule_of(trainer).batches_per_epoch(t, trainer.world_size)
    limit = trainer.limit_train_batches
    batches = min(batches, limit) if isinstance(limit, int) else int(batches * limit)
    return max(1, math.ceil(batches / trainer.accumulate_grad_batches))


def rank_share(trainer: L.Trainer, t: int, batch_idx: int, *, held_out: bool = False) -> float:
    """Weight of this rank's loss in the mean over ranks; only an uneven last batch differs from 1.

    Args:
        trainer: The Trainer of the run.
        t: The iterate whose rows are used.
        batch_idx: Index of the batch in its epoch.
        held_out: Whether the batch is one of held-out rows.
    """
    if trainer.world_size == 1:
        return 1.0
    return datamodule_of(trainer).rank_share(t, batch_idx, held_out=held_out)
