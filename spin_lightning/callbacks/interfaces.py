"""Base classes for callbacks of your own: measure iterates, or act on their metrics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import lightning as L
from lightning.pytorch.callbacks import Callback

from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord


class IterateEvaluator(Callback, ABC):
    """Base class of a callback that measures every iterate.

    Subclass it, implement `evaluate_iterate`, and pass an instance to `Trainer(callbacks=[...])`.
    `SelfPlay` calls it once per iterate, on rank 0: for iterate 0 before training starts, and for
    each later iterate as soon as it is complete. A resumed run does not measure an iterate again.
    The metrics are logged and stored in the iterate's record.

    Example:
        ```python
        class ShareOfShortAnswers(IterateEvaluator):
            def evaluate_iterate(self, module, t):
                with module.policy.at(t):
                    return {"my/short": share_of_short_answers(module.policy.model)}
        ```
    """

    @abstractmethod
    def evaluate_iterate(self, module: SelfPlayModule, t: int) -> dict[str, float]:
        """Measure iterate t.

        Leave weights, modes and global random states as they are.

        Args:
            module: The module in training. Inside `with module.policy.at(t):` its model,
                `module.policy.model`, is iterate t.
            t: Index of the iterate.

        Returns:
            Metrics by name. Choose a prefix of your own, such as `my/`.
        """


class IterateListener(Callback, ABC):
    """Base class of a callback that acts on the metrics of iterates.

    Subclass it, implement `on_iterate_measured`, and pass an instance to
    `Trainer(callbacks=[...])`. `SelfPlay` calls it each time an iterate was measured, before the
    rows of the next one are made; after a resume once more, with the current iterate. It is called
    on every rank with the same records, so all ranks come to the same decision; write files on
    rank 0 alone (`trainer.is_global_zero`).

    Example:
        ```python
        class StopAtTarget(IterateListener):
            def on_iterate_measured(self, trainer, run, records):
                if records[-1].measured["val/real_nll_per_token"] < 1.0:
                    trainer.should_stop = True
        ```
    """

    @abstractmethod
    def on_iterate_measured(
        self, trainer: L.Trainer, run: RunFolder, records: Sequence[IterateRecord]
    ) -> None:
        """Act on the metrics; `trainer.should_stop = True` ends the run with this iterate.

        Args:
            trainer: The trainer.
            run: The run folder.
            records: The record of each iterate from 0 to the newest, ascending.
        """
