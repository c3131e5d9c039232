"""The self-play loop: snapshot, draw, generate, score and train, iterate by iterate."""

from __future__ import annotations

from itertools import chain
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning.callbacks.checkpoints import (
    check_lineage_of,
    drop_timers,
    read_safely,
    write_lineage,
)
from spin_lightning.callbacks.console import console
from spin_lightning.callbacks.early import EarlySteps
from spin_lightning.callbacks.guard import RunGuard
from spin_lightning.callbacks.iterates import (
    TrainingClock,
    draw_curves,
    keep_iterate,
    keep_start,
    keep_training_time,
    measure,
    measure_training_rows,
    name_states,
    notify_listeners,
    training_record,
)
from spin_lightning.callbacks.requirements import (
    check_lineage,
    check_session,
    check_start,
    check_strategy,
    how_to_continue,
    run_root,
)
from spin_lightning.callbacks.row_making import DryRunFinished, RowMaker, ScratchRun
from spin_lightning.callbacks.run_log import RunLog
from spin_lightning.callbacks.session import Session
from spin_lightning.callbacks.unfinished import is_unfinished, stop_unfinished
from spin_lightning.callbacks.validating import AsTrained, validate_ended_epoch, validate_now
from spin_lightning.modules.checkpointing import check_weights
from spin_lightning.modules.checks import check_precision
from spin_lightning.modules.step_log import log_epoch_loss
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.folder import ITERATE_FILE, RunFolder

# The log's part of a checkpoint.
_LOG = "run_log"


