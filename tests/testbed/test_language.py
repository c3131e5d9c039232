import itertools

import pytest
import torch

from spin_lightning.errors import DataError
from spin_lightning.testbed.language import SLOTS, Language, sample
from tests.toys.chi_square import chi_square

LANGUAGE = Language.make(seed=0)


def counts_of(pairs, shape):
    counts = torch.zeros(shape)
    for x, y in pairs:
        counts[x, y] += 1
    return counts


def test_language_is_625_different_sentences_of_two_to_four_words():
    assert len(LANGUAGE.prompts) == 8
    assert len(set(LANGUAGE.responses)) == len(LANGUAGE.responses) == 5**4
    lengths = [len(response.split()) for response in LANGUAGE.responses]
    # Both optional words are there in 4 · 4 of 5 · 5 cases, none of them in one.
    assert {n: lengths.count(n) for n in (2, 3, 4)} == {2: 25, 3: 200, 4: 400}


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distributions_of_every_prompt_sum_to_one(seed):
    language = Language.make(seed)
    for log_probs in (language.log_probs, language.dialect_log_probs):
        assert log_probs.dtype == torch.float64
        assert log_probs.shape == (8, 625)
        torch.testing.assert_close(log_probs.exp().sum(dim=1), torch.ones(8).double())


def test_probabilities_are_those_of_a_chain_of_words():
    """p(ab..)/p(a'b..) depends on the first two words only, for any continuation."""
    words = list(itertools.product(range(5), repeat=len(SLOTS)))
    index = {path: i for i, path in enumerate(words)}
    ratios = [
        LANGUAGE.log_probs[3, index[1, 2, *rest]] - LANGUAGE.log_probs[3, index[4, 2, *rest]]
        for rest in itertools.product(range(5), repeat=2)
    ]
    torch.testing.assert_close(torch.stack(ratios), ratios[0].expand(25))


def test_dialect_is_half_the_data_and_half_another_distribution():
    other = 2 * LANGUAGE.dialect_log_probs.exp() - LANGUAGE.log_probs.exp()
    assert other.min() > 0
    torch.testing.assert_close(other.sum(dim=1), torch.ones(8).double())
    assert (other - LANGUAGE.log_probs.exp()).abs().sum(dim=1).min() > 0.1


def test_make_same_seed_gives_same_language_and_leaves_global_random_state():
    before = torch.get_rng_state()
    again = Language.make(seed=0)
    assert torch.equal(again.log_probs, LANGUAGE.log_probs)
    assert torch.equal(again.dialect_log_probs, LANGUAGE.dialect_log_probs)
    assert not torch.equal(Language.make(seed=1).log_probs, LANGUAGE.log_probs)
    assert torch.equal(torch.get_rng_state(), before)


def test_sample_matches_the_distribution_it_was_drawn_from():
    pairs = sample(LANGUAGE.log_probs, 40_000, seed=5)
    counts = counts_of(pairs, LANGUAGE.log_probs.shape)
    nothing = torch.zeros(8)
    assert chi_square(counts, nothing, LANGUAGE.log_probs) > 0.001
    assert chi_square(counts, nothing, LANGUAGE.dialect_log_probs) < 1e-9
    # Prompts are uniform: 5000 each, standard deviation 66.
    assert (counts.sum(dim=1) - 5000).abs().max() < 300


def test_sample_same_seed_gives_same_pairs_and_leaves_global_random_state():
    before = torch.get_rng_state()
    assert sample(LANGUAGE.log_probs, 50, seed=3) == sample(LANGUAGE.log_probs, 50, seed=3)
    assert sample(LANGUAGE.log_probs, 50, seed=3) != sample(LANGUAGE.log_probs, 50, seed=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_save_and_load_keep_every_bit(tmp_path):
    LANGUAGE.save(tmp_path / "language.json")
    loaded = Language.load(tmp_path / "language.json")
    assert (loaded.prompts, loaded.responses) == (LANGUAGE.prompts, LANGUAGE.responses)
    assert torch.equal(loaded.log_probs, LANGUAGE.log_probs)
    assert torch.equal(loaded.dialect_log_probs, LANGUAGE.dialect_log_probs)


@pytest.mark.parametrize("content", [None, "no json", '{"prompts": []}'])
def test_load_of_another_file_is_refused_with_a_fix(tmp_path, content):
    path = tmp_path / "language.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=r"Fix: give the language\.json"):
        Language.load(path)
