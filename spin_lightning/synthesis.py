"""Making the rows of an iterate: draw opponents, generate, score, write.

Rows are made in work units: a fixed list of examples, one part file each, decoded and scored in
batches that depend on nothing but the unit. So the same adapters and settings give the same bytes,
whoever makes which unit in which order; a crash costs the unit at hand.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from spin_lightning import keyed
from spin_lightning.data.rows import part_matches, write_manifest, write_part
from spin_lightning.errors import SpinError
from spin_lightning.generation.base import Generator, Request, Response
from spin_lightning.mixtures import Mixture
from spin_lightning.packing import group_by_length, pack_padded
from spin_lightning.policies.base import Policy
from spin_lightning.types import Example, Row

# The head's logits are the largest thing in a scoring pass: at most 2^27 floats of them at once.
_SCORING_LOGITS = 1 << 27
_MOST_SCORING_TOKENS = 1 << 14


class Reporter(Protocol):
    """Hears how far generation and scoring have come."""

    def advance(self, stage: str, rows: int, seconds: float) -> None:
        """`rows` more rows went through `stage` ("generating" or "scoring") in `seconds`."""


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
    """

    iterate: int
    opponent: Mixture | None
    members: tuple[int, ...]
    seed: int
    samples: int
    unit_size: int
    cap: int
    context: int


@dataclass(frozen=True)
class RowDraw:
    """One row to be made: which sample of which example, under which key, against whom."""

    example: Example
    sample: int
    key: int
    opponent: int | None


@dataclass
class Timing:
    """Rows made here and the seconds they took; parts that were already there count nothing."""

    rows: int = 0
    generating: float = 0.0
    scoring: float = 0.0

    def advance(self, stage: str, rows: int, seconds: float) -> None:
        """Add what a stage took."""
        if stage == "generating":
            self.rows += rows if seconds else 0
            self.generating += seconds
        else:
            self.scoring += seconds


@dataclass(frozen=True)
class Synthesis:
    """Makes rows with a policy and a generator.

    Attributes:
        policy: Whose iterates answer and score.
        generator: How responses are sampled.
        pad_id: Any valid id; padded columns are masked.
        vocabulary: Size of the model's head, which bounds a scoring batch.
    """

    policy: Policy
    generator: Generator
    pad_id: int
    vocabulary: int

    def make(
        self,
        plan: RowPlan,
        examples: Sequence[Example],
        folder: Path,
        report: Reporter,
        *,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[int]:
        """Make the parts that `folder` lacks; units k with k mod `world_size` = `rank` only.

        Yields:
            The index of each unit once its part is on disk. The manifest is left to `finish`, when
            all ranks are through.
        """
        for unit, draws in enumerate(units(plan, examples)):
            if unit % world_size != rank:
                continue
            if part_matches(folder, unit, [draw.key for draw in draws]):
                report.advance("generating", len(draws), 0.0)
                report.advance("scoring", len(draws), 0.0)
            else:
                write_part(folder, unit, self._unit(plan, draws, report))
            yield unit

    def _unit(self, plan: RowPlan, draws: list[RowDraw], report: Reporter) -> list[Row]:
        start = time.perf_counter()
        responses = self._responses(plan, draws)
        generated_at = time.perf_counter()
        report.advance("generating", len(draws), generated_at - start)
        scores = self._score(
            plan.members,
            draws + draws,
            [draw.example.real_ids for draw in draws] + [response.ids for response in responses],
        )
        report.advance("scoring", len(draws), time.perf_counter() - generated_at)
        return [
            _row(plan, *parts)
            for parts in zip(
                draws, responses, scores[: len(draws)], scores[len(draws) :], strict=True
            )
        ]

    def _responses(self, plan: RowPlan, draws: Sequence[RowDraw]) -> list[Response]:
        if plan.opponent is None:
            return [Response((), finished=False)] * len(draws)
        requests = []
        for draw in draws:
            assert draw.opponent is not None
            prompt = draw.example.prompt_ids
            cap = min(plan.cap, plan.context - len(prompt))
            requests.append(Request(prompt, draw.opponent, draw.key, cap))
        return self.generator.generate(self.policy, requests)

    def _score(
        self,
        members: Sequence[int],
        draws: Sequence[RowDraw],
        responses: Sequence[tuple[int, ...]],
    ) -> list[tuple[float, ...]]:
        """log p_i(response | prompt) of every member i, row by row; 0.0 for an empty response."""
        scores = [[0.0] * len(members) for _ in responses]
        filled = [i for i, response in enumerate(responses) if response]
        lengths = [len(draws[i].example.prompt_ids) + len(responses[i]) for i in filled]
        budget = max(1, min(_MOST_SCORING_TOKENS, _SCORING_LOGITS // self.vocabulary))
        batches = [[filled[i] for i in group] for group in group_by_length(lengths, budget)]
        for column, member in enumerate(members):
            with self.policy.at(member):
                for batch in batches:
                    packed = pack_padded(
                        [draws[i].example.prompt_ids for i in batch],
                        [responses[i] for i in batch],
                        self.pad_id,
                    )
                    for i, logp in zip(batch, self.policy.logps(packed).tolist(), strict=True):
                        scores[i][column] = logp
        return [tuple(row) for row in scores]


def units(plan: RowPlan, examples: Sequence[Example]) -> Iterator[list[RowDraw]]:
    """The work units of a plan: which rows, drawn against whom, in which order."""
    draws = [
        draw_row(plan, example, sample) for example in examples for sample in range(plan.samples)
    ]
    return (draws[i : i + plan.unit_size] for i in range(0, len(draws), plan.unit_size))


def draw_row(plan: RowPlan, example: Example, sample: int) -> RowDraw:
    """Give a row its key, and by the key's own stream its opponent."""
    key = keyed.row_key(plan.seed, plan.iterate, example.example_id, sample)
    opponent = None if plan.opponent is None else plan.opponent.draw(keyed.opponent_uniform(key))
    return RowDraw(example, sample, key, opponent)


def unit_count(plan: RowPlan, examples: Sequence[Example]) -> int:
    """Number of work units of a plan."""
    return -(-len(examples) * plan.samples // plan.unit_size)


def finish(
    plan: RowPlan, examples: Sequence[Example], folder: Path, fields: dict[str, Any]
) -> None:
    """Write the manifest: all parts are there.

    Raises:
        SpinError: There is nothing to make rows of.
    """
    if not examples:
        raise SpinError(f"there are no examples to make rows of in {folder}", fix="give more data")
    write_manifest(
        folder,
        {
            **fields,
            "iterate": plan.iterate,
            "opponent": None if plan.opponent is None else dict(plan.opponent.weights),
            "members": plan.members,
            "rows": len(examples) * plan.samples,
            "units": unit_count(plan, examples),
            "unit_size": plan.unit_size,
            "cap": plan.cap,
        },
    )


def _row(
    plan: RowPlan,
    draw: RowDraw,
    response: Response,
    real_logps: tuple[float, ...],
    generated_logps: tuple[float, ...],
) -> Row:
    return Row(
        example_id=draw.example.example_id,
        sample=draw.sample,
        prompt_ids=draw.example.prompt_ids,
        real_ids=draw.example.real_ids,
        generated_ids=response.ids,
        opponent=draw.opponent,
        finished=response.finished,
        real_finished=draw.example.real_finished,
        members=plan.members,
        member_real_logps=real_logps,
        member_generated_logps=generated_logps,
        token_alpha=None,
        token_members=(),
        token_real_logps=(),
        token_generated_logps=(),
        seed=draw.key,
    )
