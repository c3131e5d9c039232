"""A callback that stops a run at a batch."""

import lightning as L
from lightning.pytorch.callbacks import Callback


class StopAfter(Callback):
    """Sets `should_stop` after a number of batches of this start, on all ranks.

    Args:
        batches: The number.
    """

    def __init__(self, batches: int) -> None:
        self.left = batches

    def on_train_batch_end(self, trainer: L.Trainer, *args: object) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.should_stop = True
