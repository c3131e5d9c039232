"""Making the rows of an iterate: draw opponents, generate, score, write.

Rows are made in work units: a fixed list of examples, one part file each, decoded and scored in
batches that depend on nothing but the unit. So the same adapters and settings give the same bytes,
whoever makes which unit in which order; a crash costs the unit at hand.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from spin_lightning.errors import SpinError
from spin_lightning.generation.base import Generator, Request, Response
from spin_lightning.packing import group_by_length, pack_prompts
from spin_lightning.policies.base import Policy
from spin_lightning.rows.plan import (
    NO_ROWS,
    EarlierRows,
    RowDraw,
    RowPlan,
    unit_count,
    units,
)
from spin_lightning.rows.store import (
    damaged_parts,
    part_hashes,
    part_matches,
    read_deviations,
    read_manifest,
    warn_damaged,
    write_manifest,
    write_part,
)
from spin_lightning.rows.suspects import check_rows
from spin_lightning.run.fingerprint import differences
from spin_lightning.types import Example, PolicyId, Row

# The head's logits are the largest thing in a padded scoring pass: at most 2^27 floats of them at
# once. With shared prompts they come in small chunks, and a batch only has to fill the device.
_SCORING_LOGITS = 1 << 27
_MOST_SCORING_TOKENS = 1 << 14
_SHARED_TOKENS = 1 << 13


class Reporter(Protocol):
    """Hears how far generation and scoring have come."""

    def advance(self, stage: str, rows: int, seconds: float, tokens: int = 0) -> None:
        """`rows` more rows went through `stage` ("generating" or "scoring") in `seconds`.

        `tokens` of responses were generated now, or scored, once for each that scores.
        """


@dataclass
class Scored:
    """A response and what is known of its log-probs, by scorer."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logps: dict[PolicyId, float]


@dataclass
class Timing:
    """Rows made here and the seconds they took; parts that were already there count nothing."""

    rows: int = 0
    generating: float = 0.0
    scoring: float = 0.0
    generated_tokens: int = 0
    scored_tokens: int = 0

    def advance(self, stage: str, rows: int, seconds: float, tokens: int = 0) -> None:
        """Add what a stage took."""
        if stage == "generating":
            self.rows += rows if seconds else 0
            self.generating += seconds
            self.generated_tokens += tokens
        else:
            self.scoring += seconds
            self.scored_tokens += tokens


