"""The run's log: each line is written once, also after a resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import lightning as L
from lightning.fabric.utilities.apply_func import convert_tensors_to_scalars
from lightning.pytorch.loops.progress import _ProcessedTracker

from spin_lightning.callbacks.log_origin import log_origin
from spin_lightning.callbacks.run_files import RunCSVLogger
from spin_lightning.modules.trainer_access import is_mid_step
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import IterateRecord


@dataclass
class RunLog:
    """Which metrics of iterates were logged, and how long `metrics.csv` is.

    A checkpoint stores both. A resume cuts `metrics.csv` back to the checkpoint, and logs again
    what was logged after it.

    Attributes:
        iterate: Newest iterate whose metrics were logged; -1 for none.
        rows: Newest iterate whose rows' metrics were logged.
    """

    iterate: int = -1
    rows: int = -1

    def state(self, trainer: L.Trainer, run: RunFolder) -> dict[str, Any]:
        """The state as plain values."""
        logger = _csv_logger(trainer, run)
        return {
            "iterate": self.iterate,
            "rows": self.rows,
            "lines": None if logger is None else logger.lines,
            "next_line": _line_of_this_step(trainer),
        }

    def start(self, trainer: L.Trainer, run: RunFolder) -> None:
        """Start the log of a run from scratch."""
        self.iterate = self.rows = -1
        logger = _csv_logger(trainer, run)
        if logger is not None:
            logger.cut(0)
        log_origin(trainer, run)

    def resume(
        self,
        trainer: L.Trainer,
        run: RunFolder,
        state: Mapping[str, Any] | None,
        records: Sequence[IterateRecord],
    ) -> None:
        """Continue from a checkpoint.

        Args:
            trainer: The trainer.
            run: The run folder.
            state: What `state` returned; None for a checkpoint of an older version, whose lines
                all stay.
            records: The records of the iterates up to the checkpoint's.
        """
        log_origin(trainer, run)
        if state is None:
            self.iterate = max((r.index for r in records if r.metrics is not None), default=-1)
            self.rows = max((r.index for r in records if r.rows is not None), default=-1)
            return
        self.iterate, self.rows = state["iterate"], state["rows"]
        logger = _csv_logger(trainer, run)
        if logger is None or state["lines"] is None:
            return
        logger.cut(state["lines"])
        if state["next_line"] is not None:
            logger.log_metrics(**state["next_line"])


def _csv_logger(trainer: L.Trainer, run: RunFolder) -> RunCSVLogger | None:
    """The logger that writes the run folder's `metrics.csv`; only on rank 0."""
    if not trainer.is_global_zero:
        return None
    own = [logger for logger in trainer.loggers if isinstance(logger, RunCSVLogger)]
    return next((one for one in own if RunFolder(one.root) == run), None)


def _line_of_this_step(trainer: L.Trainer) -> dict[str, Any] | None:
    """The line that Lightning logs after `on_train_batch_end`; None at any other moment."""
    loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    progress = cast(_ProcessedTracker, loop.batch_progress.current)
    if progress.completed == progress.processed or is_mid_step(trainer):
        return None
    metrics = connector.metrics["log"] if connector.should_update_logs else {}
    if not metrics:
        return None
    values = {**convert_tensors_to_scalars(metrics), "epoch": trainer.current_epoch}
    return {"metrics": values, "step": loop._batches_that_stepped}
