"""Mixtures: their members, drawing a member, their density, and mixing in the base."""

import dataclasses
import itertools
import math

import pytest
import torch

from spin_lightning.errors import SettingError
from spin_lightning.mixtures import (
    Geometric,
    Mixture,
    base,
    latest,
    mixture_logps,
    pulled_to_base,
    referenced,
    uniform,
    window,
)

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
        (lambda: Mixture.normalized({0: -1.0}), r"\{0: -1.0\}: they sum to -1"),
        (lambda: Mixture.normalized({0: 2.0, 1: -1.0}), "iterate 1 has weight -1.0"),
        (lambda: window(2, 0), "history=0: .* at least one iterate.*null for all"),
    ],
)
def test_invalid_mixture_is_refused_with_field_value_and_fix(build, message):
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
        (window(299, None), "p0..p299"),
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


def test_mixture_logps_is_not_an_average_of_token_probabilities():
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


def test_mixture_own_logps_have_the_shape_of_its_members():
    """Half of p_1 and half of p_2, for two samples of two responses, and for one number."""
    one = torch.tensor([[1 / 2, 1 / 4], [1 / 8, 3 / 4]], dtype=torch.float64)
    other = torch.tensor([[1 / 4, 1 / 4], [3 / 8, 1 / 4]], dtype=torch.float64)
    wanted = torch.tensor([[3 / 8, 1 / 4], [1 / 4, 1 / 2]], dtype=torch.float64)
    mixture = window(2, 2)
    torch.testing.assert_close(mixture.logps({1: one.log(), 2: other.log()}).exp(), wanted)
    single = mixture.logps({1: one[0, 0].log(), 2: other[0, 0].log()})
    torch.testing.assert_close(single.exp(), wanted[0, 0])


# ------------------------------------------------------------- geometric mixture, whole responses


@pytest.fixture
def three_logps():
    """Two responses: p_0 = (1/2, 1/8), p_1 = (1/4, 1/2), p_2 = (3/4, 1/4)."""
    densities = {0: [1 / 2, 1 / 8], 1: [1 / 4, 1 / 2], 2: [3 / 4, 1 / 4]}
    return {i: torch.tensor(p, dtype=torch.float64).log() for i, p in densities.items()}


@pytest.mark.parametrize(
    ("geometric", "density"),
    [
        # sqrt(1/4 * 1/2), sqrt(1/2 * 1/8)
        (Geometric(latest(1), 0.5), [math.sqrt(1 / 8), 1 / 4]),
        # mu = (1/2, 3/8); sqrt(1/2 * 1/2), sqrt(3/8 * 1/8)
        (Geometric(window(2, 2), 0.5), [1 / 2, math.sqrt(3) / 8]),
        # (1/4)^(1/4) (1/2)^(3/4), (1/2)^(1/4) (1/8)^(3/4) = 2^(-1/4 - 9/4)
        (Geometric(latest(1), 0.75), [2 ** (-5 / 4), 2 ** (-5 / 2)]),
        # The base in mu as well: mu = (3/8, 5/16).
        (Geometric(window(1, None), 0.5), [math.sqrt(3 / 16), math.sqrt(5 / 128)]),
        (Geometric(Mixture({1: 0.25, 2: 0.75}), 0.0), [5 / 8, 5 / 16]),
        (Geometric(window(2, 2), 1.0), [1 / 2, 1 / 8]),
        (Geometric(base(), 0.4), [1 / 2, 1 / 8]),
    ],
)
def test_geometric_logps_equal_the_hand_values(geometric, density, three_logps):
    assert geometric.logps(three_logps).exp().tolist() == pytest.approx(density, abs=1e-12)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_geometric_at_its_limits_is_the_mixture_or_the_base_to_the_bit(alpha, three_logps):
    limit = window(2, 2) if alpha == 0 else base()
    found = Geometric(window(2, 2), alpha)
    assert torch.equal(found.logps(three_logps), limit.logps(three_logps))
    assert found.members == limit.members


def test_geometric_needs_only_the_scores_of_its_members(three_logps):
    """An iterate of weight 0 is not scored, so its score must not be looked up."""
    Geometric(latest(2), 0.0).logps({2: three_logps[2]})
    Geometric(latest(2), 1.0).logps({0: three_logps[0]})
    Geometric(latest(2), 0.5).logps({0: three_logps[0], 2: three_logps[2]})


