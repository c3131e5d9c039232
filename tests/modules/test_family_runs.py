"""Runs of the whole family on a tiny model, recomputed from their files with transformers and peft.

What a finished run stored, and what its first steps minimized, is worked out again from the saved
adapters alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from math import exp, log
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from spin_lightning import (
    SPACE,
    SPIN,
    TPAW,
    TSPIN,
    AlphaSPIN,
    FictitiousSPIN,
    MixtureSPIN,
    SelfPlayModule,
)
from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.mixtures import Mixture, latest, pulled_to_base
from spin_lightning.packing import pad_prompts
from spin_lightning.types import PairBatch
from tests.toys.adapters import plain_model
from tests.toys.policy import sequences
from tests.toys.runs import contents, play, write_examples

ITERATES, EXAMPLES, HELD_OUT = 3, 60, 4
HELD_OUT_ROWS = "__held_out__"
ALPHAS, BETAS = [0.9, 0.3, 0.6], [0.1, 0.5, 1.0]
ANCHOR, RATIO = 0.5, 2.0
Row = dict[str, Any]
Sequence = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """A variant's settings, with its opponent, reference and loss worked out by hand.

    Attributes:
        density: log R of responses by t, from log p_i and log g_i as functions of i.
        history: Iterates that generate while p_{t+1} is trained.
    """

    variant: type[SelfPlayModule]
    settings: dict[str, Any]
    history: Callable[[int], list[int]]
    density: Callable[[int, Callable[[int], Tensor], Callable[[int], Tensor]], Tensor]
    token_alphas: list[float] = field(default_factory=lambda: [0.0] * ITERATES)
    betas: list[float] = field(default_factory=lambda: [0.1] * ITERATES)


def last_two(t: int) -> list[int]:
    return [max(0, t - 1), t] if t else [0]


def last_three(t: int) -> list[int]:
    return list(range(max(0, t - 2), t + 1))


def everything(t: int) -> list[int]:
    return list(range(t + 1))


def mean(members: list[int], logp: Callable[[int], Tensor]) -> Tensor:
    """log of the mean of probabilities; they are small but far from underflow."""
    return (sum(logp(i).exp() for i in members) / len(members)).log()


CASES = {
    "mixture": Case(
        MixtureSPIN,
        {"history": 2},
        last_two,
        lambda t, p, g: mean(last_two(t), p),
    ),
    "fictitious": Case(FictitiousSPIN, {}, everything, lambda t, p, g: mean(everything(t), p)),
    "reservoir": Case(
        FictitiousSPIN,
        {"refresh": "reservoir"},
        everything,
        lambda t, p, g: mean(everything(t), p),
    ),
    "alpha": Case(
        AlphaSPIN,
        {"alpha": ALPHAS, "beta": BETAS, "history": 2},
        last_two,
        lambda t, p, g: (1 - ALPHAS[t]) * mean(last_two(t), p) + ALPHAS[t] * p(0),
        betas=BETAS,
    ),
    "token": Case(
        AlphaSPIN,
        {"alpha": ALPHAS, "beta": BETAS, "history": 2, "mixture": "token"},
        last_two,
        lambda t, p, g: mean(last_two(t), g),
        token_alphas=ALPHAS,
        betas=BETAS,
    ),
    "token-reservoir": Case(
        AlphaSPIN,
        {"alpha": 0.3, "history": None, "mixture": "token", "refresh": "reservoir"},
        everything,
        lambda t, p, g: mean(everything(t), g),
        token_alphas=[0.3] * ITERATES,
    ),
    "space": Case(
        SPACE,
        {"alpha": 0.3, "ratio": RATIO},
        lambda t: [t],
        lambda t, p, g: g(t),
        token_alphas=[0.3] * ITERATES,
    ),
    "sppo": Case(
        MixtureSPIN,
        {"history": 2, "loss": "sppo", "beta": BETAS},
        last_two,
        lambda t, p, g: mean(last_two(t), p),
        betas=BETAS,
    ),
    "tpaw": Case(TPAW, {"beta": BETAS}, last_three, lambda t, p, g: p(t), betas=BETAS),
    "tspin": Case(
        TSPIN,
        {"beta": BETAS, "first_weight": 0.5},
        lambda t: [t],
        lambda t, p, g: p(t),
        betas=BETAS,
    ),
    "release": Case(
        MixtureSPIN,
        {"history": 2, "reference": "previous", "rows": "union", "real_nll_weight": ANCHOR},
        last_two,
        lambda t, p, g: p(t),
    ),
}


class Watch(Callback):
    """Keeps the first batch and loss of every iterate, and counts what each policy scores."""

    def __init__(self) -> None:
        self.first: list[tuple[PairBatch, float]] = []
        self.scored: Counter[tuple[int, int, float]] = Counter()

    def on_fit_start(self, trainer, pl_module) -> None:
        """Put a counter between the loop and the policy, before the loop scores anything."""
        policy = pl_module.policy
        at, prompt_logps = policy.at, policy.prompt_logps
        acting: list[tuple[int, float]] = []

        @contextmanager
        def watched_at(iterate: int, token_alpha: float = 0.0):
            acting.append((iterate, token_alpha))
            try:
                with at(iterate, token_alpha):
                    yield
            finally:
                acting.pop()

        def watched_logps(batch):
            for scorer in acting:
                self.scored[pl_module.iterate, *scorer] += len(batch.flat_lengths)
            return prompt_logps(batch)

        policy.at, policy.prompt_logps = watched_at, watched_logps

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if batch_idx == 0:
            self.first.append((batch, float(outputs["loss"])))


class Recomputed:
    """log-probs of a run's iterates by transformers and peft, from its folder."""

    def __init__(self, root: Path, base: Path) -> None:
        self._models = cache(
            lambda i: plain_model(base, root / f"iterates/iterate_{i:03d}" if i else None)
        )
        self._token_logps = cache(self._score_tokens)

    def plain(self, i: int, pairs: tuple[Sequence, ...]) -> Tensor:
        """log p_i(y|x), shape [pairs]."""
        return _over_responses(self._token_logps(i, pairs), pairs)

    def pulled(self, i: int, alpha: float, pairs: tuple[Sequence, ...]) -> Tensor:
        """log g_i(y|x), likewise."""
        mixed = (1 - alpha) * self._token_logps(i, pairs) + alpha * self._token_logps(0, pairs)
        return _over_responses(mixed.log_softmax(-1), pairs)

    def _score_tokens(self, i: int, pairs: tuple[Sequence, ...]) -> Tensor:
        # Padded on the right, which earlier tokens do not attend to.
        ids = [torch.tensor(prompt + response) for prompt, response in pairs]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
        with torch.no_grad():
            return self._models(i)(padded).logits.double().log_softmax(-1)


