"""What tells real from generated responses, against numbers worked out by hand."""

import math
import time
from dataclasses import replace

import numpy as np
import pytest

from spin_lightning.rows.cues import CUES, Sides
from spin_lightning.rows.store import Ragged
from spin_lightning.rows.tells import find_tells, log_odds
from tests.toys.rows import table_with

STOP, ANSWER, THINK = 2, 9, 3


def accuracies(tells):
    return {cue.name: cue.accuracy for cue in tells.cues}


def cue_of(tells, name):
    return tells.cues[CUES.index(name)]


def same_but(count: int, first: list[int], second: list[int]) -> tuple[list, list]:
    """Real responses begin with `first`, generated ones with `second`; the rest is the same."""
    real = [[*first, 10 + i % 4, STOP] for i in range(count)]
    generated = [[*second, 10 + i % 4, STOP] for i in range(count)]
    return real, generated


def test_constant_first_word_is_the_first_token_named_and_the_best_cue():
    tells = find_tells(table_with(*same_but(20, [ANSWER], [8])))
    best = tells.best
    assert (best.name, best.accuracy, best.clear) == ("first_token", 1.0, True)
    assert (best.value, best.real) == (ANSWER, True)
    # 20 of 20 against 0 of 20: p = 1/2, z = 1 / sqrt(1/4 * 2/20) = sqrt(40).
    assert tells.tokens[0].ids == (ANSWER,)
    assert tells.tokens[0].counts == (20, 0)
    assert tells.tokens[0].z == pytest.approx(math.sqrt(40))
    # log(20.5 / 0.5) - log(0.5 / 20.5).
    assert tells.tokens[0].log_odds == pytest.approx(2 * math.log(41))
    assert [tell.ids for tell in tells.tokens] == [(ANSWER,), (8,)]
    assert tells.tokens[1].z == pytest.approx(-math.sqrt(40))


def test_log_odds_add_a_half_to_each_count():
    assert log_odds(Sides(3, 1), Sides(4, 4)) == pytest.approx(
        math.log(3.5 / 1.5) - math.log(1.5 / 3.5)
    )
    assert log_odds(Sides(0, 0), Sides(4, 4)) == 0.0


def test_perfect_separator_stands_before_a_frequent_one_that_is_not():
    # 7 is in 90 real and 10 generated of 100 responses, 9 in all real and no generated one. Wald's
    # z of 9 is 2 log(201) / sqrt(2 / 0.5 + 2 / 100.5) = 5.3, that of 7 is 9.3: the wrong way round.
    real = [[9, 7, STOP] if i < 90 else [9, 6, STOP] for i in range(100)]
    generated = [[5, 7, STOP] if i < 10 else [5, 6, STOP] for i in range(100)]
    tokens = find_tells(table_with(real, generated)).tokens
    assert [tell.ids[0] for tell in tokens] == [9, 7, 5, 6]
    # 0.8 / sqrt(1/4 * 2/100).
    assert tokens[1].z == pytest.approx(0.8 / math.sqrt(0.005))


def test_responses_count_and_not_occurrences():
    # One real response repeats 7 a hundred times; no more than one response has it.
    real = [[7] * 100 if i == 0 else [5] for i in range(20)]
    tells = find_tells(table_with(real, [[5]] * 20))
    assert tells.tokens == ()
    assert tells.pairs == ()


def test_pairs_are_neighbors_within_a_response():
    # 5 6 in every real response, 6 5 in every generated one. Both sides have the same tokens.
    tells = find_tells(table_with([[5, 6]] * 12 + [[6]] * 12, [[6, 5]] * 12 + [[6]] * 12))
    assert tells.tokens == ()
    assert [(tell.ids, tell.counts) for tell in tells.pairs] == [
        ((5, 6), (12, 0)),
        ((6, 5), (0, 12)),
    ]
    # p = 12 / 48: z = 0.5 / sqrt(1/4 * 3/4 * 2/24) = 4.
    assert tells.pairs[0].z == pytest.approx(4.0)


def test_first_token_accuracy_on_held_out_halves_by_hand():
    # Half 0 (examples 0, 2, 4, 6): real 5 5 5 6, generated 6 6 6 5.
    # Half 1 (examples 1, 3, 5, 7): real 5 5 6 7, generated 6 5 7 7.
    real = [[5], [5], [5], [5], [5], [6], [6], [7]]
    generated = [[6], [6], [6], [5], [6], [7], [5], [7]]
    # Learned on half 0: 5 is real, 6 is generated, 7 undecided. On half 1 real: 1, 1, 0, 1/2;
    # generated: 1, 0, 1/2, 1/2.
    # Learned on half 1: 5 is real (2 to 1), 6 undecided (1 to 1), 7 is generated (1 to 2). On half
    # 0 real: 1, 1, 1, 1/2; generated: 1/2, 1/2, 1/2, 0.
    expected = ((2.5 + 3.5) / 8 + (2.0 + 1.5) / 8) / 2
    tells = find_tells(table_with(real, generated))
    assert accuracies(tells)["first_token"] == pytest.approx(expected)
    # One token a response: the last one is the first one.
    assert accuracies(tells)["last_token"] == pytest.approx(expected)
    assert accuracies(tells)["length"] == 0.5


def test_length_has_one_threshold():
    # Real 3, 4, 5, 6 tokens, generated 1, 2, 3, 1, the same in both halves: from 3 or from 4 on is
    # right for 7 of 8; the lower of the two is taken. Real 4 of 4, generated 3 of 4.
    real = [[5] * n for n in (3, 3, 4, 4, 5, 5, 6, 6)]
    generated = [[5] * n for n in (1, 1, 2, 2, 3, 3, 1, 1)]
    cue = cue_of(find_tells(table_with(real, generated)), "length")
    assert cue.accuracy == pytest.approx(7 / 8)
    assert (cue.value, cue.real) == (3, True)
    cue = cue_of(find_tells(table_with(generated, real)), "length")
    assert cue.accuracy == pytest.approx(7 / 8)
    assert cue.real is False


