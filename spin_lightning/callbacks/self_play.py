"""The self-play loop: snapshot, draw, generate, score, hand the rows over, iterate by iterate."""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning import keyed
from spin_lightning.callbacks.checkpoints import check_lineage_of, read_safely, write_lineage
from spin_lightning.callbacks.console import console, show_iterates, show_samples
from spin_lightning.callbacks.guard import RunGuard
from spin_lightning.callbacks.interfaces import IterateEvaluator, IterateListener
from spin_lightning.callbacks.log_samples import log_samples
from spin_lightning.callbacks.requirements import (
    check_lineage,
    check_start,
    check_strategy,
    run_root,
)
from spin_lightning.callbacks.row_making import RowMaker
from spin_lightning.callbacks.row_metrics import measure_iterate, measure_rows, peak_memory
from spin_lightning.callbacks.speed import Trained, measure_speed
from spin_lightning.data.datamodule import SelfPlayDataModule
from spin_lightning.errors import SettingError
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.modules.checkpointing import check_weights
from spin_lightning.report.report import draw_iterates
from spin_lightning.report.samples import sample_pairs
from spin_lightning.rows.plan import RowPlan, redrawn
from spin_lightning.rows.store import read_rows
from spin_lightning.run.files import replace_synced, write_json, writing
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.folder import ITERATE_FILE, RunFolder

_PAIRS_LOGGED = 20


