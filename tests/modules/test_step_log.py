"""The alarm on an iterate's first margin: its limit grows with tokens and with the type's error."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from spin_lightning.mixtures import latest
from spin_lightning.modules.step_log import log_first_margin
from spin_lightning.types import PairLogps


def warned(margin: float, tokens: int, dtype: torch.dtype) -> str:
    """What is printed for one pair whose responses together have this many tokens."""
    lines: list[str] = []
    module = SimpleNamespace(
        reference=latest,
        iterate=0,
        loggers=[],
        print=lines.append,
        policy_spec=SimpleNamespace(base=SimpleNamespace(dtype=dtype)),
    )
    pairs = PairLogps(
        policy_real=torch.tensor([margin - 3.0], dtype=torch.float64),
        reference_real=torch.tensor([-3.0], dtype=torch.float64),
        real_lengths=torch.tensor([tokens // 2]),
        policy_generated=torch.tensor([-5.0], dtype=torch.float64),
        reference_generated=torch.tensor([-5.0], dtype=torch.float64),
        generated_lengths=torch.tensor([tokens - tokens // 2]),
    )
    log_first_margin(module, pairs)
    return "".join(lines)


@pytest.mark.parametrize(
    ("dtype", "tokens", "limit"),
    [
        # 0.01, 0.02 and 0.05 nats per square root of a token.
        (torch.float32, 4, 0.02),
        (torch.float32, 400, 0.2),
        (torch.float16, 4, 0.04),
        (torch.bfloat16, 4, 0.1),
        (torch.bfloat16, 400, 1.0),
    ],
)
def test_alarm_scales_with_the_square_root_of_tokens_and_the_type(dtype, tokens, limit):
    assert warned(0.99 * limit, tokens, dtype) == ""
    found = warned(-1.01 * limit, tokens, dtype)
    assert f"first margin of iterate 1 is {1.01 * limit:.3g} nats on {tokens} tokens" in found
    assert f"below {limit:.2g} by rounding" in found
