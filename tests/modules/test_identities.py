"""The exact identities of docs/variants.md, for the public modules on an enumerated language.

A module gets a table of probabilities for a policy; its rows are made, stored, read and packed as
in a run, and its own objective is evaluated and differentiated.
"""

import itertools
from math import exp, log, prod
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from spin_lightning import (
    SPACE,
    SPIN,
    TPAW,
    TSPIN,
    AlphaSPIN,
    FictitiousSPIN,
    MixtureSPIN,
    SelfPlayModule,
    losses,
)
from spin_lightning.types import PairBatch, PairLogps
from tests.toys.policy import (
    EXAMPLES,
    PREFIXES,
    PROMPTS,
    RESPONSES,
    TOKENS,
    ToyPolicy,
    make_batch,
    make_rows,
    over_language,
    some_table,
    table_of,
)

T = 3
ITERATES = [some_table(i) for i in range(T + 1)]
LOSSES = ["logistic", "hinge", "exponential", "ipo"]
BETA = 0.4
close = {"rtol": 0, "atol": 1e-6}


def built(
    variant: type[SelfPlayModule],
    iterates: list[Tensor] | None = None,
    policy: Tensor | None = None,
    t: int = T,
    **settings: Any,
) -> SelfPlayModule:
    """A variant about to train p_{t+1}, with tables for policy and iterates."""
    if variant is not SPACE:
        settings = {"beta": BETA, **settings}
    module = variant(model="unused", **settings)
    module.iterate = t
    module.policy = ToyPolicy(
        some_table(9) if policy is None else policy,
        dict(enumerate(ITERATES if iterates is None else iterates)),
    )
    return module


def value_and_gradient(module: SelfPlayModule, folder: Path) -> tuple[Tensor, Tensor]:
    """The objective over all pairs and its gradient in the policy's logits."""
    loss = module.objective(module.pair_logps(make_batch(module, folder)))
    (gradient,) = torch.autograd.grad(loss, [p for _, p in module.policy.trainable()])
    return loss.detach(), gradient


def assert_same(one: SelfPlayModule, other: SelfPlayModule, folder: Path) -> None:
    """Both train alike on the same rows, and towards somewhere."""
    value, gradient = value_and_gradient(one, folder / "one")
    other_value, other_gradient = value_and_gradient(other, folder / "other")
    assert_close(value, other_value, **close)
    assert_close(gradient, other_gradient, **close)
    assert gradient.abs().max() > 1e-3


def assert_different(one: SelfPlayModule, other: SelfPlayModule, folder: Path) -> None:
    value, gradient = value_and_gradient(one, folder / "one")
    other_value, other_gradient = value_and_gradient(other, folder / "other")
    assert abs(value - other_value) > 1e-3
    assert (gradient - other_gradient).abs().max() > 1e-4


# ------------------------------------------------------------- brute force, token by token in math


def conditional(table: Tensor, prompt: int, response: tuple[int, ...], s: int) -> dict[int, float]:
    """p(token | prompt, response[:s]) of every token."""
    row = table[prompt, PREFIXES.index(response[:s])].tolist()
    return {token: exp(logp) for token, logp in zip(TOKENS, row, strict=True)}


def probability(table: Tensor, prompt: int, response: tuple[int, ...]) -> float:
    """p_i(y|x), the product of its tokens' probabilities."""
    steps = range(len(response))
    return prod(conditional(table, prompt, response, s)[response[s]] for s in steps)


def pulled_probability(
    table: Tensor, alpha: float, prompt: int, response: tuple[int, ...]
) -> float:
    """g_i(y|x): geometric mixture with the base, normalized at every token."""
    found = 1.0
    for s, token in enumerate(response):
        acting = conditional(table, prompt, response, s)
        base = conditional(ITERATES[0], prompt, response, s)
        shares = {v: acting[v] ** (1 - alpha) * base[v] ** alpha for v in TOKENS}
        found *= shares[token] / sum(shares.values())
    return found


def enumerated(density: Any) -> Tensor:
    """log of a density over the language, shape [prompts, responses]."""
    rows = [[log(density(x, y)) for y in RESPONSES] for x in range(len(PROMPTS))]
    return torch.tensor(rows, dtype=torch.float64)


def mean_density(members: list[int]) -> Tensor:
    """log of the arithmetic mixture of iterates, by brute force."""
    return enumerated(
        lambda x, y: sum(probability(ITERATES[i], x, y) for i in members) / len(members)
    )