@pytest.mark.parametrize(
    ("geometric", "members", "is_normalized", "text"),
    [
        (Geometric(window(3, 2), 0.0), (2, 3), True, "(p2..p3)^1·p0^0"),
        (Geometric(window(3, 2), 0.25), (0, 2, 3), False, "(p2..p3)^0.75·p0^0.25"),
        (Geometric(window(1, None), 0.25), (0, 1), False, "(p0..p1)^0.75·p0^0.25"),
        (Geometric(window(3, 2), 1.0), (0,), True, "(p2..p3)^0·p0^1"),
        (Geometric(base(), 0.25), (0,), True, "(p0)^0.75·p0^0.25"),
    ],
)
def test_geometric_has_its_members_and_name(geometric, members, is_normalized, text):
    assert geometric.members == geometric.plain_members == members
    assert geometric.token_members == ()
    assert geometric.token_alpha == 0
    assert geometric.is_normalized == is_normalized
    assert str(geometric) == text


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_geometric_is_normalized_where_it_sums_to_one(alpha, language):
    mixed = Geometric(latest(2), alpha)
    total = mixed.logps(dict(enumerate(language.unbind(-1)))).exp().sum().item()
    assert mixed.is_normalized == (abs(total - 1) < 1e-9)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, math.nan])
@pytest.mark.parametrize(
    "build",
    [
        lambda alpha: Geometric(latest(1), alpha),
        lambda alpha: pulled_to_base(latest(1), alpha),
        lambda alpha: Mixture({1: 1.0}, token_alpha=alpha),
    ],
)
def test_weight_of_the_base_out_of_range_is_refused(build, alpha):
    with pytest.raises(SettingError, match=r"alpha=.*weight of the base.*from 0 .* to 1"):
        build(alpha)


def test_geometric_of_a_token_level_mixture_is_refused():
    with pytest.raises(SettingError, match=r"already mixed with the base.*without token_alpha"):
        Geometric(Mixture({1: 1.0}, token_alpha=0.5), 0.5)


# ------------------------------------------------------------------------ the base in every token


@pytest.mark.parametrize(
    ("mixture", "alpha", "pulled"),
    [
        (window(3, 2), 0.0, window(3, 2)),
        (window(3, 2), 1.0, base()),
        (base(), 0.5, base()),
        (window(3, 2), 0.25, Mixture({2: 0.5, 3: 0.5}, token_alpha=0.25)),
        (window(1, None), 0.25, Mixture({0: 0.5, 1: 0.5}, token_alpha=0.25)),
    ],
)
def test_pulled_to_base_is_plain_where_it_can_be(mixture, alpha, pulled):
    assert pulled_to_base(mixture, alpha) == pulled


def test_token_level_mixture_depends_on_token_scores_only(three_logps):
    mixture = Mixture({1: 0.25, 2: 0.75}, token_alpha=0.5)
    assert mixture.members == mixture.token_members == (1, 2)
    assert mixture.plain_members == ()
    density = mixture.logps({}, three_logps).exp()
    assert density.tolist() == pytest.approx([5 / 8, 5 / 16], abs=1e-12)
    plain = Mixture({1: 0.25, 2: 0.75})
    assert plain.plain_members == (1, 2)
    assert plain.token_members == ()
    assert torch.equal(plain.logps(three_logps, {}).exp(), density)
    assert mixture != plain


def test_token_level_mixture_names_the_weight_of_the_base():
    assert str(Mixture({2: 0.5, 3: 0.5}, token_alpha=0.25)) == "p2..p3 ~0.25·p0"


@pytest.mark.parametrize(
    ("against", "reference"), [("opponent", Mixture({1: 0.25, 3: 0.75})), ("previous", latest(3))]
)
def test_referenced_is_the_opponent_s_mixture_or_the_last_iterate(against, reference):
    assert referenced(3, Mixture({1: 0.25, 3: 0.75}), against) == reference


@pytest.mark.parametrize(
    ("value", "name"), [(latest(1), "token_alpha"), (Geometric(latest(1), 0.5), "alpha")]
)
def test_opponents_and_references_are_immutable(value, name):
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(value, name, None)