def test_lengths_that_a_single_threshold_cannot_tell_apart():
    # Real responses have 1 or 5 tokens, generated ones 3: a threshold gets half of the real ones.
    real = [[5] * n for n in (1, 1, 5, 5) * 4]
    cue = cue_of(find_tells(table_with(real, [[5] * 3] * 16)), "length")
    assert cue.accuracy == pytest.approx(3 / 4)


@pytest.mark.parametrize("real_end", [True, False])
def test_finished_says_which_side_ends(real_end):
    finished, cut = [True] * 8, [False] * 8
    table = table_with(
        [[5, 6]] * 8,
        [[5, 6]] * 8,
        real_finished=finished if real_end else cut,
        finished=cut if real_end else finished,
    )
    cue = cue_of(find_tells(table), "finished")
    assert (cue.accuracy, cue.real, cue.clear) == (1.0, real_end, True)


def test_special_token_inside_a_response_counts_and_the_one_that_ends_it_does_not():
    real = [[5, STOP]] * 12
    generated = [[THINK, 5, STOP]] * 12
    cue = cue_of(find_tells(table_with(real, generated), {STOP, THINK}), "special_token")
    assert (cue.accuracy, cue.value, cue.real) == (1.0, THINK, False)
    # The same ids as text.
    assert cue_of(find_tells(table_with(real, generated)), "special_token").accuracy == 0.5
    # A response that was cut off right behind a stop token's id contains it.
    cut = table_with(real, [[5, STOP]] * 12, finished=[False] * 12)
    assert cue_of(find_tells(cut, {STOP}), "special_token").value == STOP


def test_real_response_of_an_example_with_many_rows_counts_once():
    # Three rows of example 4, one each of 5 and 6.
    real = [[7], [7], [7], [8], [9]]
    table = table_with(real, [[5], [5], [6], [5], [5]], example_id=[4, 4, 4, 5, 6])
    tells = find_tells(table)
    assert tells.responses == (3, 5)


def test_rows_of_one_example_are_never_in_both_halves():
    # Each example has its own first token on either side, in two rows: a rule that had seen one row
    # of it would know the other.
    ids = list(range(100, 140))
    real = [[i] for i in ids for _ in range(2)]
    generated = [[i + 500] for i in ids for _ in range(2)]
    table = table_with(real, generated, example_id=[i for i in ids for _ in range(2)])
    assert accuracies(find_tells(table))["first_token"] == 0.5


@pytest.mark.parametrize("rows", [4, 20, 400])
def test_noise_does_not_look_like_a_cue(rows):
    """Both sides drawn from one distribution over many tokens, 50 times."""
    draw, clear, means = np.random.default_rng(0), 0, []
    for _ in range(50):
        real, generated = (
            [draw.integers(3, 200, size=draw.integers(1, 30)).tolist() for _ in range(rows)]
            for _ in range(2)
        )
        tells = find_tells(table_with(real, generated), {3, 4})
        clear += any(cue.clear for cue in tells.cues)
        means.append(accuracies(tells)["first_token"])
        assert len(tells.tokens) + len(tells.pairs) <= 1
    assert clear <= 1
    # The error of the mean of 50 is at most 0.25 / sqrt(50 * rows / 2).
    assert np.mean(means) == pytest.approx(0.5, abs=4 * 0.25 / math.sqrt(25 * rows))


def test_few_rows_are_no_clear_cue():
    assert not find_tells(table_with([[5]] * 3, [[6]] * 3)).best.clear
    assert find_tells(table_with([[5]] * 5, [[6]] * 5)).best.clear


@pytest.mark.parametrize("rows", [1, 2])
def test_one_and_two_rows_have_tells(rows):
    tells = find_tells(table_with([[5]] * rows, [[6]] * rows))
    assert set(accuracies(tells).values()) <= {0.5, 1.0}
    assert tells.tokens == ()


def test_empty_responses_are_a_value_of_their_own():
    table = table_with([[5, 6]] * 6, [[]] * 6, finished=[False] * 6)
    assert accuracies(find_tells(table))["first_token"] == 1.0
    both = table_with([[]] * 6, [[]] * 6)
    assert set(accuracies(find_tells(both)).values()) == {0.5}


def test_method_without_generated_responses_has_no_tells():
    assert find_tells(table_with([[5]], [[]], opponent=-1)) is None


def test_metrics_are_flat_names():
    metrics = find_tells(table_with(*same_but(20, [ANSWER], [8]))).metrics()
    assert metrics == {
        "rows/tells/accuracy/finished": 0.5,
        "rows/tells/accuracy/special_token": 0.5,
        "rows/tells/accuracy/first_token": 1.0,
        "rows/tells/accuracy/last_token": 0.5,
        "rows/tells/accuracy/length": 0.5,
        "rows/tells/best": 1.0,
    }


def test_many_rows_are_fast():
    draw, rows, length = np.random.default_rng(0), 12_800, 100
    offsets = np.arange(rows + 1) * length

    def column() -> Ragged:
        # Frequencies of words: a few are very common.
        ids = np.minimum(draw.zipf(1.3, size=rows * length), 50_000)
        return Ragged(ids.astype(np.int32), offsets)

    table = table_with([[5]] * rows, [[5]] * rows)
    table = replace(table, real_ids=column(), generated_ids=column())
    start = time.process_time()
    find_tells(table, {2})
    # Generous: 0.3 s on one core of a shared machine.
    assert time.process_time() - start < 2.0
