"""Making an iterate's rows inside a Trainer, shown as they come, with what they will cost."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import lightning as L

from spin_lightning.callbacks.console import RowProgress, console
from spin_lightning.callbacks.guard import RunGuard
from spin_lightning.data.datamodule import SelfPlayDataModule
from spin_lightning.mixtures import Mixture, latest
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.rows.making import Synthesis, Timing, finish, is_finished
from spin_lightning.rows.plan import NO_ROWS, Coupling, EarlierRows, RowPlan
from spin_lightning.rows.store import MANIFEST, read_manifest, read_rows
from spin_lightning.run.folder import RunFolder
from spin_lightning.types import Example


class DryRunFinished(Exception):
    """The costs were shown; nothing was trained."""


@dataclass
class RowMaker:
    """Makes the rows of the module's iterate into the run folder.

    Attributes:
        trainer: Whose ranks share the work.
        module: Whose policy plays.
        data: Whose examples are answered.
        run: Where rows go.
        iterates: Number of iterates of the run.
        guard: Lets ranks wait, and stops between two units.
        dry_run: Stop after the first work unit of training rows.
        estimated: Whether the time that the run will take was said before.
        timing: What was made here and how long it took.
    """

    trainer: L.Trainer
    module: SelfPlayModule
    data: SelfPlayDataModule
    run: RunFolder
    iterates: int
    guard: RunGuard
    dry_run: bool = False
    estimated: bool = False
    timing: Timing = field(default_factory=Timing)

    def make_val(self, fields: dict[str, Any]) -> None:
        """Answer the held-out examples with the newest iterate, and score for every comparison.

        Args:
            fields: What the manifest says besides the rows' own numbers.
        """
        t = self.module.iterate
        plan = self._plan(latest(t), also_scored_by={t, max(t - 1, 0), 0}, samples=1)
        self._make(plan, self.data.val, self.run.val_rows, fields, "held-out rows")

    def make_train(self, fields: dict[str, Any]) -> RowPlan:
        """Make the rows that train the next iterate, and time it.

        Args:
            fields: What the manifest says besides the rows' own numbers.

        Returns:
            What rows they are.

        Raises:
            DryRunFinished: After the first work unit, when that is all that was asked for.
        """
        t, self.timing = self.module.iterate, Timing()
        opponent = self.module.opponent(t)
        plan = self._plan(opponent, samples=self.data.samples_per_prompt)
        plan = replace(
            plan, union=self.module.rows == "union", coupling=self._coupling(t, opponent)
        )
        examples = self.data.iterate_examples(t)
        self._make(plan, examples, self.run.rows, fields, "rows", estimate=True)
        return plan

    def cost(self) -> str:
        """Rows and tokens of an iterate, before anything is made."""
        examples = self.data.iterate_examples(self.module.iterate)
        t, cap = self.module.iterate, self.data.max_response_tokens
        samples = self.data.samples_per_prompt * self.module.rows_per_sample(t)
        prompt = sum(len(example.prompt_ids) for example in examples) * samples
        real = sum(len(example.real_ids) for example in examples) * samples
        rows = len(examples) * samples
        return (
            f"Each of {self.iterates} iterates: {rows:,} rows, {prompt:,} prompt tokens, "
            f"{real:,} real tokens, at most {rows * cap:,} generated tokens; "
            f"{len(self.data.val):,} held-out rows."
        )

    def _plan(
        self, opponent: Mixture | None, samples: int, also_scored_by: Collection[int] = ()
    ) -> RowPlan:
        members, token_alpha = set(also_scored_by), 0.0
        token_members: tuple[int, ...] = ()
        if opponent is not None:
            reference = self.module.reference(self.module.iterate)
            token_members, token_alpha = reference.token_members, reference.token_alpha
            members |= {*reference.plain_members, *token_members, *((0,) if token_alpha else ())}
        return RowPlan(
            iterate=self.module.iterate,
            opponent=opponent,
            members=tuple(sorted(members)),
            token_alpha=token_alpha,
            token_members=token_members,
            seed=self.data.seed,
            samples=samples,
            unit_size=self.module.generation.unit_size,
            cap=self.data.max_response_tokens,
            context=self.module.context_length,
        )

    def _coupling(self, t: int, opponent: Mixture | None) -> Coupling | None:
        """How rows of the iterate before are kept; None where all are made anew."""
        before = self.module.opponent(t - 1) if t else None
        if self.module.refresh == "all" or opponent is None or before is None:
            return None
        return Coupling.between(before, opponent)

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
        folder, trainer = folder_of(plan.iterate), self.trainer
        # One rank decides: while another looks, parts may already be made again.
        here = trainer.is_global_zero and is_finished(plan, examples, folder)
        if trainer.strategy.broadcast(here):
            return
        if trainer.is_global_zero:
            # Rows of another plan, of an alpha that was changed, say, are made anew.
            (folder / MANIFEST).unlink(missing_ok=True)
        before = folder_of(plan.iterate - 1)
        is_there = plan.iterate > 0 and (plan.coupling or read_manifest(before))
        earlier = EarlierRows(read_rows(before)) if is_there else NO_ROWS
        rows = len(examples) * plan.rows_per_example
        title = f"iterate {plan.iterate} {what}"
        with RowProgress(title, rows, visible=trainer.is_global_zero) as progress:
            parts = self._synthesis().make(
                plan,
                examples,
                folder,
                _Both(progress, self.timing),
                earlier=earlier,
                rank=trainer.global_rank,
                world_size=trainer.world_size,
            )
            for _ in parts:
                self.guard.between_units(trainer)
                if estimate and not self.estimated and self.timing.rows:
                    self.estimated = True
                    self._announce(plan, rows)
        self.guard.wait(trainer)
        if trainer.is_global_zero:
            finish(plan, examples, folder, fields)
        self.guard.wait(trainer)

    def _synthesis(self) -> Synthesis:
        module, text_format = self.module, self.data.format
        assert text_format is not None
        generator = module.make_generator(
            text_format.stop_ids, text_format.pad_id, module.generation
        )
        return Synthesis(module.policy, generator, module.vocabulary)

    def _announce(self, plan: RowPlan, rows: int) -> None:
        """Say how long the run will take, from its first work unit; a dry run ends here."""
        share = rows / self.timing.rows / self.trainer.world_size
        making = share * (self.timing.generating + self.timing.scoring)
        # A step is a forward and a backward pass over what one member's scoring runs forward.
        passes = 3 * self.module.epochs_per_iterate / max(1, len(plan.members))
        training = share * self.timing.scoring * passes
        left = self.iterates - plan.iterate
        if self.trainer.is_global_zero:
            console.print(
                f"Estimated per iterate: {_minutes(making)} to generate and score, about "
                f"{_minutes(training)} to train; {_minutes(left * (making + training))} for the "
                f"{left} iterates that are left."
            )
        if self.dry_run:
            raise DryRunFinished


@dataclass(frozen=True)
class _Both:
    """Passes progress on to the bars and to the clock."""

    progress: RowProgress
    timing: Timing

    def advance(self, stage: str, rows: int, seconds: float, tokens: int = 0) -> None:
        self.progress.advance(stage, rows, seconds, tokens)
        self.timing.advance(stage, rows, seconds, tokens)


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"