def _over_responses(token_logps: Tensor, pairs: tuple[Sequence, ...]) -> Tensor:
    sums = [
        sum(float(logps[len(x) - 1 + s, token]) for s, token in enumerate(y))
        for logps, (x, y) in zip(token_logps, pairs, strict=True)
    ]
    return torch.tensor(sums, dtype=torch.float64)


@dataclass
class Finished:
    """A finished run."""

    name: str
    root: Path
    watch: Watch
    recomputed: Recomputed

    @property
    def case(self) -> Case:
        return CASES[self.name]

    def rows(self, t: int, part: str = "") -> list[Row]:
        """Training rows of iterate t, or those of another folder beside them."""
        folder = self.root / f"rows/iterate_{t:03d}" / part
        return [row for f in sorted(folder.glob("part-*")) for row in pq.read_table(f).to_pylist()]

    def reference(self, t: int, pairs: tuple[Sequence, ...]) -> Tensor:
        """log R of responses while p_{t+1} is trained, worked out again."""
        return self.case.density(
            t,
            lambda i: self.recomputed.plain(i, pairs),
            lambda i: self.recomputed.pulled(i, self.case.token_alphas[t], pairs),
        )


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_examples(tmp_path_factory.mktemp("data") / "examples.jsonl", EXAMPLES + HELD_OUT)


