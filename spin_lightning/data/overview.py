"""What a source holds for a model: counts, lengths against the caps, repetitions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from spin_lightning.data.lengths import Lengths
from spin_lightning.data.read_report import ReadReport
from spin_lightning.types import BadRow, Example


@dataclass(frozen=True)
class Overview:
    """What was read from a source and how it fits a model.

    Attributes:
        report: What became of every row, column and file.
        tried: Number of examples that were tokenized: all that were read, or as many as were drawn.
        unfit: Those of them that do not fit the model or its chat template.
        examples: Number of the others.
        prompts: Lengths of the prompts, of those that are too long, too.
        responses: Lengths of the whole responses, the stop id counted.
        cut_by_context: Responses within their cap that the model's context cuts.
        repeated_prompts: Examples whose prompt an earlier example has, too.
        repeated_pairs: Examples whose prompt and response an earlier example has, too.
        handled: How many examples were used in a way that their user should see, by what was done.
    """

    report: ReadReport
    tried: int
    unfit: tuple[BadRow, ...]
    examples: int
    prompts: Lengths
    responses: Lengths
    cut_by_context: int = 0
    repeated_prompts: int = 0
    repeated_pairs: int = 0
    handled: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        report: ReadReport,
        examples: Sequence[Example],
        unfit: Sequence[BadRow],
        *,
        max_prompt_tokens: int | None,
        max_response_tokens: int,
        context: int,
        handled: Mapping[str, int],
    ) -> Overview:
        """Count and measure.

        Args:
            report: What was read.
            examples: The examples that fit, with their whole responses.
            unfit: The others.
            max_prompt_tokens: Cap of prompts; None for the context's length.
            max_response_tokens: Cap of responses, the stop id counted.
            context: Longest sequence that the model was made for.
            handled: What `PromptFormat.counts` counted.
        """
        too_long = [row.prompt_tokens for row in unfit if row.prompt_tokens is not None]
        prompts = [len(example.prompt_ids) for example in examples]
        responses = [len(example.real_ids) for example in examples]
        rooms = (context - length for length in prompts)
        return cls(
            report=report,
            tried=len(examples) + len(unfit),
            unfit=tuple(unfit),
            examples=len(examples),
            prompts=Lengths.of(
                [*prompts, *too_long],
                context - 1 if max_prompt_tokens is None else max_prompt_tokens,
            ),
            responses=Lengths.of(responses, max_response_tokens),
            cut_by_context=sum(
                room < length <= max_response_tokens
                for room, length in zip(rooms, responses, strict=True)
            ),
            repeated_prompts=len(examples) - len({e.prompt_ids for e in examples}),
            repeated_pairs=len(examples) - len({(e.prompt_ids, e.real_ids) for e in examples}),
            handled=handled,
        )

    @property
    def left_out(self) -> tuple[BadRow, ...]:
        """Rows that give no example, and examples that do not fit."""
        return (*self.report.bad, *self.unfit)

    def notes(self) -> list[str]:
        """One line for each thing that was not used as it came, left out rows aside."""
        notes = self.report.notes()
        notes += [f"{count:,} {what}" for what, count in self.handled.items() if count]
        return [*notes, *self._cuts()]

    def summary(self) -> list[str]:
        """Two lines: what is used, how long it is, and what repeats."""
        if not self.examples:
            return []
        lengths = f"{_three(self.prompts)} in prompts, {_three(self.responses)} in responses"
        cuts = self.responses.over + self.cut_by_context
        repeats = f"{self.repeated_prompts:,} repeat a prompt and {self.repeated_pairs:,} a pair"
        tokens = f"Tokens (median, 95 %, longest): {lengths}; {cuts:,} responses are cut; {repeats}"
        left_out = f"{len(self.left_out):,} rows left out"
        return [f"{self.report.source}: {self.examples:,} examples, {left_out}", tokens]

    def _cuts(self) -> list[str]:
        lengths, notes = self.responses, []
        if lengths.over:
            of_95, longest = lengths.percentiles[95], lengths.percentiles[100]
            fits = f"all fit in {longest}"
            if lengths.cap is not None and of_95 > lengths.cap:
                fits = f"95 % fit in {of_95}, all in {longest}"
            notes.append(
                f"{lengths.over:,} of {lengths.count:,} responses are longer than "
                f"max_response_tokens={lengths.cap} and are cut; {fits}"
            )
        if self.cut_by_context:
            notes.append(
                f"{self.cut_by_context:,} of {lengths.count:,} responses are cut where the model's "
                "context ends"
            )
        return notes


def _three(lengths: Lengths) -> str:
    return ", ".join(f"{lengths.percentiles[p]:,}" for p in (50, 95, 100))
