"""Evaluating the iterates of a run: the base is loaded once, and only if a score is missing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from spin_lightning.evaluation.contestants import Contestant, contestants
from spin_lightning.evaluation.results import Result
from spin_lightning.generation.base import MakeGenerator
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.policies.base import Policy
from spin_lightning.run.folder import RunFolder


@dataclass(frozen=True)
class EvaluatedRun:
    """A run, with everything that its contestants need to answer.

    Attributes:
        folder: The run folder, where results are kept.
        policy: Returns a policy that can act as every iterate. Not called if all results are
            cached, so that nothing is loaded then.
        tokenizer: The run's tokenizer.
        make_generator: Makes the engine that samples responses.
    """

    folder: RunFolder
    policy: Callable[[], Policy]
    tokenizer: PreTrainedTokenizerBase
    make_generator: MakeGenerator


class Benchmark(Protocol):
    """Measures contestants of a run."""

    def evaluate(self, run: EvaluatedRun, contestant: Contestant) -> list[Result]:
        """Measure one contestant; cached results are not measured again."""


def evaluate_run(
    run: RunFolder,
    names: Sequence[str],
    benchmarks: Sequence[Benchmark],
    make_generator: MakeGenerator = LocalGenerator,
) -> Iterator[tuple[Contestant, list[Result]]]:
    """Measure iterates of a run, one at a time.

    Args:
        run: The run folder.
        names: Names of contestants, see `contestants`.
        benchmarks: What they are measured on.
        make_generator: Makes the engine that samples responses.

    Yields:
        Each contestant with its results, as soon as it is measured.

    Raises:
        RunFolderError: The run has no such iterate.
        SettingError: A name is not one of a contestant.
    """
    from spin_lightning.policies.saved import load_policy, load_tokenizer

    chosen = contestants(run, names)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    @cache
    def policy() -> Policy:
        return load_policy(run.root, device)

    evaluated = EvaluatedRun(run, policy, load_tokenizer(run.root), make_generator)
    for contestant in chosen:
        yield (
            contestant,
            [
                result
                for benchmark in benchmarks
                for result in benchmark.evaluate(evaluated, contestant)
            ],
        )
