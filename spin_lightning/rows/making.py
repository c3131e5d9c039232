"""Making the rows of an iterate: draw opponents, generate, score, write.

Rows are made in work units: fixed lists of rows, one part file each, decoded and scored in batches
that depend on the unit alone. So the same adapters and settings give the same bytes, whichever
process makes a unit and in whatever order; a crash costs only the current unit.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from spin_lightning.errors import SpinError
from spin_lightning.generation.base import Generator, Request, Response
from spin_lightning.packing import group_by_length, pack_prompts
from spin_lightning.policies.base import Policy
from spin_lightning.rows.agreement import Sampled, SamplerGap, check_agreement
from spin_lightning.rows.manifest import read_manifest, write_manifest
from spin_lightning.rows.plan import NO_ROWS, EarlierRows, RowDraw, RowPlan, units
from spin_lightning.rows.store import (
    damaged_parts,
    part_hashes,
    part_matches,
    read_deviations,
    read_gap,
    warn_damaged,
    write_part,
)
from spin_lightning.rows.suspects import Suspect, check_rows
from spin_lightning.run.row_folder import about
from spin_lightning.types import Example, PolicyId, Row

# The manifest's field for the gap between sampler and scorer, nats per token.
GAP = "sampler_gap"
# The head's logits are the largest tensor of a padded scoring pass: a batch has at most 2^27 of
# them. With shared prompts they are computed in small chunks, and a batch only has to fill the
# device.
_SCORING_LOGITS = 1 << 27
_MOST_SCORING_TOKENS = 1 << 14
SHARED_TOKENS = 1 << 13


class Reporter(Protocol):
    """Receives the progress of generation and scoring."""

    def advance(self, stage: str, rows: int, seconds: float, tokens: int = 0) -> None:
        """Report progress.

        Args:
            stage: "generating" or "scoring".
            rows: Rows that went through the stage.
            seconds: Time they took; 0 for rows of an existing part.
            tokens: Response tokens that were generated, or scored, counted once per scorer.
        """


@dataclass
class Scored:
    """A response and its known log-probs, by scorer."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    logps: dict[PolicyId, float]


