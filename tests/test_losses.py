"""Losses: values and slopes by hand, at arguments that make them simple, and by differences."""

from math import exp, log
from typing import get_args

import pytest
import torch

from spin_lightning import losses

LOG_3 = log(3)

# Name, beta, margin, loss, slope in the margin.
BY_HAND = [
    # sigmoid(log 3) = 3/4; the slope is -beta * sigmoid(-beta m).
    ("logistic", 0.1, 0.0, log(2), -0.05),
    ("logistic", 1.0, LOG_3, log(4 / 3), -1 / 4),
    ("logistic", 1.0, -LOG_3, log(4), -3 / 4),
    ("logistic", 0.5, 2 * LOG_3, log(4 / 3), -1 / 8),
    # Far out, where a naive log(sigmoid) is infinite.
    ("logistic", 1.0, -10_000.0, 10_000.0, -1.0),
    ("logistic", 1.0, 10_000.0, 0.0, 0.0),
    # Won by 1 / beta = 2 nats or more: flat.
    ("hinge", 0.5, 0.0, 1.0, -0.5),
    ("hinge", 0.5, 1.0, 0.5, -0.5),
    ("hinge", 0.5, -2.0, 2.0, -0.5),
    ("hinge", 0.5, 2.5, 0.0, 0.0),
    # exp(-log 3) = 1/3; the slope is -beta times the loss.
    ("exponential", 2.0, 0.0, 1.0, -2.0),
    ("exponential", 2.0, LOG_3 / 2, 1 / 3, -2 / 3),
    ("exponential", 2.0, -LOG_3 / 2, 3.0, -6.0),
    # Past an exponent of 40 along the tangent there: e^40 (1 + x - 40), slope -beta e^40.
    ("exponential", 2.0, -20.0, exp(40), -2 * exp(40)),
    ("exponential", 2.0, -25.0, 11 * exp(40), -2 * exp(40)),
    ("exponential", 1.0, -10_000.0, 9_961 * exp(40), -exp(40)),
    # Least at 1 / (2 * 0.25) = 2; the slope is 2 (m - 2).
    ("ipo", 0.25, 2.0, 0.0, 0.0),
    ("ipo", 0.25, 0.0, 4.0, -4.0),
    ("ipo", 0.25, 5.0, 9.0, 6.0),
]


