"""Validation outside Lightning's own schedule."""

from __future__ import annotations

import lightning as L


def validate_ended_epoch(trainer: L.Trainer) -> None:
    """Validate at the end of the epoch before, if Lightning would have."""
    every, epoch = trainer.check_val_every_n_epoch, trainer.fit_loop.epoch_progress.current
    batches, interval = trainer.num_training_batches, trainer.val_check_batch
    if not trainer.enable_validation or (every is not None and epoch.completed % every):
        return
    if isinstance(interval, int) and batches % interval:
        return
    # Loggers get the index of the epoch in which the checkpoint was taken.
    epoch.completed -= 1
    try:
        validate_now(trainer)
    finally:
        epoch.completed += 1


def validate_now(trainer: L.Trainer) -> None:
    """Run the validation loop once, as Lightning does it in the middle of training."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.run()
    trainer.training = True
