"""How far each phase of a run is, for logs without a terminal and for `spin-lightning watch`."""

from __future__ import annotations

import math
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn

from spin_lightning.callbacks.console import console
from spin_lightning.callbacks.session import run_folder_of
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.modules.trainer_access import callbacks_of
from spin_lightning.run.progress import Phase, ProgressLog


class PhaseProgress(Callback):
    """Writes a line every half minute where there is no terminal, and the run's `progress.json`.

    Rows are counted by `RowMaker`; this callback counts batches of training and validation. A
    module adds it by itself.
    """

    def __init__(self) -> None:
        """Say nothing yet."""
        # (Lightning puts its own `log` on every callback.)
        self.progress = ProgressLog(None)
        self._open = ExitStack()
        self._training: ExitStack = ExitStack()
        self._validation: ExitStack = ExitStack()
        self._batches: Phase | None = None
        self._held_out: Phase | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Start, after `SelfPlay` has chosen and locked the run folder."""
        self._close()
        if not trainer.is_global_zero:
            return
        # A dry run leaves no trace. (`SelfPlay` has the setting, and imports this module.)
        is_dry = any(getattr(one, "dry_run", False) for one in callbacks_of(trainer))
        is_fit = trainer.state.fn == TrainerFn.FITTING and not is_dry
        shows_bars = console.is_terminal or console.is_jupyter or console.quiet
        path = run_folder_of(trainer).progress if is_fit else None
        self.progress = self._open.enter_context(ProgressLog(None if shows_bars else _say, path))

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a phase of training."""
        assert isinstance(pl_module, SelfPlayModule)
        epochs, t = pl_module.epochs_per_iterate, pl_module.iterate + 1
        which = f", epoch {trainer.current_epoch % epochs + 1} of {epochs}" if epochs > 1 else ""
        self._training.close()
        self._batches = self._training.enter_context(
            self.progress.phase(
                f"iterate {t} training{which}", _whole(trainer.num_training_batches), "batches"
            )
        )

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Count a batch."""
        if self._batches is None:
            return
        if self.progress.is_due:
            loss = trainer.callback_metrics.get("train/loss")
            self._batches.note = "" if loss is None else f"loss {float(loss):.4f}"
        done = sum(self._batches.counts.values())
        # A resumed epoch begins in the middle.
        self.progress.advance(self._batches, batch_idx - done, found=True)
        self.progress.advance(self._batches, 1)
        if batch_idx + 1 >= self._batches.total > 0:
            # What follows in this epoch, validation and the next rows, are phases of their own.
            self._end_training()

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the phase."""
        self._end_training()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin a phase of validation, inside that of training."""
        assert isinstance(pl_module, SelfPlayModule)
        batches: Any = trainer.num_val_batches
        total = sum(map(_whole, batches if isinstance(batches, list) else [batches]))
        self._validation.close()
        self._held_out = self._validation.enter_context(
            self.progress.phase(f"iterate {pl_module.iterate + 1} validation", total, "batches")
        )

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Count a batch."""
        if self._held_out is not None:
            self.progress.advance(self._held_out, 1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End the phase."""
        self._validation.close()
        self._held_out = None

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The run has ended."""
        self.progress.end("finished")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """The run was stopped, or failed."""
        stopped = isinstance(exception, KeyboardInterrupt | SystemExit)
        self.progress.end("stopped" if stopped else "failed")
        self._close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Stop."""
        self._close()

    def _end_training(self) -> None:
        self._training.close()
        self._batches = None

    def _close(self) -> None:
        self._end_training()
        self._validation.close()
        self._held_out = None
        self._open.close()
        self.progress = ProgressLog(None)


def progress_log(trainer: L.Trainer) -> ProgressLog:
    """The log of a trainer's `PhaseProgress`; one that says nothing without such a callback."""
    found = (one.progress for one in callbacks_of(trainer) if isinstance(one, PhaseProgress))
    return next(found, ProgressLog(None))


def _say(line: str) -> None:
    console.print(line, markup=False, style="dim")


def _whole(batches: float) -> int:
    """A number of batches; Lightning has infinity where it does not know."""
    return int(batches) if math.isfinite(batches) else 0
