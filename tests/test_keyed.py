"""Keyed random numbers: the same for the same key, independent and uniform otherwise."""

import itertools
import json
import os
import subprocess
import sys
from collections import Counter

import lightning as L
import numpy as np
import pytest
from scipy import stats

from spin_lightning import keyed

KEYS = [keyed.row_key(0, 0, example, 0) for example in range(3000)]
LEAST_P = 1e-3


def contingency(first, second) -> float:
    """p-value of two samples of [0, 1) being independent, on a grid of 6 by 6."""
    counts, *_ = np.histogram2d(first, second, bins=6, range=[(0, 1), (0, 1)])
    return stats.chi2_contingency(counts).pvalue


# -------------------------------------------------------------------------------------------- keys


def test_row_key_is_a_signed_64_bit_integer_of_its_own():
    parts = itertools.product((0, 1, 11), (-1, 0, 1, 11), (0, 1, 11, 111), (0, 1, 11))
    keys = [keyed.row_key(*key) for key in parts]
    assert len(set(keys)) == len(keys) == 144
    assert all(key == np.int64(key) for key in keys)
    assert min(keys) < 0 < max(keys)


@pytest.mark.parametrize("set_seed", [0, 7])
def test_global_seed_is_the_one_set_by_lightning(set_seed):
    L.seed_everything(set_seed, verbose=False)
    assert keyed.global_seed() == set_seed


def test_global_seed_is_zero_by_default(monkeypatch):
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    assert keyed.global_seed() == 0


# ----------------------------------------------------------------------------------- reproducible


def test_numbers_are_the_same_in_another_process():
    script = f"""
import json, runpy
keyed = runpy.run_path({keyed.__file__!r})
key = keyed["row_key"](3, 1, 4, 1)
uniforms, order = keyed["position_uniforms"](key, 5), keyed["epoch_order"](3, 1, 9)
arrays = uniforms, order, keyed["subset"](3, 1, 9, 4)
print(json.dumps([key, keyed["opponent_uniform"](key), *(a.tolist() for a in arrays)]))
"""
    there = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONHASHSEED": "12345"},
        capture_output=True,
        check=True,
    )
    key = keyed.row_key(3, 1, 4, 1)
    arrays = (
        keyed.position_uniforms(key, 5),
        keyed.epoch_order(3, 1, 9),
        keyed.subset(3, 1, 9, 4),
    )
    here = [key, keyed.opponent_uniform(key), *(a.tolist() for a in arrays)]
    assert json.loads(there.stdout) == here


def test_numbers_depend_neither_on_global_state_nor_on_what_was_drawn_before():
    before = [(keyed.position_uniforms(key, 3).tolist(), key) for key in KEYS[:5]]
    L.seed_everything(99, verbose=False)
    for numbers, key in reversed(before):
        keyed.opponent_uniform(key)
        assert keyed.position_uniforms(key, 3).tolist() == numbers


def test_position_uniforms_of_a_longer_response_begin_with_those_of_a_shorter():
    long, short = (keyed.position_uniforms(KEYS[0], count) for count in (50, 20))
    assert long[:20].tolist() == short.tolist()


# ---------------------------------------------------------------------- uniform and independent


@pytest.mark.parametrize(
    "numbers",
    [
        lambda: keyed.position_uniforms(KEYS[0], 3000),
        lambda: [keyed.position_uniforms(key, 1)[0] for key in KEYS],
        lambda: [keyed.opponent_uniform(key) for key in KEYS],
    ],
    ids=["positions of a row", "rows at a position", "opponents"],
)
def test_numbers_are_uniform(numbers):
    drawn = np.asarray(numbers())
    assert drawn.min() >= 0
    assert drawn.max() < 1
    assert stats.kstest(drawn, "uniform").pvalue > LEAST_P


@pytest.mark.parametrize(
    "shift",
    [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)],
    ids=["seed", "iterate", "example", "sample"],
)
def test_numbers_of_keys_that_differ_in_one_part_are_independent(shift):
    seed, iterate, example, sample = shift
    shifted = [keyed.row_key(seed, iterate, i + example, sample) for i in range(len(KEYS))]
    one, other = ([keyed.position_uniforms(key, 1)[0] for key in keys] for keys in (KEYS, shifted))
    assert contingency(one, other) > LEAST_P


def test_opponent_and_positions_of_a_row_are_independent():
    opponents = [keyed.opponent_uniform(key) for key in KEYS]
    positions = np.array([keyed.position_uniforms(key, 2) for key in KEYS])
    assert contingency(opponents, positions[:, 0]) > LEAST_P
    assert contingency(positions[:, 0], positions[:, 1]) > LEAST_P


# --------------------------------------------------------------------------- orders and subsets


@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_epoch_order_visits_every_row_once(count):
    assert sorted(keyed.epoch_order(5, 2, count)) == list(range(count))


def test_epoch_order_takes_every_order_equally_often():
    seen = Counter(tuple(keyed.epoch_order(seed, e, 3)) for seed in range(3) for e in range(400))
    assert len(seen) == 6
    assert stats.chisquare(list(seen.values())).pvalue > LEAST_P


@pytest.mark.parametrize(("population", "count"), [(9, 0), (9, 1), (9, 5), (9, 9)])
def test_subset_is_that_many_indices_ascending_and_without_repeats(population, count):
    chosen = keyed.subset(1, 2, population, count).tolist()
    assert len(chosen) == count
    assert chosen == sorted(set(chosen))
    assert set(chosen) <= set(range(population))


def test_subset_takes_every_pair_equally_often():
    seen = Counter(tuple(keyed.subset(0, draw, 4, 2)) for draw in range(1200))
    assert seen.keys() == set(itertools.combinations(range(4), 2))
    assert stats.chisquare(list(seen.values())).pvalue > LEAST_P