@dataclass
class Timing:
    """Rows that this process made and the seconds they took; existing parts do not count."""

    rows: int = 0
    generating: float = 0.0
    scoring: float = 0.0
    generated_tokens: int = 0
    scored_tokens: int = 0

    def advance(self, stage: str, rows: int, seconds: float, tokens: int = 0) -> None:
        """Add the progress of a stage, see `Reporter`."""
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
        policy: Its iterates generate and score.
        generator: The engine that samples responses.
        vocabulary: Size of the model's head, which limits a scoring batch.
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
        """Make the missing parts of `folder`; units k with k mod `world_size` = `rank` only.

        Args:
            plan: The rows to make.
            examples: The examples to answer.
            folder: The folder of the parts.
            report: Receives the progress.
            earlier: Rows of the iterate before, kept where the plan requires it.
            rank: Rank of this process.
            world_size: Number of processes that share the units.

        Yields:
            The number of each unit once its part is on disk. Call `finish` for the manifest when
            all ranks are done.

        Raises:
            NonFiniteError: A log-prob of a unit is NaN or infinite; the unit is not written.
            DisagreementError: Likewise, if its sampled responses have other log-probs when scored.
        """
        for unit, draws in enumerate(units(plan, examples, earlier)):
            if unit % world_size != rank:
                continue
            if part_matches(folder, unit, _known_before(plan, draws)):
                report.advance("generating", len(draws), 0.0)
                report.advance("scoring", len(draws), 0.0)
            else:
                made = f"scoring rows of iterate {plan.iterate}, work unit {unit}"
                self.generator.scratch = scratch = about(folder) / f"unit-{unit:05d}"
                rows, sampled = self._unit(plan, draws, earlier, report)
                check_rows(rows, about(folder) / f"not_finite-{unit:05d}.json", made)
                gap = None
                if self.generator.computes_elsewhere:
                    gap = SamplerGap.of(sampled)
                else:
                    disagreeing = about(folder) / f"disagreeing-{unit:05d}.json"
                    check_agreement(sampled, self.policy.largest_bias, disagreeing, made)
                deviations = {
                    **self.generator.deviations,
                    **self.policy.deviations,
                    **self.policy.scoring_limit.deviations,
                }
                write_part(folder, unit, rows, deviations, gap)
                shutil.rmtree(scratch, ignore_errors=True)
            yield unit

    def _unit(
        self, plan: RowPlan, draws: list[RowDraw], earlier: EarlierRows, report: Reporter
    ) -> tuple[list[Row], list[Sampled]]:
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
        rows = [
            _row(plan, draw, response, real[draw.example.example_id].logps, scored.logps)
            for draw, response, scored in zip(draws, responses, generated, strict=True)
        ]
        return rows, list(_sampled(plan, draws, responses, generated))

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
        """Fill in the missing log p(response | prompt) of every scorer."""
        for scorer in scorers:
            unknown = [s for s in sequences if scorer not in s.logps]
            for s in unknown:
                s.logps[scorer] = 0.0  # stays 0 for a response without tokens
            written = [s for s in unknown if s.response_ids]
            if not written:
                continue
            with self.policy.at(*scorer):
                for groups in self._scoring_batches(written):
                    packed = pack_prompts(
                        [group[0].prompt_ids for group in groups],
                        [[s.response_ids for s in group] for group in groups],
                    )
                    logps = self.policy.score(packed).tolist()
                    scored = (s for group in groups for s in group)
                    for s, logp in zip(scored, logps, strict=True):
                        s.logps[scorer] = logp

    def _scoring_batches(self, sequences: Sequence[Scored]) -> Iterator[list[list[Scored]]]:
        """Batches of responses, grouped by prompt if the policy can share prompts."""
        if self.policy.shares_prompts:
            by_prompt: dict[tuple[int, ...], list[Scored]] = {}
            for s in sequences:
                by_prompt.setdefault(s.prompt_ids, []).append(s)
            groups, budget = list(by_prompt.values()), SHARED_TOKENS
        else:
            groups = [[s] for s in sequences]
            budget = max(1, min(_MOST_SCORING_TOKENS, _SCORING_LOGITS // self.vocabulary))
        lengths = [len(g[0].prompt_ids) + sum(len(s.response_ids) for s in g) for g in groups]
        for batch in group_by_length(lengths, budget):
            yield [groups[i] for i in batch]


def finish(
    plan: RowPlan, examples: Sequence[Example], folder: Path, fields: Mapping[str, Any]
) -> None:
    """Write the manifest, once all parts exist.

    Args:
        plan: The rows that were made.
        examples: The examples that were answered.
        folder: The folder of the parts.
        fields: Further fields of the manifest.

    Raises:
        SpinError: There are no examples.
    """
    if not examples:
        raise SpinError(f"there are no examples to make rows of in {folder}", fix="give more data")
    manifest = plan.manifest(examples)
    gap = read_gap(folder, manifest.units)
    if gap is not None:
        gap.warn(folder)
        fields = {**fields, GAP: gap.per_token}
    write_manifest(
        folder,
        replace(
            manifest,
            parts=part_hashes(folder, manifest.units),
            deviations=read_deviations(folder, manifest.units),
            others=fields,
        ),
    )


def is_finished(plan: RowPlan, examples: Sequence[Example], folder: Path) -> bool:
    """Whether the folder holds all rows of a plan, undamaged, and no others."""
    manifest = read_manifest(folder)
    if manifest is None or not manifest.has_rows_of(plan.manifest(examples)):
        return False
    found = damaged_parts(folder, manifest)
    for path in found:
        warn_damaged(path, "its contents have changed")
        # It may still be a readable part.
        path.unlink(missing_ok=True)
    return not found


def _known_before(plan: RowPlan, draws: Sequence[RowDraw]) -> dict[str, list[Any]]:
    """The columns of a unit's rows that the plan determines."""
    rows = len(draws)
    return {
        "seed": [draw.key for draw in draws],
        "opponent": [draw.opponent for draw in draws],
        "members": [list(plan.members)] * rows,
        "token_alpha": [plan.token_alpha or None] * rows,
        "token_members": [list(plan.token_members)] * rows,
    }


def _sampled(
    plan: RowPlan,
    draws: Sequence[RowDraw],
    responses: Sequence[Response],
    generated: Sequence[Scored],
) -> Iterator[Sampled]:
    """The new responses that are scored under their own opponent."""
    token_alpha = plan.opponent.token_alpha if plan.opponent else 0.0
    for draw, response, scored in zip(draws, responses, generated, strict=True):
        if draw.kept is not None or draw.opponent is None or response.logp is None:
            continue
        own = PolicyId(draw.opponent, token_alpha if draw.opponent else 0.0)
        if own in scored.logps:
            ids = {"prompt": scored.prompt_ids, "generated": response.ids}
            logps = {"sampled": response.logp, "scored": scored.logps[own]}
            suspect = Suspect(draw.example.example_id, draw.sample, ids, logps)
            yield Sampled(suspect, len(response.ids), response.logp, scored.logps[own])


def _row(
    plan: RowPlan,
    draw: RowDraw,
    response: Response,
    real_logps: Mapping[PolicyId, float],
    generated_logps: Mapping[PolicyId, float],
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
        member_real_logps=tuple(real_logps[scorer] for scorer in plan.plain_scorers),
        member_generated_logps=tuple(generated_logps[scorer] for scorer in plan.plain_scorers),
        token_alpha=plan.token_alpha or None,
        token_members=plan.token_members,
        token_real_logps=tuple(real_logps[scorer] for scorer in plan.token_scorers),
        token_generated_logps=tuple(generated_logps[scorer] for scorer in plan.token_scorers),
        seed=draw.key,
    )
