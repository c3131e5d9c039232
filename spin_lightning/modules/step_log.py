"""Logging of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from spin_lightning import losses
from spin_lightning.metrics import first_margin, pair_statistics
from spin_lightning.types import PairLogps

if TYPE_CHECKING:
    from spin_lightning.modules.base import SelfPlayModule

# Nats.
_LARGEST_FIRST_MARGIN = 0.1


def log_step(module: SelfPlayModule, logps: PairLogps, loss: Tensor) -> None:
    """Log the statistics of a batch, its loss and the learning rate.

    Args:
        module: The module in training.
        logps: Log-probs of n pairs.
        loss: The objective.
    """
    pairs, beta = len(logps.policy_real), module.reward_scale
    statistics = {name: s.mean for name, s in pair_statistics(logps, beta).items()}
    statistics["loss"] = loss.detach()
    if module.loss == "exponential":
        statistics["overflows"] = losses.overflows(logps.margin.detach(), beta).double()
    module.log_dict({f"train/{name}": s for name, s in statistics.items()}, batch_size=pairs)
    module.log("train/learning_rate", float(module.trainer.optimizers[0].param_groups[0]["lr"]))
    module.log(
        "train/loss_epoch",
        loss,
        on_step=False,
        on_epoch=True,
        batch_size=pairs,
        sync_dist=True,
    )


def log_first_margin(module: SelfPlayModule, logps: PairLogps) -> None:
    """Log how far the first margin is from 0, if policy and reference are the same at the start.

    Args:
        module: The module in training.
        logps: Log-probs of the first batch of an iterate.
    """
    reference = module.reference(module.iterate)
    same = reference.plain_members == (module.iterate,) and not reference.token_members
    if logps.policy_generated is None or not same:
        return
    values = {f"train/{name}": value for name, value in first_margin(logps).items()}
    for logger in module.loggers:
        logger.log_metrics(values, step=module.global_step)
    if values["train/first_margin_abs"] > _LARGEST_FIRST_MARGIN:
        module.print(
            f"WARNING: the first margin of iterate {module.iterate + 1} is "
            f"{values['train/first_margin_abs']:.3g} nats and should be 0: training and scoring "
            "disagree (low precision, or LoRA dropout)."
        )
