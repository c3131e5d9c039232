"""Every opponent's rows are samples of its density: chi-square against an enumeration.

The densities are computed here with transformers and peft alone, from the adapters' folders, over
every response of the testbed's language; what is not of the language is one cell per prompt.
"""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer

from spin_lightning import SPIN, AlphaSPIN, FictitiousSPIN, MixtureSPIN, SelfPlayModule
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.mixtures import Mixture
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.rows.making import Synthesis, Timing, finish
from spin_lightning.rows.plan import NO_ROWS, Coupling, EarlierRows, RowPlan
from spin_lightning.rows.store import RowTable, read_rows
from spin_lightning.testbed import Language
from spin_lightning.types import Example
from tests.toys.adapters import plain_model, write_adapter
from tests.toys.chi_square import chi_square

# Iterates 0 to 3 are there, 0 the base.
LAST = 3
# 20,000 rows of each of two prompts.
EXAMPLES, SAMPLES = 4_000, 10
CAP = 6


class DecayingSPIN(SelfPlayModule):
    """As a user writes one: every iterate, each with half the weight of the one after it."""

    def opponent(self, t: int) -> Mixture:
        return Mixture.normalized({i: 0.5 ** (t - i) for i in range(t + 1)})

    def reference(self, t: int) -> Mixture:
        return self.opponent(t)


@dataclass(frozen=True)
class Opponent:
    """A module, and what its opponent at iterate 3 is, by hand."""

    variant: type[SelfPlayModule]
    weights: Mapping[int, float]
    token_alpha: float = 0.0
    settings: Mapping[str, Any] = field(default_factory=dict)


def _pulled(history: int) -> dict[str, Any]:
    return {"alpha": 0.5, "mixture": "token", "history": history}


OPPONENTS = {
    "spin": Opponent(SPIN, {3: 1}),
    "window": Opponent(MixtureSPIN, {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}, settings={"history": 3}),
    "fictitious": Opponent(FictitiousSPIN, {0: 1 / 4, 1: 1 / 4, 2: 1 / 4, 3: 1 / 4}),
    "decaying": Opponent(DecayingSPIN, {0: 1 / 15, 1: 2 / 15, 2: 4 / 15, 3: 8 / 15}),
    "token": Opponent(AlphaSPIN, {3: 1}, 0.5, _pulled(history=1)),
    "token-window": Opponent(AlphaSPIN, {2: 1 / 2, 3: 1 / 2}, 0.5, _pulled(history=2)),
}


