"""The plan of an iterate's rows: the opponent and key of each row, and which rows are kept."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from spin_lightning import keyed
from spin_lightning.generation.base import Response
from spin_lightning.mixtures import Mixture, Reference
from spin_lightning.rows.manifest import Manifest
from spin_lightning.rows.store import RowTable
from spin_lightning.types import Example, PolicyId

_SMALLEST_UNIT, _LARGEST_UNIT = 64, 512
# Weights that differ by less count as equal.
_SAME_WEIGHT = 1e-12


@dataclass(frozen=True)
class Coupling:
    """How rows drawn from one mixture become rows of another with the fewest new draws.

    A row of index i stays with probability min(1, w'_i / w_i); else a new index is drawn from the
    weights that grew, (w' - w)_+ normalized. The index of every row then follows w' exactly: this
    is the maximal coupling of the two.

    Attributes:
        keep: Probability that a row of each index stays.
        gained: The mixture that new indices are drawn from; None if no weight grew, so that all
            rows stay.
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
class RowSettings:
    """Settings that the rows of all iterates share.

    Attributes:
        seed: Seed of the run.
        unit_size: Rows of a work unit; None derives it, see `unit_size_of`.
        cap: Most response tokens, including the stop id.
        context: Most tokens of prompt and response together.
    """

    seed: int
    unit_size: int | None
    cap: int
    context: int


@dataclass(frozen=True)
class RowPlan:
    """The planned rows of one iterate.

    Attributes:
        iterate: The iterate t at which the rows are drawn.
        opponent: The mixture that generates y'; None without generated responses.
        members: Iterates whose log-probs are stored, ascending.
        seed: Seed of the run.
        samples: Responses per prompt.
        unit_size: Rows of a work unit; None derives it, see `unit_size_of`.
        cap: Most response tokens, including the stop id.
        context: Most tokens of prompt and response together.
        token_alpha: Base weight of the token-level mixtures that are scored; 0 without any.
        token_members: Their iterates, ascending.
        union: A row per example and member of the opponent, instead of one with a drawn member.
        coupling: How rows of the iterate before are kept; None if all rows are regenerated.
        source: Name of the examples' source, unless it is the training data. Ids count from 0 in
            every source, so each has keys of its own.
    """

    iterate: int
    opponent: Mixture | None
    members: tuple[int, ...]
    seed: int
    samples: int
    unit_size: int | None
    cap: int
    context: int
    token_alpha: float = 0.0
    token_members: tuple[int, ...] = ()
    union: bool = False
    coupling: Coupling | None = None
    source: str = ""

    @property
    def rows_per_example(self) -> int:
        """Number of rows that each example gets."""
        return self.samples * rows_per_sample(self.opponent, union=self.union)

    @cached_property
    def plain_scorers(self) -> tuple[PolicyId, ...]:
        """The policies that score for `members`, in their order."""
        return tuple(PolicyId(i) for i in self.members)

    @cached_property
    def token_scorers(self) -> tuple[PolicyId, ...]:
        """The policies that score for `token_members`; the base mixed with itself is the base."""
        return tuple(PolicyId(i, self.token_alpha if i else 0.0) for i in self.token_members)

    @cached_property
    def scorers(self) -> tuple[PolicyId, ...]:
        """All policies that score, each once."""
        return tuple(dict.fromkeys(self.plain_scorers + self.token_scorers))

    def manifest(self, examples: Sequence[Example]) -> Manifest:
        """The manifest of its rows, without their bytes."""
        return Manifest(
            iterate=self.iterate,
            opponent=None if self.opponent is None else dict(self.opponent.weights),
            members=self.members,
            rows=len(examples) * self.rows_per_example,
            units=unit_count(self, examples),
            unit_size=unit_size_of(self, examples),
            cap=self.cap,
            token_alpha=self.token_alpha,
            token_members=self.token_members,
        )


def plan_rows(
    iterate: int,
    opponent: Mixture | None,
    reference: Reference,
    settings: RowSettings,
    *,
    samples: int = 1,
    union: bool = False,
    keep_from: Mixture | None = None,
    also_scored_by: Collection[int] = (),
    source: str = "",
) -> RowPlan:
    """Plan the rows of an iterate.

    Args:
        iterate: The iterate t at which the rows are drawn.
        opponent: The mixture that generates y'; None without generated responses.
        reference: The reference of the log-ratios; its members score the rows.
        settings: Settings that the rows of all iterates share.
        samples: Responses per prompt.
        union: A row per example and member of the opponent, instead of one with a drawn member.
        keep_from: The opponent of the iterate before, whose rows are kept as far as possible; None
            regenerates all rows.
        also_scored_by: Further iterates that score the rows.
        source: Name of the examples' source, unless it is the training data.
    """
    members, token_alpha = set(also_scored_by), 0.0
    token_members: tuple[int, ...] = ()
    if opponent is not None:
        token_members, token_alpha = reference.token_members, reference.token_alpha
        members |= {*reference.plain_members, *token_members, *((0,) if token_alpha else ())}
    coupling = None
    if opponent is not None and keep_from is not None:
        coupling = Coupling.between(keep_from, opponent)
    return RowPlan(
        iterate=iterate,
        opponent=opponent,
        members=tuple(sorted(members)),
        seed=settings.seed,
        samples=samples,
        unit_size=settings.unit_size,
        cap=settings.cap,
        context=settings.context,
        token_alpha=token_alpha,
        token_members=token_members,
        union=union,
        coupling=coupling,
        source=source,
    )


@dataclass(frozen=True)
class RowDraw:
    """One row to make.

    Attributes:
        example: Its example.
        sample: Number of the sample among those of the example.
        key: Key of its random numbers (`keyed.row_key`).
        opponent: The iterate that generates the response; None without a response.
        kept: The response of an earlier iterate's row; None if one is generated.
    """

    example: Example
    sample: int
    key: int
    opponent: int | None
    kept: Response | None = None


class EarlierRows:
    """The rows of the iterate before: responses to keep, and scores to reuse.

    Args:
        table: The rows; None if there are none.
    """

    def __init__(self, table: RowTable | None = None) -> None:
        """Index the rows by example and sample."""
        self._rows: dict[tuple[int, int], int] = {}
        if table is not None:
            self._table = table
            self._rows = {pair: row for row, pair in enumerate(table.row_ids)}
        self._by_example = {example: row for (example, _), row in self._rows.items()}

    def kept(self, example: Example, sample: int) -> RowDraw | None:
        """The row of an example's sample as it was made, or None."""
        row = self._rows.get((example.example_id, sample))
        if row is None:
            return None
        table = self._table
        response = Response(tuple(table.generated_ids[row].tolist()), bool(table.finished[row]))
        opponent, key = int(table.opponent[row]), int(table.seed[row])
        return RowDraw(example, sample, key, opponent, kept=response)

    def real_logps(self, example: Example) -> dict[PolicyId, float]:
        """Stored log-probs of an example's real response, by scorer."""
        row = self._by_example.get(example.example_id)
        return {} if row is None else self._known(row, real=True)

    def generated_logps(self, draw: RowDraw) -> dict[PolicyId, float]:
        """Stored log-probs of a kept row's generated response, by scorer."""
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
    """The rows of each work unit of a plan, in order."""
    draws = (draw for example in examples for draw in draws_of(plan, example, earlier))
    size = unit_size_of(plan, examples)
    return iter(lambda: list(islice(draws, size)), [])


def unit_count(plan: RowPlan, examples: Sequence[Example]) -> int:
    """Number of work units of a plan."""
    return -(-len(examples) * plan.rows_per_example // unit_size_of(plan, examples))


def unit_size_of(plan: RowPlan, examples: Sequence[Example]) -> int:
    """Rows of each work unit of a plan but the last.

    By default the units are large, so that few slots are free in the end of each, but there are
    eight or more, for processes to share and for a crash to lose little.
    """
    if plan.unit_size is not None:
        return plan.unit_size
    eighth = len(examples) * plan.rows_per_example // 8
    return min(max(1 << max(eighth.bit_length() - 1, 0), _SMALLEST_UNIT), _LARGEST_UNIT)


def draws_of(plan: RowPlan, example: Example, earlier: EarlierRows = NO_ROWS) -> Iterator[RowDraw]:
    """The rows of one example."""
    for sample in range(plan.samples):
        if plan.opponent is None:
            yield RowDraw(example, sample, _key(plan, example, sample), opponent=None)
        elif plan.union:
            # The number includes the member, so that it stays the same while other members change.
            for member in plan.opponent.members:
                number = sample + plan.samples * member
                key = _key(plan, example, number)
                kept = _kept(plan, example, number, earlier)
                yield kept or RowDraw(example, number, key, member)
        else:
            yield _draw(plan, plan.opponent, example, sample, earlier)


def redrawn(plan: RowPlan, table: RowTable) -> float:
    """Share of a plan's finished rows that were generated for it rather than kept."""
    rows = zip(table.example_id.tolist(), table.sample.tolist(), table.seed.tolist(), strict=True)
    own = [
        keyed.row_key(plan.seed, plan.iterate, example, sample, plan.source) == key
        for example, sample, key in rows
    ]
    return sum(own) / len(own)


def _draw(
    plan: RowPlan, opponent: Mixture, example: Example, sample: int, earlier: EarlierRows
) -> RowDraw:
    """Keep the earlier row or draw a new one, so that indices follow the opponent's weights."""
    key = _key(plan, example, sample)
    kept = _kept(plan, example, sample, earlier)
    if kept is not None:
        assert plan.coupling is not None
        assert kept.opponent is not None
        if keyed.keep_uniform(key) < plan.coupling.keep[kept.opponent]:
            return kept
        assert plan.coupling.gained is not None, "if one weight shrank, another grew"
        opponent = plan.coupling.gained
    return RowDraw(example, sample, key, opponent.draw(keyed.opponent_uniform(key)))


def _kept(plan: RowPlan, example: Example, sample: int, earlier: EarlierRows) -> RowDraw | None:
    return None if plan.coupling is None else earlier.kept(example, sample)


def _key(plan: RowPlan, example: Example, sample: int) -> int:
    return keyed.row_key(plan.seed, plan.iterate, example.example_id, sample, plan.source)
