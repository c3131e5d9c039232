"""What the first steps of an iterate are like."""

from __future__ import annotations

from typing import Any

from spin_lightning.callbacks.session import Session

_METRICS = {"accuracy": "train/rewards/accuracies", "loss": "train/loss"}


class EarlySteps:
    """Means over the batches in the second half of an iterate's first tenth.

    In the first batch all margins are 0. With fewer than ten batches there is no first tenth. With
    several processes these are the pairs of rank 0.
    """

    def __init__(self) -> None:
        """Start empty."""
        self._sums: dict[str, float] = {}
        self._batches = self._pairs = 0

    def add(self, session: Session, batch_idx: int) -> None:
        """Add the batch that just ended, if it is in the second half of the first tenth."""
        trainer, epochs = session.trainer, session.module.epochs_per_iterate
        batches = trainer.num_training_batches
        place = trainer.current_epoch % epochs * batches + batch_idx + 1
        if place == 1:
            self._sums, self._batches, self._pairs = {}, 0, 0
        if not batches * epochs / 20 < place <= batches * epochs / 10:
            return
        metrics = trainer.callback_metrics
        for name, metric in _METRICS.items():
            if metric in metrics:
                self._sums[name] = self._sums.get(name, 0.0) + float(metrics[metric])
        self._batches += 1
        self._pairs += session.data.batch_size

    def means(self) -> dict[str, float] | None:
        """Mean `accuracy` and `loss`, and the number of `pairs`; None without batches."""
        if not self._batches:
            return None
        means = {name: total / self._batches for name, total in self._sums.items()}
        return {**means, "pairs": self._pairs}

    def state_dict(self) -> dict[str, Any]:
        """The state, for a checkpoint in the middle of an iterate."""
        return {"sums": dict(self._sums), "batches": self._batches, "pairs": self._pairs}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state."""
        self._sums = dict(state["sums"])
        self._batches, self._pairs = state["batches"], state["pairs"]