def play_case(name: str, root: Path, model: Path, data: Path) -> Watch:
    watch = Watch()
    play(
        root,
        model,
        data,
        variant=CASES[name].variant,
        epochs=ITERATES,
        callbacks=[watch],
        settings={"learning_rate": 2e-2, **CASES[name].settings},
        data_settings={"val_examples": HELD_OUT},
    )
    return watch


@pytest.fixture(scope="module")
def runs(tiny_model_dir, data, tmp_path_factory) -> Callable[[str], Finished]:
    """Finished runs by name, each played once."""

    @cache
    def finished(name: str) -> Finished:
        root = tmp_path_factory.mktemp(name)
        watch = play_case(name, root, tiny_model_dir, data)
        return Finished(name, root, watch, Recomputed(root, tiny_model_dir))

    return finished


@pytest.fixture(params=CASES)
def run(request: pytest.FixtureRequest, runs) -> Finished:
    return runs(request.param)


def sides(rows: list[Row]) -> dict[str, tuple[Sequence, ...]]:
    """Prompt and response of every row, for both responses."""
    return {
        side: tuple((tuple(r["prompt_ids"]), tuple(r[f"{side}_ids"])) for r in rows)
        for side in ("real", "generated")
    }


# ------------------------------------------------------------------- what was stored, and minimized


def test_rows_hold_the_log_probs_of_their_members_by_transformers_and_peft(run):
    folders = [(t, part) for t in range(ITERATES) for part in ("", HELD_OUT_ROWS)]
    folders += [(ITERATES, HELD_OUT_ROWS)]
    for t, part in folders:
        rows = run.rows(t, part)
        members, token_members = rows[0]["members"], rows[0]["token_members"]
        assert t in members
        for side, pairs in sides(rows).items():
            stored = torch.tensor([row[f"member_{side}_logps"] for row in rows])
            wanted = [run.recomputed.plain(i, pairs) for i in members]
            torch.testing.assert_close(stored.double(), torch.stack(wanted, -1), rtol=0, atol=1e-3)
            if token_members:
                (alpha,) = {row["token_alpha"] for row in rows}
                stored = torch.tensor([row[f"token_{side}_logps"] for row in rows])
                wanted = [run.recomputed.pulled(i, alpha, pairs) for i in token_members]
                torch.testing.assert_close(
                    stored.double(), torch.stack(wanted, -1), rtol=0, atol=1e-3
                )


def test_rows_name_the_opponents_members_and_weights_of_theory(run):
    uses_base = "alpha" in run.case.settings
    for t in range(ITERATES):
        rows, history = run.rows(t), run.case.history(t)
        previous = run.case.settings.get("reference") == "previous"
        members = {t} if previous else {*history, *([0] if uses_base else [])}
        is_token = run.case.token_alphas[t] > 0 and t > 0  # at t = 0 all there is is the base
        assert {row["opponent"] for row in rows} == set(history)
        for row in rows:
            assert set(row["members"]) == members
            assert row["token_members"] == (history if is_token else [])
            assert row["token_alpha"] == (run.case.token_alphas[t] if is_token else None)
        union = run.case.settings.get("rows") == "union"
        per_example = len(history) if union else 1
        assert Counter(row["example_id"] for row in rows) == {
            row["example_id"]: per_example for row in rows
        }
        assert len(rows) == EXAMPLES * per_example


