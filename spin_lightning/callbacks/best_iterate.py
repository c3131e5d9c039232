"""The stability guard: which iterate is the best, and when it has stopped getting better."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning.callbacks.interfaces import IterateListener
from spin_lightning.errors import SettingError
from spin_lightning.run.folder import DEFAULT_METRIC, RunFolder
from spin_lightning.run.records import IterateRecord


class BestIterate(IterateListener):
    """Keeps `iterates/best.json` ({index, metric, value}), and can stop a run that gets worse.

    Self-play need not improve with every iterate. The ranking depends only on the records of the
    iterates, so a resumed run ranks them the same way.

    Args:
        metric: The metric to rank iterates by; default val/real_nll_per_token, which needs
            held-out examples.
        mode: min: smaller is better; max: larger is better.
        patience: Stop after this many iterates in a row that were no better than the best;
            default: never.

    Raises:
        SettingError: A `patience` below 1, or a metric that the iterates do not have.
    """

    def __init__(
        self,
        metric: str | None = None,
        mode: Literal["min", "max"] = "min",
        patience: int | None = None,
    ) -> None:
        """Keep the settings."""
        if patience is not None and patience < 1:
            raise SettingError(
                "patience", patience, "out of range", fix="give 1 or more, or null to go on"
            )
        self.metric = metric
        self.mode = mode
        self.patience = patience

    def on_iterate_measured(
        self, trainer: L.Trainer, run: RunFolder, records: Sequence[IterateRecord]
    ) -> None:
        """Write which iterate is the best; stop once `patience` later ones were no better."""
        values = self._values(records)
        if not values:
            return
        sign = 1 if self.mode == "min" else -1
        best = min(values, key=lambda t: (sign * values[t], t))
        if trainer.is_global_zero:
            run.write_best(best, self.metric or DEFAULT_METRIC, values[best])
        newest = records[-1].index
        if self.patience is not None and newest - best >= self.patience:
            trainer.should_stop = True
            rank_zero_info(
                f"Stopped at iterate {newest}: {self.metric or DEFAULT_METRIC} was best at "
                f"iterate {best}, {newest - best} iterates ago (patience {self.patience})."
            )

    def _values(self, records: Sequence[IterateRecord]) -> dict[int, float]:
        metrics = {record.index: record.metrics or {} for record in records}
        name = self.metric or DEFAULT_METRIC
        values = {t: measured[name] for t, measured in metrics.items() if name in measured}
        if self.metric is not None and not values:
            known = sorted({name for measured in metrics.values() for name in measured})
            raise SettingError(
                "metric",
                self.metric,
                "the iterates have no such metric",
                fix=f"choose from {', '.join(known) or 'none (hold out examples first)'}",
            )
        return values
