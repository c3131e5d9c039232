"""Tokenized examples from a source: read, sampled, tokenized, checked and hashed."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning.pytorch.utilities import rank_zero_info

from spin_lightning import keyed
from spin_lightning.data.formats import describe_bad_rows
from spin_lightning.data.tokenize import PromptFormat
from spin_lightning.errors import DataError, SettingError
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
        refuse_bad_rows: Raise for a row that cannot be used, instead of skipping it.
        seed: Determines the examples that are used if there are more than the limit.
    """

    text_format: PromptFormat
    read_conversations: Callable[[str, str], tuple[list[Conversation], list[BadRow]]]
    max_prompt_tokens: int | None
    max_response_tokens: int
    context: int
    refuse_bad_rows: bool
    seed: int

    def read(self, source: str, setting: str, limit: int | None) -> list[Example]:
        """The examples of a source, in its order.

        Args:
            source: A file, a folder or a hub id.
            setting: Setting that names the source, for messages.
            limit: Most examples; None for all.

        Raises:
            DataError: The source cannot be read, has no usable rows, or has a bad row that is
                refused.
        """
        conversations, bad = self.read_conversations(source, setting)
        total = len(conversations) + len(bad)
        if limit is not None and limit < len(conversations):
            picked = keyed.subset(self.seed, 0, len(conversations), limit)
            conversations = [conversations[i] for i in picked]
        tokenized = [
            self.text_format.tokenize(
                conversation,
                max_prompt_tokens=self.max_prompt_tokens,
                max_response_tokens=self.max_response_tokens,
                context=self.context,
            )
            for conversation in conversations
        ]
        examples = [example for example in tokenized if isinstance(example, Example)]
        bad = [*bad, *(row for row in tokenized if isinstance(row, BadRow))]
        if bad and (self.refuse_bad_rows or not examples):
            raise DataError(
                f"{setting}={source!r}: {describe_bad_rows(bad, total)}",
                fix="correct these rows, or skip them with data.bad_rows: skip"
                if examples
                else "correct the rows; if prompts are too long, raise data.max_prompt_tokens or "
                "use a model with a longer context",
            )
        if bad:
            rank_zero_info(f"{source}: skipped {describe_bad_rows(bad, total)}")
        return examples


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
