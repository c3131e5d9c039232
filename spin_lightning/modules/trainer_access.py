"""Typed access to what Lightning's Trainer holds untyped or private."""

from __future__ import annotations

import math
from typing import cast

import lightning as L
from lightning.pytorch.callbacks import Callback

from spin_lightning.policies.base import Policy
from spin_lightning.types import DataForModule


def datamodule_of(trainer: L.Trainer) -> DataForModule:
    """The data module of the run; `SelfPlay.setup` has checked that there is one."""
    # A connector sets the attribute, where mypy does not see it.
    return cast(DataForModule, trainer.datamodule)  # type: ignore[attr-defined]


def callbacks_of(trainer: L.Trainer) -> list[Callback]:
    """The trainer's callbacks, in their order."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]  # a connector sets it
    return callbacks


def serve_others(trainer: L.Trainer) -> None:
    """Let the policy, once there is one, take part in the passes of other processes."""
    policy = trainer.lightning_module._modules.get("policy")
    if policy is not None:
        cast(Policy, policy).serve_others()


def is_mid_step(trainer: L.Trainer) -> bool:
    """Whether gradients have accumulated that no optimizer step has used yet."""
    return trainer.fit_loop._should_accumulate()


def steps_per_epoch(trainer: L.Trainer, t: int) -> int:
    """Optimizer steps in an epoch on the rows of iterate t, which need not be made yet."""
    return max(1, math.ceil(batches_per_epoch(trainer, t) / trainer.accumulate_grad_batches))


def batches_per_epoch(trainer: L.Trainer, t: int) -> int:
    """Batches of an epoch on the rows of iterate t that the Trainer uses."""
    batches = datamodule_of(trainer).batches_per_epoch(t, trainer.world_size)
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)


def step_share(trainer: L.Trainer, t: int, batch_idx: int) -> float:
    """Factor of a training batch's mean loss, so that each step is the mean over all its rows.

    Lightning divides by `accumulate_grad_batches` even in the last window of an epoch, which may
    have fewer batches, and gives all batches and ranks the same weight, whatever their rows.
    """
    share = rank_share(trainer, t, batch_idx)
    batches = trainer.accumulate_grad_batches
    if batches == 1:
        return share
    limit = batches_per_epoch(trainer, t)
    return share * datamodule_of(trainer).window_share(t, batch_idx, batches, limit)


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
