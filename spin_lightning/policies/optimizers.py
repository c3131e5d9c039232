"""Optimizers and schedules by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

from torch import nn
from torch.optim import AdamW, Optimizer, RMSprop
from torch.optim.lr_scheduler import LRScheduler

OptimizerName = Literal["adamw", "rmsprop", "adamw_8bit"]
ScheduleName = Literal["linear", "cosine", "constant"]


def make_optimizer(
    name: OptimizerName,
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
) -> Optimizer:
    """Build an optimizer: AdamW, RMSprop (used by the SPIN paper), or bitsandbytes' 8-bit AdamW.

    Not the paged one: bitsandbytes never frees its pages, and every iterate has a new optimizer.
    """
    return _OPTIMIZERS[name](list(parameters), lr=learning_rate, weight_decay=weight_decay)


def make_schedule(
    name: ScheduleName, optimizer: Optimizer, total_steps: int, warmup_ratio: float
) -> LRScheduler:
    """Build a schedule: warm-up over `warmup_ratio` of `total_steps`, then schedule `name`."""
    from transformers import get_scheduler  # imports peft, which takes more than a second

    kind = "constant_with_warmup" if name == "constant" else name
    return get_scheduler(
        kind,
        optimizer,
        num_warmup_steps=round(warmup_ratio * total_steps),
        num_training_steps=total_steps,
    )


def _bitsandbytes(name: str) -> Callable[..., Optimizer]:
    def build(parameters: list[nn.Parameter], **kwargs: Any) -> Optimizer:
        import bitsandbytes.optim  # importing it takes seconds and is rarely needed

        optimizer: Optimizer = getattr(bitsandbytes.optim, name)(parameters, **kwargs)
        return optimizer

    return build


_OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {
    "adamw": AdamW,
    "rmsprop": RMSprop,
    "adamw_8bit": _bitsandbytes("AdamW8bit"),
}