def test_iterates_differ_enough_for_a_mistaken_one_to_show(run):
    pairs = sides(run.rows(2))["generated"]
    logps = [run.recomputed.plain(i, pairs) for i in range(ITERATES)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (logps[i] - logps[j]).abs().max() > 0.3


def test_first_batch_of_every_iterate_has_the_reference_and_the_loss_worked_out_again(run):
    assert len(run.watch.first) == ITERATES
    for t, (batch, loss) in enumerate(run.watch.first):
        count = 3 if run.name == "tspin" else 2
        all_sides = [tuple(sequences(pad_prompts(batch.pairs))[i::count]) for i in range(count)]
        pairs = {"real": all_sides[0], "generated": all_sides[1]}
        rows = Counter(zip(*sides(run.rows(t)).values(), strict=True))
        assert not Counter(zip(*pairs.values(), strict=True)) - rows, "from this iterate's rows"
        stored = {"real": batch.reference_real, "generated": batch.reference_generated}
        ratios = {}
        for side, responses in pairs.items():
            reference = run.reference(t, responses)
            torch.testing.assert_close(stored[side], reference, rtol=0, atol=1e-3)
            # The policy starts the iterate as p_t.
            ratios[side] = (run.recomputed.plain(t, responses) - reference).tolist()
        if run.name == "tpaw":
            wanted = tpaw_by_hand(run, t, pairs)
        elif run.name == "tspin":
            wanted = tspin_by_hand(run, t, pairs, all_sides[2])
        else:
            by_pair = zip(ratios["real"], ratios["generated"], strict=True)
            wanted = [loss_by_hand(run, t, *pair) for pair in by_pair]
        anchor = run.recomputed.plain(t, pairs["real"]) / torch.tensor(
            [len(y) for _, y in pairs["real"]]
        )
        weight = run.case.settings.get("real_nll_weight", 0.0)
        by_hand = sum(wanted) / len(wanted) - weight * anchor.mean().item()
        assert loss == pytest.approx(by_hand, abs=1e-4)


def loss_by_hand(run: Finished, t: int, real: float, generated: float) -> float:
    """The loss of a pair from its log-ratios, word for word."""
    if run.case.variant is SPACE:
        right = 1 / (1 + RATIO * exp(-real))
        wrong = 1 / (1 + RATIO * exp(-generated))
        return -log(right) - RATIO * log(1 - wrong)
    if run.case.settings.get("loss") == "sppo":
        goal = 1 / (2 * run.case.betas[t])
        return (real - goal) ** 2 + (generated + goal) ** 2
    return log(1 + exp(-run.case.betas[t] * (real - generated)))


def tpaw_by_hand(run: Finished, t: int, pairs: dict[str, tuple[Sequence, ...]]) -> list[float]:
    """sum_j softmax_j(-m_j / 2) log(1 + e^-(a_j P_j(y) - P_j(y'))), P_j = beta log p_t / p_j."""
    logps = {
        side: {j: run.recomputed.plain(j, responses).tolist() for j in last_three(t)}
        for side, responses in pairs.items()
    }
    losses = []
    for n in range(len(pairs["real"])):
        real, generated = (
            [run.case.betas[t] * (of_side[t][n] - of_side[j][n]) for j in last_three(t)]
            for of_side in (logps["real"], logps["generated"])
        )
        weights = [exp(-0.5 * (r - g)) for r, g in zip(real, generated, strict=True)]
        each = [
            log(1 + exp(-((6 if r <= 0 else 1) * r - g)))
            for r, g in zip(real, generated, strict=True)
        ]
        losses.append(sum(w * e for w, e in zip(weights, each, strict=True)) / sum(weights))
    return losses


def tspin_by_hand(
    run: Finished, t: int, pairs: dict[str, tuple[Sequence, ...]], first: tuple[Sequence, ...]
) -> list[float]:
    """Both comparisons by p_t, with the responses in the rows of iterate 0."""
    of_first = {(r["tuple"], r["real"]): r["generated"] for r in map(_as_tuples, run.rows(0))}
    real = [(x, y) for x, y in pairs["real"]]
    assert [y for _, y in first] == [of_first[pair] for pair in real]
    scores = [run.recomputed.plain(t, r).tolist() for r in (*pairs.values(), first)]
    beta = run.case.betas[t]
    return [
        log(1 + exp(-beta * (r - g))) + 0.5 * log(1 + exp(-beta * (g - f)))
        for r, g, f in zip(*scores, strict=True)
    ]


def _as_tuples(row: Row) -> dict[str, tuple[int, ...]]:
    names = {"tuple": "prompt_ids", "real": "real_ids", "generated": "generated_ids"}
    return {name: tuple(row[column]) for name, column in names.items()}


def test_first_loss_against_the_last_iterate_is_log_two_and_against_a_mixture_is_not(runs):
    first = {name: [loss for _, loss in runs(name).watch.first] for name in CASES}
    assert [run[0] for run in map(first.get, ("mixture", "alpha", "token"))] == pytest.approx(
        [log(2)] * 3, abs=1e-5
    )
    assert first["space"][0] == pytest.approx(log(3) + 2 * log(3 / 2), abs=1e-5)
    assert all(abs(loss - log(2)) > 1e-3 for loss in first["alpha"][1:])


# ------------------------------------------------------------------------- what is made only once

IDENTITY = (
    *("example_id", "sample", "seed", "prompt_ids", "real_ids"),
    *("generated_ids", "opponent", "finished", "real_finished"),
)


def scores(row: Row, side: str) -> dict[tuple[int, float], float]:
    """Stored log-probs of one response by (iterate, weight of the base)."""
    plain = zip(row["members"], row[f"member_{side}_logps"], strict=True)
    token = zip(row["token_members"], row[f"token_{side}_logps"], strict=True)
    alpha = row["token_alpha"] or 0.0
    return {(i, 0.0): v for i, v in plain} | {(i, alpha if i else 0.0): v for i, v in token}


@pytest.mark.parametrize("name", ["reservoir", "token-reservoir"])
def test_kept_rows_are_the_earlier_ones_with_their_scores_to_the_bit(name, runs):
    run = runs(name)
    for t in range(1, ITERATES):
        earlier = {row["example_id"]: row for row in run.rows(t - 1)}
        kept = 0
        for row in run.rows(t):
            old = earlier[row["example_id"]]
            if row["seed"] != old["seed"]:
                assert row["opponent"] == t, "what is new is from the newest iterate"
                continue
            kept += 1
            assert {n: row[n] for n in IDENTITY} == {n: old[n] for n in IDENTITY}
            assert scores(row, "generated").items() >= scores(old, "generated").items()
        # 60 rows kept with probability t / (t + 1), to four standard deviations.
        assert abs(kept / EXAMPLES - t / (t + 1)) < 4 * (t / (t + 1) ** 2 / EXAMPLES) ** 0.5


def test_real_responses_keep_the_scores_they_have(run):
    """Scores under frozen iterates do not change; another alpha makes another g."""
    for t in range(1, ITERATES):
        earlier = {row["example_id"]: row for row in run.rows(t - 1)}
        for row in run.rows(t):
            old, new = scores(earlier[row["example_id"]], "real"), scores(row, "real")
            for scorer in old.keys() & new.keys():
                assert new[scorer] == old[scorer]


def count_by_hand(run: Finished, part: str) -> Counter[tuple[int, int, float]]:
    """Number of sequences that each policy has to score per iterate, from the rows alone."""
    wanted: Counter[tuple[int, int, float]] = Counter()
    known: dict[tuple[str, int, int], set[tuple[int, float]]] = {}
    for t in range(ITERATES + 1):
        stored: dict[tuple[str, int, int], set[tuple[int, float]]] = {}
        for row in run.rows(t, part):
            real, generated = ("real", row["example_id"], 0), ("new", row["seed"], 0)
            for name, side in ((real, "real"), (generated, "generated")):
                who = set(scores(row, side))
                for scorer in who - known.get(name, set()) - stored.get(name, set()):
                    wanted[t, *scorer] += 1
                stored[name] = stored.get(name, set()) | who
        known = stored
    return wanted


def test_no_response_is_scored_twice_under_the_same_iterate(run):
    assert run.watch.scored == count_by_hand(run, "") + count_by_hand(run, HELD_OUT_ROWS)


@pytest.mark.parametrize("name", ["fictitious", "reservoir"])
def test_sequences_scored_by_each_iterate_are_as_many_as_theory_says(name, runs):
    """The newest scores all rows, an older one new rows only: with the reservoir, redrawn ones."""
    run = runs(name)
    for t in range(1, ITERATES):
        earlier = {row["seed"] for row in run.rows(t - 1)}
        new = sum(row["seed"] not in earlier for row in run.rows(t))
        assert (new == EXAMPLES) == (name == "fictitious")
        for i in range(t + 1):
            generated, real = (EXAMPLES, EXAMPLES + HELD_OUT) if i == t else (new, 0)
            assert run.watch.scored[t, i, 0.0] == generated + HELD_OUT + real


@pytest.mark.parametrize("name", ["reservoir", "token", "release"])
def test_same_config_twice_gives_the_same_bytes(name, runs, tiny_model_dir, data, tmp_path):
    torch.manual_seed(99)
    play_case(name, tmp_path, tiny_model_dir, data)
    assert contents(tmp_path) == contents(runs(name).root)


# ------------------------------------------------------------------- another alpha after a resume


class Crash(Exception):
    """Stands for a power failure."""


class CrashInIterate(Callback):
    def __init__(self, t: int) -> None:
        self.t = t

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if pl_module.iterate == self.t:
            raise Crash


class RowsServed(Callback):
    """The weight of the base in the rows that are used, and in the reference."""

    def __init__(self) -> None:
        self.alphas: set[tuple[str, int, float, float]] = set()

    def _see(self, kind: str, loader, module) -> None:
        rows, reference = loader.dataset._table, module.reference(module.iterate)
        self.alphas.add((kind, module.iterate, rows.token_alpha, reference.token_alpha))

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self._see("train", trainer.train_dataloader, pl_module)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, *_) -> None:
        if not trainer.sanity_checking:
            self._see("val", trainer.val_dataloaders, pl_module)


