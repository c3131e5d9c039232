"""Epochs that end early: time is up, a callback stops the run, or one skips batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning.errors import SpinError
from spin_lightning.modules.trainer_access import batches_per_epoch, is_mid_step


def missing_batches(trainer: L.Trainer, t: int) -> int:
    """Batches that the epoch which just ended has not trained on, on the rows of iterate t."""
    done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
    return max(0, batches_per_epoch(trainer, t) - done)


def report_unfinished(trainer: L.Trainer, t: int) -> bool:
    """Say that the iterate in training is not kept, since its epoch ended early.

    Args:
        trainer: A trainer at the end of an epoch that lacks batches.
        t: Index of the current iterate; t + 1 is in training.

    Returns:
        Whether a checkpoint of this moment can be continued from.

    Raises:
        SpinError: Training would go on with the next epoch.
    """
    batches, missing = batches_per_epoch(trainer, t), missing_batches(trainer, t)
    where = f"after {batches - missing} of {batches} batches of an epoch of iterate {t + 1}"
    if not trainer.should_stop:
        # A hook returned -1 or raised StopIteration: counts of batches no longer fit.
        raise SpinError(
            f"a callback skipped the rest of the epoch {where}, which is not kept as an iterate",
            fix="remove the callback whose on_train_batch_start returns -1, and run the same "
            "command again to continue from the last checkpoint",
        )
    rank_zero_info(
        f"Stopped {where}: it is not kept as an iterate. Run the same command again to finish it."
    )
    return not (is_mid_step(trainer) and trainer.world_size > 1)


@contextmanager
def as_after_batch(trainer: L.Trainer) -> Iterator[None]:
    """Present the loops' progress as it was after the last batch, inside an epoch.

    When an epoch ends early, Lightning has counted it as processed before any hook runs; a
    checkpoint would continue with the next epoch.
    """
    epochs: Any = trainer.fit_loop.epoch_progress
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress
    for counts in (epochs.current, epochs.total):
        counts.processed -= 1
    for counts in (batches.current, batches.total):
        counts.completed -= 1
    try:
        yield
    finally:
        for counts in (epochs.current, epochs.total):
            counts.processed += 1
        for counts in (batches.current, batches.total):
            counts.completed += 1
