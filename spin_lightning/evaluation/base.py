"""Evaluating a run's iterates: the base is loaded once, and only if something is not known yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from spin_lightning.evaluation.contestants import Contestant, contestants
from spin_lightning.evaluation.results import Result
from spin_lightning.policies.base import Policy
from spin_lightning.policies.saved import load_policy, load_tokenizer
from spin_lightning.run.folder import RunFolder


class Benchmark(Protocol):
    """Something that a contestant can be measured on."""

    def evaluate(
        self,
        run: RunFolder,
        policy: Callable[[], Policy],
        tokenizer: PreTrainedTokenizerBase,
        contestant: Contestant,
    ) -> list[Result]:
        """Measure one contestant; what is known of it is not measured again."""


def evaluate_run(
    run: RunFolder, names: Sequence[str], benchmarks: Sequence[Benchmark]
) -> Iterator[tuple[Contestant, list[Result]]]:
    """Measure iterates of a run, one after the other.

    Args:
        run: The run.
        names: Who is measured, as `contestants` takes it.
        benchmarks: On what.

    Yields:
        Each contestant with its results, as they are there.

    Raises:
        RunFolderError: The run has no such iterate.
        SettingError: There is no such name.
    """
    chosen = contestants(run, names)
    tokenizer = load_tokenizer(run.root)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @cache
    def policy() -> Policy:
        return load_policy(run.root, device)

    for contestant in chosen:
        results = [
            result
            for benchmark in benchmarks
            for result in benchmark.evaluate(run, policy, tokenizer, contestant)
        ]
        yield contestant, results
