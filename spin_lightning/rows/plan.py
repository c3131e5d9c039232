"""Which rows an iterate is to have: who answers which example, under which key, what is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from spin_lightning import keyed
from spin_lightning.generation.base import Response
from spin_lightning.mixtures import Mixture
from spin_lightning.rows.store import RowTable
from spin_lightning.types import Example, PolicyId

# Weights that differ by rounding alone are the same.
_SAME_WEIGHT = 1e-12


@dataclass(frozen=True)
class Coupling:
    """How rows drawn from one mixture become rows of another with the fewest new draws.

    A row of index i stays with probability min(1, w'_i / w_i); else a new index is drawn from the
    weights that grew, (w' - w)_+ normalized. The index of every row then follows w' exactly: this
    is the maximal coupling of the two.

    Attributes:
        keep: Probability that a row of each index stays.
        gained: What the others are drawn from; None where no weight grew, and none is redrawn.
    """

    keep: Mapping[int, float]
    gained: Mixture | None

    @classmethod
    def between(cls, before: Mixture, now: Mixture) -> Coupling:
        """Couple the rows of `before` to those of `now`."""
        indices = {*before.weights, *now.weights}
        growth = {i: now.weights.get(i, 0.0) - before.weights.get(i, 0.0) for i in indices}
        grown = {i: more for i, more in growth.items() if more > _SAME_WEIGHT}
        keep = {
            i: 1.0 if growth[i] >= -_SAME_WEIGHT else now.weights.get(i, 0.0) / weight
            for i, weight in before.weights.items()
        }
        return cls(keep, Mixture.normalized(grown) if grown else None)


@dataclass(frozen=True)
class RowPlan:
    """What the rows of one iterate are to be.

    Attributes:
        iterate: The iterate t at which the rows are drawn.
        opponent: Who writes y'; None when no response is generated.
        members: Iterates whose log-probs are stored, ascending.
        seed: Seed of the run.
        samples: Responses per prompt.
        unit_size: Rows of a work unit.
        cap: Most response tokens, the stop id counted.
        context: Most tokens of prompt and response together.
        token_alpha: Base weight of the token-level mixtures that are scored; 0 without any.
        token_members: Their iterates, ascending.
        union: A row per example and member of the opponent, instead of one with a drawn member.
        coupling: How rows of the iterate before are kept; None when all are made anew.
    """

    iterate: int
    opponent: Mixture | None
    members: tuple[int, ...]
    seed: int
    samples: int
    unit_size: int
    cap: int
    context: int
    token_alpha: float = 0.0
    token_members: tuple[int, ...] = ()
    union: bool = False
    coupling: Coupling | None = None

    @property
    def rows_per_example(self) -> int:
        """Number of rows that each example gets."""
        return self.samples * rows_per_sample(self.opponent, union=self.union)

    def plain_scorer(self, member: int) -> PolicyId:
        """Who scores for `member`."""
        return PolicyId(member)

    def token_scorer(self, member: int) -> PolicyId:
        """Who scores for `member` mixed with the base; the base mixed with itself is the base."""
        return PolicyId(member, self.token_alpha if member else 0.0)

    @cached_property
    def scorers(self) -> tuple[PolicyId, ...]:
        """Everybody who scores, once."""
        plain = [self.plain_scorer(i) for i in self.members]
        token = [self.token_scorer(i) for i in self.token_members]
        return tuple(dict.fromkeys(plain + token))


@dataclass(frozen=True)
class RowDraw:
    """One row to be made: which sample of which example, under which key, against whom.

    Attributes:
        kept: The response that an earlier iterate's row already holds; None when one is generated.
    """

    example: Example
    sample: int
    key: int
    opponent: int | None
    kept: Response | None = None


class EarlierRows:
    """The rows of the iterate before: responses to keep, and scores that need no second pass.

    Args:
        table: The rows; None when there are none.
    """

    def __init__(self, table: RowTable | None = None) -> None:
        """Index the rows by example and sample."""
        self._rows: dict[tuple[int, int], int] = {}
        if table is not None:
            self._table = table
            ids = zip(table.example_id.tolist(), table.sample.tolist(), strict=True)
            self._rows = {pair: row for row, pair in enumerate(ids)}
        self._by_example = {example: row for (example, _), row in self._rows.items()}

    def kept(self, example: Example, sample: int) -> RowDraw | None:
        """The row of an example's sample, as it was made; None if there was none."""
        row = self._rows.get((example.example_id, sample))
        if row is None:
            return None
        table = self._table
        response = Response(tuple(table.generated_ids[row].tolist()), bool(table.finished[row]))
        opponent, key = int(table.opponent[row]), int(table.seed[row])
        return RowDraw(example, sample, key, opponent, kept=response)

    def real_logps(self, example: Example) -> dict[PolicyId, float]:
        """log-probs of an example's real response that are known, by scorer."""
        row = self._by_example.get(example.example_id)
        return {} if row is None else self._known(row, real=True)

    def generated_logps(self, draw: RowDraw) -> dict[PolicyId, float]:
        """log-probs of a kept row's generated response that are known, by scorer."""
        return self._known(self._rows[draw.example.example_id, draw.sample], real=False)

    def _known(self, row: int, *, real: bool) -> dict[PolicyId, float]:
        table = self._table
        plain = table.real_logps if real else table.generated_logps
        token = table.token_real_logps if real else table.token_generated_logps
        known = {PolicyId(i): float(values[row]) for i, values in plain.items()}
        return known | {
            PolicyId(i, table.token_alpha): float(v[row]) for i, v in token.items() if i
        }


NO_ROWS = EarlierRows()


def rows_per_sample(opponent: Mixture | None, *, union: bool) -> int:
    """Number of rows of one sample: one, or with `union` one per member of the opponent."""
    return len(opponent.members) if union and opponent is not None else 1


def units(
    plan: RowPlan, examples: Sequence[Example], earlier: EarlierRows = NO_ROWS
) -> Iterator[list[RowDraw]]:
    """The work units of a plan as they come: which rows, drawn against whom, in which order."""
    draws = (draw for example in examples for draw in draws_of(plan, example, earlier))
    return iter(lambda: list(islice(draws, plan.unit_size)), [])


def unit_count(plan: RowPlan, examples: Sequence[Example]) -> int:
    """Number of work units of a plan."""
    return -(-len(examples) * plan.rows_per_example // plan.unit_size)


def draws_of(plan: RowPlan, example: Example, earlier: EarlierRows = NO_ROWS) -> Iterator[RowDraw]:
    """The rows of one example."""
    for sample in range(plan.samples):
        if plan.opponent is None:
            yield RowDraw(example, sample, _key(plan, example, sample), opponent=None)
        elif plan.union:
            # Numbered by the member as well, so that a row keeps its name while others come and go.
            for member in plan.opponent.members:
                number = sample + plan.samples * member
                key = _key(plan, example, number)
                kept = _kept(plan, example, number, earlier)
                yield kept or RowDraw(example, number, key, member)
        else:
            yield _draw(plan, plan.opponent, example, sample, earlier)


def redrawn(plan: RowPlan, table: RowTable) -> float:
    """Share of a plan's finished rows that were generated for it, and not kept."""
    rows = zip(table.example_id.tolist(), table.sample.tolist(), table.seed.tolist(), strict=True)
    own = [keyed.row_key(plan.seed, plan.iterate, *names) == key for *names, key in rows]
    return sum(own) / len(own)


def _draw(
    plan: RowPlan, opponent: Mixture, example: Example, sample: int, earlier: EarlierRows
) -> RowDraw:
    """Keep the earlier row or draw anew, so that indices follow the opponent's weights."""
    key = _key(plan, example, sample)
    kept = _kept(plan, example, sample, earlier)
    if kept is not None:
        assert plan.coupling is not None
        assert kept.opponent is not None
        if keyed.keep_uniform(key) < plan.coupling.keep[kept.opponent]:
            return kept
        assert plan.coupling.gained is not None, "what one weight lost another gained"
        opponent = plan.coupling.gained
    return RowDraw(example, sample, key, opponent.draw(keyed.opponent_uniform(key)))


def _kept(plan: RowPlan, example: Example, sample: int, earlier: EarlierRows) -> RowDraw | None:
    return None if plan.coupling is None else earlier.kept(example, sample)


def _key(plan: RowPlan, example: Example, sample: int) -> int:
    return keyed.row_key(plan.seed, plan.iterate, example.example_id, sample)