class SelfPlay(Callback):
    """Makes each iterate's rows before it is trained, and keeps each iterate.

    An iterate t is played like this. Before its first epoch, examples are answered by the opponent
    and scored under the members of the reference, in work units that survive a crash. The loaders
    serve these rows for `epochs_per_iterate` epochs. At the end of the last one the policy is kept
    as iterate t + 1, optimizer and schedule start afresh, `checkpoints/last.ckpt` is written, and
    the next rows are made.

    Needs a `SelfPlayModule` and a `SelfPlayDataModule`. The number of iterates is
    `Trainer(max_epochs) / epochs_per_iterate`.

    This class decides when things happen; `callbacks.iterates` holds what happens to an iterate.

    Args:
        dry_run: Stop after the first work unit, as soon as the run's duration can be estimated.
        pairs_shown: Sample pairs printed with each iterate.
        checkpoint_minutes: Also write `checkpoints/last.ckpt` within an epoch, whenever this many
            minutes have passed; None: only after each epoch.
        checkpoint_steps: Also write it after this many optimizer steps; None: only after each
            epoch.

    Raises:
        SettingError: An interval that is not positive.
    """

    def __init__(
        self,
        dry_run: bool = False,
        pairs_shown: int = 3,
        checkpoint_minutes: float | None = 10.0,
        checkpoint_steps: int | None = None,
    ) -> None:
        """Keep the settings."""
        self.dry_run = dry_run
        self.pairs_shown = pairs_shown
        self.guard = RunGuard(checkpoint_minutes, checkpoint_steps)
        self._as_trained = AsTrained()
        self._start_over()

    def _start_over(self) -> None:
        """Set the state of one fit to its start."""
        self.run: RunFolder | None = None
        self._iterates = 0
        self._limit: int | float | None = None
        self._iterate_step = 0
        self._clock = TrainingClock()
        self._early = EarlySteps()
        self._named: set[str] = set()
        self._log = RunLog()
        self._scratch = ScratchRun()
        self._log_state: dict[str, Any] | None = None
        self._maker: RowMaker | None = None

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Choose the run folder, and check all that can be checked before weights are read."""
        if stage == "fit":
            self._start_over()
        run = self.run or RunFolder(trainer.strategy.broadcast(run_root(trainer, pl_module)))
        if self.dry_run and stage == "fit" and not run.known_iterates():
            run = self._scratch.open(trainer, run)
        session = Session.of(trainer, pl_module, run)
        self.run = session.data.run_folder = run
        read_safely(trainer)
        check_precision(trainer.precision)
        if stage != "fit":
            if trainer.ckpt_path is None:
                self._as_trained.start(session)
            return
        self._iterates = session.module.check_trainer()
        session.module.forget_earlier_fit()
        check_strategy(trainer.strategy)
        check_session(session, self._iterates)
        self.guard.open(trainer, run)
        # (mypy does not see what Lightning's connectors set.)
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        if not session.data.val:
            trainer.limit_val_batches = 0
        check_lineage(run, session.fingerprint_fields)
        if not session.module.generation.is_exact:
            rank_zero_info(
                f"NOTE: {session.module.generation} does not sample from the iterates themselves, "
                "whose log-probs at temperature 1 the loss uses. This is not the self-play of the "
                "papers."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep iterate 0, and make the current iterate's missing rows."""
        session = self._session(trainer, pl_module)
        run, module = session.run, session.module
        module.was_fitted = True
        # The checkpoint to resume from is not set before this point.
        check_start(run, trainer)
        if trainer.ckpt_path is not None:
            # Any of them may be an opponent, a reference, or the start of the next.
            for t in range(module.iterate + 1):
                run.check_iterate(t)
            run.check_tokenizer()
        if trainer.ckpt_path is None:
            self._log.start(trainer, run)
        elif not self.dry_run:
            records = [run.record(t) for t in range(module.iterate + 1)]
            self._log.resume(trainer, run, self._log_state, records)
        self._maker = RowMaker(session, self._iterates, self.guard, self.dry_run)
        if trainer.is_global_zero:
            console.print(f"Run folder: {run.root}")
            if 0 not in run.known_iterates():
                keep_start(session)
            if module.iterate < self._iterates:
                if self.dry_run:
                    for line in chain(*(o.summary() for o in session.data.overviews)):
                        console.print(line, markup=False)
                console.print(self._maker.cost())
        self._prepare(session)
        if module.iterate >= self._iterates or trainer.should_stop:
            # The run is finished, and has no rows to train on.
            self._limit, trainer.limit_train_batches = trainer.limit_train_batches, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate iterate 0; after a resume, continue from where the checkpoint was taken."""
        session = self._session(trainer, pl_module)
        self.guard.start(trainer)
        caught_up = self._catch_up(session)
        if not caught_up and trainer.global_step == self._iterate_step > 0:
            # The checkpoint of an untouched optimizer holds the settings of the run it ended.
            trainer.strategy.setup_optimizers(trainer)
        if trainer.global_step == 0 and session.data.val:
            validate_now(trainer)
        self._clock.restart(trainer.global_step)

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Write a checkpoint if one is due; stop if a signal came."""
        self._early.add(self._session(trainer, pl_module), batch_idx)
        self.guard.after_batch(trainer, self._run)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """After the last epoch of an iterate, keep it and make the next one's rows."""
        session = self._session(trainer, pl_module)
        if is_unfinished(trainer, session.module.iterate):
            stop_unfinished(trainer, session.module.iterate, self.guard, session.run)
        log_epoch_loss(session.module)
        if (trainer.current_epoch + 1) % session.module.epochs_per_iterate == 0:
            self._finish_iterate(session)
        else:
            self.guard.save(trainer, session.run)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the curves over the iterates."""
        session = self._session(trainer, pl_module)
        self._catch_up(session)
        self._clock.stop()
        if self._limit is not None:
            trainer.limit_train_batches = self._limit
            self._limit = None
        if trainer.is_global_zero:
            draw_curves(session)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Release the run folder, and end the ranks that would wait for this one."""
        if self._maker is not None and isinstance(exception, KeyboardInterrupt):
            keep_training_time(self._session(trainer, pl_module), self._rows.times, self._clock)
        self.guard.close(trainer, exception)
        self._as_trained.end(pl_module)
        if isinstance(exception, KeyboardInterrupt) and self.run and not self.dry_run:
            rank_zero_info(f"Stopped. {how_to_continue(self.run)}")
        self._scratch.close()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Release the run folder."""
        self._as_trained.end(pl_module)
        self.guard.close(trainer)
        self._scratch.close()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Store which iterate of which run the checkpoint continues from."""
        session = self._session(trainer, pl_module)
        if self._maker is not None and trainer.global_step > self._iterate_step:
            keep_training_time(session, self._rows.times, self._clock)
        write_lineage(checkpoint, session.run, session.module.iterate)
        drop_timers(checkpoint, session.callbacks)
        checkpoint[_LOG] = self._log.state(trainer, session.run)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to train on from a checkpoint of another run."""
        if trainer.state.fn == TrainerFn.FITTING:
            check_lineage_of(checkpoint, self._run)
            self._log_state = checkpoint.get(_LOG)
        else:
            self._as_trained.start(self._session(trainer, pl_module))

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides the module's own state."""
        return {"iterate_step": self._iterate_step, "early": self._early.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state of the run that is resumed."""
        self._iterate_step = state_dict["iterate_step"]
        # Older versions did not store it.
        if "early" in state_dict:
            self._early.load_state_dict(state_dict["early"])

    # ------------------------------------------------------------------ the loop

    def _catch_up(self, session: Session) -> bool:
        """Finish an epoch, and its iterate, whose checkpoint was saved after its last batch.

        Lightning counts the epoch of such a checkpoint as finished. It neither validates, nor calls
        its end or the start of the next.

        Returns:
            Whether there was such an iterate.
        """
        trainer, module = session.trainer, session.module
        if trainer.current_epoch > module.epoch_loss.epoch and module.epoch_loss.has_batches:
            validate_ended_epoch(trainer)
            log_epoch_loss(module)
        behind = trainer.current_epoch // module.epochs_per_iterate > module.iterate
        if behind:
            self._finish_iterate(session)
            # The loader in use has the held-out rows of the iterate before.
            trainer.fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = float("-inf")
        return behind

    def _finish_iterate(self, session: Session) -> None:
        """Keep the policy as the next iterate and move on to it. Doing it twice is harmless."""
        trainer, module = session.trainer, session.module
        check_weights(module.policy, module.iterate)
        training = training_record(session, self._rows.times, self._clock, self._early)
        self._iterate_step = trainer.global_step
        if trainer.is_global_zero:
            keep_iterate(session, module.iterate + 1, self._iterate_step, training)
        self.guard.wait(trainer)
        module.iterate += 1
        trainer.strategy.setup_optimizers(trainer)
        self.guard.save(trainer, session.run)
        self._prepare(session)

    def _prepare(self, session: Session) -> None:
        """Measure the current iterate and make its rows, unless this was done before."""
        trainer, module, run = session.trainer, session.module, session.run
        t = module.iterate
        self.guard.wait_for(trainer, run.iterate(t) / ITERATE_FILE)
        module.policy.use_iterates(run.iterate_folders())
        fields = session.fingerprint_fields(t)
        manifest = {"fingerprint": fingerprint(fields), "fingerprint_fields": fields}
        if not self.dry_run:
            if session.data.val:
                self._rows.make_val(manifest)
            if trainer.is_global_zero:
                measure(session, self.pairs_shown, self._log)
            self.guard.wait(trainer)
            notify_listeners(session)
        if t < self._iterates and not trainer.should_stop:
            plan = self._rows.make_train(manifest)
            if self.dry_run:
                raise DryRunFinished
            if trainer.is_global_zero:
                measure_training_rows(session, plan, self._log)
        if trainer.is_global_zero and not self.dry_run:
            name_states(session, self._named)
        module.policy.evict()
        self._clock.restart(trainer.global_step)

    # ------------------------------------------------------------------ details

    def _session(self, trainer: L.Trainer, pl_module: L.LightningModule) -> Session:
        return Session.of(trainer, pl_module, self._run)

    @property
    def _run(self) -> RunFolder:
        assert self.run is not None, "setup() chose the run folder"
        return self.run

    @property
    def _rows(self) -> RowMaker:
        assert self._maker is not None, "on_fit_start() made it"
        return self._maker
