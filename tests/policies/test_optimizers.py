"""Optimizers and schedules against a step, or a few, by hand."""

import math

import pytest
import torch
from torch import nn

from spin_lightning.policies.optimizers import make_optimizer, make_schedule

FULL = (1.0,) * 8


def stepped(name: str, weight_decay: float = 0.0) -> torch.Tensor:
    """Weights 1, -1, 1, … after a step with gradients 0.5, 0.5, -0.5, -0.5, … and rate 0.1."""
    # bitsandbytes keeps the state of fewer than 4096 weights in 32 bits.
    weights = nn.Parameter(torch.tensor([1.0, -1.0]).repeat(2048))
    weights.grad = torch.tensor([0.5, 0.5, -0.5, -0.5]).repeat(1024)
    make_optimizer(name, (w for w in [weights]), 0.1, weight_decay).step()
    return weights.detach()[:4]


@pytest.mark.parametrize(
    ("name", "weight_decay", "wanted"),
    [
        # AdamW's first step is the rate times the gradient's sign; decay takes 0.1 · 0.2 of w.
        ("adamw", 0.0, [0.9, -1.1, 1.1, -0.9]),
        ("adamw", 0.2, [0.88, -1.08, 1.08, -0.88]),
        ("adamw_8bit", 0.0, [0.9, -1.1, 1.1, -0.9]),
        ("adamw_8bit", 0.2, [0.88, -1.08, 1.08, -0.88]),
        # RMSprop's is 0.1 · g / sqrt(0.01 · g²): ten times as long.
        ("rmsprop", 0.0, [0.0, -2.0, 2.0, 0.0]),
    ],
)
def test_make_optimizer_first_step_equals_the_one_by_hand(name, weight_decay, wanted):
    torch.testing.assert_close(stepped(name, weight_decay), torch.tensor(wanted), atol=1e-3, rtol=0)


def test_make_optimizer_adamw_8bit_keeps_its_state_in_bytes():
    weights = nn.Parameter(torch.ones(4096))
    optimizer = make_optimizer("adamw_8bit", [weights], 0.1, 0.0)
    for _ in range(3):
        weights.grad = torch.full_like(weights, 0.5)
        optimizer.step()
    assert {optimizer.state[weights][name].dtype for name in ("state1", "state2")} == {torch.uint8}
    torch.testing.assert_close(weights.detach(), torch.full((4096,), 0.7), atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("name", "warmup_ratio", "shares"),
    [
        ("constant", 0.0, [*FULL]),
        ("constant", 0.25, [0.0, 0.5, *FULL[:6]]),
        ("linear", 0.0, [1 - k / 8 for k in range(8)]),
        ("linear", 0.25, [0.0, 0.5, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),
        ("linear", 0.3, [0.0, 0.5, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]),  # 2.4 steps are 2
        ("cosine", 0.0, [(1 + math.cos(math.pi * k / 8)) / 2 for k in range(8)]),
        ("cosine", 0.5, [0.0, 0.25, 0.5, 0.75, 1.0, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_make_schedule_rates_of_eight_steps_equal_those_by_hand(name, warmup_ratio, shares):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.2)
    schedule = make_schedule(name, optimizer, total_steps=8, warmup_ratio=warmup_ratio)
    rates = []
    for _ in range(8):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.2 * share for share in shares])
