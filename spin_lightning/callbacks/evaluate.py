"""Evaluating iterates inside the run that makes them."""

from __future__ import annotations

from abc import ABC, abstractmethod

from lightning.pytorch.callbacks import Callback

from spin_lightning.modules.base import SelfPlayModule


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