class Enumeration:
    """log p(y|x) of every response of the language to two prompts, without our code.

    Args:
        base: Folder of the base model.
        adapters: Folders of the iterates that are not the base.
        language: Its texts.
    """

    def __init__(self, base: Path, adapters: Mapping[int, Path], language: Language) -> None:
        tokenizer = AutoTokenizer.from_pretrained(base)
        texts = [language.prompts[x] for x in (0, 5)]  # of six words and of five
        self.prompts = [tuple(ids) for ids in tokenizer(texts)["input_ids"]]
        spoken = tokenizer(list(language.responses), add_special_tokens=False)["input_ids"]
        self.responses = [(*ids, tokenizer.eos_token_id) for ids in spoken]
        self._models = {t: plain_model(base, adapters.get(t)) for t in range(LAST + 1)}
        self._next_tokens = functools.cache(self._next_token_logps)

    def _next_token_logps(self, t: int) -> Tensor:
        """log p_t(. | x, y_<s), shape [prompts, responses, positions, vocabulary]."""
        # Padded on the right, where nothing that is read can see it.
        after = pad_sequence([torch.tensor(y) for y in self.responses], batch_first=True)
        tables = []
        for x in self.prompts:
            ids = torch.cat([torch.tensor(x).expand(len(after), -1), after], dim=1)
            with torch.no_grad():
                logits = self._models[t](ids).logits[:, len(x) - 1 : -1]
            tables.append(logits.double().log_softmax(-1))
        return torch.stack(tables)

    def member(self, t: int, token_alpha: float = 0.0) -> Tensor:
        """log p_t, or log g_t, shape [prompts, responses]."""
        table = self._next_tokens(t)
        if token_alpha:
            mixed = (1 - token_alpha) * table + token_alpha * self._next_tokens(0)
            table = mixed - mixed.logsumexp(-1, keepdim=True)
        places = [(list(range(len(y))), list(y)) for y in self.responses]
        return torch.stack([table[:, i, s, y].sum(-1) for i, (s, y) in enumerate(places)], dim=1)

    def density(self, weights: Mapping[int, float], token_alpha: float = 0.0) -> Tensor:
        """log of the arithmetic mixture, shape [prompts, responses]."""
        each = [self.member(t, token_alpha) + math.log(w) for t, w in weights.items()]
        return torch.stack(each).logsumexp(0)

    def counts(self, rows: RowTable, opponent: int | None = None) -> tuple[Tensor, Tensor]:
        """How often each response was drawn, and anything else; of one opponent or of all."""
        of = range(len(rows)) if opponent is None else (rows.opponent == opponent).nonzero()[0]
        seen = Counter((rows.example_id[n] % 2, tuple(rows.generated_ids[n].tolist())) for n in of)
        inside = torch.tensor([[seen[x, y] for y in self.responses] for x in (0, 1)])
        drawn = [sum(n for (x, _), n in seen.items() if x == prompt) for prompt in (0, 1)]
        return inside, torch.tensor(drawn) - inside.sum(1)

    def p_value(self, rows: RowTable, log_density: Tensor) -> float:
        """Chi-square of all rows against a density over all responses."""
        return chi_square(*self.counts(rows), log_density)

    def p_value_within(self, rows: RowTable, log_density: Tensor) -> float:
        """Chi-square of the rows that are of the language, against a density given that."""
        inside, outside = self.counts(rows)
        return chi_square(inside, torch.zeros_like(outside), log_density.log_softmax(1))


@pytest.fixture(scope="module")
def adapters(testbed_seed_0, tmp_path_factory) -> dict[int, Path]:
    """Iterates 1 to 3: random, tenths of a nat apart, a tenth of what they say no language."""
    root, model = tmp_path_factory.mktemp("adapters"), testbed_seed_0.model
    shape = {"target_modules": ["q_proj", "v_proj"], "lora_alpha": 8}
    return {t: write_adapter(model, root / str(t), seed=t, **shape) for t in (1, 2, 3)}


@pytest.fixture(scope="module")
def exact(testbed_seed_0, adapters) -> Enumeration:
    return Enumeration(testbed_seed_0.model, adapters, Language.load(testbed_seed_0.language))


@pytest.fixture(scope="module")
def base(testbed_seed_0) -> FrozenBase:
    return FrozenBase(str(testbed_seed_0.model), compute_dtype="float32")


@pytest.fixture(scope="module")
def draw(base, adapters, exact, tmp_path_factory) -> Callable[..., RowTable]:
    """Rows of an iterate, made, written and read as a run does; few of them where scored."""
    policy = LoraPolicy(base, LoraSettings(r=2))
    policy.use_iterates({0: tmp_path_factory.mktemp("iterate_000"), **adapters})
    examples = [Example(i, exact.prompts[i % 2], exact.responses[0], True) for i in range(EXAMPLES)]
    stop = exact.responses[0][-1]

    def draw(
        opponent: Opponent,
        t: int = LAST,
        before: RowTable | None = None,
        *,
        scored: bool = False,
        **settings: Any,
    ) -> RowTable:
        module = opponent.variant(model=base.name, **opponent.settings)
        reference, now = module.reference(t), module.opponent(t)
        assert now is not None
        plan = RowPlan(
            iterate=t,
            opponent=now,
            members=reference.plain_members if scored else (),
            token_alpha=reference.token_alpha if scored else 0.0,
            token_members=reference.token_members if scored else (),
            seed=5,
            samples=1 if scored else SAMPLES,
            unit_size=4_000,
            cap=CAP,
            context=32,
            coupling=before and Coupling.between(module.opponent(t - 1), now),
        )
        generator = LocalGenerator((stop,), 0, GenerationSettings(**settings))
        synthesis = Synthesis(policy, generator, vocabulary=38)
        folder = tmp_path_factory.mktemp("rows")
        earlier = NO_ROWS if before is None else EarlierRows(before)
        answered = examples[:600] if scored else examples
        list(synthesis.make(plan, answered, folder, Timing(), earlier=earlier))
        finish(plan, answered, folder, {})
        return read_rows(folder)

    return draw