def mean_pulled_density(members: list[int], alpha: float) -> Tensor:
    """log of the arithmetic mixture of token-level geometric mixtures, by brute force."""
    return enumerated(
        lambda x, y: (
            sum(pulled_probability(ITERATES[i], alpha, x, y) for i in members) / len(members)
        )
    )


def geometric_density(members: list[int], alpha: float) -> Tensor:
    """log of the NORMALIZED geometric mixture of whole responses, by brute force."""
    mixed = (1 - alpha) * mean_density(members) + alpha * mean_density([0])
    return mixed - mixed.exp().sum(-1, keepdim=True).log()


def margins_by_hand(policy: Tensor, reference: Tensor) -> list[float]:
    """The margin of every example's pair under a reference's log-density over the language."""
    log_p = enumerated(lambda x, y: probability(policy, x, y))
    ratio = (log_p - reference).tolist()
    return [
        ratio[PROMPTS.index(e.prompt_ids)][RESPONSES.index(e.real_ids)]
        - ratio[PROMPTS.index(e.prompt_ids)][RESPONSES.index(y)]
        for e, y in zip(EXAMPLES, itertools.cycle(RESPONSES), strict=False)
    ]


def reference_over_language(batch: PairBatch) -> Tensor:
    """log R of every response from the rows; real and generated sides agree."""
    assert batch.reference_generated is not None
    generated = over_language(batch.reference_generated, batch, 1)
    real = over_language(batch.reference_real, batch, 0)
    assert_close(real[:, : len(PREFIXES)], generated[:, : len(PREFIXES)], rtol=0, atol=0)
    return generated


# --------------------------------------------------------------------- one variant equals another

SAME_AS_SPIN = [
    (AlphaSPIN, {"alpha": 0.0}, T),
    (AlphaSPIN, {"alpha": 0.0, "mixture": "token"}, T),
    (MixtureSPIN, {"history": 1}, T),
    (MixtureSPIN, {"history": 1, "reference": "previous"}, T),
    (FictitiousSPIN, {}, 0),
    (MixtureSPIN, {"history": 4}, 0),
    (AlphaSPIN, {"alpha": 0.7, "history": None}, 0),
    (AlphaSPIN, {"alpha": 0.7, "history": None, "mixture": "token"}, 0),
]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("variant", "settings", "t"), SAME_AS_SPIN)
def test_variant_at_its_limit_is_spin(variant, settings, t, loss, tmp_path):
    one, spin = built(variant, t=t, loss=loss, **settings), built(SPIN, t=t, loss=loss)
    assert one.opponent(t) == spin.opponent(t)
    assert_same(one, spin, tmp_path)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ((AlphaSPIN, {"alpha": 0.0, "history": 2}), (MixtureSPIN, {"history": 2})),
        ((AlphaSPIN, {"alpha": 0.0, "history": None}), (FictitiousSPIN, {})),
        ((MixtureSPIN, {"history": T + 1}), (FictitiousSPIN, {})),
        ((MixtureSPIN, {"history": None}), (FictitiousSPIN, {})),
    ],
)
@pytest.mark.parametrize("reference", ["opponent", "previous"])
def test_variant_at_its_limit_is_another(one, other, reference, tmp_path):
    (variant, settings), (another, others) = one, other
    first = built(variant, reference=reference, **settings)
    second = built(another, reference=reference, **others)
    assert first.opponent(T) == second.opponent(T)
    assert_same(first, second, tmp_path)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("variant", "settings"),
    [
        (MixtureSPIN, {"history": 2}),
        (FictitiousSPIN, {}),
        (AlphaSPIN, {"alpha": 0.0, "history": 3}),
    ],
)
def test_mixture_of_identical_iterates_is_the_single_iterate(variant, settings, loss, tmp_path):
    same = [ITERATES[1]] * (T + 1)
    assert_same(built(variant, same, loss=loss, **settings), built(SPIN, same, loss=loss), tmp_path)


@pytest.mark.parametrize("mixture", ["sequence", "token"])
def test_mixture_of_identical_iterates_but_the_base_is_the_single_one(mixture, tmp_path):
    iterates = [ITERATES[0], *[ITERATES[1]] * T]
    settings = {"alpha": 0.3, "mixture": mixture}
    mixed = built(AlphaSPIN, iterates, history=T, **settings)
    assert_same(mixed, built(AlphaSPIN, iterates, history=1, **settings), tmp_path)


