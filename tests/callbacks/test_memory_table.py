"""The largest passes of a run, by hand."""

import torch

from spin_lightning.callbacks.memory_table import LongestRow
from spin_lightning.policies.memory import PassSize

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


def test_the_largest_training_pass_is_that_of_the_longest_pairs():
    """Pairs of 600 + 300 + 100. A pass of 1,024 tokens has one, one of 8,192 has 8."""
    row = LongestRow(600, 300, 100)
    assert row.training_pass(1, 1024) == PassSize(1000, 400, repeated=700, further=100)
    assert row.training_pass(4, 1024) == row.training_pass(1, 1024)
    assert row.training_pass(8, 8192) == PassSize(8000, 3200, repeated=5600, further=800)
    assert LongestRow(600, 300, None).training_pass(1, 1024) == PassSize(900, 300)


def test_the_largest_scoring_pass_has_all_samples_of_a_prompt():
    """1,000 + 500 + 2 x 250: 4 of 2,000 tokens in 8,192."""
    row = LongestRow(1000, 500, 250, samples=2)
    wanted = PassSize(8000, 4000, repeated=4 * 2 * 1250, further=4 * 2 * 250)
    assert row.scoring_pass(GPU) == wanted
    assert row.scoring_pass(CPU).tokens == 2000