@pytest.fixture(scope="module")
def drawn(draw) -> Callable[[str], RowTable]:
    """Rows of each opponent at iterate 3, all of them drawn for it."""
    return functools.cache(lambda name: draw(OPPONENTS[name]))


@pytest.fixture(scope="module")
def density(exact) -> Callable[[str], Tensor]:
    """The density of each opponent at iterate 3."""
    return functools.cache(
        lambda name: exact.density(OPPONENTS[name].weights, OPPONENTS[name].token_alpha)
    )


def index_p_value(rows: RowTable, weights: Mapping[int, float]) -> float:
    """Chi-square of the opponents' indices against their weights."""
    seen = Counter(rows.opponent.tolist())
    assert set(seen) == set(weights)
    expected = [len(rows) * weight for weight in weights.values()]
    return float(stats.chisquare([seen[i] for i in weights], expected).pvalue)


def member_p_value(exact: Enumeration, rows: RowTable, opponent: Opponent) -> float:
    """Chi-square of the rows of each index against that member, all members together."""
    counts = [exact.counts(rows, t) for t in opponent.weights]
    inside, outside = (torch.cat(parts) for parts in zip(*counts, strict=True))
    log_probs = torch.cat([exact.member(t, opponent.token_alpha) for t in opponent.weights])
    return chi_square(inside, outside, log_probs)


def assert_scored_as(rows: RowTable, opponent: Opponent, exact: Enumeration) -> None:
    """The log-probs that came with the rows are those of the members, for every response."""
    stored = rows.token_generated_logps if opponent.token_alpha else rows.generated_logps
    place = {y: i for i, y in enumerate(exact.responses)}
    cells = [
        (n, rows.example_id[n] % 2, place[y])
        for n in range(len(rows))
        if (y := tuple(rows.generated_ids[n].tolist())) in place
    ]
    n, x, y = (list(column) for column in zip(*cells, strict=True))
    assert set(stored) == set(opponent.weights)
    for t, found in stored.items():
        wanted = exact.member(t, opponent.token_alpha)[x, y]
        torch.testing.assert_close(found[n], wanted, atol=1e-4, rtol=0)


# --------------------------------------------------------------------------------- all rows anew


@pytest.mark.parametrize("name", OPPONENTS)
def test_rows_of_an_opponent_are_samples_of_its_density(name, drawn, density, exact):
    rows = drawn(name)
    counts, outside = exact.counts(rows)
    assert (counts.sum(1) + outside).tolist() == [20_000, 20_000]
    p_value = exact.p_value(rows, density(name))
    print(f"{name}: p = {p_value:.3g}")
    assert p_value > 1e-4


@pytest.mark.parametrize("name", OPPONENTS)
def test_rows_are_scored_with_the_densities_they_are_samples_of(name, draw, exact):
    assert_scored_as(draw(OPPONENTS[name], scored=True), OPPONENTS[name], exact)


