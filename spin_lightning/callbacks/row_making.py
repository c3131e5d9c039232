"""Making an iterate's rows inside a Trainer, with progress bars and an estimate of the cost."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import nsmallest
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L

from spin_lightning.callbacks.console import RowProgress, console, show_table
from spin_lightning.callbacks.guard import RunGuard
from spin_lightning.callbacks.memory_table import LongestRow, memory_rows, predicted_phases
from spin_lightning.callbacks.phase_progress import progress_log
from spin_lightning.callbacks.run_times import RunTimes
from spin_lightning.callbacks.session import Session
from spin_lightning.errors import SettingError, SpinError
from spin_lightning.mixtures import latest
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.packing import pack_prompts
from spin_lightning.rows.making import Reporter, Synthesis, Timing, finish, is_finished
from spin_lightning.rows.manifest import read_manifest
from spin_lightning.rows.plan import NO_ROWS, EarlierRows, RowPlan, RowSettings, plan_rows
from spin_lightning.rows.store import read_rows
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.progress import duration
from spin_lightning.run.row_folder import manifest_path
from spin_lightning.types import Example, PromptBatch


class DryRunFinished(Exception):
    """The costs were shown; nothing was trained."""


class ScratchRun:
    """The run folder of a dry run: a temporary one, so that it leaves nothing that binds a run."""

    def __init__(self) -> None:
        """Create no folder yet."""
        self._folder: TemporaryDirectory[str] | None = None

    def open(self, trainer: L.Trainer, run: RunFolder) -> RunFolder:
        """Create the folder on rank 0 for all ranks, near the run folder, where servers see it.

        Raises:
            SettingError: Some ranks are on other machines.
        """
        if trainer.num_nodes > 1:
            raise SettingError(
                "dry_run",
                True,
                "its temporary folder is for one machine",
                fix="make the dry run on one machine, with --trainer.num_nodes 1",
            )
        name = ""
        if trainer.is_global_zero:
            near = next(path for path in run.root.resolve().parents if path.is_dir())
            where = near if os.access(near, os.W_OK) else None
            self._folder = TemporaryDirectory(prefix=".spin-lightning-dry-run-", dir=where)
            name = self._folder.name
        return RunFolder(Path(trainer.strategy.broadcast(name)))

    def close(self) -> None:
        """Delete the folder; a second call does nothing."""
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


@dataclass
class RowMaker:
    """Makes the rows of the module's iterate into the run folder.

    Attributes:
        session: The run; its ranks share the work.
        iterates: Number of iterates of the run.
        guard: Lets ranks wait, and stops between two units.
        dry_run: Stop after the first work unit of training rows.
        estimated: Whether the duration of the run was estimated before.
        timing: What was made here and how long it took.
        times: What each iterate took, summed over all starts of the run.
    """

    session: Session
    iterates: int
    guard: RunGuard
    dry_run: bool = False
    estimated: bool = False
    timing: Timing = field(default_factory=Timing)
    times: RunTimes = field(init=False)

    def __post_init__(self) -> None:
        """Read what earlier starts of the run took, and check the policy before it makes rows."""
        module, examples = self.session.module, self.session.data.train
        if examples:
            # All ranks take the same examples, so that they take the same passes.
            module.policy.check_passes(trial_batch(examples, module.context_length))
        kept = self.session.trainer.is_global_zero and not self.dry_run
        self.times = RunTimes.of(self.session.run, kept=kept)

    def make_val(self, fields: dict[str, Any]) -> None:
        """Answer the held-out examples with the newest iterate, and score for every comparison.

        Args:
            fields: What the manifest holds besides the rows' own numbers.
        """
        session, t = self.session, self.session.module.iterate
        plan = plan_rows(
            t,
            latest(t),
            session.module.reference(t),
            self._settings(),
            also_scored_by={t, max(t - 1, 0), 0} | _further_members(session.module),
            source="" if session.data.val_data is None else "val_data",
        )
        self._make(plan, session.data.val, session.run.val_rows, fields, "held-out rows")

    def make_train(self, fields: dict[str, Any]) -> RowPlan:
        """Make the rows that train the next iterate, and time it.

        Args:
            fields: What the manifest holds besides the rows' own numbers.

        Returns:
            The plan of these rows.

        Raises:
            DryRunFinished: In a dry run, after the first work unit.
        """
        module, data = self.session.module, self.session.data
        t, self.timing = module.iterate, Timing()
        plan = plan_rows(
            t,
            module.opponent(t),
            module.reference(t),
            self._settings(),
            samples=data.samples_per_prompt,
            union=module.rows == "union",
            keep_from=module.opponent(t - 1) if t and module.refresh == "reservoir" else None,
            also_scored_by=_further_members(module),
        )
        examples = data.iterate_examples(t)
        self._make(plan, examples, self.session.run.rows, fields, "rows", estimate=True)
        return plan

    def cost(self) -> str:
        """Rows and tokens of an iterate, before anything is made."""
        module, data = self.session.module, self.session.data
        examples = data.iterate_examples(module.iterate)
        t, cap = module.iterate, data.max_response_tokens
        samples = data.samples_per_prompt * module.rows_per_sample(t)
        prompt = sum(len(example.prompt_ids) for example in examples) * samples
        real = sum(len(example.real_ids) for example in examples) * samples
        rows = len(examples) * samples
        return (
            f"Each of {self.iterates} iterates: {rows:,} rows, {prompt:,} prompt tokens, "
            f"{real:,} real tokens, at most {rows * cap:,} generated tokens; "
            f"{len(data.val):,} held-out rows."
        )

    def _settings(self) -> RowSettings:
        module, data = self.session.module, self.session.data
        return RowSettings(
            seed=data.seed,
            unit_size=module.generation.unit_size,
            cap=data.max_response_tokens,
            context=module.context_length,
        )

    def _make(
        self,
        plan: RowPlan,
        examples: list[Example],
        folder_of: Callable[[int], Path],
        fields: dict[str, Any],
        what: str,
        *,
        estimate: bool = False,
    ) -> None:
        folder, trainer = folder_of(plan.iterate), self.session.trainer
        # Only one rank checks: another may already be regenerating parts.
        here = trainer.is_global_zero and is_finished(plan, examples, folder)
        if trainer.strategy.broadcast(here):
            self.guard.wait_for(trainer, manifest_path(folder))
            return
        if trainer.is_global_zero:
            # Rows of another plan, after a change of alpha for example, are regenerated.
            manifest_path(folder).unlink(missing_ok=True)
        before = folder_of(plan.iterate - 1)
        is_there = plan.iterate > 0 and (plan.coupling or read_manifest(before))
        earlier = EarlierRows(read_rows(before)) if is_there else NO_ROWS
        rows = len(examples) * plan.rows_per_example
        title = f"iterate {plan.iterate} {what}"
        own_rows = -(-rows // trainer.world_size)
        with RowProgress(
            title, own_rows, visible=trainer.is_global_zero, log=progress_log(trainer)
        ) as progress:
            synthesis = self._synthesis()
            synthesis.generator.on_progress = progress.respond
            parts = synthesis.make(
                plan,
                examples,
                folder,
                _All((progress, self.timing, *([self.times.making(plan.iterate + 1)] * estimate))),
                earlier=earlier,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
            for _ in parts:
                self.guard.between_units(trainer)
                if estimate and not self.estimated and self.timing.rows:
                    self.estimated = True
                    self._print_estimate(plan, rows)
        self.guard.wait(trainer)
        if trainer.is_global_zero:
            synthesis.generator.rest()
            finish(plan, examples, folder, fields)
        self.guard.wait_for(trainer, manifest_path(folder))

    def _synthesis(self) -> Synthesis:
        module, text_format = self.session.module, self.session.text_format
        generator = module.make_generator(
            text_format.stop_ids, text_format.pad_id, module.generation
        )
        return Synthesis(module.policy, generator, module.vocabulary)

    def _print_estimate(self, plan: RowPlan, rows: int) -> None:
        """Print how long the run will take, judging by its first work unit; a dry run ends here."""
        trainer, module = self.session.trainer, self.session.module
        share = rows / self.timing.rows / trainer.world_size
        making = share * (self.timing.generating + self.timing.scoring)
        # A step is a forward and a backward pass over what one member's scoring runs forward.
        passes = 3 * module.epochs_per_iterate / max(1, len(plan.members))
        training = share * self.timing.scoring * passes
        left = self.iterates - plan.iterate
        if trainer.is_global_zero:
            console.print(
                f"Estimated per iterate: {duration(making)} to generate and score, about "
                f"{duration(training)} to train; {duration(left * (making + training))} in "
                f"total (iterates left: {left})."
            )
        if self.dry_run:
            if trainer.is_global_zero:
                self._show_memory()
            raise DryRunFinished

    def _show_memory(self) -> None:
        """Print how much memory the run is predicted to take, or why that is not known."""
        module, data = self.session.module, self.session.data
        longest = max(data.train, key=lambda e: len(e.prompt_ids) + len(e.real_ids))
        prompt, paired = len(longest.prompt_ids), module.opponent(module.iterate) is not None
        generated = min(data.max_response_tokens, module.context_length - prompt)
        row = LongestRow(
            prompt,
            len(longest.real_ids),
            generated if paired else None,
            data.samples_per_prompt * module.rows_per_sample(module.iterate),
            uses_first=module.uses_first_responses,
        )
        device = self.session.trainer.strategy.root_device
        try:
            show_table(memory_rows(predicted_phases(module, row, data.batch_size, device)))
        except SpinError as error:
            console.print(f"No table of memory: {error.problem}.")


def _further_members(module: SelfPlayModule) -> set[int]:
    """Iterates whose log-probs the further references of the iterate in training need."""
    further = module.further_references(module.iterate)
    return {member for density in further for member in density.plain_members}


def trial_batch(examples: Sequence[Example], context: int) -> PromptBatch:
    """Two short prompts, each with the real responses to both, as a trial of a policy's passes.

    Args:
        examples: At least one.
        context: Largest number of tokens of a prompt with a response; longer ones are cut.
    """
    few = nsmallest(2, examples, key=lambda e: len(e.prompt_ids) + len(e.real_ids))
    return pack_prompts(
        [one.prompt_ids for one in few],
        [[other.real_ids[: context - len(one.prompt_ids)] for other in few] for one in few],
    )


@dataclass(frozen=True)
class _All:
    """Passes progress on to several reporters."""

    reporters: Sequence[Reporter]

    def advance(self, stage: str, rows: int, seconds: float, tokens: int = 0) -> None:
        for reporter in self.reporters:
            reporter.advance(stage, rows, seconds, tokens)