class SelfPlay(Callback):
    """Plays self-play: makes each iterate's rows before it is trained, and keeps each iterate.

    An iterate t is played like this. Before its first epoch, examples are answered by the opponent
    and scored under the members of the reference, in work units that survive a crash. The loaders
    serve these rows for `epochs_per_iterate` epochs. At the end of the last one the policy is kept
    as iterate t + 1, optimizer and schedule start afresh, `checkpoints/last.ckpt` is written, and
    the next rows are made.

    Needs a `SelfPlayModule` and a `SelfPlayDataModule`. The number of iterates is
    `Trainer(max_epochs) / epochs_per_iterate`.

    Args:
        dry_run: Stop after the first work unit, when the time that the run will take is known.
        pairs_shown: Sample pairs printed with each iterate.
        checkpoint_minutes: Write `checkpoints/last.ckpt` in the middle of an epoch when this long
            has gone by; None: only after each epoch.
        checkpoint_steps: Write it after this many optimizer steps; None: only after each epoch.

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
        self.run: RunFolder | None = None
        self._iterates = 0
        self._limit: int | float | None = None
        self._iterate_step = 0
        self._training_since, self._step_since = 0.0, 0
        self._maker: RowMaker | None = None

    # ------------------------------------------------------------------ Lightning's hooks

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Name the run folder, and check all that can be checked before weights are read."""
        module, data = _parts(trainer, pl_module)
        if self.run is None:
            self.run = RunFolder(trainer.strategy.broadcast(run_root(trainer, module)))
        data.run_folder = self.run
        read_safely(trainer)
        if stage != "fit":
            return
        self._iterates = module.check_trainer()
        check_strategy(trainer.strategy)
        self.guard.open(trainer, self.run)
        # (mypy does not see what Lightning's connectors set.)
        trainer.reload_dataloaders_every_n_epochs = 1  # type: ignore[attr-defined]
        if not data.val:
            trainer.limit_val_batches = 0
        check_lineage(self.run, lambda t: _fields(trainer, module, data, t))
        if not module.generation.is_exact:
            rank_zero_info(
                f"NOTE: {module.generation} does not sample from the iterates themselves, whose "
                "log-probs at temperature 1 the loss uses. What is played is not the self-play of "
                "the papers."
            )

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep iterate 0, and make whatever rows the iterate at hand lacks."""
        module, data = _parts(trainer, pl_module)
        run = self._run
        # Only now does Lightning know what it resumes from.
        check_start(run, trainer.ckpt_path)
        if trainer.ckpt_path is not None:
            # Each of them may act, or be the start of the next.
            for t in range(module.iterate + 1):
                run.check_iterate(t)
            run.check_tokenizer()
        self._maker = RowMaker(trainer, module, data, run, self._iterates, self.guard, self.dry_run)
        if trainer.is_global_zero:
            console.print(f"Run folder: {run.root}")
            if 0 not in run.known_iterates():
                with writing(run.tokenizer):
                    module.tokenizer.save_pretrained(run.tokenizer)
                self._keep(trainer, module, data, 0, training=None)
            if module.iterate < self._iterates:
                console.print(self._maker.cost())
        self.guard.wait(trainer)
        self._prepare(trainer, module, data)
        if module.iterate >= self._iterates or trainer.should_stop:
            # The run is finished, and has no rows to train on.
            self._limit, trainer.limit_train_batches = trainer.limit_train_batches, 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Validate iterate 0; after a resume, go on from where the checkpoint was taken."""
        module, data = _parts(trainer, pl_module)
        self.guard.start(trainer)
        caught_up = self._catch_up(trainer, module, data)
        if not caught_up and trainer.global_step == self._iterate_step > 0:
            # The checkpoint of an untouched optimizer holds the settings of the run it ended.
            trainer.strategy.setup_optimizers(trainer)
        if trainer.global_step == 0 and data.val:
            _validate_now(trainer)
        self._training_since, self._step_since = time.perf_counter(), trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Write a checkpoint where one is due; end here where a signal asked for that."""
        self.guard.after_batch(trainer, self._run)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """At the last epoch of an iterate, keep it and make the next one's rows."""
        module, data = _parts(trainer, pl_module)
        if (trainer.current_epoch + 1) % module.epochs_per_iterate == 0:
            self._finish_iterate(trainer, module, data)
        else:
            self.guard.save(trainer, self._run)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw the curves over the iterates."""
        self._catch_up(trainer, *_parts(trainer, pl_module))
        if self._limit is not None:
            trainer.limit_train_batches = self._limit
            self._limit = None
        measured = any(self._run.read_iterate(t).get("metrics") for t in self._run.known_iterates())
        if trainer.is_global_zero and measured:
            picture = draw_iterates([self._run], self._run.report / "iterates.png")
            console.print(f"Picture: {picture}")

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Let the folder go, and no rank wait for this one."""
        self.guard.close(trainer, exception)

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Let the folder go."""
        self.guard.close(trainer)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Say which run's iterate the checkpoint goes on from."""
        module, _ = _parts(trainer, pl_module)
        write_lineage(checkpoint, self._run, module.iterate)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Refuse to train on from a checkpoint of another run."""
        if trainer.state.fn == TrainerFn.FITTING:
            check_lineage_of(checkpoint, self._run)

    def state_dict(self) -> dict[str, Any]:
        """What a resume needs besides the module's own state."""
        return {"iterate_step": self._iterate_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the state of the run that is resumed."""
        self._iterate_step = state_dict["iterate_step"]

    # ------------------------------------------------------------------ the loop

    def _catch_up(
        self, trainer: L.Trainer, module: SelfPlayModule, data: SelfPlayDataModule
    ) -> bool:
        """Finish an iterate whose checkpoint was saved after its last batch; say if there was one.

        Lightning counts the epoch of such a checkpoint as finished, and calls neither its end nor
        the start of the next.
        """
        behind = trainer.current_epoch // module.epochs_per_iterate > module.iterate
        if behind:
            self._finish_iterate(trainer, module, data)
        return behind

    def _finish_iterate(
        self, trainer: L.Trainer, module: SelfPlayModule, data: SelfPlayDataModule
    ) -> None:
        """Keep the policy as the next iterate and go on to it. Doing it twice is harmless."""
        check_weights(module.policy, module.iterate)
        training = self._training_record(trainer, module, data)
        self._iterate_step = trainer.global_step
        if trainer.is_global_zero:
            self._keep(trainer, module, data, module.iterate + 1, training)
        self.guard.wait(trainer)
        module.iterate += 1
        trainer.strategy.setup_optimizers(trainer)
        self.guard.save(trainer, self._run)
        self._prepare(trainer, module, data)

    def _keep(
        self,
        trainer: L.Trainer,
        module: SelfPlayModule,
        data: SelfPlayDataModule,
        t: int,
        training: dict[str, Any] | None,
    ) -> None:
        """Write the policy's adapter as iterate t; the bare base has none."""
        run = self._run
        staged = run.staged_iterate(t)
        bare = t == 0 and module.policy_spec.initial_adapter is None
        files = {} if bare else module.policy.snapshot(staged)
        if t in run.known_iterates() and run.read_iterate(t)["files"] != files:
            run.discard_after(t)
        fields = _fields(trainer, module, data, t)
        record = {
            "index": t,
            "parent": t - 1 if t else None,
            "files": files,
            "base": asdict(module.policy_spec.base),
            "fingerprint": fingerprint(fields),
            "fingerprint_fields": fields,
            "step": self._iterate_step,
            "training": training,
        }
        if t == 0:
            record["tokenizer_files"] = run.tokenizer_hashes()
        write_json(staged / ITERATE_FILE, record)
        replace_synced(staged, run.iterate(t))

    def _prepare(
        self, trainer: L.Trainer, module: SelfPlayModule, data: SelfPlayDataModule
    ) -> None:
        """Make the rows that the iterate at hand lacks, and measure it if that was not done."""
        t = module.iterate
        module.policy.use_iterates(self._run.iterate_folders())
        assert self._maker is not None, "on_fit_start() made it"
        fields = _fields(trainer, module, data, t)
        manifest = {"fingerprint": fingerprint(fields), "fingerprint_fields": fields}
        if not self.dry_run:
            if data.val:
                self._maker.make_val(manifest)
            self._measure(trainer, module, data)
            self.guard.wait(trainer)
            self._tell(trainer)
        if t < self._iterates and not trainer.should_stop:
            plan = self._maker.make_train(manifest)
            if trainer.is_global_zero:
                self._measure_rows(trainer, plan)
        module.policy.evict()
        self._training_since, self._step_since = time.perf_counter(), trainer.global_step

    def _measure(
        self, trainer: L.Trainer, module: SelfPlayModule, data: SelfPlayDataModule
    ) -> None:
        """Measure the iterate at hand once: log it, keep it with the iterate, show it."""
        if not trainer.is_global_zero:
            return
        t, run = module.iterate, self._run
        record = run.read_iterate(t)
        table = read_rows(run.val_rows(t)) if data.val else None
        if "metrics" not in record:
            metrics = {} if table is None else measure_iterate(table, t)
            for callback in trainer.callbacks:  # type: ignore[attr-defined]
                if isinstance(callback, IterateEvaluator):
                    metrics |= callback.evaluate_iterate(module, t)
            record["metrics"] = metrics
            run.write_iterate(t, record)
            speed = (record["training"] or {}).get("speed", {})
            self._log(trainer, {**metrics, **speed, "iterate": t}, record["step"])
            if table is not None:
                pairs = sample_pairs(table, module.tokenizer, _PAIRS_LOGGED)
                log_samples(trainer.loggers, pairs, record["step"])
        show_iterates([run.read_iterate(i) for i in range(t + 1)])
        if table is not None:
            show_samples(sample_pairs(table, module.tokenizer, self.pairs_shown))

    def _measure_rows(self, trainer: L.Trainer, plan: RowPlan) -> None:
        """Measure the rows of the iterate at hand once: log it, keep it with the iterate."""
        run, t = self._run, plan.iterate
        record = run.read_iterate(t)
        if "rows" in record:
            return
        table = read_rows(run.rows(t))
        record["rows"] = measure_rows(table, redrawn(plan, table))
        run.write_iterate(t, record)
        self._log(trainer, record["rows"], record["step"])

    def _tell(self, trainer: L.Trainer) -> None:
        """Tell who listens what is known of the iterates."""
        run = self._run
        records = [run.read_iterate(t) for t in run.known_iterates()]
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, IterateListener):
                callback.on_iterate_measured(trainer, run, records)

    def _log(self, trainer: L.Trainer, metrics: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=step)

    def _training_record(
        self, trainer: L.Trainer, module: SelfPlayModule, data: SelfPlayDataModule
    ) -> dict[str, Any]:
        """How the iterate that just ended was trained; None where Lightning has no figure."""
        opponent = module.opponent(module.iterate)
        assert self._maker is not None, "on_fit_start() made it"
        timing = self._maker.timing
        trained = self._trained(trainer, module, data)

        def metric(name: str) -> float | None:
            value = trainer.callback_metrics.get(name)
            return None if value is None else float(value)

        return {
            "opponent": None if opponent is None else str(opponent),
            "reference": str(module.reference(module.iterate)),
            "rows": data.rows_at(module.iterate),
            "loss": metric("train/loss_epoch"),
            "margin": metric("val/rewards/margins"),
            "accuracy": metric("val/rewards/accuracies"),
            "seconds": {
                "generating": timing.generating,
                "scoring": timing.scoring,
                "training": trained.seconds,
            },
            "speed": measure_speed(
                timing, trained, module.policy_spec.base, trainer.strategy.root_device
            ),
            "peak_memory": peak_memory(),
        }

    def _trained(
        self, trainer: L.Trainer, module: SelfPlayModule, data: SelfPlayDataModule
    ) -> Trained:
        """What this process has trained of the iterate that just ended."""
        seconds = time.perf_counter() - self._training_since
        t, rows = module.iterate, self._run.read_iterate(module.iterate).get("rows", {})
        steps = trainer.global_step - self._step_since
        in_steps = steps * trainer.accumulate_grad_batches * data.batch_size
        return Trained(
            seconds=seconds,
            rows=min(in_steps, data.rows_at(t) * module.epochs_per_iterate / trainer.world_size),
            prompt_tokens=rows.get("rows/prompt_tokens", 0.0),
            response_tokens=rows.get("rows/real_tokens", 0.0)
            + rows.get("rows/generated_tokens", 0.0),
        )

    @property
    def _run(self) -> RunFolder:
        assert self.run is not None, "setup() names the run folder"
        return self.run


