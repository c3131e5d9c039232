"""Metrics of pairs: values by hand, and means over batches of unequal size."""

from math import isnan, log, nan, sqrt

import pytest
import torch

from spin_lightning.metrics import (
    PairMetrics,
    first_margin,
    mean_and_error,
    pair_statistics,
    sampled_kl,
)
from spin_lightning.types import PairLogps


def pairs(*rows: tuple[float, float, float, float, int]) -> PairLogps:
    """Rows of (log p(y), log p(y'), R(y), R(y'), tokens of y)."""
    *logps, lengths = zip(*rows, strict=True)
    real, generated, *reference = (torch.tensor(x, dtype=torch.float64) for x in logps)
    return PairLogps(real, generated, *reference, torch.tensor(lengths), torch.tensor(lengths))


def without_generated(logps: PairLogps) -> PairLogps:
    real, reference = logps.policy_real, logps.reference_real
    return PairLogps(real, None, reference, None, logps.real_lengths, None)


# Log-ratios (2, 0), (-2, 2), (1, 1): margins 2, -4 and 0, so one is won, one lost, one a tie.
WON = (-2.0, -3.0, -4.0, -3.0, 2)
LOST = (-6.0, -5.0, -4.0, -7.0, 4)
TIED = (-1.0, -8.0, -2.0, -9.0, 1)

BY_HAND = {
    "logps/real": -9 / 3,
    "logps/generated": -16 / 3,
    "real_nll_per_token": 9 / 7,
    "rewards/real": 0.5 * 1 / 3,
    "rewards/generated": 0.5 * 3 / 3,
    "rewards/margins": 0.5 * -2 / 3,
    "rewards/accuracies": (1 + 0 + 0.5) / 3,
}
OF_REAL = ("logps/real", "real_nll_per_token")


def means(statistics):
    return {name: value.mean.item() for name, value in statistics.items()}


def test_pair_statistics_equal_the_hand_values():
    assert means(pair_statistics(pairs(WON, LOST, TIED), beta=0.5)) == pytest.approx(BY_HAND)


def test_tie_up_to_rounding_counts_half():
    # Over 2 · 2 tokens, margins of 1e-6 and -3e-5 are within 1e-5 nats per token, 5e-5 is not.
    near = [pairs((-2.0 + gap, -3.0, -2.0, -3.0, 2)) for gap in (1e-6, -3e-5, 5e-5)]
    wins = [pair_statistics(one, beta=0.1)["rewards/accuracies"].mean.item() for one in near]
    assert wins == [0.5, 0.5, 1.0]


def test_pair_statistics_without_generated_responses_are_those_of_the_real_ones():
    only_real = without_generated(pairs(WON, LOST, TIED))
    expected = {name: BY_HAND[name] for name in OF_REAL}
    assert means(pair_statistics(only_real, beta=0.5)) == pytest.approx(expected)


def test_pair_statistics_keep_no_graph():
    logps = pairs(WON, LOST)
    logps.policy_real.requires_grad_()
    logps.policy_generated.requires_grad_()
    values = pair_statistics(logps, beta=0.5)
    assert not any(value.mean.requires_grad for value in values.values())


def test_first_margin_is_the_largest_in_nats_and_per_token():
    """Margins 2, -4 and 0 over 2 * (2, 4, 1) tokens: 4 nats, and 2 / 4 = 4 / 8 per token."""
    assert first_margin(pairs(WON, LOST, TIED)) == {
        "first_margin_abs": 4.0,
        "first_margin_abs_per_token": 0.5,
    }


def test_pair_metrics_over_unequal_batches_are_the_pooled_means():
    """Losses 3 on one pair and 0.6 on two: (3 + 2 * 0.6) / 3 = 1.4."""
    metrics = PairMetrics()
    metrics.update(pairs(LOST), 0.5, torch.tensor(3.0))
    metrics.update(pairs(WON, TIED), 0.5, torch.tensor(0.6))
    pooled = {name: value.item() for name, value in metrics.compute().items()}
    assert pooled == pytest.approx({**BY_HAND, "loss": 1.4})


def test_pair_metrics_without_generated_responses_have_none_of_them():
    metrics = PairMetrics()
    metrics.update(without_generated(pairs(WON)), 1.0, torch.tensor(2.0))
    assert metrics.compute().keys() == {"loss", *OF_REAL}


def test_pair_metrics_that_were_reset_start_again():
    metrics = PairMetrics()
    metrics.update(pairs(LOST), 0.5, torch.tensor(3.0))
    metrics.reset()
    metrics.update(without_generated(pairs(WON)), 0.5, torch.tensor(2.0))
    values = {name: value.item() for name, value in metrics.compute().items()}
    assert values == {"loss": 2.0, "logps/real": -2.0, "real_nll_per_token": 1.0}


def test_pair_metrics_of_float32_batches_are_summed_in_double_precision():
    """A float32 sum of 2^24 + 1 would stay at 2^24."""
    metrics = PairMetrics()
    for loss in (2.0**24, 1.0):
        logp, length = torch.tensor([loss]), torch.tensor([1])
        metrics.update(PairLogps(logp, None, logp, None, length, None), 1.0, logp.mean())
    values = metrics.compute()
    assert values["loss"] == values["logps/real"] == (2**24 + 1) / 2


def test_mean_and_error_equal_the_hand_values():
    """Deviations -2, -1, 0, 3: variance 14 / 3 over 4 values."""
    assert mean_and_error(torch.tensor([1, 2, 3, 6])) == pytest.approx((3, sqrt(14 / 3 / 4)))


def test_mean_and_error_of_one_value_has_no_error():
    mean, error = mean_and_error(torch.tensor([2.5]))
    assert mean == 2.5
    assert isnan(error)


def test_sampled_kl_equals_the_hand_values():
    """Gaps 1, 0, 2 with deviations 0, -1, 1; 3 nats over 6 tokens."""
    logps = {2: torch.tensor([-1.0, -2.0, -3.0]), 0: torch.tensor([-2.0, -2.0, -5.0])}
    kl = sampled_kl(logps, member=2, other=0, lengths=torch.tensor([1, 2, 3]))
    assert kl == pytest.approx({"": 1.0, "_error": 1 / sqrt(3), "_per_token": 0.5})


def test_sampled_kl_of_responses_in_their_proportions_is_the_divergence():
    """p = (3/4, 1/4) writes three a and one b; q = (1/2, 1/2)."""
    p, q = torch.tensor([0.75, 0.75, 0.75, 0.25]).log(), torch.full((4,), 0.5).log()
    kl = sampled_kl({1: p, 0: q}, 1, 0, torch.ones(4))
    assert kl[""] == pytest.approx(0.75 * log(3 / 2) + 0.25 * log(1 / 2))


def test_sampled_kl_to_itself_is_zero_and_of_one_response_has_no_error():
    kl = sampled_kl({3: torch.tensor([-7.5])}, 3, 3, torch.tensor([4]))
    assert kl == pytest.approx({"": 0.0, "_error": nan, "_per_token": 0.0}, nan_ok=True)
