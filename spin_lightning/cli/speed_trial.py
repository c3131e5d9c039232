"""How fast this machine decodes, scores and trains with a policy: a short trial of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from spin_lightning.callbacks.memory_table import LongestRow
from spin_lightning.data.collate import collate
from spin_lightning.data.dataset import Pair
from spin_lightning.generation.base import Request
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.modules import pass_by_pass
from spin_lightning.modules.base import SelfPlayModule

_PROMPT = 32
# On other devices a trial has to fill the device.
_ROWS, _RESPONSE = {"cpu": 8}, {"cpu": 16}
_ROWS_ELSEWHERE, _RESPONSE_ELSEWHERE = 64, 128


class Speed(NamedTuple):
    """Tokens per second of each phase of a run.

    Attributes:
        decoding: Response tokens that are sampled from an iterate.
        scoring: Tokens of prompts and responses under one policy.
        training: Tokens of prompts and responses, forward and backward.
    """

    decoding: float
    scoring: float
    training: float

    def seconds(self, row: LongestRow) -> tuple[float, float, float]:
        """Time that such a row takes in each phase: with one scorer, and in one epoch."""
        generated = row.generated or 0
        tokens = row.prompt + row.real + generated
        return generated / self.decoding, tokens / self.scoring, tokens / self.training


def measure(module: SelfPlayModule, folder: Path) -> Speed:
    """Measure a module on random ids, each phase once after a warm-up.

    Args:
        module: The module, with its policy.
        folder: An empty folder, for a snapshot of the policy as iterate 0.
    """
    policy = module.policy
    policy.snapshot(folder)
    policy.use_iterates({0: folder})
    device = policy.device
    rows = _ROWS.get(device.type, _ROWS_ELSEWHERE)
    length = _RESPONSE.get(device.type, _RESPONSE_ELSEWHERE)
    source = np.random.default_rng(0)
    ids = source.integers(module.vocabulary, size=(rows, _PROMPT + 2 * length), dtype=np.int32)
    parts = [np.split(one, [_PROMPT, _PROMPT + length]) for one in ids]
    paired = module.opponent(0) is not None
    further = (0.0,) * len(module.further_references(0))
    pairs = [
        Pair(
            x,
            y,
            generated if paired else y[:0],
            reference_real=0.0,
            reference_generated=0.0,
            first_ids=generated if module.uses_first_responses else y[:0],
            further_real=further,
            further_generated=further,
        )
        for x, y, generated in parts
    ]
    batch = collate(pairs).to(device)
    tokens = len(batch.pairs.input_ids)
    generator = LocalGenerator((), 0, module.generation)

    def decode(cap: int = length) -> None:
        requests = [
            Request(tuple(pair.prompt_ids.tolist()), 0, key, cap) for key, pair in enumerate(pairs)
        ]
        generator.generate(policy, requests)

    def score() -> None:
        with policy.at(0):
            policy.score(batch.pairs)

    def train() -> None:
        _, objective = pass_by_pass.score(module, batch)
        objective.backward()
        module.zero_grad()

    decode(cap=2)
    return Speed(
        rows * length / _clock(decode, device),
        tokens / _clock(score, device),
        tokens / _clock(train, device),
    )


def _clock(work: Callable[[], None], device: torch.device) -> float:
    """Seconds that `work` takes; scoring and training have compiled their kernels before."""
    if device.type != "cpu":
        work()
    _wait(device)
    start = time.perf_counter()
    work()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