@pytest.mark.parametrize(
    ("epochs", "before", "after", "crash"),
    [
        pytest.param(3, [0.3, 0.3, 0.3], [0.3, 0.9, 0.3], CrashInIterate(1), id="changed"),
        pytest.param(2, [0.3, 0.3], [0.3, 0.3, 0.9], None, id="extended"),
    ],
)
def test_rows_of_another_alpha_are_not_used_after_a_resume(
    epochs, before, after, crash, tiny_model_dir, data, tmp_path
):
    """An alpha that no iterate was trained with may change; its token-level rows may not stay."""

    def go(alpha: list[float], epochs: int, *callbacks: Callback, **settings: Any) -> None:
        play(
            tmp_path,
            tiny_model_dir,
            data,
            variant=AlphaSPIN,
            epochs=epochs,
            callbacks=callbacks,
            settings={"alpha": alpha, "mixture": "token"},
            data_settings={"val_examples": HELD_OUT},
            **settings,
        )

    with pytest.raises(Crash) if crash else nullcontext():
        go(before, epochs, *([crash] if crash else []))
    served = RowsServed()
    with suppress(SettingError, RunFolderError):  # to refuse would be as good
        go(after, 3, served, ckpt_path=tmp_path / "checkpoints/last.ckpt")
    for kind, t, of_rows, of_reference in sorted(served.alphas):
        assert of_rows == of_reference, f"{kind} rows of iterate {t}"


