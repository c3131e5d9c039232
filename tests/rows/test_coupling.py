"""Which rows an iterate keeps of the one before, and how many rows a sample has."""

import dataclasses

import pytest

from spin_lightning.mixtures import Mixture, latest, window
from spin_lightning.rows.plan import Coupling, rows_per_sample


@pytest.mark.parametrize(
    ("opponent", "union", "rows"),
    [(window(3, 2), False, 1), (window(3, 2), True, 2), (window(0, 2), True, 1), (None, True, 1)],
)
def test_rows_per_sample_are_one_or_with_union_one_per_member(opponent, union, rows):
    assert rows_per_sample(opponent, union=union) == rows


@pytest.mark.parametrize(
    ("before", "now", "keep", "gained"),
    [
        # SPIN: all are new.
        (window(0, 1), window(1, 1), {0: 0.0}, {1: 1.0}),
        # Fictitious play keeps t / (t + 1); a window that still grows does the same.
        (window(0, None), window(1, None), {0: 1 / 2}, {1: 1.0}),
        (window(2, None), window(3, None), {0: 3 / 4, 1: 3 / 4, 2: 3 / 4}, {3: 1.0}),
        (window(1, 3), window(2, 3), {0: 2 / 3, 1: 2 / 3}, {2: 1.0}),
        # A full one: those that left it, and no other.
        (window(2, 3), window(3, 3), {0: 0.0, 1: 1.0, 2: 1.0}, {3: 1.0}),
        # Halved weights: (1/3, 2/3) to (1/7, 2/7, 4/7).
        (
            Mixture({0: 1 / 3, 1: 2 / 3}),
            Mixture({0: 1 / 7, 1: 2 / 7, 2: 4 / 7}),
            {0: 3 / 7, 1: 3 / 7},
            {2: 1.0},
        ),
        # Two that grow, by 1/4 and 1/8; one that shrinks from 1/2 to 1/8.
        (
            Mixture({0: 1 / 2, 1: 1 / 4, 2: 1 / 4}),
            Mixture({0: 1 / 8, 1: 1 / 2, 2: 3 / 8}),
            {0: 1 / 4, 1: 1.0, 2: 1.0},
            {1: 2 / 3, 2: 1 / 3},
        ),
        # Nothing changes: nothing is drawn.
        (window(3, 2), window(3, 2), {2: 1.0, 3: 1.0}, None),
    ],
)
def test_coupling_keeps_and_draws_as_worked_out_by_hand(before, now, keep, gained):
    coupling = Coupling.between(before, now)
    assert coupling.keep == pytest.approx(keep, abs=1e-12)
    found = None if coupling.gained is None else dict(coupling.gained.weights)
    assert found == (gained if gained is None else pytest.approx(gained, abs=1e-12))


def test_coupling_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Coupling.between(latest(0), latest(1)).gained = None


def test_coupling_of_weights_that_differ_by_rounding_alone_draws_nothing():
    before = Mixture({0: 0.1 + 0.2, 1: 0.7})
    coupling = Coupling.between(before, Mixture({0: 0.3, 1: 0.7}))
    assert before.weights[0] != 0.3
    assert coupling == Coupling({0: 1.0, 1: 1.0}, None)


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (window(2, 3), window(3, 3)),
        (Mixture({0: 0.5, 1: 0.25, 2: 0.25}), Mixture({0: 0.125, 2: 0.375, 3: 0.5})),
    ],
)
def test_coupling_gives_the_new_weights_and_redraws_only_what_must_change(before, now):
    """w' = w keep + (1 - sum w keep) gained, with 1 - sum w keep = half the L1 distance."""
    coupling = Coupling.between(before, now)
    assert coupling.gained is not None
    kept = {i: w * coupling.keep[i] for i, w in before.weights.items()}
    redrawn = 1 - sum(kept.values())
    indices = {*before.members, *now.members}
    after = {i: kept.get(i, 0) + redrawn * coupling.gained.weights.get(i, 0) for i in indices}
    apart = {i: now.weights.get(i, 0) - before.weights.get(i, 0) for i in indices}
    assert redrawn == pytest.approx(sum(map(abs, apart.values())) / 2, abs=1e-12)
    assert after == pytest.approx({i: now.weights.get(i, 0) for i in indices}, abs=1e-12)
