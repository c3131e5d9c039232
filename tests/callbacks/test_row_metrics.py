"""Metrics of the rows that train an iterate."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from spin_lightning.callbacks.row_metrics import measure_iterate, measure_rows
from spin_lightning.mixtures import window
from spin_lightning.rows.plan import units
from spin_lightning.rows.store import Ragged
from spin_lightning.rows.tells import find_tells
from spin_lightning.run.folder import RunFolder
from tests.toys.plans import PLAN, some_examples, table_of
from tests.toys.rows import table_with
from tests.toys.runs import play, write_examples

PARTS = ("_error", "_per_token")


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


def test_rows_have_the_accuracies_of_the_tells():
    table = table_with([[9, 5]] * 20, [[8, 5]] * 20)
    metrics = measure_rows(table, 1.0, find_tells(table))
    assert metrics["rows/tells/accuracy/first_token"] == metrics["rows/tells/best"] == 1.0
    assert metrics["rows/tells/accuracy/length"] == 0.5
    assert not any("tells" in name for name in measure_rows(table, 1.0))


def test_kl_is_left_out_where_responses_are_not_drawn_from_the_iterate():
    table = table_with([[9, 5]] * 4, [[8, 5]] * 4)
    exact, other = (measure_iterate(table, 0, is_exact=exact) for exact in (True, False))
    kl = {f"val/kl_{of}{part}" for of in ("base", "previous") for part in ("", *PARTS)}
    assert kl <= exact.keys()
    assert other == {name: value for name, value in exact.items() if name not in kl}


@pytest.mark.parametrize(
    ("generation", "has_kl"),
    [({}, True), ({"temperature": 0.7}, False), ({"top_p": 0.9}, False), ({"top_k": 5}, False)],
)
def test_kl_is_logged_for_exact_sampling_alone(generation, has_kl, tiny_model_dir, tmp_path):
    data = write_examples(tmp_path / "examples.jsonl", count=20)
    settings = {"generation": {"unit_size": 32, **generation}}
    play(tmp_path, tiny_model_dir, data, settings=settings, epochs=1)
    metrics = RunFolder(tmp_path).record(1).metrics
    assert ("val/kl_base" in metrics) == has_kl
    assert "val/real_nll_per_token" in metrics
