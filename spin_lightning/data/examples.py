"""Tokenized examples from a source: read, sampled, tokenized, checked and hashed."""

from __future__ import annotations

import hashlib
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightning.pytorch.utilities import rank_zero_info

from spin_lightning import keyed
from spin_lightning.data.lengths import cut
from spin_lightning.data.overview import Overview
from spin_lightning.data.read_report import BadRows, ReadReport, checked_bad_rows
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import SettingError
from spin_lightning.types import BadRow, Conversation, Example


@dataclass(frozen=True)
class ExampleReader:
    """Reads the examples of a source.

    Attributes:
        text_format: Converts conversations to ids.
        read_conversations: Reads a source as text, given the setting that names it.
        max_prompt_tokens: Longest prompt; None for the context's length.
        max_response_tokens: Cap of a response, including the stop id.
        context: Longest sequence that the model supports, in tokens.
        bad_rows: Whether rows that cannot be used are skipped or refused.
        seed: Determines the examples that are used if there are more than the limit.
        texts: The conversations of the source that was read last, by example id.
    """

    text_format: PromptFormat
    read_conversations: Callable[[object, str], tuple[list[Conversation], ReadReport]]
    max_prompt_tokens: int | None
    max_response_tokens: int
    context: int
    bad_rows: BadRows
    seed: int
    texts: dict[int, Conversation] = field(default_factory=dict, compare=False)

    def read(
        self, source: object, setting: str, limit: int | None
    ) -> tuple[list[Example], Overview]:
        """The examples of a source, in its order, and what was read; the log names what is lost.

        Args:
            source: What `data.sources` reads.
            setting: Setting that names the source, for messages.
            limit: Most examples; None for all.

        Raises:
            DataError: The source cannot be read, has no usable rows, or has a bad row that is
                refused.
        """
        examples, overview = self.survey(source, setting, limit)
        label = overview.report.source
        for note in overview.notes():
            rank_zero_info(f"{label}: {note}")
        skipped = checked_bad_rows(overview.report, overview.unfit, overview.tried, self.bad_rows)
        if skipped:
            rank_zero_info(f"{label}: skipped {skipped}")
        return examples, overview

    def survey(
        self, source: object, setting: str, limit: int | None
    ) -> tuple[list[Example], Overview]:
        """The same, however many rows cannot be used, and without a word to the log."""
        conversations, report = self.read_conversations(source, setting)
        if limit is not None and limit < len(conversations):
            picked = keyed.subset(self.seed, 0, len(conversations), limit)
            conversations = [conversations[i] for i in picked]
        self.texts.clear()
        self.texts.update((each.example_id, each) for each in conversations)
        counted = Counter(self.text_format.counts)
        tokenized = [
            self.text_format.whole(
                conversation, max_prompt_tokens=self.max_prompt_tokens, context=self.context
            )
            for conversation in conversations
        ]
        whole = [example for example in tokenized if isinstance(example, Example)]
        overview = Overview.of(
            report,
            whole,
            [row for row in tokenized if isinstance(row, BadRow)],
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            context=self.context,
            handled=self.text_format.counts - counted,
        )
        return [cut(e, self.max_response_tokens, self.context) for e in whole], overview


def check_ids(examples: Sequence[Example], text_format: PromptFormat, vocabulary: int) -> None:
    """Check that the model has an embedding for every id.

    Args:
        examples: The examples to check.
        text_format: Its stop and padding ids are checked as well.
        vocabulary: Number of ids that the model has embeddings for.

    Raises:
        SettingError: The tokenizer produces an id outside the model's vocabulary.
    """
    largest = max(
        text_format.pad_id,
        *text_format.stop_ids,
        *(max(*example.prompt_ids, *example.real_ids) for example in examples),
    )
    if largest >= vocabulary:
        raise SettingError(
            "model",
            text_format.tokenizer.name_or_path,
            f"its tokenizer produces the id {largest}, but it has only {vocabulary} embeddings",
            fix="use the tokenizer that the model was trained with",
        )


def content_hash(examples: Sequence[Example]) -> str:
    """SHA-256 of the ids of all examples, in order."""
    digest = hashlib.sha256()
    for example in examples:
        lengths = (example.example_id, len(example.prompt_ids), len(example.real_ids))
        ids = (*example.prompt_ids, *example.real_ids)
        digest.update(struct.pack(f"<3q{len(ids)}i", *lengths, *ids))
    return digest.hexdigest()