@pytest.mark.parametrize("mixture", ["sequence", "token"])
@pytest.mark.parametrize("history", [1, 2, None])
def test_alpha_one_scores_against_the_base_whatever_the_history(history, mixture, tmp_path):
    settings = {"alpha": 1.0, "history": history, "mixture": mixture}
    module = built(AlphaSPIN, **settings)
    assert module.reference(T).members == (0,)
    of_others = built(AlphaSPIN, [ITERATES[0], *map(some_table, (5, 6, 7))], **settings)
    assert_same(module, of_others, tmp_path / "same")
    dpo_like = value_and_gradient(built(SPIN, t=0), tmp_path / "base")
    assert_close(value_and_gradient(module, tmp_path / "again"), dpo_like, **close)
    of_another_base = built(AlphaSPIN, [some_table(5), *ITERATES[1:]], **settings)
    assert_different(module, of_another_base, tmp_path / "different")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("variant", "settings", "plain"),
    [
        (MixtureSPIN, {"history": 2}, SPIN),
        (FictitiousSPIN, {}, SPIN),
        (AlphaSPIN, {"alpha": 0.3, "history": 2}, AlphaSPIN),
        (AlphaSPIN, {"alpha": 0.3, "history": 2, "mixture": "token"}, AlphaSPIN),
    ],
)
def test_reference_previous_is_that_of_history_one_while_the_history_generates(
    variant, settings, plain, loss, tmp_path
):
    of_opponent = built(variant, loss=loss, **settings)
    of_previous = built(variant, loss=loss, reference="previous", **settings)
    alone = {k: v for k, v in settings.items() if k != "history"}
    assert of_previous.opponent(T) == of_opponent.opponent(T)
    assert len(of_previous.opponent(T).members) > 1
    assert_same(of_previous, built(plain, loss=loss, **alone), tmp_path / "same")
    assert_different(of_previous, of_opponent, tmp_path / "different")


# --------------------------------------------------------------------- references by brute force


@pytest.mark.parametrize(
    ("variant", "settings", "density"),
    [
        (SPIN, {}, lambda: mean_density([3])),
        (MixtureSPIN, {"history": 2}, lambda: mean_density([2, 3])),
        (FictitiousSPIN, {}, lambda: mean_density([0, 1, 2, 3])),
        (
            AlphaSPIN,
            {"alpha": 0.3, "history": 2, "mixture": "token"},
            lambda: mean_pulled_density([2, 3], 0.3),
        ),
        (
            AlphaSPIN,
            {"alpha": 0.6, "history": None, "mixture": "token"},
            lambda: mean_pulled_density([0, 1, 2, 3], 0.6),
        ),
        (SPACE, {}, lambda: mean_density([3])),
        (SPACE, {"alpha": 0.3}, lambda: mean_pulled_density([3], 0.3)),
    ],
)
def test_reference_is_the_brute_force_density_and_sums_to_one(variant, settings, density, tmp_path):
    found = reference_over_language(make_batch(built(variant, **settings), tmp_path))
    assert_close(found, density(), **close)
    assert_close(found.exp().sum(-1), torch.ones(2, dtype=torch.float64), **close)


def test_members_of_a_row_are_plain_and_its_token_members_pulled(tmp_path):
    """Both kinds are stored, whichever the reference uses."""
    module = built(AlphaSPIN, alpha=0.3, history=2, mixture="token")
    table = make_rows(module, tmp_path)
    batch = make_batch(module, tmp_path / "batch")
    assert table.token_members == (2, 3)
    for i in table.members:
        found = over_language(table.generated_logps[i], batch, 1)
        assert_close(found, mean_density([i]), **close)
    for i in table.token_members:
        found = over_language(table.token_generated_logps[i], batch, 1)
        assert_close(found, mean_pulled_density([i], 0.3), **close)


