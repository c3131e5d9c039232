"""Epochs that end early: time is up, a callback stops the run, or a hook skips batches."""

from __future__ import annotations

from typing import cast

import lightning as L
from lightning.pytorch.loops.progress import _ProcessedTracker
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning.callbacks.guard import RunGuard
from spin_lightning.callbacks.requirements import how_to_continue
from spin_lightning.errors import SpinError
from spin_lightning.modules.trainer_access import batches_per_epoch, is_mid_step
from spin_lightning.run.folder import RunFolder


def is_unfinished(trainer: L.Trainer, t: int) -> bool:
    """Whether the epoch that just ended lacks batches of the rows of iterate t."""
    return _batches_done(trainer) < batches_per_epoch(trainer, t)


def stop_unfinished(trainer: L.Trainer, t: int, guard: RunGuard, run: RunFolder) -> None:
    """End the fit inside the epoch, so that the same command continues after its last batch.

    Args:
        trainer: A trainer in `on_train_epoch_end` of an epoch that lacks batches.
        t: Index of the current iterate; t + 1 is in training.
        guard: Writes the checkpoint.
        run: The run folder.

    Raises:
        SpinError: A hook skipped the rest of the epoch, which Lightning's counts do not show.
        StopIteration: Always otherwise: it makes Lightning's loop over epochs end here, without
            the end of this epoch for callbacks that come later.
    """
    done, batches = _batches_done(trainer), batches_per_epoch(trainer, t)
    where = f"after {done} of {batches} batches of an epoch of iterate {t + 1}"
    if not trainer.should_stop or trainer.fit_loop.epoch_loop.batch_progress.current.ready != done:
        raise SpinError(
            f"a hook skipped the rest of the epoch {where}; the iterate is not kept",
            fix="remove the on_train_batch_start that returns -1 or raises StopIteration, and run "
            "the same command again to continue from the last checkpoint",
        )
    _present_as_inside_the_epoch(trainer)
    if trainer.world_size == 1 or not is_mid_step(trainer):
        # Open gradients of several ranks cannot be restored: the checkpoint before this one stays.
        guard.save(trainer, run)
    rank_zero_info(f"Stopped {where}, which is not kept. {how_to_continue(run)}")
    raise StopIteration


def _present_as_inside_the_epoch(trainer: L.Trainer) -> None:
    """Set Lightning's counts back to what they were before it left the loop over batches.

    It has counted the epoch as processed; a checkpoint would continue with the next one.
    """
    loop, progress = trainer.fit_loop.epoch_loop, trainer.fit_loop.epoch_progress
    for counts in (progress.current, progress.total):
        cast(_ProcessedTracker, counts).processed -= 1
    if _validates_after_this_batch(trainer) and not is_mid_step(trainer):
        # A resume skips this validation, but counts the step again that comes with it.
        loop._batches_that_stepped -= 1


def _validates_after_this_batch(trainer: L.Trainer) -> bool:
    """Whether `val_check_interval` has a validation here, not only because the fit stops."""
    loop, fetcher = trainer.fit_loop.epoch_loop, trainer.fit_loop._data_fetcher
    assert fetcher is not None
    trainer.should_stop = False
    try:
        return loop._should_check_val_fx(fetcher)
    finally:
        trainer.should_stop = True


def _batches_done(trainer: L.Trainer) -> int:
    return trainer.fit_loop.epoch_loop.batch_progress.current.completed
