"""Callbacks that measure iterates inside the run that makes them, or act on what was measured."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.run.folder import RunFolder


class IterateEvaluator(Callback, ABC):
    """A callback that measures every iterate once, right after it was made.

    `SelfPlay` calls it for iterate 0 before training, and for each new iterate; what it returns is
    logged, shown in the table and kept in the iterate's folder.
    """

    @abstractmethod
    def evaluate_iterate(self, module: SelfPlayModule, t: int) -> dict[str, float]:
        """Measure iterate t.

        Args:
            module: The module; `module.policy.at(t)` makes its policy act as iterate t.
            t: Index of the iterate.

        Returns:
            Metrics by the names they are logged under.
        """


class IterateListener(Callback, ABC):
    """A callback that is told when an iterate was measured, before the next one is played.

    `SelfPlay` calls it on every rank, with the same records, also after a resume.
    """

    @abstractmethod
    def on_iterate_measured(
        self, trainer: L.Trainer, run: RunFolder, records: Sequence[Mapping[str, Any]]
    ) -> None:
        """Act on the metrics; `trainer.should_stop = True` ends the run with this iterate.

        Args:
            trainer: The trainer.
            run: The run folder.
            records: What is known of each iterate up to the newest, its `metrics` among it.
        """