# --------------------------------------------------------------------------------- what is refused


class FurtherTokens(SPIN):
    """A variant whose further references are mixed with the base at every token."""

    def further_references(self, t: int) -> list[Mixture]:
        return [pulled_to_base(latest(t), 0.5)]


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    [
        (
            SPACE,
            {"alpha": 0.3, "mixture": "sequence"},
            r"^mixture='sequence': SPACE .* Fix: set mixture: token, .*alpha: 0",
        ),
        (
            SPACE,
            {"alpha": [0.0, 0.0, 0.3], "mixture": "sequence"},
            r"^mixture='sequence': SPACE .* Fix: set mixture: token",
        ),
        (
            AlphaSPIN,
            {"alpha": ALPHAS, "history": 2, "mixture": "token", "refresh": "reservoir"},
            r"^refresh='reservoir': .*alpha changes.* Fix: set refresh: all",
        ),
        (
            SPACE,
            {"alpha": ALPHAS, "refresh": "reservoir"},
            r"^refresh='reservoir': .*alpha changes.* Fix: set refresh: all",
        ),
        (
            AlphaSPIN,
            {"alpha": 0.3, "loss": "sppo"},
            r"^mixture='sequence': AlphaSPIN scores each .* Fix: .*loss of the margin",
        ),
        (FurtherTokens, {}, r"^further_references\(1\)=.*only `reference` may be"),
        (AlphaSPIN, {"alpha": [0.1, 0.2]}, r"^alpha=.*2 values for 3 iterates.* Fix: "),
        (SPIN, {"beta": [0.1]}, r"^beta=.*1 values for 3 iterates.* Fix: "),
    ],
)
def test_run_that_would_minimize_something_else_is_refused_before_it_starts(
    variant, settings, message, tiny_model_dir, data, tmp_path
):
    with pytest.raises(SettingError, match=message):
        play(
            tmp_path / "run",
            tiny_model_dir,
            data,
            variant=variant,
            epochs=ITERATES,
            settings=settings,
        )
    assert not list(tmp_path.rglob("*.parquet"))


