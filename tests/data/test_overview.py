"""Lengths, repetitions and what is left out, counted by hand."""

import pytest

from spin_lightning.data.lengths import Lengths, cut, prompt_problem
from spin_lightning.data.overview import Overview
from spin_lightning.data.read_report import ReadReport
from spin_lightning.types import BadRow, Conversation, Example


def example(number: int, prompt: int, response: int) -> Example:
    """Prompt and response of these lengths; equal lengths are equal texts."""
    return Example(number, (5,) * prompt, (6,) * response, real_finished=True)


def overview(examples, unfit=(), *, cap=64, context=200, handled=None) -> Overview:
    read = [Conversation(e.example_id, (), "a") for e in (*examples, *unfit)]
    report = ReadReport.of_rows("data='x'", read, [BadRow(90, "no messages")])
    return Overview.of(
        report,
        examples,
        unfit,
        max_prompt_tokens=None,
        max_response_tokens=cap,
        context=context,
        handled=handled or {},
    )


def test_percentiles_are_the_smallest_length_that_the_share_does_not_exceed():
    lengths = Lengths.of(range(1, 101), cap=97)
    assert lengths.percentiles == {50: 50, 90: 90, 95: 95, 99: 99, 100: 100}
    assert (lengths.count, lengths.over) == (100, 3)
    assert Lengths.of([], cap=3).percentiles == {}


@pytest.mark.parametrize(
    ("lengths", "note"),
    [
        ([10] * 12 + [112] * 8, "8 of 20 responses are longer than max_response_tokens=64"),
        ([10] * 12 + [112] * 8, "95 % fit in 112, all in 112"),
        ([10] * 19 + [112], "1 of 20 responses are longer"),
        ([10] * 19 + [112], "and are cut; all fit in 112"),
    ],
)
def test_responses_over_the_cap_are_counted_with_what_would_fit(lengths, note):
    examples = [example(i, 3, length) for i, length in enumerate(lengths)]
    (said,) = overview(examples).notes()
    assert note in said


def test_responses_that_the_context_cuts_are_counted_apart():
    found = overview([example(0, 150, 60), example(1, 150, 50)])
    assert found.notes() == ["1 of 2 responses are cut where the model's context ends"]


def test_repetitions_and_rows_left_out_are_counted():
    examples = [example(0, 3, 4), example(1, 3, 4), example(2, 3, 5), example(3, 4, 4)]
    unfit = [BadRow(4, "a prompt that fills the context: 300 tokens", 300)]
    found = overview(examples, unfit, handled={"answers trimmed": 2})
    assert (found.repeated_prompts, found.repeated_pairs) == (2, 1)
    assert (found.examples, found.tried, len(found.left_out)) == (4, 5, 2)
    assert found.prompts.percentiles[100] == 300
    assert (found.prompts.cap, found.prompts.over) == (199, 1)
    assert found.notes() == ["2 answers trimmed"]
    counts, tokens = found.summary()
    assert counts == "data='x': 4 examples, 2 rows left out"
    assert tokens == (
        "Tokens (median, 95 %, longest): 3, 300, 300 in prompts, 4, 5, 5 in responses; "
        "0 responses are cut; 2 repeat a prompt and 1 a pair"
    )


def test_summary_of_nothing_is_empty():
    assert overview([]).summary() == []


def test_cut_keeps_first_ids_and_says_that_it_is_not_finished():
    whole = example(0, 6, 5)
    assert cut(whole, 5, 11) == whole
    assert cut(whole, 4, 100) == Example(0, (5,) * 6, (6,) * 4, real_finished=False)
    assert len(cut(whole, 5, 9).real_ids) == 3


def test_prompt_problems_name_length_and_cap():
    assert prompt_problem(3, 3, 10) is None
    assert prompt_problem(0, 3, 10) == "a prompt without tokens"
    assert prompt_problem(4, 3, 10) == "a prompt of more than max_prompt_tokens=3: 4 tokens"
    assert prompt_problem(10, None, 10) == (
        "a prompt that fills the model's context of 10 tokens: 10 tokens"
    )
