import pytest
import torch
from scipy import stats

from tests.toys.chi_square import chi_square


def test_chi_square_hand_counts_give_hand_p_value():
    """Expected 50, 30, 20; seen 60, 30, 10: 100/50 + 0 + 100/20 = 7 on 2 degrees, p = e^-3.5."""
    log_probs = torch.tensor([[0.5, 0.3, 0.2]]).log()
    p_value = chi_square(torch.tensor([[60, 30, 10]]), torch.tensor([0]), log_probs)
    assert p_value == pytest.approx(0.0301973834, rel=1e-5)


def test_chi_square_rare_cells_are_pooled_and_outside_is_a_cell():
    """n = 100: cells {5 + 7}, {30}, {40} and outside {18}; seen 12, 20, 50, 18.

    (20-30)²/30 + (50-40)²/40 = 35/6 on 3 degrees of freedom.
    """
    log_probs = torch.tensor([[0.07, 0.4, 0.05, 0.3]]).log()
    p_value = chi_square(torch.tensor([[2, 50, 10, 20]]), torch.tensor([18]), log_probs)
    assert p_value == pytest.approx(stats.chi2.sf(35 / 6, 3), rel=1e-5)


def test_chi_square_outside_of_a_full_distribution_is_impossible():
    log_probs = torch.tensor([[0.5, 0.5]]).log()
    assert chi_square(torch.tensor([[50, 49]]), torch.tensor([1]), log_probs) == 0.0