@pytest.mark.parametrize(("name", "beta", "margin", "loss", "slope"), BY_HAND)
def test_loss_and_its_slope_equal_the_hand_values(name, beta, margin, loss, slope):
    m = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    value = getattr(losses, name)(m, beta)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert m.grad.item() == pytest.approx(slope, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", get_args(losses.LossName))
def test_loss_of_a_batch_is_one_value_per_pair_in_its_dtype(name):
    real, generated = torch.tensor([-1.5, 0.0, 2.0]), torch.tensor([0.5, -1.0, 3.0])
    loss = losses.of_pairs(name)
    whole = loss(real, generated, 0.5)
    assert whole.dtype == torch.float32
    singly = [loss(r, g, 0.5).item() for r, g in zip(real, generated, strict=True)]
    assert whole.tolist() == singly


@pytest.mark.parametrize("name", get_args(losses.LossName))
def test_losses_of_the_margin_are_those_that_a_shift_of_both_log_ratios_leaves_as_they_are(name):
    """A factor of the reference that depends on the prompt shifts both."""
    real, generated = torch.tensor([-1.5, 0.0, 2.0]), torch.tensor([0.5, -1.0, 3.0])
    loss = losses.of_pairs(name)
    shifted = loss(real + 8, generated + 8, 0.5)
    assert torch.equal(shifted, loss(real, generated, 0.5)) == losses.depends_on_margin(name)
    if losses.depends_on_margin(name):
        assert torch.equal(shifted, getattr(losses, name)(real - generated, 0.5))


@pytest.mark.parametrize("beta", [0.1, 2.0])
@pytest.mark.parametrize("name", get_args(losses.LossName))
def test_gradient_of_a_loss_is_that_of_finite_differences(name, beta):
    real = torch.tensor([-1.3, 0.2, 1.7], dtype=torch.float64, requires_grad=True)
    generated = torch.tensor([0.4, -1.1, 0.9], dtype=torch.float64, requires_grad=True)
    loss = losses.of_pairs(name)
    assert torch.autograd.gradcheck(lambda r, g: loss(r, g, beta), (real, generated))


def value_and_slopes(
    loss: losses.PairLoss, real: float, generated: float, setting: float
) -> tuple[float, ...]:
    """The loss of one pair, and its slopes in r and r'."""
    sides = [torch.tensor([r], dtype=torch.float64, requires_grad=True) for r in (real, generated)]
    value = loss(*sides, setting)
    return value.item(), *(slope.item() for slope in torch.autograd.grad(value.sum(), sides))


# -------------------------------------------------------------------------------------------- SPPO

# beta, r of the real response, r' of the generated one, loss, slope in r, slope in r'.
SPPO_BY_HAND = [
    # The goals are 1 / (2 * 0.25) = 2 and -2; the slopes are 2 (r - 2) and 2 (r' + 2).
    (0.25, 2.0, -2.0, 0.0, 0.0, 0.0),
    (0.25, 0.0, 0.0, 8.0, -4.0, 4.0),
    (0.25, 3.0, 1.0, 10.0, 2.0, 6.0),
    (0.1, 0.0, 0.0, 50.0, -10.0, 10.0),
]


@pytest.mark.parametrize(("beta", "real", "generated", "loss", "slope", "other"), SPPO_BY_HAND)
def test_sppo_and_its_slopes_equal_the_hand_values(beta, real, generated, loss, slope, other):
    found = value_and_slopes(losses.sppo, real, generated, beta)
    assert found == pytest.approx((loss, slope, other), rel=1e-12, abs=1e-12)


def test_sppo_over_a_language_is_least_at_the_difference_of_the_two_shares():
    """With y ~ data and y' ~ reference, r = (data - reference) / (data + reference) / (2 beta)."""
    data = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    best = ((data - reference) / (data + reference) / (2 * 0.1)).requires_grad_()
    zero = torch.zeros(3, dtype=torch.float64)
    total = data * losses.sppo(best, zero, 0.1) + reference * losses.sppo(zero, best, 0.1)
    (slope,) = torch.autograd.grad(total.sum(), best)
    assert slope.abs().max() < 1e-12


# ------------------------------------------------------------------------------------------- SPACE

# Ratio mu, r of the real response, r' of the generated one, loss, slope in r, slope in r'.
# s(z) = 1 / (1 + mu e^-z): the slopes are s(r) - 1 and mu s(r').
SPACE_BY_HAND = [
    # s = 1/2 on both sides.
    (1.0, 0.0, 0.0, 2 * log(2), -1 / 2, 1 / 2),
    # s(0) = 1/3.
    (2.0, 0.0, 0.0, log(3) + 2 * log(3 / 2), -2 / 3, 2 / 3),
    # s(0) = 2/3.
    (0.5, 0.0, 0.0, log(3 / 2) + 0.5 * log(3), -1 / 3, 1 / 3),
    # s(log 3) = 3/4, s(-log 3) = 1/4: both right.
    (1.0, LOG_3, -LOG_3, 2 * log(4 / 3), -1 / 4, 1 / 4),
    # s(log 3) = 3/4 on both sides: the generated one is wrong.
    (1.0, LOG_3, LOG_3, log(4 / 3) + log(4), -1 / 4, 3 / 4),
    # s(log 2) = 1/2 and s(log 6) = 3/4 at mu = 2.
    (2.0, log(2), log(6), log(2) + 2 * log(4), -1 / 2, 3 / 2),
    # Far out, where 1 - s rounds to 0 and a naive logarithm is infinite.
    (2.0, -10_000.0, 10_000.0, 30_000.0 - log(2), -1.0, 2.0),
    (2.0, 10_000.0, -10_000.0, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize(("ratio", "real", "generated", "loss", "slope", "other"), SPACE_BY_HAND)
def test_space_and_its_slopes_equal_the_hand_values(ratio, real, generated, loss, slope, other):
    found = value_and_slopes(losses.space, real, generated, ratio)
    assert found == pytest.approx((loss, slope, other), rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("ratio", [0.1, 1.0, 4.0])
def test_gradient_of_space_is_that_of_finite_differences(ratio):
    real = torch.tensor([-2.0, 0.1, 3.0], dtype=torch.float64, requires_grad=True)
    generated = torch.tensor([1.0, -0.4, 2.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda r, g: losses.space(r, g, ratio), (real, generated))


@pytest.mark.parametrize("ratio", [0.1, 1.0, 4.0])
def test_space_over_a_language_is_least_where_the_log_ratio_is_that_of_data_to_reference(ratio):
    """Pointwise: p_data (1 - s(r)) = mu R s(r) only at e^r = p_data / R; convex, so least."""
    data = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    zero = torch.zeros(3, dtype=torch.float64)

    def slope(r: torch.Tensor) -> torch.Tensor:
        r = r.requires_grad_()
        real = (data * losses.space(r, zero, ratio)).sum()
        generated = (reference * losses.space(zero, r, ratio)).sum()
        return torch.autograd.grad(real + generated, r)[0]

    best = (data / reference).log()
    assert slope(best).abs().max() < 1e-12
    assert (slope(best + 0.1) > 1e-3).all()
    assert (slope(best - 0.1) < -1e-3).all()


def test_space_of_a_batch_is_one_value_per_pair_in_its_dtype():
    real, generated = torch.tensor([-1.5, 0.0, 2.0]), torch.tensor([0.5, -1.0, 3.0])
    whole = losses.space(real, generated, 0.5)
    assert whole.dtype == torch.float32
    singly = [losses.space(r, g, 0.5).item() for r, g in zip(real, generated, strict=True)]
    assert whole.tolist() == singly


# --------------------------------------------------------------------------- the supervised anchor


def test_real_nll_is_the_mean_over_examples_of_the_nll_per_token():
    """6 nats in 2 tokens and 5 in 5: (3 + 1) / 2, where the mean over tokens is 11 / 7."""
    logps = torch.tensor([-6.0, -5.0], dtype=torch.float64, requires_grad=True)
    nll = losses.real_nll(logps, torch.tensor([2, 5]))
    nll.backward()
    assert nll.shape == ()
    assert nll.item() == pytest.approx(2.0, abs=1e-12)
    assert logps.grad.tolist() == pytest.approx([-1 / 4, -1 / 10], abs=1e-12)


def test_gradient_of_real_nll_is_that_of_finite_differences():
    logps = torch.tensor([-6.0, -5.0, -0.2], dtype=torch.float64, requires_grad=True)
    lengths = torch.tensor([2, 5, 1])
    assert torch.autograd.gradcheck(lambda x: losses.real_nll(x, lengths), logps)


def test_exponential_loss_of_a_hopeless_pair_stays_a_float32_with_its_squared_slope():
    margin = torch.tensor([-1e6, -50.0, 1e6], requires_grad=True)
    loss = losses.exponential(margin, 1.0)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert margin.grad.square().isfinite().all()


def test_overflows_counts_the_pairs_past_an_exponent_of_forty():
    margins = torch.tensor([-81.0, -80.0, -79.0, 0.0, 100.0, -1e9], dtype=torch.float64)
    assert losses.overflows(margins, 0.5).item() == 2
    assert losses.overflows(margins, 1.0).item() == 4
