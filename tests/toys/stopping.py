"""Callbacks that act at a batch, such as to stop the run."""

from collections.abc import Callable

import lightning as L
from lightning.pytorch.callbacks import Callback


class At(Callback):
    """Does something at the end of the n-th batch of this start, on all ranks."""

    def __init__(self, batch: int, act: Callable[[L.Trainer], None]) -> None:
        self.left, self.act = batch, act

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        self.left -= 1
        if self.left == 0:
            self.act(trainer)


class StopAfter(At):
    """Sets `should_stop` after a number of batches.

    Args:
        batches: The number.
    """

    def __init__(self, batches: int) -> None:
        super().__init__(batches, _stop)


def _stop(trainer: L.Trainer) -> None:
    trainer.should_stop = True
