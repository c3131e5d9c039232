"""docs/variants.md's stability table: what exact best responses do to a small error, by simulation.

The minimizer of the pairwise logistic loss is p_{t+1} ∝ R_t (p_data / S_t)^{1/lambda}, with S_t
who generates and R_t the reference. Both are the public modules' own, applied to a table of
log-probs of five responses of one token, where a token-level mixture is one of whole responses.
"""

from functools import cache
from math import sqrt

import pytest
import torch
from torch import Tensor

from spin_lightning import SPIN, AlphaSPIN, FictitiousSPIN, MixtureSPIN, SelfPlayModule
from spin_lightning.mixtures import Reference

ITERATES = 400
DATA = torch.tensor([0.35, 0.25, 0.2, 0.12, 0.08], dtype=torch.float64).log()


def centered(values: list[float]) -> Tensor:
    """A direction that keeps sum p_data e^u at 1 to first order."""
    u = torch.tensor(values, dtype=torch.float64)
    return u - (DATA.exp() * u).sum()


START = centered([1.0, -2.0, 0.5, 1.5, -1.0])
START = 1e-3 * START / START.norm()


def played(module: SelfPlayModule, beta: float) -> list[Tensor]:
    """log p_0 … log p_T, each a best response to those before."""
    history = [(DATA + START).log_softmax(-1)]
    for t in range(ITERATES):
        reference, opponent = module.reference(t), module.opponent(t)
        assert opponent is not None
        ratio = DATA - log_density(opponent, history)
        history.append((log_density(reference, history) + ratio / beta).log_softmax(-1))
    return history


def log_density(density: Reference, history: list[Tensor]) -> Tensor:
    plain = {i: history[i] for i in density.plain_members}
    alpha, base = density.token_alpha, history[0]
    token = {
        i: ((1 - alpha) * history[i] + alpha * base).log_softmax(-1) for i in density.token_members
    }
    return density.logps(plain, token)


def kl(log_p: Tensor) -> float:
    """KL(p || p_data), nats."""
    return float((log_p.exp() * (log_p - DATA)).sum())


def kl_ratio(module: SelfPlayModule, beta: float) -> float:
    """KL(p_T || p_data) / KL(p_0 || p_data)."""
    history = played(module, beta)
    return kl(history[-1]) / kl(history[0])


def amplification(history: list[Tensor]) -> float:
    """The largest error on the way, in units of the first."""
    return sqrt(max(map(kl, history)) / kl(history[0]))


def build(variant: type[SelfPlayModule], **settings: object) -> SelfPlayModule:
    return variant(model="unused", **settings)


THRESHOLDS = [
    (SPIN, {}, 1 / 2),
    (MixtureSPIN, {"history": 1}, 1 / 2),
    (MixtureSPIN, {"history": 2}, 1 / 3),
    (MixtureSPIN, {"history": 4}, 1 / 5),
    (MixtureSPIN, {"history": 2, "reference": "previous"}, 1 / 2),
]


@pytest.mark.parametrize(("variant", "settings", "threshold"), THRESHOLDS)
def test_error_vanishes_just_above_the_threshold(variant, settings, threshold):
    assert abs(kl_ratio(build(variant, **settings), 1.1 * threshold)) < 0.01


@pytest.mark.parametrize(("variant", "settings", "threshold"), THRESHOLDS)
def test_error_explodes_just_below_the_threshold(variant, settings, threshold):
    assert kl_ratio(build(variant, **settings), 0.9 * threshold) > 1e3


@pytest.mark.parametrize("beta", [0.05, 0.1, 0.3, 1.0])
def test_error_of_fictitious_play_vanishes_at_every_beta(beta):
    module = build(FictitiousSPIN)
    history = played(module, beta)
    mixture = log_density(module.opponent(ITERATES), history)
    assert abs(kl(history[-1]) / kl(history[0])) < 0.01
    assert abs(kl(mixture) / kl(history[0])) < 0.01