def _parts(
    trainer: L.Trainer, module: L.LightningModule
) -> tuple[SelfPlayModule, SelfPlayDataModule]:
    """The module and the data module, of the classes that self-play needs."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(module, SelfPlayModule) or not isinstance(data, SelfPlayDataModule):
        raise SettingError(
            "callbacks",
            "SelfPlay",
            f"it got a {type(module).__name__} and a {type(data).__name__}",
            fix="train a SelfPlayModule with a SelfPlayDataModule: Trainer.fit(module, datamodule)",
        )
    return module, data


def _fields(
    trainer: L.Trainer, module: SelfPlayModule, data: SelfPlayDataModule, t: int
) -> dict[str, Any]:
    """All that must stay the same for iterates up to t to be those of the same run."""
    batch = data.batch_size * trainer.accumulate_grad_batches * trainer.world_size
    return {
        **module.fingerprint_fields(t),
        **data.fingerprint_fields(),
        "seed": keyed.global_seed(),
        "batch_size": batch,
        "gradient_clip_val": trainer.gradient_clip_val,
        "limit_train_batches": trainer.limit_train_batches,
    }


def _validate_now(trainer: L.Trainer) -> None:
    """Run the validation loop once, as Lightning does it in the middle of training."""
    loop = trainer.fit_loop.epoch_loop.val_loop
    trainer.validating = True
    loop.run()
    trainer.training = True
