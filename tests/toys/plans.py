"""A row plan, examples for it, and its rows without a model."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence

import numpy as np
import torch

from spin_lightning.mixtures import Mixture
from spin_lightning.rows.plan import RowDraw, RowPlan, draws_of
from spin_lightning.rows.store import Ragged, RowTable
from spin_lightning.types import Example

STOP = 2
PLAN = RowPlan(
    iterate=2,
    opponent=Mixture({0: 0.5, 1: 0.25, 2: 0.25}),
    members=(1, 2),
    seed=11,
    samples=2,
    unit_size=16,
    cap=6,
    context=64,
)


def some_examples(count: int = 35) -> list[Example]:
    """Examples with gaps in their ids, as if some had been left out."""
    draw = random.Random(5)

    def words(most: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 24) for _ in range(draw.randrange(most)))

    return [Example(3 * i, (1, *words(8)), (*words(6), STOP), True) for i in range(count)]


def key_by_hand(plan: RowPlan, example_id: int, sample: int) -> int:
    text = f"{plan.seed}/{plan.iterate}/{example_id}/{sample}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big", signed=True)


def draw_row(plan: RowPlan, example: Example, sample: int) -> RowDraw:
    return next(draw for draw in draws_of(plan, example) if draw.sample == sample)


def table_of(draws: Sequence[RowDraw], iterate: int) -> RowTable:
    """The rows of some draws; a response is (iterate of generation, opponent, stop)."""
    responses = [d.kept.ids if d.kept else (iterate, d.opponent, STOP) for d in draws]
    return RowTable(
        example_id=np.array([d.example.example_id for d in draws]),
        sample=np.array([d.sample for d in draws], dtype=np.int32),
        prompt_ids=_ragged([d.example.prompt_ids for d in draws]),
        real_ids=_ragged([d.example.real_ids for d in draws]),
        generated_ids=_ragged(responses),
        opponent=np.array([d.opponent for d in draws], dtype=np.int32),
        finished=np.ones(len(draws), dtype=bool),
        real_finished=np.ones(len(draws), dtype=bool),
        members=(iterate,),
        real_logps={iterate: torch.arange(len(draws)).double()},
        generated_logps={iterate: -torch.arange(len(draws)).double()},
        token_alpha=0.0,
        token_members=(),
        token_real_logps={},
        token_generated_logps={},
        seed=np.array([d.key for d in draws]),
    )


def _ragged(lists: Sequence[Sequence[int | None]]) -> Ragged:
    offsets = np.cumsum([0, *(len(values) for values in lists)])
    return Ragged(np.array([v for values in lists for v in values], dtype=np.int32), offsets)
