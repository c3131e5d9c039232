"""Benchmarks inside the run: every iterate is scored right after it was made."""

from __future__ import annotations

from collections.abc import Sequence

import lightning as L

from spin_lightning.callbacks.console import show_table
from spin_lightning.callbacks.evaluate import IterateEvaluator
from spin_lightning.errors import SettingError
from spin_lightning.evaluation.contestants import iterate_contestant
from spin_lightning.evaluation.lm_eval import Harness, HarnessSettings, check_installed
from spin_lightning.evaluation.results import read_results, score_table
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.run_folder import RunFolder


class EvaluateIterates(IterateEvaluator):
    """Scores every iterate with lm-evaluation-harness, on the base that is loaded for training.

    Training goes on as if nothing had happened: weights, modes, gradients and random states are as
    before. Scores are kept in the run's `evaluation/`, where `spin-lightning evaluate` finds them.

    Args:
        tasks: Names of tasks, groups or presets (open_llm_leaderboard), or folders with YAML tasks.
        num_fewshot: Examples in the prompt; what the task says if not given. A preset has its own.
        limit: Only the first so many documents of each task.
        batch_size: Requests in a forward.
        apply_chat_template: Put the prompts into the chat template.
        seed: Of all that the harness draws; its own default seeds if not given.

    Raises:
        SettingError: No tasks, or lm_eval is not installed.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        apply_chat_template: bool = False,
        seed: int | None = None,
    ) -> None:
        """Check that the harness is there."""
        if not tasks:
            raise SettingError("tasks", tasks, "nothing to evaluate", fix="name at least one task")
        check_installed()
        self._settings = HarnessSettings(
            tasks=tuple(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            seed=seed,
        )
        self._harness: Harness | None = None

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look the tasks up, before anything expensive."""
        if stage == "fit" and trainer.is_global_zero and self._harness is None:
            self._harness = Harness(self._settings)

    def evaluate_iterate(self, module: SelfPlayModule, t: int) -> dict[str, float]:
        """Score iterate t, and show all scores so far."""
        assert self._harness is not None, "setup() made it"
        data = module.trainer.datamodule  # type: ignore[attr-defined]
        run: RunFolder = data.run_folder
        contestant = iterate_contestant(run, t)
        results = self._harness.evaluate(run, lambda: module.policy, module.tokenizer, contestant)
        show_table(score_table(read_results(run)))
        return {name: value for result in results for name, value in result.metrics.items()}
