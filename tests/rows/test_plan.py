"""Plans of rows: units, keys, drawn opponents, and rows that are kept over iterates."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from scipy import stats

from spin_lightning.mixtures import Geometric, Mixture, latest, window
from spin_lightning.rows.plan import (
    Coupling,
    EarlierRows,
    RowDraw,
    RowPlan,
    RowSettings,
    plan_rows,
    redrawn,
    unit_count,
    unit_size_of,
    units,
)
from spin_lightning.types import Example
from tests.toys.plans import PLAN, draw_row, key_by_hand, some_examples, table_of

EXAMPLES = some_examples()
MANY = [Example(i, (1, 3), (4, 2), True) for i in range(3000)]


# ------------------------------------------------------------------------------------------ plans

SETTINGS = RowSettings(seed=11, unit_size=16, cap=6, context=64)


def test_plan_of_an_opponent_is_scored_by_the_members_of_the_reference():
    opponent = Mixture({0: 0.5, 1: 0.25, 2: 0.25})
    assert plan_rows(2, opponent, window(2, 2), SETTINGS, samples=2) == PLAN
    held_out = plan_rows(2, latest(2), window(2, 1), SETTINGS, also_scored_by={0, 1, 2})
    assert held_out == replace(PLAN, opponent=latest(2), members=(0, 1, 2), samples=1)


@pytest.mark.parametrize(
    ("reference", "members", "token_alpha", "token_members"),
    [
        (Geometric(latest(2), 0.3), (0, 2), 0.0, ()),
        (Mixture({1: 0.5, 2: 0.5}, token_alpha=0.3), (0, 1, 2), 0.3, (1, 2)),
    ],
    ids=["geometric", "token-level"],
)
def test_plan_of_a_reference_near_the_base_is_scored_by_the_base_too(
    reference, members, token_alpha, token_members
):
    plan = plan_rows(2, latest(2), reference, SETTINGS)
    assert plan.members == members
    assert (plan.token_alpha, plan.token_members) == (token_alpha, token_members)
    assert plan.scorers == (
        *((i, 0.0) for i in members),
        *((i, token_alpha) for i in token_members),
    )


def test_plan_without_an_opponent_is_not_scored():
    plan = plan_rows(2, None, latest(2), SETTINGS, keep_from=latest(1))
    assert plan == RowPlan(2, None, (), seed=11, samples=1, unit_size=16, cap=6, context=64)


def test_plan_that_keeps_rows_couples_the_opponents_of_both_iterates():
    plan = plan_rows(2, window(2, 2), latest(2), SETTINGS, union=True, keep_from=window(1, 2))
    assert plan.union
    assert plan.coupling == Coupling.between(window(1, 2), window(2, 2))
    assert plan_rows(2, window(2, 2), latest(2), SETTINGS).coupling is None


def test_manifest_of_a_plan_counts_its_rows_and_units():
    manifest = PLAN.manifest(EXAMPLES)
    assert (manifest.iterate, manifest.opponent) == (2, {0: 0.5, 1: 0.25, 2: 0.25})
    assert (manifest.rows, manifest.units, manifest.unit_size, manifest.cap) == (70, 5, 16, 6)


# ------------------------------------------------------------------------------------------ draws


@pytest.mark.parametrize(
    ("unit_size", "sizes"),
    [(16, [16, 16, 16, 16, 6]), (35, [35, 35]), (999, [70]), (None, [64, 6])],
)
def test_units_hold_every_sample_of_every_example_once(unit_size, sizes):
    plan = replace(PLAN, unit_size=unit_size)
    made = list(units(plan, EXAMPLES))
    assert [len(unit) for unit in made] == sizes
    assert unit_count(plan, EXAMPLES) == len(sizes)
    assert [(draw.example, draw.sample) for unit in made for draw in unit] == [
        (example, sample) for example in EXAMPLES for sample in (0, 1)
    ]


@pytest.mark.parametrize(
    ("count", "size"), [(1, 64), (511, 64), (512, 128), (1_023, 128), (2_048, 512), (90_000, 512)]
)
def test_units_are_an_eighth_of_the_rows_by_default(count, size):
    """Of 2 samples each; rounded down to a power of two from 64 to 512."""
    examples = EXAMPLES[:1] * count
    assert unit_size_of(replace(PLAN, unit_size=None), examples) == size


def test_draw_key_and_opponent_depend_on_seed_iterate_example_and_sample_alone():
    draw = draw_row(PLAN, EXAMPLES[7], 1)
    assert draw.key == key_by_hand(PLAN, 21, 1)
    assert draw == draw_row(replace(PLAN, unit_size=3, samples=9), EXAMPLES[7], 1)
    others = [
        draw_row(replace(PLAN, seed=12), EXAMPLES[7], 1),
        draw_row(replace(PLAN, iterate=1), EXAMPLES[7], 1),
        draw_row(PLAN, EXAMPLES[8], 1),
        draw_row(PLAN, EXAMPLES[7], 0),
    ]
    assert len({draw.key, *(other.key for other in others)}) == 5


def test_examples_of_another_source_have_keys_of_their_own():
    own = [draw.key for unit in units(PLAN, EXAMPLES) for draw in unit]
    others = replace(PLAN, source="val_data")
    theirs = [draw.key for unit in units(others, EXAMPLES) for draw in unit]
    assert not {*own} & {*theirs}
    assert others.manifest(EXAMPLES) == PLAN.manifest(EXAMPLES), "finished rows stay"


def test_draw_opponents_have_the_weights_of_the_mixture():
    plan = replace(PLAN, samples=1)
    drawn = Counter(draw_row(plan, example, 0).opponent for example in MANY)
    assert stats.chisquare([drawn[0], drawn[1], drawn[2]], [1500, 750, 750]).pvalue > 0.001


def test_union_has_a_row_per_member_with_names_that_stay():
    plan = replace(PLAN, opponent=window(1, 2), union=True, iterate=1)
    first = [d for unit in units(plan, EXAMPLES[:2]) for d in unit]
    assert [(d.example.example_id, d.opponent) for d in first] == [
        (example, member) for example in (0, 3) for _ in range(2) for member in (0, 1)
    ]
    assert len({(d.example.example_id, d.sample) for d in first}) == len(first)
    later = replace(plan, opponent=window(2, 2), iterate=2)
    names = {(d.sample, d.opponent) for u in units(later, EXAMPLES[:1]) for d in u}
    assert {name for name in names if name[1] == 1} == {
        (d.sample, 1) for d in first if d.example.example_id == 0 and d.opponent == 1
    }
    assert unit_count(replace(later, unit_size=3), EXAMPLES) == -(-len(EXAMPLES) * 4 // 3)


# ------------------------------------------------------------------------------------- reservoir


def decaying(t: int) -> Mixture:
    return Mixture.normalized({k: 0.5 ** (t - k) for k in range(t + 1)})


def there_and_back(t: int) -> Mixture:
    """Weights that shrink and grow again."""
    return Mixture.normalized({0: 1.0 + t % 2, 1: 2.0 - t % 2})


def refresh(opponent: Callable[[int], Mixture], iterates: int) -> list[list[RowDraw]]:
    """The draws of each iterate, with as many rows kept as possible."""
    history: list[list[RowDraw]] = []
    earlier = EarlierRows()
    for t in range(iterates):
        coupling = Coupling.between(opponent(t - 1), opponent(t)) if t else None
        plan = replace(PLAN, iterate=t, opponent=opponent(t), samples=1, coupling=coupling)
        history.append([draw for unit in units(plan, MANY, earlier) for draw in unit])
        earlier = EarlierRows(table_of(history[-1], t))
    return history


@pytest.mark.parametrize(
    "opponent",
    [
        lambda t: window(t, 1),
        lambda t: window(t, 3),
        lambda t: window(t, None),
        decaying,
        there_and_back,
    ],
    ids=["spin", "window", "fictitious", "decaying", "there-and-back"],
)
def test_reservoir_indices_follow_the_weights_at_every_iterate(opponent):
    for t, draws in enumerate(refresh(opponent, 6)):
        weights = opponent(t).weights
        drawn = Counter(draw.opponent for draw in draws)
        assert set(drawn) == set(weights)
        if len(weights) > 1:
            expected = [3000 * weight for weight in weights.values()]
            assert stats.chisquare([drawn[i] for i in weights], expected).pvalue > 1e-3


@pytest.mark.parametrize(
    ("opponent", "shares"),
    [
        (lambda t: window(t, 1), [1, 1, 1, 1]),
        (lambda t: window(t, None), [1, 1 / 2, 1 / 3, 1 / 4]),
        # Full from the third iterate on: then the newest iterate replaces a third of the rows.
        (lambda t: window(t, 3), [1, 1 / 2, 1 / 3, 1 / 3]),
        # |w' - w| / 2: half of all moves to the newest iterate, then a little less than half.
        (decaying, [1, 2 / 3, 4 / 7, 8 / 15]),
    ],
    ids=["spin", "fictitious", "window", "decaying"],
)
def test_reservoir_redraws_the_fewest_rows_that_will_do(opponent, shares):
    for t, (draws, share) in enumerate(zip(refresh(opponent, 4), shares, strict=True)):
        new = sum(draw.kept is None for draw in draws) / len(draws)
        assert new == pytest.approx(share, abs=0.03)
        plan = replace(PLAN, iterate=t)
        assert redrawn(plan, table_of(draws, t)) == new
        assert all(draw.opponent == t for draw in draws if draw.kept is None)


def test_reservoir_kept_rows_are_the_earlier_ones_and_only_those_that_left_are_replaced():
    history = refresh(lambda t: window(t, 2), 4)
    for before, after in pairwise(history[1:]):
        gone = min(draw.opponent for draw in before)
        for old, new in zip(before, after, strict=True):
            assert (new.kept is None) == (old.opponent == gone)
            if new.kept is not None:
                assert (new.key, new.opponent) == (old.key, old.opponent)
                assert new.kept.ids[1] == old.opponent


def test_union_reservoir_generates_for_the_newest_member_alone():
    first = replace(PLAN, iterate=1, opponent=window(1, 2), union=True)
    draws = [d for unit in units(first, EXAMPLES) for d in unit]
    coupling = Coupling.between(window(1, 2), window(2, 2))
    second = replace(first, iterate=2, opponent=window(2, 2), coupling=coupling)
    later = [d for u in units(second, EXAMPLES, EarlierRows(table_of(draws, 1))) for d in u]
    assert {(draw.opponent, draw.kept is None) for draw in later} == {(1, False), (2, True)}


# --------------------------------------------------------------------- what need not be scored


def test_earlier_rows_know_the_scores_of_kept_rows_and_of_every_real_response():
    draws = [d for unit in units(replace(PLAN, samples=1), EXAMPLES) for d in unit]
    earlier = EarlierRows(table_of(draws, 2))
    kept = earlier.kept(EXAMPLES[4], 0)
    assert kept is not None
    assert earlier.generated_logps(kept) == {(2, 0.0): -4.0}
    assert earlier.real_logps(EXAMPLES[4]) == {(2, 0.0): 4.0}
    assert earlier.kept(Example(999, (1,), (2,), True), 0) is None
    assert earlier.real_logps(Example(999, (1,), (2,), True)) == {}


def test_earlier_token_scores_are_known_under_their_alpha():
    draws = [d for unit in units(replace(PLAN, samples=1), EXAMPLES[:2]) for d in unit]
    table = table_of(draws, 2)
    table = replace(
        table,
        token_alpha=0.5,
        token_members=(0, 2),
        token_real_logps={0: table.real_logps[2], 2: 2 * table.real_logps[2]},
        token_generated_logps={0: table.real_logps[2], 2: 3 * table.real_logps[2]},
    )
    earlier = EarlierRows(table)
    assert earlier.real_logps(EXAMPLES[1]) == {(2, 0.0): 1.0, (2, 0.5): 2.0}
