"""Metrics of pairs: statistics of a batch, and their means over many batches."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchmetrics import Metric

from spin_lightning.types import PairLogps

# Nats: two passes over the same token in float32 differ by up to 4e-6 where only the batch differs.
_TIE_PER_TOKEN = 1e-5


class Weighted(NamedTuple):
    """Values and the weight of each in the mean, both of shape [n]."""

    values: Tensor
    weights: Tensor

    @property
    def mean(self) -> Tensor:
        """The weighted mean, shape []."""
        return (self.values * self.weights).sum() / self.weights.sum()


def pair_statistics(logps: PairLogps, beta: float) -> dict[str, Weighted]:
    """Rewards, log-probs and the real response's negative log-likelihood of a batch of pairs.

    The implicit reward is beta * (log p_theta - R). A pair is won if the real response has the
    larger reward; a tie, up to the rounding of float32, counts half.

    Args:
        logps: Log-probs of n pairs.
        beta: Temperature of the implicit reward.

    Returns:
        By metric name (without `train/` or `val/`), the values of the n pairs and their weights: 1
        per pair, or the number of tokens for metrics per token.
    """
    real_tokens = logps.real_lengths.double()
    one = torch.ones_like(real_tokens)
    real = logps.policy_real.detach()
    statistics = {
        "logps/real": Weighted(real, one),
        "real_nll_per_token": Weighted(-real / real_tokens, real_tokens),
    }
    if logps.policy_generated is None:
        return statistics
    margin = logps.margin.detach()
    return statistics | {
        "logps/generated": Weighted(logps.policy_generated.detach(), one),
        "rewards/real": Weighted(beta * logps.real_log_ratio.detach(), one),
        "rewards/generated": Weighted(beta * logps.generated_log_ratio.detach(), one),
        "rewards/margins": Weighted(beta * margin, one),
        "rewards/accuracies": Weighted(_wins(logps), one),
    }


def _wins(logps: PairLogps) -> Tensor:
    """1 for a pair with a positive margin, 1/2 for a tie, else 0; shape [n]."""
    assert logps.generated_lengths is not None
    margin = logps.margin.detach()
    tie = margin.abs() <= _TIE_PER_TOKEN * (logps.real_lengths + logps.generated_lengths)
    return margin.masked_fill(tie, 0.0).heaviside(margin.new_tensor(0.5))


class PairMetrics(Metric):
    """Weighted means of `pair_statistics` and of the loss over a whole validation set."""

    full_state_update = False

    def __init__(self) -> None:
        """Start empty."""
        super().__init__()
        for name in _NAMES:
            for part in ("sum", "weight"):
                zero = torch.zeros((), dtype=torch.float64)
                self.add_state(f"{name}:{part}", default=zero, dist_reduce_fx="sum")

    def update(self, logps: PairLogps, beta: float, loss: Tensor) -> None:
        """Add a batch of pairs and its mean loss."""
        pairs = len(logps.policy_real)
        whole = Weighted(loss.detach().double().expand(pairs), torch.ones_like(logps.policy_real))
        for name, (values, weights) in {**pair_statistics(logps, beta), "loss": whole}.items():
            total = getattr(self, f"{name}:sum") + (values * weights).sum()
            setattr(self, f"{name}:sum", total)
            setattr(self, f"{name}:weight", getattr(self, f"{name}:weight") + weights.sum())

    def compute(self) -> dict[str, Tensor]:
        """Mean by metric name, for every metric that has been updated."""
        return {
            name: getattr(self, f"{name}:sum") / getattr(self, f"{name}:weight")
            for name in _NAMES
            if getattr(self, f"{name}:weight") > 0
        }


_NAMES = (
    "loss",
    "logps/real",
    "logps/generated",
    "real_nll_per_token",
    "rewards/real",
    "rewards/generated",
    "rewards/margins",
    "rewards/accuracies",
)


def first_margin(logps: PairLogps) -> dict[str, float]:
    """Largest absolute margin of a batch of pairs, in nats and in nats per token.

    At the first step of an iterate it is 0 where policy and reference are the same.

    Args:
        logps: Log-probs of n pairs, with generated responses.

    Returns:
        By metric name without `train/`.
    """
    assert logps.generated_lengths is not None
    margin = logps.margin.detach().abs()
    tokens = logps.real_lengths + logps.generated_lengths
    return {
        "first_margin_abs": float(margin.max()),
        "first_margin_abs_per_token": float((margin / tokens).max()),
    }


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Mean of independent values, shape [n], and its standard error (NaN for n = 1)."""
    error = values.double().std(correction=1) / math.sqrt(len(values)) if len(values) > 1 else None
    return float(values.double().mean()), math.nan if error is None else float(error)


def sampled_kl(
    generated_logps: Mapping[int, Tensor], member: int, other: int, lengths: Tensor
) -> dict[str, float]:
    """Estimate KL(p_member || p_other) from responses that p_member generated.

    KL(p||q) = E_{y ~ p} [log p(y|x) - log q(y|x)], an average over the given responses.

    Args:
        generated_logps: log p_i(y'|x) by iterate, each of shape [n].
        member: The iterate that generated the responses.
        other: The iterate to compare with.
        lengths: Response lengths in tokens, shape [n].

    Returns:
        The estimate in nats per response, its standard error, and nats per token.
    """
    gap = generated_logps[member] - generated_logps[other]
    mean, error = mean_and_error(gap)
    return {"": mean, "_error": error, "_per_token": float(gap.sum() / lengths.sum())}


def distinct(ids: NDArray[np.integer], offsets: NDArray[np.integer], n: int) -> float:
    """Distinct-n: the share of distinct token n-grams; NaN if no response has n tokens.

    Args:
        ids: Tokens of all responses, concatenated.
        offsets: Start of each response, and the end of the last, shape [responses + 1].
        n: Length of an n-gram, 1 to 3.

    Reference: Li et al., "A Diversity-Promoting Objective Function for Neural Conversation Models",
    https://arxiv.org/abs/1510.03055.
    """
    starts = [np.arange(a, b - n + 1) for a, b in pairwise(offsets)]
    begin = np.concatenate([np.empty(0, dtype=np.int64), *starts])
    if not len(begin):
        return math.nan
    # Encode each n-gram as one integer: comparing integers is many times faster than rows.
    vocabulary, grams = int(ids.max()) + 1, np.zeros(len(begin), dtype=np.int64)
    for place in range(n):
        grams = grams * vocabulary + ids[begin + place]
    return len(np.unique(grams)) / len(grams)


def duplicate_rate(sequences: Iterable[NDArray[np.integer]]) -> float:
    """Share of responses that repeat an earlier one token for token."""
    seen = [sequence.tobytes() for sequence in sequences]
    return 1 - len(set(seen)) / len(seen)
