"""Metrics over the iterates: which are shown, and which iterate is the best."""

from spin_lightning.report.measures import MEASURES, best_of, measures_of, points
from spin_lightning.run.records import IterateRecord

BY_NAME = {measure.name: measure for measure in MEASURES}


def test_best_iterate_is_at_the_better_end_of_a_measure():
    nll, entropy = BY_NAME["val/real_nll_per_token"], BY_NAME["exact/entropy"]
    assert best_of(nll, {0: 3.0, 1: 2.0, 2: 2.5}) == 1
    assert best_of(nll, {0: 2.0, 1: 2.0, 2: 3.0}) is None, "several are equal"
    assert best_of(nll, {0: 3.0}) is None, "nothing to compare"
    assert best_of(entropy, {0: 3.0, 1: 2.0}) is None, "neither end is better"


def test_points_are_the_values_of_the_iterates_that_have_them():
    records = [
        IterateRecord(0, metrics={"exact/kl": 2}, rows={"rows/distinct_1": 0.5}),
        IterateRecord(1, metrics={"exact/kl": 1.5}),
        IterateRecord(2),
    ]
    assert points(records, "exact/kl") == {0: 2.0, 1: 1.5}
    assert points(records, "rows/distinct_1") == {0: 0.5}
    assert points(records, "exact/entropy") == {}


def test_measures_are_those_of_the_runs_and_then_those_of_their_callbacks():
    first = [IterateRecord(0, metrics={"my/score": 1.0, "val/kl_base": 0.1, "lm_eval/x/acc": 0.5})]
    second = [IterateRecord(0, metrics={"exact/kl": 1.0, "val/kl_base_error": 0.1, "iterate": 0})]
    assert [measure.name for measure in measures_of([first, second])] == [
        "exact/kl",
        "val/kl_base",
        "my/score",
    ]
