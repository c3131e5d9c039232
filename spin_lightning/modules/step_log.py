"""Logging of a training step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from spin_lightning import losses
from spin_lightning.metrics import first_margin, pair_statistics
from spin_lightning.types import PairLogps

if TYPE_CHECKING:
    from spin_lightning.modules.base import SelfPlayModule

# Largest first margin that rounding explains, in nats per square root of a token: rounding errors
# of the tokens of a response add up like a random walk.
_LARGEST_FIRST_MARGIN = {torch.float32: 0.01, torch.float16: 0.02, torch.bfloat16: 0.05}


def log_step(module: SelfPlayModule, logps: PairLogps, loss: Tensor, share: float) -> None:
    """Log the statistics of a batch, its loss and the learning rate.

    Args:
        module: The module in training.
        logps: Log-probs of n pairs.
        loss: The objective.
        share: Weight of this rank's batch in the mean over ranks; 0 for a repeated row.
    """
    pairs, beta = len(logps.policy_real), module.reward_scale
    statistics = {name: s.mean for name, s in pair_statistics(logps, beta).items()}
    statistics["loss"] = loss.detach()
    if module.loss == "exponential":
        statistics["overflows"] = losses.overflows(logps.margin.detach(), beta).double()
    module.log_dict({f"train/{name}": s for name, s in statistics.items()}, batch_size=pairs)
    module.log("train/learning_rate", float(module.trainer.optimizers[0].param_groups[0]["lr"]))
    module.epoch_loss.add(module.current_epoch, loss, pairs if share else 0)


def log_epoch_loss(module: SelfPlayModule) -> None:
    """Log the mean loss of the epoch that just ended as `train/loss_epoch`, and start a new sum.

    It goes to the loggers at once: Lightning would log it after the next rows are made. All ranks
    call this function.
    """
    trainer, epoch = module.trainer, module.epoch_loss.epoch
    mean = module.epoch_loss.take(trainer)
    if mean is None:
        return
    trainer.callback_metrics["train/loss_epoch"] = torch.tensor(mean)
    for logger in module.loggers:
        # Lightning counts the steps that it logs from 0.
        step = trainer.global_step - 1
        logger.log_metrics({"train/loss_epoch": mean, "epoch": epoch}, step=step)


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
    allowed = _LARGEST_FIRST_MARGIN[module.policy_spec.base.dtype]
    assert logps.generated_lengths is not None
    tokens = (logps.real_lengths + logps.generated_lengths).double()
    excess = logps.margin.detach().abs() - allowed * tokens.sqrt()
    for logger in module.loggers:
        logger.log_metrics(values, step=module.global_step)
    if float(excess.max()) > 0:
        worst = int(excess.argmax())
        module.print(
            f"WARNING: the first margin of iterate {module.iterate + 1} is "
            f"{float(logps.margin[worst].detach().abs()):.3g} nats on {int(tokens[worst])} tokens "
            f"and should be 0, or below {allowed * float(tokens[worst].sqrt()):.2g} by rounding: "
            "training and scoring disagree (LoRA dropout, or a kernel of low precision)."
        )
