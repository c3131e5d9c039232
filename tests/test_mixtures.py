"""Mixtures: which iterates, how one is drawn, and the exact density of what it writes."""

import itertools
import math

import pytest
import torch

from spin_lightning.errors import SettingError
from spin_lightning.mixtures import Mixture, base, latest, mixture_logps, uniform, window

JUST_BELOW_1 = math.nextafter(1.0, 0.0)


# ---------------------------------------------------------------------------------- which iterates


@pytest.mark.parametrize(
    ("mixture", "weights"),
    [
        (latest(3), {3: 1.0}),
        (base(), {0: 1.0}),
        (uniform([4, 1]), {1: 0.5, 4: 0.5}),
        (uniform(range(4)), {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}),
        (Mixture.normalized({2: 3, 0: 1}), {0: 0.25, 2: 0.75}),
        (window(5, 1), {5: 1.0}),
        (window(5, 2), {4: 0.5, 5: 0.5}),
        (window(0, 2), {0: 1.0}),
        (window(1, 4), {0: 0.5, 1: 0.5}),
        (window(3, None), {0: 0.25, 1: 0.25, 2: 0.25, 3: 0.25}),
        (Mixture({2: 0.5, 1: 0.0, 0: 0.5}), {0: 0.5, 2: 0.5}),
    ],
)
def test_mixture_has_these_members_in_ascending_order(mixture, weights):
    assert list(mixture.weights.items()) == list(weights.items())
    assert mixture.members == tuple(weights)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Mixture({0: 1.5, 1: -0.5}), r"\{0: 1.5, 1: -0.5\}: iterate 1 has weight -0.5"),
        (lambda: Mixture({-1: 1.0}), r"\{-1: 1.0\}: iterate -1 has weight 1.0"),
        (lambda: Mixture({0: math.nan}), r"\{0: nan\}: iterate 0 has weight nan"),
        (lambda: Mixture({0: math.inf}), r"\{0: inf\}: iterate 0 has weight inf"),
        (lambda: Mixture({0: 0.5, 1: 0.25}), r"sum to 0.75, not to 1.*Mixture.normalized"),
        (lambda: Mixture({}), r"mixture weights=\{\}: they sum to 0"),
        (lambda: uniform([]), r"mixture weights=\{\}: they sum to 0"),
        (lambda: Mixture.normalized({0: 0.0, 2: 0.0}), r"\{0: 0.0, 2: 0.0\}: they sum to 0"),
        (lambda: Mixture.normalized({0: 2.0, 1: -1.0}), "iterate 1 has weight -1.0"),
        (lambda: window(2, 0), "history=0: .* at least one iterate.*null for all"),
    ],
)
def test_mixture_that_cannot_be_is_refused_with_field_value_and_fix(build, message):
    with pytest.raises(SettingError, match=r"(mixture weights|history)=.*Fix: .*\.$") as refused:
        build()
    assert refused.match(message)


def test_mixture_weights_that_sum_to_one_but_for_rounding_are_accepted():
    assert Mixture(dict.fromkeys(range(10), 0.1)).members == tuple(range(10))


@pytest.mark.parametrize(
    ("mixture", "text"),
    [
        (latest(2), "p2"),
        (window(2, None), "p0..p2"),
        (window(6, 3), "p4..p6"),
        (uniform([0, 2]), "0.5·p0+0.5·p2"),
        (Mixture({0: 0.25, 1: 0.75}), "0.25·p0+0.75·p1"),
    ],
)
def test_mixture_names_its_iterates(mixture, text):
    assert str(mixture) == text


# ------------------------------------------------------------------------------------------ drawing


@pytest.mark.parametrize(
    ("uniform_number", "member"),
    [
        (0.0, 1),
        (math.nextafter(0.25, 0.0), 1),
        (0.25, 2),
        (math.nextafter(0.75, 0.0), 2),
        (0.75, 5),
        (JUST_BELOW_1, 5),
    ],
)
def test_draw_inverts_the_cumulative_distribution(uniform_number, member):
    assert Mixture({1: 0.25, 2: 0.5, 5: 0.25}).draw(uniform_number) == member


def test_draw_beyond_a_rounded_sum_is_the_last_member():
    """Ten times 0.1, added one by one, is just below 1."""
    mixture = Mixture(dict.fromkeys(range(10), 0.1))
    assert sum(mixture.weights.values()) == JUST_BELOW_1
    assert mixture.draw(JUST_BELOW_1) == 9


# ------------------------------------------------------------------------------------------ density

WEIGHTS = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


@pytest.fixture(scope="module")
def language():
    """log p_i(y) of three iterates over all 27 responses of 3 tokens, shape [27, 3]."""
    generator = torch.Generator().manual_seed(0)
    tables = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64).log_softmax(-1)
    responses = itertools.product(range(3), repeat=3)
    return torch.stack([tables[:, range(3), list(y)].sum(-1) for y in responses])


@pytest.mark.parametrize("weights", [None, WEIGHTS, torch.tensor([1.0, 0.0, 0.0])])
def test_mixture_logps_equal_brute_force_over_a_language(weights, language):
    shares = [1 / 3] * 3 if weights is None else weights.tolist()
    by_hand = [
        math.log(sum(w * math.exp(logp) for w, logp in zip(shares, row, strict=True)))
        for row in language.tolist()
    ]
    density = mixture_logps(language, weights)
    assert density.tolist() == pytest.approx(by_hand, abs=1e-12)
    assert density.exp().sum().item() == pytest.approx(1.0, abs=1e-12)


def test_mixture_logps_is_no_average_of_token_probabilities():
    """Two tokens, each 0.9 under one iterate and 0.1 under the other: (0.81 + 0.01) / 2."""
    logps = 2 * torch.tensor([0.9, 0.1], dtype=torch.float64).log()
    assert mixture_logps(logps).exp().item() == pytest.approx(0.41)


def test_mixture_logps_of_improbable_responses_do_not_underflow():
    """log(0.25 e^-5000 + 0.75 e^(-5000 - log 3)) = -5000 - log 2."""
    logps = torch.tensor([-5000.0, -5000.0 - math.log(3)], dtype=torch.float64)
    density = mixture_logps(logps, torch.tensor([0.25, 0.75], dtype=torch.float64))
    assert density.item() == pytest.approx(-5000 - math.log(2), abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mixture_logps_keep_leading_dimensions_and_dtype(dtype):
    density = mixture_logps(torch.zeros(4, 5, 3, dtype=dtype))
    assert density.shape == (4, 5)
    assert density.dtype == dtype


def test_mixture_logps_of_identical_iterates_are_the_iterate_s():
    logps = torch.tensor([-1500.25, -3.5, -1e-3], dtype=torch.float64)
    density = mixture_logps(logps[:, None].expand(-1, 3))
    torch.testing.assert_close(density, logps, rtol=1e-15, atol=1e-15)


def test_mixture_own_logps_pick_its_members_with_their_weights(language):
    """Iterates 1, 4, 7 are there; the mixture is of 1 and 7."""
    by_iterate = dict(zip((7, 1, 4), language.unbind(-1), strict=True))
    density = Mixture({7: 0.25, 1: 0.75}).logps(by_iterate)
    by_hand = 0.25 * by_iterate[7].exp() + 0.75 * by_iterate[1].exp()
    torch.testing.assert_close(density.exp(), by_hand)
    assert torch.equal(latest(4).logps(by_iterate), by_iterate[4])
