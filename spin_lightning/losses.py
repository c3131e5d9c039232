"""Losses, one pure function each; most are functions of the margin.

These take the margin m = r - r' of a batch of pairs, in nats and before beta, with

    r = log p_theta(y|x) - log R(y|x),    r' = log p_theta(y'|x) - log R(y'|x),

y the real and y' the generated response and R the reference, and return one loss per pair. Others
take r and r' apart: they need a normalized reference.
Equations: SPIN (https://arxiv.org/abs/2401.01335, eq. 4.7), DPO (https://arxiv.org/abs/2305.18290),
IPO (https://arxiv.org/abs/2310.12036, eq. 17).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional

LossName = Literal["logistic", "hinge", "exponential", "ipo", "sppo"]
MarginLoss = Callable[[Tensor, float], Tensor]
PairLoss = Callable[[Tensor, Tensor, float], Tensor]

# e^40 = 2.4e17, and the squared gradient in an optimizer 5.5e34; float32 overflows at 3.4e38.
_MOST_EXPONENT = 40.0


def logistic(margin: Tensor, beta: float) -> Tensor:
    """SPIN's and DPO's loss: -log sigmoid(beta * m).

    Args:
        margin: Log-ratio margin, nats, shape [batch].
        beta: Temperature of the implicit reward, > 0.

    Returns:
        Loss per pair, shape [batch]; log 2 at m = 0.

    Example:
        >>> logistic(torch.zeros(1), beta=0.1)
        tensor([0.6931])
    """
    return -functional.logsigmoid(beta * margin)


def hinge(margin: Tensor, beta: float) -> Tensor:
    """Hinge loss: max(0, 1 - beta * m), flat once a pair is won by 1 / beta nats.

    Args:
        margin: Log-ratio margin, nats, shape [batch].
        beta: Temperature of the implicit reward, > 0.

    Returns:
        Loss per pair, shape [batch].
    """
    return functional.relu(1.0 - beta * margin)


def exponential(margin: Tensor, beta: float) -> Tensor:
    """Exponential loss: exp(-beta * m), which weighs lost pairs the most.

    Beyond an exponent of 40 it continues along its tangent, so that neither the loss nor its
    squared gradient overflows float32; `overflows` counts these pairs.

    Args:
        margin: Log-ratio margin, nats, shape [batch].
        beta: Temperature of the implicit reward, > 0.

    Returns:
        Loss per pair, shape [batch].
    """
    exponent = -beta * margin
    clamped = exponent.clamp_max(_MOST_EXPONENT)
    return torch.exp(clamped) * (1.0 + (exponent - clamped))


def overflows(margin: Tensor, beta: float) -> Tensor:
    """Number of pairs whose exponential loss is linearized, int64, shape [].

    Args:
        margin: Log-ratio margin, nats, shape [batch].
        beta: Temperature of the implicit reward, > 0.
    """
    return (-beta * margin > _MOST_EXPONENT).sum()


def ipo(margin: Tensor, beta: float) -> Tensor:
    """IPO's squared loss: (m - 1 / (2 beta))^2, minimal at a margin of 1 / (2 beta).

    Log-probs are sums over the response, as in the IPO paper; some libraries divide by the length.

    Args:
        margin: Log-ratio margin, nats, shape [batch].
        beta: IPO's tau, > 0.

    Returns:
        Loss per pair, shape [batch].
    """
    return (margin - 1.0 / (2.0 * beta)) ** 2


def sppo(real_log_ratio: Tensor, generated_log_ratio: Tensor, beta: float) -> Tensor:
    """SPPO's squared loss for won and lost responses: (r - 1/(2 beta))^2 + (r' + 1/(2 beta))^2.

    SPPO (https://arxiv.org/abs/2405.00675) regresses log-ratios on (P - 1/2) / beta, with P the
    probability that a response is preferred. Here, as in TRL's `sppo_hard`, the real response has
    P = 1 and the generated one P = 0; beta is the paper's 1 / eta.

    Args:
        real_log_ratio: r, nats, shape [batch].
        generated_log_ratio: r', likewise.
        beta: Temperature of the implicit reward, > 0.

    Returns:
        Loss per pair, shape [batch]; 1 / (2 beta^2) at r = r' = 0.
    """
    goal = 1.0 / (2.0 * beta)
    return (real_log_ratio - goal) ** 2 + (generated_log_ratio + goal) ** 2


def space(real_log_ratio: Tensor, generated_log_ratio: Tensor, ratio: float) -> Tensor:
    """SPACE's noise-contrastive loss: tell real from generated responses, each on its own.

    -log s(r) - mu * log(1 - s(r')) with s(z) = 1 / (1 + mu * exp(-z)), mu the `ratio`.

    Args:
        real_log_ratio: r = log p_theta(y|x) - log R(y|x), nats, shape [batch].
        generated_log_ratio: r' of the generated responses, likewise.
        ratio: mu, weight of generated responses relative to real ones, > 0.

    Returns:
        Loss per pair, shape [batch]; log(1 + mu) + mu * log((1 + mu) / mu) at r = r' = 0.
    """
    # s(z) = sigmoid(z - log mu); its log-sigmoid neither overflows nor rounds to 0.
    shift = math.log(ratio)
    real = functional.logsigmoid(real_log_ratio - shift)
    generated = functional.logsigmoid(shift - generated_log_ratio)
    return -real - ratio * generated


def real_nll(real_logps: Tensor, real_lengths: Tensor) -> Tensor:
    """Mean over examples of the negative log-likelihood per token, -log p(y|x) / |y|, shape [].

    Args:
        real_logps: log p_theta(y|x), nats, shape [batch].
        real_lengths: |y| in tokens, shape [batch].
    """
    return -(real_logps / real_lengths).mean()


_OF_MARGIN: dict[str, MarginLoss] = {
    "logistic": logistic,
    "hinge": hinge,
    "exponential": exponential,
    "ipo": ipo,
}
_OF_BOTH: dict[str, PairLoss] = {"sppo": sppo}
assert (*_OF_MARGIN, *_OF_BOTH) == get_args(LossName)


def depends_on_margin(name: LossName) -> bool:
    """Whether a loss is a function of the margin alone."""
    return name in _OF_MARGIN


def of_pairs(name: LossName) -> PairLoss:
    """The loss of this name as a function of r, r' and beta."""
    if name in _OF_BOTH:
        return _OF_BOTH[name]
    of_margin = _OF_MARGIN[name]
    return lambda real, generated, beta: of_margin(real - generated, beta)
