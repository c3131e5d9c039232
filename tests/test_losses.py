"""Losses of the margin: values and slopes by hand, at arguments that make them simple."""

from math import log
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
    # Least at 1 / (2 * 0.25) = 2; the slope is 2 (m - 2).
    ("ipo", 0.25, 2.0, 0.0, 0.0),
    ("ipo", 0.25, 0.0, 4.0, -4.0),
    ("ipo", 0.25, 5.0, 9.0, 6.0),
]


@pytest.mark.parametrize(("name", "beta", "margin", "loss", "slope"), BY_HAND)
def test_loss_and_its_slope_equal_the_hand_values(name, beta, margin, loss, slope):
    m = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
    value = losses.by_name(name)(m, beta)
    value.sum().backward()
    assert value.item() == pytest.approx(loss, rel=1e-12, abs=1e-12)
    assert m.grad.item() == pytest.approx(slope, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("name", get_args(losses.LossName))
def test_loss_of_a_batch_is_one_value_per_pair_in_its_dtype(name):
    margins = torch.tensor([-1.5, 0.0, 2.0])
    loss = losses.by_name(name)
    assert loss(margins, 0.5).dtype == torch.float32
    assert loss(margins, 0.5).tolist() == [loss(m, 0.5).item() for m in margins]


@pytest.mark.parametrize("name", get_args(losses.LossName))
def test_by_name_of_every_name_is_the_public_function(name):
    assert losses.by_name(name) is getattr(losses, name)