@dataclass(frozen=True)
class Synthesis:
    """Makes rows with a policy and a generator.

    Attributes:
        policy: Whose iterates answer and score.
        generator: How responses are sampled.
        vocabulary: Size of the model's head, which bounds a scoring batch.
    """

    policy: Policy
    generator: Generator
    vocabulary: int

    def make(
        self,
        plan: RowPlan,
        examples: Sequence[Example],
        folder: Path,
        report: Reporter,
        *,
        earlier: EarlierRows = NO_ROWS,
        rank: int = 0,
        world_size: int = 1,
    ) -> Iterator[int]:
        """Make the parts that `folder` lacks; units k with k mod `world_size` = `rank` only.

        Args:
            plan: What rows there are to be.
            examples: What is answered.
            folder: Where the parts go.
            report: Hears how far it has come.
            earlier: Rows of the iterate before, for what can be kept of them.
            rank: Which of the processes this is.
            world_size: Number of processes that share the units.

        Yields:
            The index of each unit once its part is on disk. The manifest is left to `finish`, when
            all ranks are through.

        Raises:
            NonFiniteError: A log-prob of a unit is NaN or infinite; nothing of it is written.
        """
        for unit, draws in enumerate(units(plan, examples, earlier)):
            if unit % world_size != rank:
                continue
            if part_matches(folder, unit, _known_before(plan, draws)):
                report.advance("generating", len(draws), 0.0)
                report.advance("scoring", len(draws), 0.0)
            else:
                rows = self._unit(plan, draws, earlier, report)
                made = f"scoring rows of iterate {plan.iterate}, work unit {unit}"
                check_rows(rows, folder / f"not_finite-{unit:05d}.json", made)
                write_part(folder, unit, rows, self.generator.deviations)
            yield unit

    def _unit(
        self, plan: RowPlan, draws: list[RowDraw], earlier: EarlierRows, report: Reporter
    ) -> list[Row]:
        start = time.perf_counter()
        responses = self._responses(plan, draws)
        generated_at = time.perf_counter()
        new = sum(
            len(response.ids)
            for draw, response in zip(draws, responses, strict=True)
            if draw.kept is None
        )
        report.advance("generating", len(draws), generated_at - start, new)
        # Rows of one example share its real response: it is scored once.
        examples = {draw.example.example_id: draw.example for draw in draws}
        real = {
            i: Scored(example.prompt_ids, example.real_ids, earlier.real_logps(example))
            for i, example in examples.items()
        }
        generated = [
            Scored(
                draw.example.prompt_ids,
                response.ids,
                {} if draw.kept is None else earlier.generated_logps(draw),
            )
            for draw, response in zip(draws, responses, strict=True)
        ]
        sequences = [*real.values(), *generated]
        unknown = sum(
            len(s.response_ids) * sum(scorer not in s.logps for scorer in plan.scorers)
            for s in sequences
        )
        self._score(plan.scorers, sequences)
        report.advance("scoring", len(draws), time.perf_counter() - generated_at, unknown)
        return [
            _row(plan, draw, response, real[draw.example.example_id].logps, scored.logps)
            for draw, response, scored in zip(draws, responses, generated, strict=True)
        ]

    def _responses(self, plan: RowPlan, draws: Sequence[RowDraw]) -> list[Response]:
        if plan.opponent is None:
            return [Response((), finished=False)] * len(draws)
        token_alpha = plan.opponent.token_alpha
        requests = []
        for draw in draws:
            if draw.kept is None:
                assert draw.opponent is not None
                prompt = draw.example.prompt_ids
                cap = min(plan.cap, plan.context - len(prompt))
                requests.append(Request(prompt, draw.opponent, draw.key, cap, token_alpha))
        made = iter(self.generator.generate(self.policy, requests))
        return [next(made) if draw.kept is None else draw.kept for draw in draws]

    def _score(self, scorers: Sequence[PolicyId], sequences: Sequence[Scored]) -> None:
        """Fill in log p(response | prompt) under every scorer, where it is not known yet."""
        for scorer in scorers:
            unknown = [s for s in sequences if scorer not in s.logps]
            for s in unknown:
                s.logps[scorer] = 0.0  # what a response without tokens keeps
            written = [s for s in unknown if s.response_ids]
            if not written:
                continue
            with self.policy.at(*scorer):
                for groups in self._scoring_batches(written):
                    packed = pack_prompts(
                        [group[0].prompt_ids for group in groups],
                        [[s.response_ids for s in group] for group in groups],
                    )
                    logps = self.policy.prompt_logps(packed).tolist()
                    scored = (s for group in groups for s in group)
                    for s, logp in zip(scored, logps, strict=True):
                        s.logps[scorer] = logp

    def _scoring_batches(self, sequences: Sequence[Scored]) -> Iterator[list[list[Scored]]]:
        """Responses grouped by their prompt where the policy can share it, in batches."""
        if self.policy.shares_prompts:
            by_prompt: dict[tuple[int, ...], list[Scored]] = {}
            for s in sequences:
                by_prompt.setdefault(s.prompt_ids, []).append(s)
            groups, budget = list(by_prompt.values()), _SHARED_TOKENS
        else:
            groups = [[s] for s in sequences]
            budget = max(1, min(_MOST_SCORING_TOKENS, _SCORING_LOGITS // self.vocabulary))
        lengths = [len(g[0].prompt_ids) + sum(len(s.response_ids) for s in g) for g in groups]
        for batch in group_by_length(lengths, budget):
            yield [groups[i] for i in batch]


def finish(
    plan: RowPlan, examples: Sequence[Example], folder: Path, fields: dict[str, Any]
) -> None:
    """Write the manifest: all parts are there.

    Raises:
        SpinError: There is nothing to make rows of.
    """
    if not examples:
        raise SpinError(f"there are no examples to make rows of in {folder}", fix="give more data")
    manifest = _manifest_of(plan, examples)
    if deviations := read_deviations(folder, manifest["units"]):
        manifest["deviations"] = deviations
    parts = part_hashes(folder, manifest["units"])
    write_manifest(folder, {**fields, **manifest, "parts": parts})


def is_finished(plan: RowPlan, examples: Sequence[Example], folder: Path) -> bool:
    """Whether all rows of a plan are there, whole, and no others."""
    manifest = read_manifest(folder)
    if manifest is None:
        return False
    wanted = _manifest_of(plan, examples)
    if differences({name: manifest.get(name) for name in wanted}, wanted):
        return False
    damaged = damaged_parts(folder, manifest)
    for path in damaged:
        warn_damaged(path, "its bytes are not those that were written")
        # It may still read like a whole one.
        path.unlink(missing_ok=True)
    return not damaged


def _manifest_of(plan: RowPlan, examples: Sequence[Example]) -> dict[str, Any]:
    weights = {} if plan.opponent is None else plan.opponent.weights
    return {
        "iterate": plan.iterate,
        "opponent": {str(i): weight for i, weight in weights.items()} or None,
        "members": plan.members,
        "token_alpha": plan.token_alpha or None,
        "token_members": plan.token_members,
        "rows": len(examples) * plan.rows_per_example,
        "units": unit_count(plan, examples),
        "unit_size": plan.unit_size,
        "cap": plan.cap,
    }


def _known_before(plan: RowPlan, draws: Sequence[RowDraw]) -> dict[str, list[Any]]:
    """The columns of a unit's rows that are known before any is made."""
    rows = len(draws)
    return {
        "seed": [draw.key for draw in draws],
        "opponent": [draw.opponent for draw in draws],
        "members": [list(plan.members)] * rows,
        "token_alpha": [plan.token_alpha or None] * rows,
        "token_members": [list(plan.token_members)] * rows,
    }


def _row(
    plan: RowPlan,
    draw: RowDraw,
    response: Response,
    real_logps: Mapping[PolicyId, float],
    generated_logps: Mapping[PolicyId, float],
) -> Row:
    plain = [plan.plain_scorer(i) for i in plan.members]
    token = [plan.token_scorer(i) for i in plan.token_members]
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
        member_real_logps=tuple(real_logps[scorer] for scorer in plain),
        member_generated_logps=tuple(generated_logps[scorer] for scorer in plain),
        token_alpha=plan.token_alpha or None,
        token_members=plan.token_members,
        token_real_logps=tuple(real_logps[scorer] for scorer in token),
        token_generated_logps=tuple(generated_logps[scorer] for scorer in token),
        seed=draw.key,
    )