@pytest.mark.parametrize("name", ["window", "fictitious", "decaying", "token-window"])
def test_rows_of_an_index_are_samples_of_that_member(name, drawn, exact):
    opponent = OPPONENTS[name]
    p_values = [
        index_p_value(drawn(name), opponent.weights),
        member_p_value(exact, drawn(name), opponent),
    ]
    print(f"{name}: p = {p_values}")
    assert min(p_values) > 1e-4


@pytest.mark.parametrize("settings", [{"top_p": 0.95}, {"temperature": 0.9}], ids=str)
@pytest.mark.parametrize(
    "name", ["spin", *(pytest.param(n, marks=pytest.mark.slow) for n in ("fictitious", "token"))]
)
def test_rows_truncated_or_sharpened_are_rejected(name, settings, draw, density, exact):
    assert exact.p_value(draw(OPPONENTS[name], **settings), density(name)) < 1e-6


@pytest.mark.parametrize(
    ("name", "wrong", "token_alpha"),
    [
        ("spin", {2: 1}, 0.0),
        ("window", {0: 1 / 3, 2: 1 / 3, 3: 1 / 3}, 0.0),
        ("fictitious", {1: 1 / 3, 2: 1 / 3, 3: 1 / 3}, 0.0),
        ("decaying", {3: 1 / 15, 2: 2 / 15, 1: 4 / 15, 0: 8 / 15}, 0.0),
        ("token", {2: 1}, 0.5),
        ("token", {3: 1}, 0.0),
        ("token", {3: 1}, 0.4),
        ("token-window", {1: 1 / 2, 3: 1 / 2}, 0.5),
    ],
)
def test_rows_of_another_member_weight_or_alpha_are_rejected(
    name, wrong, token_alpha, drawn, exact
):
    assert exact.p_value(drawn(name), exact.density(wrong, token_alpha)) < 1e-6


@pytest.mark.parametrize("name", ["token", "token-window"])
def test_rows_of_a_token_mixture_are_no_samples_of_the_sequence_mixture(
    name, drawn, density, exact
):
    """The sequence mixture is known on the language alone, so both are tested given that."""
    weights, alpha = OPPONENTS[name].weights, OPPONENTS[name].token_alpha
    sequence = (1 - alpha) * exact.density(weights) + alpha * exact.member(0)
    assert exact.p_value_within(drawn(name), density(name)) > 1e-4
    assert exact.p_value_within(drawn(name), sequence) < 1e-6


# ------------------------------------------------------------------------ rows kept over iterates


# Share of rows that iterate 3 keeps: what two successive weightings have in common.
KEPT = {"fictitious": 3 / 4, "window": 2 / 3, "decaying": 7 / 15, "token-window": 1 / 2}


def refreshed(draw: Callable[..., RowTable], name: str, **settings: Any) -> RowTable:
    """Rows of iterate 3 after three refreshes of those of iterate 0."""
    rows = None
    for t in range(LAST + 1):
        before, rows = rows, draw(OPPONENTS[name], t, rows, **settings)
    assert before is not None
    assert (rows.seed == before.seed).mean() == pytest.approx(KEPT[name], abs=0.05)
    return rows


@pytest.mark.parametrize(
    "name",
    ["fictitious", *(pytest.param(n, marks=pytest.mark.slow) for n in list(KEPT)[1:])],
)
def test_rows_after_three_reservoir_refreshes_are_samples_of_the_density(
    name, draw, density, exact
):
    """Of frozen iterates: the mixture, the members given the index, and the indices."""
    opponent, rows = OPPONENTS[name], refreshed(draw, name)
    p_values = [
        exact.p_value(rows, density(name)),
        member_p_value(exact, rows, opponent),
        index_p_value(rows, opponent.weights),
    ]
    print(f"{name}: p = {p_values}")
    assert min(p_values) > 1e-4


@pytest.mark.parametrize("name", KEPT)
def test_rows_kept_over_iterates_have_the_scores_of_their_own_responses(name, draw, exact):
    assert_scored_as(refreshed(draw, name, scored=True), OPPONENTS[name], exact)
