"""Padding on the left, prompts shared, and batches within a budget."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spin_lightning.packing import (
    group_by_length,
    halve_prompts,
    halve_responses,
    pack_padded,
    pack_prompts,
    pad_left,
    pad_prompts,
    positions,
    predictors,
    split_prompts,
)
from spin_lightning.types import PromptBatch

quick = settings(deadline=None, database=None, derandomize=True)
LENGTHS = st.lists(st.integers(1, 40), max_size=30)
IDS = st.lists(st.integers(0, 50_000), min_size=1, max_size=8)


def test_pack_padded_ends_every_response_in_the_last_column():
    batch = pack_padded([(1, 5), (1, 6, 7), (1,)], [(8, 2), (9, 3, 2), (2,)], pad_id=4)
    assert batch.input_ids.tolist() == [
        [4, 4, 1, 5, 8, 2],
        [1, 6, 7, 9, 3, 2],
        [4, 4, 4, 4, 1, 2],
    ]
    assert batch.attention_mask.tolist() == [
        [0, 0, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1],
        [0, 0, 0, 0, 1, 1],
    ]
    assert batch.response_lengths.tolist() == [2, 3, 1]


@pytest.mark.parametrize("kind", [tuple, list, lambda ids: np.array(ids, dtype=np.int32)])
def test_pack_padded_takes_ids_of_any_kind_and_gives_int64(kind):
    batch = pack_padded([kind([1, 5])], [kind([8])], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 5, 8]]
    assert {tensor.dtype for tensor in vars(batch).values()} == {torch.int64}


def test_pack_padded_of_unequal_counts_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        pack_padded([(1,), (2,)], [(3,)], pad_id=0)


@quick
@given(st.lists(st.tuples(IDS, IDS), min_size=1, max_size=5), st.integers(0, 9))
def test_pack_padded_gives_prompt_and_response_back_and_pads_the_rest(pairs, pad_id):
    batch = pack_padded(*zip(*pairs, strict=True), pad_id=pad_id)
    rows = zip(batch.input_ids, batch.attention_mask.bool(), batch.response_lengths, strict=True)
    assert batch.input_ids.shape[1] == max(
        len(prompt) + len(response) for prompt, response in pairs
    )
    for (prompt, response), (ids, mask, length) in zip(pairs, rows, strict=True):
        assert ids[mask].tolist() == prompt + response
        assert ids[-length:].tolist() == response
        assert set(ids[~mask].tolist()) <= {pad_id}


def test_pad_left_puts_the_padding_first():
    ids, mask = pad_left([(7,), (8, 9)], pad_id=3)
    assert ids.tolist() == [[3, 7], [8, 9]]
    assert mask.tolist() == [[0, 1], [1, 1]]


@pytest.mark.parametrize(
    ("lengths", "max_tokens", "groups"),
    [
        ([3, 1, 5, 2], 6, [[2], [0, 3], [1]]),
        ([2, 2, 2, 2, 2], 4, [[0, 1], [2, 3], [4]]),
        ([9, 1, 1], 4, [[0], [1, 2]]),
        ([0, 0], 4, [[0, 1]]),  # padded tokens there are none
        ([], 4, []),
    ],
)
def test_group_by_length_equals_the_hand_split(lengths, max_tokens, groups):
    assert list(group_by_length(lengths, max_tokens)) == groups


@quick
@given(LENGTHS, st.integers(1, 100))
def test_group_by_length_holds_every_index_once_within_the_budget(lengths, max_tokens):
    groups = list(group_by_length(lengths, max_tokens))
    flat = [i for group in groups for i in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[i] for i in flat] == sorted(lengths, reverse=True)
    for group in groups:
        longest = lengths[group[0]]
        assert len(group) == 1 or len(group) * longest <= max_tokens
        full = (len(group) + 1) * longest > max_tokens
        assert full or group is groups[-1], "room for one more was left"


# --------------------------------------------------------------------------- prompts shared

# Two prompts of two and one tokens, with two responses and with one.
SHARED = pack_prompts([(1, 5), (6,)], [[(8, 9, 2), (7,)], [(3, 2)]])


def test_pack_prompts_puts_everything_in_one_row():
    assert SHARED.input_ids.tolist() == [1, 5, 8, 9, 2, 7, 6, 3, 2]
    assert SHARED.input_ids.dtype == torch.int64
    assert SHARED.prompt_lengths == (2, 1)
    assert SHARED.response_lengths == ((3, 1), (2,))
    assert SHARED.flat_lengths == [3, 1, 2]


def prompts_of(*lengths: int) -> PromptBatch:
    """Prompts of one token, each with a response; tokens are numbered through."""
    return PromptBatch(
        torch.arange(sum(lengths)),
        prompt_lengths=tuple(1 for _ in lengths),
        response_lengths=tuple((length - 1,) for length in lengths),
    )


@pytest.mark.parametrize(
    ("lengths", "most", "sizes"),
    [
        ((4, 4, 4, 4), 16, [[4, 4, 4, 4]]),
        ((4, 4, 4, 4), 15, [[4, 4], [4, 4]]),
        ((4, 4, 4, 4), 8, [[4, 4], [4, 4]]),
        # Three pieces of 5 1/3: the middles of the prompts lie at 2, 6, 10 and 14.
        ((4, 4, 4, 4), 7, [[4], [4, 4], [4]]),
        # Two pieces of 7: the middle of the first prompt lies at 5, of the others at 11 and 13.
        ((10, 2, 2), 8, [[10], [2, 2]]),
        # Nothing begins in the second of three pieces of 4 1/3.
        ((2, 9, 2), 5, [[2], [9], [2]]),
        # Two pieces of 4: the middle of the second prompt lies at 3.5.
        ((2, 3, 3), 4, [[2, 3], [3]]),
        ((12,), 5, [[12]]),
    ],
)
def test_split_prompts_equals_the_hand_split(lengths, most, sizes):
    pieces = split_prompts(prompts_of(*lengths), most)
    assert [[n + 1 for n in piece.flat_lengths] for piece in pieces] == sizes
    assert [piece.prompt_lengths for piece in pieces] == [(1,) * len(size) for size in sizes]
    ids = [piece.input_ids.tolist() for piece in pieces]
    assert [len(piece) for piece in ids] == [sum(size) for size in sizes]
    assert [i for piece in ids for i in piece] == list(range(sum(lengths)))


def test_split_prompts_keeps_all_responses_with_their_prompt():
    first, second = split_prompts(SHARED, 5)
    assert first.input_ids.tolist() == [1, 5, 8, 9, 2, 7]
    assert (first.prompt_lengths, first.response_lengths) == ((2,), ((3, 1),))
    assert second.input_ids.tolist() == [6, 3, 2]
    assert (second.prompt_lengths, second.response_lengths) == ((1,), ((2,),))


@quick
@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(1, 100))
def test_split_prompts_gives_no_piece_more_than_a_prompt_beyond_the_most(lengths, most):
    for piece in split_prompts(prompts_of(*lengths), most):
        assert len(piece.input_ids) <= most + max(lengths)


def test_halves_between_prompts_have_about_equal_tokens_and_end_at_one_prompt():
    """4, 3, 7 and 2 tokens: 7 and 9. A long first or last prompt is a half of its own."""
    batch = pack_prompts([(1, 2), (3,), (4, 5), (6,)], [[(7, 8)], [(9,), (2,)], [(1,) * 5], [(3,)]])
    first, second = halve_prompts(batch)
    assert first.input_ids.tolist() == [1, 2, 7, 8, 3, 9, 2]
    assert second.input_ids.tolist() == [4, 5, 1, 1, 1, 1, 1, 6, 3]
    assert (first.prompt_lengths, first.response_lengths) == ((2, 1), ((2,), (1, 1)))
    assert first.is_one_pass
    assert second.is_one_pass
    for lengths in ([90, 1], [1, 90], [1, 1], [1, 2]):
        pair = pack_prompts([(5,)] * 2, [[(6,) * n] for n in lengths])
        assert [len(half.prompt_lengths) for half in halve_prompts(pair)] == [1, 1]
        assert halve_prompts(halve_prompts(pair)[0]) == []


def test_halves_between_responses_repeat_their_prompt_and_end_at_one_response():
    batch = pack_prompts([(1, 2)], [[(3,), (4, 5), (6,)]])
    first, second = halve_responses(batch)
    assert first.input_ids.tolist() == [1, 2, 3]
    assert second.input_ids.tolist() == [1, 2, 4, 5, 6]
    assert (second.prompt_lengths, second.response_lengths) == ((2,), ((2, 1),))
    assert second.is_one_pass
    assert halve_responses(first) == []
    prompts = halve_responses(pack_prompts([(1,), (2,)], [[(3,), (4,)]] * 2))
    assert [half.input_ids.tolist() for half in prompts] == [[1, 3, 4], [2, 3, 4]]


def test_positions_start_anew_for_every_response():
    assert positions(SHARED).tolist() == [0, 1, 2, 3, 4, 2, 0, 1, 2]


def test_predictors_of_a_first_token_are_the_end_of_its_prompt():
    predicting, predicted = predictors(SHARED)
    assert predicting.tolist() == [1, 2, 3, 1, 6, 7]
    assert predicted.tolist() == [2, 3, 4, 5, 7, 8]


def test_pad_prompts_spells_every_response_out():
    batch = pad_prompts(SHARED)
    assert batch.input_ids.tolist() == [[1, 5, 8, 9, 2], [0, 0, 1, 5, 7], [0, 0, 6, 3, 2]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    assert batch.response_lengths.tolist() == [3, 1, 2]


def test_second_prompt_of_three_tokens_is_found_behind_the_first():
    """It starts at 5, where sums and bits of 5 and 3 differ."""
    batch = pack_prompts([(1, 5, 6), (7, 8, 9)], [[(2, 3)], [(4,), (10, 11)]])
    assert pad_prompts(batch).input_ids.tolist() == [
        [1, 5, 6, 2, 3],
        [0, 7, 8, 9, 4],
        [7, 8, 9, 10, 11],
    ]
    predicting, predicted = predictors(batch)
    assert predicting.tolist() == [2, 3, 7, 7, 9]
    assert predicted.tolist() == [3, 4, 8, 9, 10]


@pytest.mark.parametrize(
    "reader", [positions, predictors, pad_prompts, lambda batch: split_prompts(batch, 9)]
)
def test_batch_with_more_prompts_than_groups_of_responses_is_refused(reader):
    batch = PromptBatch(torch.tensor([1, 8, 5]), prompt_lengths=(1, 1), response_lengths=((1,),))
    with pytest.raises(ValueError, match="shorter"):
        reader(batch)


@pytest.mark.parametrize("kind", [tuple, list, lambda ids: np.array(ids, dtype=np.int32)])
def test_pack_prompts_takes_ids_of_any_kind(kind):
    batch = pack_prompts([kind([1, 5])], [[kind([8]), kind([9, 2])]])
    assert batch.input_ids.tolist() == [1, 5, 8, 9, 2]
    assert batch.input_ids.dtype == torch.int64


def test_pack_prompts_of_unequal_counts_is_refused():
    with pytest.raises(ValueError, match="shorter"):
        pack_prompts([(1,), (2,)], [[(3,)]])
