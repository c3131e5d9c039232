"""Metrics of the rows that train an iterate."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from spin_lightning.callbacks.row_metrics import measure_rows
from spin_lightning.mixtures import window
from spin_lightning.rows.plan import units
from spin_lightning.rows.store import Ragged
from tests.toys.plans import PLAN, some_examples, table_of


def test_rows_are_measured_by_hand():
    plan = replace(PLAN, samples=1, opponent=window(2, 1))
    table = table_of([d for unit in units(plan, some_examples(4)) for d in unit], 2)
    table = replace(
        table,
        opponent=np.array([0, 2, 2, 2], dtype=np.int32),
        # 5 6 5 6 | 5 6 | 7 | 5 6: nine tokens of three kinds; five bigrams of two kinds.
        generated_ids=Ragged(np.array([5, 6, 5, 6, 5, 6, 7, 5, 6]), np.array([0, 4, 6, 7, 9])),
        real_logps={2: torch.tensor([-1.0, -2.0, -3.0, -6.0]), 1: torch.full((4,), -2.5)},
    )
    assert measure_rows(table, regenerated=0.75) == pytest.approx(
        {
            "rows/opponent/p0": 0.25,
            "rows/opponent/p2": 0.75,
            "rows/regenerated": 0.75,
            "rows/real_logps/p2": -3.0,
            "rows/real_logps/p1": -2.5,
            "rows/distinct_1": 3 / 9,
            "rows/distinct_2": 2 / 5,
            "rows/duplicates": 1 / 4,
            "rows/prompt_tokens": np.mean([len(e.prompt_ids) for e in some_examples(4)]),
            "rows/real_tokens": np.mean([len(e.real_ids) for e in some_examples(4)]),
            "rows/generated_tokens": 9 / 4,
        }
    )