@pytest.mark.parametrize("beta", [0.1, 0.3])
def test_error_of_fictitious_play_is_amplified_first_as_the_recursion_says(beta):
    """The mixture's error by prod |1 - (1/beta) / (k + 2)|, the iterate's by |c| times that."""
    mixture, largest = 1.0, 1.0
    for k in range(ITERATES):
        largest = max(largest, abs(1 - 1 / beta) * mixture)
        mixture *= abs(1 - 1 / beta / (k + 2))
    found = amplification(played(build(FictitiousSPIN), beta))
    assert found == pytest.approx(largest, rel=0.1)


@pytest.mark.parametrize("beta", [2.0, 4.0])
def test_error_of_the_fictitious_mixture_falls_with_the_power_one_over_beta(beta):
    """From iterate 100 to 400: by 4^{-1/beta}, so KL by its square."""
    module = build(FictitiousSPIN)
    history = played(module, beta)
    early, late = (kl(log_density(module.opponent(t), history)) for t in (100, 400))
    assert sqrt(late / early) == pytest.approx(4 ** (-1 / beta), rel=0.05)


def test_all_data_against_the_last_iterate_is_slow_after_a_large_transient():
    """At lambda = 0.1 times 46 first, and then as t^{-1/4}: still above its start at the end."""
    history = played(build(FictitiousSPIN, reference="previous"), 0.1)
    assert amplification(history) == pytest.approx(46, abs=1)
    assert kl(history[-1]) > 10 * kl(history[0])

    def envelope(t: int) -> float:
        return sqrt(max(map(kl, history[t // 2 : t + 1])))

    assert envelope(100) / envelope(400) == pytest.approx(4 ** (1 / 4), rel=0.15)


@cache
def end_of_alpha(mixture: str, alpha: float, beta: float) -> Tensor:
    """The error u_T = log p_T - log p_data of an AlphaSPIN run."""
    return played(build(AlphaSPIN, alpha=alpha, mixture=mixture), beta)[-1] - DATA


def fixed_point(mixture: str, alpha: float, beta: float) -> float:
    """u* / u_0 of docs/variants.md."""
    c = 1 - 1 / beta
    if mixture == "sequence":
        return alpha * beta / (1 + alpha * beta)
    return alpha * c / (1 - (1 - alpha) * c)


def threshold_of_alpha(mixture: str, alpha: float) -> float:
    """lambda of 1/lambda + alpha = 2, or of (1 - alpha) (1/lambda - 1) = 1."""
    return 1 / (2 - alpha) if mixture == "sequence" else (1 - alpha) / (2 - alpha)


ALPHAS = [(mixture, alpha) for mixture in ("sequence", "token") for alpha in (0.1, 0.3, 0.7)]


@pytest.mark.parametrize("beta", ["1.1 x threshold", 1.5, 5.0])
@pytest.mark.parametrize(("mixture", "alpha"), ALPHAS)
def test_alpha_ends_at_its_fixed_point(mixture, alpha, beta):
    beta = beta if isinstance(beta, float) else 1.1 * threshold_of_alpha(mixture, alpha)
    wanted = fixed_point(mixture, alpha, beta) * START
    found = end_of_alpha(mixture, alpha, beta)
    assert (found - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize(("mixture", "alpha"), ALPHAS)
def test_alpha_explodes_just_below_its_threshold(mixture, alpha):
    module = build(AlphaSPIN, alpha=alpha, mixture=mixture)
    assert kl_ratio(module, 0.9 * threshold_of_alpha(mixture, alpha)) > 1e3


@pytest.mark.parametrize(("beta", "side"), [(2.0, 1), (0.8, -1)])
def test_alpha_at_the_token_level_ends_towards_the_base_or_beyond_the_data(beta, side):
    assert side * (end_of_alpha("token", 0.3, beta) * START).sum() > 0
    assert (end_of_alpha("sequence", 0.3, beta) * START).sum() > 0


def test_alpha_at_the_token_level_ends_at_the_data_at_lambda_one():
    assert end_of_alpha("token", 0.3, 1.0).abs().max() < 1e-12
