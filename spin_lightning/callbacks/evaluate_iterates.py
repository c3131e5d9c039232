"""Benchmarks inside the run: every iterate is scored right after it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning.callbacks.console import show_table
from spin_lightning.callbacks.interfaces import IterateEvaluator
from spin_lightning.errors import SettingError
from spin_lightning.evaluation.base import Benchmark
from spin_lightning.evaluation.contestants import iterate_contestant
from spin_lightning.evaluation.lm_eval import Harness, HarnessSettings, check_installed
from spin_lightning.evaluation.mt_bench.answers import Answering
from spin_lightning.evaluation.mt_bench.benchmark import MTBench
from spin_lightning.evaluation.mt_bench.judge import JudgeError, JudgeSettings
from spin_lightning.evaluation.results import Result, read_results, score_table
from spin_lightning.modules.base import SelfPlayModule
from spin_lightning.run.folder import RunFolder


class EvaluateIterates(IterateEvaluator):
    """Scores every iterate on benchmarks, on the base that is loaded for training.

    Training goes on as if nothing had happened: weights, modes, gradients and random states are as
    before. Scores are kept in the run's `evaluation/`, where `spin-lightning evaluate` finds them;
    verdicts that a judge could not give do not stop the run, and can be had by that command later.

    Args:
        tasks: Of lm-evaluation-harness: names of tasks, groups or presets (open_llm_leaderboard),
            or folders with YAML tasks.
        num_fewshot: Examples in the prompt; what the task says if not given. A preset has its own.
        limit: Only the first so many documents of each task.
        batch_size: Requests in a forward.
        apply_chat_template: Put the prompts into the chat template.
        include_path: A folder with more tasks, which `tasks` may name.
        seed: Of all that the harness draws; its own default seeds if not given.
        mt_bench: Folder or hub id of MT-Bench's files; not played if not given.
        judge: Settings of `JudgeSettings`: base_url, model, key_variable and so on.
        max_new_tokens: Longest answer to MT-Bench's questions.

    Raises:
        SettingError: Nothing to evaluate, an extra is not installed, or a setting of the judge that
            there is not.
    """

    def __init__(
        self,
        tasks: Sequence[str] = (),
        num_fewshot: int | None = None,
        limit: int | None = None,
        batch_size: int = 8,
        apply_chat_template: bool = False,
        include_path: str | None = None,
        seed: int | None = None,
        mt_bench: str | None = None,
        judge: dict[str, Any] | None = None,
        max_new_tokens: int = 1024,
    ) -> None:
        """Check that what it takes is installed."""
        if not tasks and mt_bench is None:
            raise SettingError(
                "tasks", list(tasks), "nothing to evaluate", fix="name a task, or mt_bench's files"
            )
        if tasks:
            check_installed()
        self._harness = HarnessSettings(
            tasks=tuple(tasks),
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=apply_chat_template,
            include_path=include_path,
            seed=seed,
        )
        self._mt_bench = mt_bench
        self._judge = JudgeSettings.of(judge or {})
        self._answering = Answering(max_new_tokens=max_new_tokens)
        self._benchmarks: list[Benchmark] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look the tasks up and read the questions, before anything expensive."""
        if stage != "fit" or not trainer.is_global_zero or self._benchmarks:
            return
        if self._harness.tasks:
            self._benchmarks.append(Harness(self._harness))
        if self._mt_bench is not None:
            self._benchmarks.append(MTBench(self._mt_bench, self._judge, self._answering))

    def evaluate_iterate(self, module: SelfPlayModule, t: int) -> dict[str, float]:
        """Score iterate t, and show all scores so far."""
        data = module.trainer.datamodule  # type: ignore[attr-defined]
        run: RunFolder = data.run_folder
        contestant = iterate_contestant(run, t)
        results: list[Result] = []
        for benchmark in self._benchmarks:
            try:
                results += benchmark.evaluate(
                    run, lambda: module.policy, module.tokenizer, contestant
                )
            except JudgeError as error:
                rank_zero_info(f"Iterate {t} has no score of the judge: {error}")
        known = read_results(run)
        if known:
            show_table(score_table(known))
        return {name: value for result in results for name, value in result.metrics.items()}
