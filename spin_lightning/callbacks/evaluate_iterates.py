"""Benchmarks inside the run: every iterate is scored right after it was made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning.callbacks.console import show_table
from spin_lightning.callbacks.interfaces import IterateEvaluator
from spin_lightning.callbacks.session import run_folder_of, tokenizer_of
from spin_lightning.errors import SettingError
from spin_lightning.evaluation.base import Benchmark, EvaluatedRun
from spin_lightning.evaluation.contestants import iterate_contestant
from spin_lightning.evaluation.lm_eval import Harness, check_installed
from spin_lightning.evaluation.mt_bench.benchmark import MTBench
from spin_lightning.evaluation.mt_bench.judge import JudgeError
from spin_lightning.evaluation.results import Result, read_results, score_table
from spin_lightning.evaluation.settings import Answering, HarnessSettings, JudgeSettings
from spin_lightning.modules.base import SelfPlayModule


class EvaluateIterates(IterateEvaluator):
    """Scores every iterate on benchmarks, on the base that is loaded for training.

    Training is not affected: weights, modes, gradients and random states are afterwards as they
    were before. Scores are stored in the run's `evaluation/` folder, where `spin-lightning
    evaluate` finds them. Missing verdicts of a judge do not stop the run; that command requests
    them later.

    Args:
        tasks: Tasks of lm-evaluation-harness: names of tasks, groups or presets
            (open_llm_leaderboard, offline_leaderboard), or folders with YAML tasks.
        mt_bench: Folder or hub id of MT-Bench's files; default: no MT-Bench.
        judge: Settings of `JudgeSettings`: base_url, model, key_variable and so on.
        max_new_tokens: Length limit of an answer to MT-Bench's questions.
        harness: The other settings of `HarnessSettings`: num_fewshot, limit, batch_size,
            apply_chat_template, include_path, seed and offline_data.

    Raises:
        SettingError: There is nothing to evaluate, an extra is not installed, or a setting of the
            judge does not exist.
    """

    def __init__(
        self,
        tasks: Sequence[str] = (),
        mt_bench: str | None = None,
        judge: dict[str, Any] | None = None,
        max_new_tokens: int = Answering.max_new_tokens,
        **harness: Any,
    ) -> None:
        """Check the settings, and that the extra is installed."""
        if not tasks and mt_bench is None:
            raise SettingError(
                "tasks", list(tasks), "nothing to evaluate", fix="name a task, or mt_bench's files"
            )
        self._harness = HarnessSettings(tasks=tuple(tasks), **harness)
        if tasks:
            check_installed(self._harness)
        self._mt_bench = mt_bench
        self._judge = JudgeSettings.of(judge or {})
        self._answering = Answering(max_new_tokens=max_new_tokens)
        self._benchmarks: list[Benchmark] = []

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Look up the tasks and read the questions, before anything expensive."""
        if stage != "fit" or not trainer.is_global_zero or self._benchmarks:
            return
        if self._harness.tasks:
            self._benchmarks.append(Harness(self._harness))
        if self._mt_bench is not None:
            self._benchmarks.append(MTBench(self._mt_bench, self._judge, self._answering))

    def evaluate_iterate(self, module: SelfPlayModule, t: int) -> dict[str, float]:
        """Score iterate t, and show all scores so far."""
        folder, tokenizer = run_folder_of(module.trainer), tokenizer_of(module.trainer)
        run = EvaluatedRun(folder, lambda: module.policy, tokenizer, module.make_generator)
        contestant = iterate_contestant(folder, t)
        results: list[Result] = []
        for benchmark in self._benchmarks:
            try:
                results += benchmark.evaluate(run, contestant)
            except JudgeError as error:
                rank_zero_info(f"Iterate {t} has no score of the judge: {error}")
        if table := read_results(folder):
            show_table(score_table(table))
        return {name: value for result in results for name, value in result.metrics.items()}
