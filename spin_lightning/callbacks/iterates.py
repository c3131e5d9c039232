"""What happens to an iterate: it is kept, measured and recorded, and listeners are notified."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace

import torch

from spin_lightning.callbacks.console import (
    console,
    show_iterates,
    show_samples,
    show_verdicts,
)
from spin_lightning.callbacks.early import EarlySteps
from spin_lightning.callbacks.interfaces import IterateEvaluator, IterateListener
from spin_lightning.callbacks.log_samples import log_samples, log_tells
from spin_lightning.callbacks.row_metrics import measure_iterate, measure_rows
from spin_lightning.callbacks.run_log import RunLog
from spin_lightning.callbacks.run_times import RunTimes, Spent, peak_memory
from spin_lightning.callbacks.session import Session
from spin_lightning.callbacks.speed import Trained, measure_speed
from spin_lightning.data.samples import samples_to_json
from spin_lightning.out_of_memory import TokenLimit
from spin_lightning.report.cue_words import best_cue_line, clear_cues, special_ids
from spin_lightning.report.report import draw_iterates
from spin_lightning.report.samples import sample_pairs
from spin_lightning.report.verdicts import find_verdicts
from spin_lightning.rows.making import GAP
from spin_lightning.rows.manifest import read_manifest
from spin_lightning.rows.plan import RowPlan, redrawn
from spin_lightning.rows.store import read_rows
from spin_lightning.rows.tells import find_tells
from spin_lightning.run.files import replace_synced, write_json, writing
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.folder import ITERATE_FILE
from spin_lightning.run.records import STAGES, IterateRecord, TrainingRecord

_PAIRS_LOGGED = 20


@dataclass
class TrainingClock:
    """When the stretch of training began whose time is not yet counted.

    Attributes:
        since: Time, seconds of `time.perf_counter`; None while nothing is trained.
        step: Optimizer step.
    """

    since: float | None = None
    step: int = 0

    def restart(self, step: int) -> None:
        """Start again, now, at this optimizer step."""
        self.since, self.step = time.perf_counter(), step

    def stop(self) -> None:
        """Count no time until the next start."""
        self.since = None


def keep_start(session: Session) -> None:
    """Write the tokenizer, with the chat template as used, records of the data, and iterate 0."""
    write_json(session.run.data, {"sources": session.data.records()})
    write_json(session.run.conversations, samples_to_json(session.data.samples))
    tokenizer = session.run.tokenizer
    with writing(tokenizer):
        session.text_format.tokenizer.save_pretrained(tokenizer)
    keep_iterate(session, 0, step=0, training=None)


def keep_iterate(session: Session, t: int, step: int, training: TrainingRecord | None) -> None:
    """Write the policy's adapter as iterate t; the bare base has none.

    If a different iterate t is already there, everything that descends from it is deleted.

    Args:
        session: The session.
        t: Index of the iterate.
        step: Optimizer steps of the run so far.
        training: How the iterate was trained; None for iterate 0.
    """
    run, module = session.run, session.module
    staged = run.staged_iterate(t)
    bare = t == 0 and module.policy_spec.initial_adapter is None
    files = {} if bare else module.policy.snapshot(staged)
    if t in run.known_iterates() and run.record(t).files != files:
        run.discard_after(t)
    fields = session.fingerprint_fields(t)
    record = IterateRecord(
        index=t,
        parent=t - 1 if t else None,
        files=files,
        base=asdict(module.policy_spec.base.absolute),
        fingerprint=fingerprint(fields),
        fingerprint_fields=fields,
        step=step,
        training=training,
        tokenizer_files=None if t else run.tokenizer_hashes(),
        template_date=None if t else session.text_format.date_written,
    )
    write_json(staged / ITERATE_FILE, record.to_json())
    replace_synced(staged, run.iterate(t))


def measure(session: Session, pairs_shown: int, log: RunLog) -> None:
    """Measure the current iterate, unless its record has metrics, and show the results.

    Metrics go to the loggers and into the iterate's record.

    Args:
        session: The session.
        pairs_shown: Sample pairs to print.
        log: Which iterates were logged before.
    """
    module, run, t = session.module, session.run, session.module.iterate
    record, tokenizer = run.record(t), session.text_format.tokenizer
    table = read_rows(run.val_rows(t)) if session.data.val else None
    metrics = record.metrics
    if metrics is None:
        exact = module.generation.is_exact
        metrics = {} if table is None else measure_iterate(table, t, is_exact=exact)
        for callback in session.callbacks:
            if isinstance(callback, IterateEvaluator):
                metrics |= callback.evaluate_iterate(module, t)
        run.write_record(replace(record, metrics=metrics))
    if t > log.iterate:
        speed = record.training.speed if record.training else {}
        session.log({**metrics, **speed, "iterate": t}, record.step)
        log.iterate = t
        if table is not None:
            pairs = sample_pairs(table, tokenizer, _PAIRS_LOGGED)
            log_samples(session.trainer.loggers, pairs, record.step)
    show_iterates([run.record(i) for i in range(t + 1)])
    if table is not None:
        show_samples(sample_pairs(table, tokenizer, pairs_shown))


def measure_training_rows(session: Session, plan: RowPlan, log: RunLog) -> None:
    """Measure the rows that train the next iterate, unless the record has their metrics."""
    run, t = session.run, plan.iterate
    record = run.record(t)
    rows = record.rows
    if rows is None:
        table, tokenizer = read_rows(run.rows(t)), session.module.tokenizer
        tells = find_tells(table, special_ids(tokenizer))
        manifest = read_manifest(run.rows(t))
        gap = None if manifest is None else manifest.others.get(GAP)
        rows = measure_rows(table, redrawn(plan, table), tells, gap)
        cues = None if tells is None else clear_cues(tells, tokenizer)
        run.write_record(replace(record, rows=rows, cues=cues))
        if tells is not None:
            log_tells(session.trainer.loggers, tells, tokenizer, record.step)
            console.print(best_cue_line(tells, tokenizer))
    if t > log.rows:
        session.log(rows, record.step)
        log.rows = t


def notify_listeners(session: Session) -> None:
    """Pass the records of all iterates to every listener."""
    records = session.run.records()
    for callback in session.callbacks:
        if isinstance(callback, IterateListener):
            callback.on_iterate_measured(session.trainer, session.run, records)


def name_states(session: Session, named: set[str]) -> None:
    """Print each known state of the run that is not yet among those named, and add it to them."""
    run = session.run
    new = [v for v in find_verdicts(run.records(), run.best_record()) if v.name not in named]
    show_verdicts(new)
    named |= {verdict.name for verdict in new}


def training_record(
    session: Session, times: RunTimes, clock: TrainingClock, early: EarlySteps
) -> TrainingRecord:
    """Describe how the iterate that just ended was trained.

    Args:
        session: The session.
        times: What it took, summed over all starts of the run.
        clock: When the stretch of training began that is not in `times` yet; it is stopped.
        early: What its first tenth was like.
    """
    module, trainer = session.module, session.trainer
    opponent = module.opponent(module.iterate)
    keep_training_time(session, times, clock)
    clock.stop()
    spent = times.spent_on(module.iterate + 1)
    trained = _trained(session, spent)

    def metric(name: str) -> float | None:
        value = trainer.callback_metrics.get(name)
        return None if value is None else float(value)

    return TrainingRecord(
        opponent=None if opponent is None else str(opponent),
        reference=str(module.reference(module.iterate)),
        rows=session.data.rows_at(module.iterate),
        loss=metric("train/loss_epoch"),
        margin=metric("val/rewards/margins"),
        accuracy=metric("val/rewards/accuracies"),
        seconds={stage: getattr(spent, stage) for stage in STAGES},
        speed=measure_speed(spent, trained, module.policy_spec.base, trainer.strategy.root_device),
        peak_memory=peak_memory(),
        phase_peaks=spent.peaks,
        early=early.means(),
        deviations=_training_limit(session).deviations,
    )


def _training_limit(session: Session) -> TokenLimit:
    """The lowest limit of a training pass in any process. All of them call this function."""
    own, strategy = session.module.policy.training_limit, session.trainer.strategy
    tokens = torch.tensor(own.tokens, device=strategy.root_device)
    return replace(own, tokens=int(strategy.reduce(tokens, reduce_op="min")))


def draw_curves(session: Session) -> None:
    """Draw the metrics over the iterates, if any iterate has metrics."""
    run, records = session.run, session.run.records()
    if any(record.metrics for record in records):
        picture = draw_iterates({run.root.name: records}, run.report / "iterates.png")
        console.print(f"Picture: {picture}")


def keep_training_time(session: Session, times: RunTimes, clock: TrainingClock) -> None:
    """Count the stretch of training since the clock's start, and restart the clock.

    Does nothing while nothing is trained.
    """
    if clock.since is None:
        return
    seconds = time.perf_counter() - clock.since
    trainer, data, t = session.trainer, session.data, session.module.iterate
    steps = trainer.global_step - clock.step
    rows = steps * trainer.accumulate_grad_batches * data.batch_size
    times.train(t + 1, seconds, rows)
    clock.restart(trainer.global_step)


def _trained(session: Session, spent: Spent) -> Trained:
    """What this process trained of the iterate that just ended."""
    module, t = session.module, session.module.iterate
    in_epochs = session.data.rows_at(t) * module.epochs_per_iterate / session.trainer.world_size
    rows = session.run.record(t).rows or {}
    return Trained(
        seconds=spent.training,
        # Without rows that a crash lost, and those that the last batch of an epoch lacks.
        rows=min(spent.trained_rows, in_epochs),
        prompt_tokens=rows.get("rows/prompt_tokens", 0.0),
        response_tokens=rows.get("rows/real_tokens", 0.0) + rows.get("rows/generated_tokens", 0.0),
    )