def test_token_level_mixture_is_another_than_that_of_whole_responses(tmp_path):
    settings = {"alpha": 0.3, "history": 2}
    sequence = make_batch(built(AlphaSPIN, **settings), tmp_path / "sequence")
    token = make_batch(built(AlphaSPIN, mixture="token", **settings), tmp_path / "token")
    apart = reference_over_language(sequence) - reference_over_language(token)
    assert (apart - apart.mean(-1, keepdim=True)).abs().max() > 0.1


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(("history", "members"), [(1, [3]), (2, [2, 3]), (None, [0, 1, 2, 3])])
def test_normalizer_of_the_sequence_level_mixture_cancels(history, members, loss, tmp_path):
    module = built(AlphaSPIN, alpha=0.3, history=history, loss=loss)
    batch = make_batch(module, tmp_path)
    normalized = geometric_density(members, 0.3)
    log_z = reference_over_language(batch) - normalized
    assert_close(log_z, log_z[:, :1].expand_as(log_z), **close)
    assert log_z[0, 0] < -0.01
    assert abs(log_z[0, 0] - log_z[1, 0]) > 0.01, "each prompt has its own"
    margins = margins_by_hand(some_table(9), normalized)
    logps = module.pair_logps(batch)
    assert logps.margin.tolist() == pytest.approx(margins, abs=1e-6)
    by_hand = {
        "logistic": lambda m: log(1 + exp(-BETA * m)),
        "hinge": lambda m: max(0.0, 1 - BETA * m),
        "exponential": lambda m: exp(-BETA * m),
        "ipo": lambda m: (m - 1 / (2 * BETA)) ** 2,
    }[loss]
    wanted = sum(map(by_hand, margins)) / len(margins)
    assert module.objective(logps).item() == pytest.approx(wanted, abs=1e-6)


# --------------------------------------------------------------------- where policy = reference

AT_REFERENCE = [
    (SPIN, {}, lambda: mean_density([3])),
    (MixtureSPIN, {"history": 2}, lambda: mean_density([2, 3])),
    (MixtureSPIN, {"history": 2, "reference": "previous"}, lambda: mean_density([3])),
    (FictitiousSPIN, {}, lambda: mean_density([0, 1, 2, 3])),
    (AlphaSPIN, {"alpha": 0.3, "history": 2}, lambda: geometric_density([2, 3], 0.3)),
    (
        AlphaSPIN,
        {"alpha": 0.3, "history": 2, "mixture": "token"},
        lambda: mean_pulled_density([2, 3], 0.3),
    ),
    (AlphaSPIN, {"alpha": 1.0, "history": 2}, lambda: mean_density([0])),
]


