"""Which examples are held out, and how many."""

from collections import Counter
from collections.abc import Sequence

import pytest

from spin_lightning.data.held_out import hold_out
from spin_lightning.types import Example


def ids(examples: Sequence[Example]) -> list[int]:
    return [example.example_id for example in examples]


def examples(*prompts: int) -> list[Example]:
    """One example for each prompt, told apart by their responses."""
    return [Example(i, (1, prompt), (i, 2), real_finished=True) for i, prompt in enumerate(prompts)]


def prompts_of(made: Sequence[Example]) -> set[tuple[int, ...]]:
    return {example.prompt_ids for example in made}


@pytest.mark.parametrize("count", [0, 1, 20, 99])
def test_hold_out_with_many_prompts_takes_whole_prompts(count):
    train, val, what = hold_out(examples(*range(100)), count)
    assert len(val) == count
    assert sorted(ids(train) + ids(val)) == list(range(100))
    assert what == f"{count} examples with prompts of their own"


def test_hold_out_repeated_prompts_stay_on_one_side():
    data = examples(*(i % 70 for i in range(210)))
    train, val, _ = hold_out(data, 30)
    assert len(val) == 30
    assert not prompts_of(train) & prompts_of(val)
    assert set(Counter(e.prompt_ids for e in val).values()) == {3}


def test_hold_out_with_few_prompts_takes_responses_and_says_so():
    data = examples(*(i % 8 for i in range(200)))
    train, val, what = hold_out(data, 50)
    assert len(val) == 50
    assert sorted(ids(train) + ids(val)) == list(range(200))
    assert prompts_of(train) == prompts_of(val) == prompts_of(data)
    assert "50 responses" in what
    assert "only 8 distinct prompts" in what


@pytest.mark.parametrize(("prompts", "by_prompt"), [(63, False), (64, True)])
def test_hold_out_asks_for_64_prompts_to_hold_prompts_out(prompts, by_prompt):
    what = hold_out(examples(*range(prompts)), 5)[2]
    assert ("prompts of their own" in what) is by_prompt


def test_hold_out_depends_on_the_seed_alone(monkeypatch):
    def held(seed: int) -> tuple[int, ...]:
        monkeypatch.setenv("PL_GLOBAL_SEED", str(seed))
        return tuple(ids(hold_out(examples(*range(100)), 10)[1]))

    assert held(0) == held(0)
    assert len({held(0), held(1), held(2)}) == 3