@pytest.mark.parametrize(
    ("variant", "settings", "message"),
    [
        (MixtureSPIN, {"history": 0}, r"^history=0: .*at least one.* Fix: give 1 or more"),
        (MixtureSPIN, {"history": -1}, r"^history=-1: "),
        (AlphaSPIN, {"alpha": 0.3, "history": 0}, r"^history=0: .* Fix: give 1 or more"),
        (AlphaSPIN, {"alpha": 1.5}, r"^alpha=1.5: .* Fix: give a number from 0 .* to 1"),
        (AlphaSPIN, {"alpha": [0.5, -0.1]}, r"^alpha=-0.1: .* Fix: "),
        (SPACE, {"alpha": 1.5}, r"^alpha=1.5: .* Fix: give a number from 0 .* to 1"),
        (SPACE, {"ratio": 0}, r"^ratio=0: .* Fix: give a number > 0"),
        (SPACE, {"ratio": float("nan")}, r"^ratio=nan: .* Fix: give a number > 0"),
        (SPACE, {"ratio": float("inf")}, r"^ratio=inf: .* Fix: give a number > 0"),
        (SPIN, {"real_nll_weight": -1.0}, r"^real_nll_weight=-1.0: .* Fix: give a number >= 0"),
        (TPAW, {"history": 0}, r"^history=0: .* Fix: give 1 or more"),
        (TPAW, {"player_weight": 0}, r"^player_weight=0: .* Fix: give a number > 0"),
        (TPAW, {"opponent_weight": -1}, r"^opponent_weight=-1: .* Fix: give a number >= 0"),
        (TSPIN, {"first_weight": -0.5}, r"^first_weight=-0.5: .* Fix: give a number >= 0"),
        (TSPIN, {"rows": "union"}, r"^rows='union': TSPIN has one opponent.* Fix: leave rows out"),
        (TSPIN, {"loss": "sppo"}, r"^loss='sppo': .*without a reference.* Fix: .* logistic"),
    ],
)
def test_invalid_setting_is_refused_by_name_with_the_fix(variant, settings, message):
    with pytest.raises(SettingError, match=message):
        variant(model="unused", **settings)


@pytest.mark.parametrize("name", ["beta", "loss"])
def test_space_takes_no_beta_and_no_loss(name):
    with pytest.raises(TypeError, match=name):
        SPACE(model="unused", **{name: 0.1})