@pytest.mark.parametrize(
    ("loss", "value"),
    [("logistic", log(2)), ("hinge", 1.0), ("exponential", 1.0), ("ipo", 1 / (2 * BETA) ** 2)],
)
@pytest.mark.parametrize(("variant", "settings", "density"), AT_REFERENCE)
def test_policy_that_is_the_reference_has_margin_zero(
    variant, settings, density, loss, value, tmp_path
):
    module = built(variant, policy=table_of(density()), loss=loss, **settings)
    logps = module.pair_logps(make_batch(module, tmp_path))
    assert logps.margin.abs().max() < 1e-6
    assert module.objective(logps).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize("ratio", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_policy_that_is_the_reference_has_the_loss_of_space_at_zero(alpha, ratio, tmp_path):
    policy = table_of(mean_pulled_density([T], alpha))
    module = built(SPACE, policy=policy, alpha=alpha, ratio=ratio)
    logps = module.pair_logps(make_batch(module, tmp_path))
    assert logps.real_log_ratio.abs().max() < 1e-6
    assert logps.generated_log_ratio.abs().max() < 1e-6
    wanted = log(1 + ratio) + ratio * log((1 + ratio) / ratio)
    assert module.objective(logps).item() == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_space_is_the_sum_over_the_language_of_its_two_terms(alpha, tmp_path):
    """Word for word: -log s(r) - mu log(1 - s(r')), s(z) = 1 / (1 + mu e^-z)."""
    module = built(SPACE, alpha=alpha, ratio=2.0)
    log_p = enumerated(lambda x, y: probability(some_table(9), x, y))
    ratios = (log_p - mean_pulled_density([T], alpha)).tolist()

    def s(z: float) -> float:
        return 1 / (1 + 2.0 * exp(-z))

    terms = []
    for example, generated in zip(EXAMPLES, itertools.cycle(RESPONSES), strict=False):
        row = ratios[PROMPTS.index(example.prompt_ids)]
        real, fake = row[RESPONSES.index(example.real_ids)], row[RESPONSES.index(generated)]
        terms.append(-log(s(real)) - 2.0 * log(1 - s(fake)))
    value, _ = value_and_gradient(module, tmp_path)
    assert value.item() == pytest.approx(sum(terms) / len(terms), abs=1e-6)


# --------------------------------------------------------------------- objectives


@pytest.mark.parametrize("beta", [0.1, 0.25, 2.0])
def test_ipo_is_least_at_a_margin_of_one_over_two_beta(beta):
    module = built(SPIN, loss="ipo", beta=beta)

    def at(margin: float) -> tuple[float, float]:
        zero, two = torch.zeros(1, dtype=torch.float64), torch.tensor([2])
        m = torch.tensor([margin], dtype=torch.float64, requires_grad=True)
        loss = module.objective(PairLogps(m, zero, zero, zero, two, two))
        return loss.item(), torch.autograd.grad(loss, m)[0].item()

    assert at(1 / (2 * beta)) == pytest.approx((0.0, 0.0), abs=1e-12)
    for step in (-0.5, 0.5):
        assert at(1 / (2 * beta) + step) == pytest.approx((0.25, 2 * step), abs=1e-9)


def test_inpo_is_alpha_spin_with_the_ipo_loss_at_alpha_tau_over_eta_and_beta_eta(tmp_path):
    """INPO with the data's response as the winner, word for word from log-probs by brute force."""
    tau, eta = 0.05, 0.2
    module = built(AlphaSPIN, alpha=tau / eta, beta=eta, loss="ipo")
    policy, base, last = (
        enumerated(lambda x, y, table=table: probability(table, x, y)).tolist()
        for table in (some_table(9), ITERATES[0], ITERATES[T])
    )
    terms = []
    for example, generated in zip(EXAMPLES, itertools.cycle(RESPONSES), strict=False):
        x = PROMPTS.index(example.prompt_ids)
        y, other = RESPONSES.index(example.real_ids), RESPONSES.index(generated)
        h = policy[x][y] - policy[x][other]
        h -= tau / eta * (base[x][y] - base[x][other])
        h -= (eta - tau) / eta * (last[x][y] - last[x][other])
        terms.append((h - 1 / (2 * eta)) ** 2)
    value, _ = value_and_gradient(module, tmp_path)
    assert value.item() == pytest.approx(sum(terms) / len(terms), rel=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_tpaw_against_one_iterate_without_a_weight_of_the_player_is_spin(loss, tmp_path):
    module = built(TPAW, history=1, player_weight=1.0, loss=loss)
    assert_same(module, built(SPIN, loss=loss), tmp_path)


def test_tpaw_against_equal_iterates_is_spin_whatever_the_opponents_weights(tmp_path):
    same = [ITERATES[T]] * (T + 1)
    for sharpness in (0.0, 0.5, 3.0):
        module = built(TPAW, same, player_weight=1.0, opponent_weight=sharpness)
        assert_same(module, built(SPIN, same), tmp_path / str(sharpness))


def test_tpaw_without_weights_is_the_mean_of_its_losses_against_each_iterate(tmp_path):
    module = built(TPAW, history=2, player_weight=1.0, opponent_weight=0.0)
    value, gradient = value_and_gradient(module, tmp_path / "team")
    singly = [
        # An iterate T - 1 in the last place is SPIN's opponent and reference.
        value_and_gradient(built(SPIN, [*ITERATES[:T], ITERATES[j]]), tmp_path / str(j))
        for j in (T - 1, T)
    ]
    assert_close(value, sum(v for v, _ in singly) / 2, **close)
    assert_close(gradient, sum(g for _, g in singly) / 2, **close)


def pair_of(real: float, generated: float, **further: Any) -> PairLogps:
    """One pair of two-token responses without a reference."""
    sides = (torch.tensor([v], dtype=torch.float64, requires_grad=True) for v in (real, generated))
    zero, two = torch.zeros(1, dtype=torch.float64), torch.tensor([2])
    return PairLogps(*sides, zero, zero, two, two, **further)


def test_tpaw_of_two_iterates_and_its_slopes_equal_the_hand_values():
    """r = (-1, 2), r' = (1, 1), beta 1: a = (6, 1), m = (-2, 1), weights e and e^-1/2 over both."""
    module = built(TPAW, beta=1.0)
    logps = pair_of(
        -3.0,
        -4.0,
        further_real=torch.tensor([[-2.0, -5.0]], dtype=torch.float64),
        further_generated=torch.tensor([[-5.0, -5.0]], dtype=torch.float64),
    )
    total = exp(1) + exp(-0.5)
    first, second = exp(1) / total, exp(-0.5) / total
    loss = module.objective(logps)
    # -6 - 1 = -7 and 2 - 1 = 1.
    wanted = first * log(1 + exp(7)) + second * log(1 + exp(-1))
    assert loss.item() == pytest.approx(wanted, rel=1e-12)
    real, generated = torch.autograd.grad(loss, (logps.policy_real, logps.policy_generated))
    slopes = first / (1 + exp(-7)), second / (1 + exp(1))
    assert real.item() == pytest.approx(-6 * slopes[0] - slopes[1], rel=1e-12)
    assert generated.item() == pytest.approx(sum(slopes), rel=1e-12)


def test_tspin_without_its_second_term_is_spin_without_a_reference():
    logps = pair_of(-3.0, -4.0, policy_first=torch.tensor([-9.0], dtype=torch.float64))
    module = built(TSPIN, first_weight=0.0, beta=2.0)
    assert module.objective(logps).item() == pytest.approx(log(1 + exp(-2)), rel=1e-12)


@pytest.mark.parametrize("loss", LOSSES)
def test_tspin_has_finite_difference_gradients_in_all_three_log_probs(loss):
    module = built(TSPIN, first_weight=0.7, loss=loss)

    def objective(real: Tensor, generated: Tensor, first: Tensor) -> Tensor:
        zero, two = torch.zeros(3, dtype=torch.float64), torch.tensor([2, 2, 2])
        logps = PairLogps(real, generated, zero, zero, two, two, policy_first=first)
        return module.objective(logps)

    sides = [-3 * torch.rand(3, dtype=torch.float64) for _ in range(3)]
    assert torch.autograd.gradcheck(objective, [side.requires_grad_() for side in sides])


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_tspin_without_its_second_term_is_least_where_the_data_are_divided_by_the_opponent(beta):
    """log p = log(p_data / p_t) / beta + c: not the data, and uniform once the opponent is."""
    data = torch.tensor([0.6, 0.3, 0.1], dtype=torch.float64)
    for opponent in (torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), data):
        best = ((data / opponent).log() / beta).log_softmax(-1).requires_grad_()
        total = data[:, None] * opponent * losses.logistic(best[:, None] - best, beta)
        (slope,) = torch.autograd.grad(total.sum(), best)
        assert slope.abs().max() < 1e-12


def test_tspin_of_a_triplet_equals_the_hand_value():
    """log p = (-1, -1 - log 3, -1 - 2 log 3), beta 1: both comparisons are won by log 3."""
    first = torch.tensor([-1 - 2 * log(3)], dtype=torch.float64)
    logps = pair_of(-1.0, -1 - log(3), policy_first=first)
    module = built(TSPIN, beta=1.0)
    assert module.objective(logps).item() == pytest.approx(2 * log(4 / 3), rel=1e-12)


@pytest.mark.parametrize("loss", [*LOSSES, "sppo"])
@pytest.mark.parametrize(
    ("variant", "settings"),
    [(SPIN, {}), (AlphaSPIN, {"alpha": 0.3, "history": 2}), (TPAW, {"history": 2})],
)
def test_gradient_is_that_of_finite_differences_of_the_objective(variant, settings, loss, tmp_path):
    policy = 0.1 * some_table(9) + 0.9 * ITERATES[T]  # near the reference: no kink of the hinge
    _, gradient = value_and_gradient(
        built(variant, policy=policy, loss=loss, **settings), tmp_path / "here"
    )
    direction = some_table(11)
    step = 1e-5 * direction
    up, down = (
        value_and_gradient(
            built(variant, policy=policy + sign * step, loss=loss, **settings),
            tmp_path / f"{sign}",
        )[0]
        for sign in (1, -1)
    )
    slope = (up - down).item() / 2e-5
    assert (gradient * direction).sum().item() == pytest.approx(slope, abs=1e-6)


@pytest.mark.parametrize(
    ("variant", "settings"), [(SPIN, {}), (AlphaSPIN, {"alpha": 0.3}), (SPACE, {})]
)
def test_real_nll_weight_adds_the_mean_over_examples_of_the_nll_per_token(
    variant, settings, tmp_path
):
    policy = some_table(9)
    nll = [
        -log(probability(policy, PROMPTS.index(e.prompt_ids), e.real_ids)) / len(e.real_ids)
        for e in EXAMPLES
    ]
    module = built(variant, policy=policy, real_nll_weight=0.25, **settings)
    logps = module.pair_logps(make_batch(module, tmp_path))
    added = module.anchored_objective(logps) - module.objective(logps)
    assert added.item() == pytest.approx(0.25 * sum(nll) / len(nll), abs=1e-6)
