"""Pairs of a real and a generated response, as text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from spin_lightning.report.user_turn import PromptReader
from spin_lightning.rows.store import RowTable


@dataclass(frozen=True)
class PromptSamples:
    """One prompt, its real response and the response of each iterate.

    Attributes:
        prompt: The user's last turn of the prompt.
        real: The data's response.
        generated: The response of each iterate, by its index.
    """

    prompt: str
    real: str
    generated: Mapping[int, str]


def sample_pairs(
    table: RowTable, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[tuple[str, str, str]]:
    """(prompt, real, generated) of the first rows with different prompts, in a fixed order.

    Of a prompt, the user's last turn is shown, without what the chat template adds. Responses keep
    their special tokens: whether a response ended is part of it.
    """
    reader = PromptReader.of(tokenizer)
    return [
        (
            reader.read(table.prompt_ids[i].tolist()),
            str(tokenizer.decode(table.real_ids[i].tolist())),
            str(tokenizer.decode(table.generated_ids[i].tolist())),
        )
        for i in _first_of_prompts(table)[:count]
    ]


def samples_of_prompts(
    tables: Mapping[int, RowTable], tokenizer: PreTrainedTokenizerBase, count: int
) -> list[PromptSamples]:
    """The iterates' responses to the same prompts.

    Args:
        tables: Held-out rows by the iterate that answered them; all have the same examples.
        tokenizer: The run's tokenizer.
        count: Number of prompts, all different.

    Returns:
        The first prompts of the first iterate, with the responses of all.
    """
    if not tables:
        return []
    first = tables[min(tables)]
    texts = sample_pairs(first, tokenizer, count)
    shown = _first_of_prompts(first)[:count]
    found = []
    for i, (prompt, real, _) in zip(shown, texts, strict=True):
        example = int(first.example_id[i])
        answers = {
            t: str(tokenizer.decode(table.generated_ids[int(rows[0])].tolist()))
            for t, table in tables.items()
            if len(rows := (table.example_id == example).nonzero()[0])
        }
        found.append(PromptSamples(prompt, real, answers))
    return found


def _first_of_prompts(table: RowTable) -> list[int]:
    """The first row of each prompt, in order."""
    first: dict[tuple[int, ...], int] = {}
    for i in range(len(table)):
        first.setdefault(tuple(table.prompt_ids[i].tolist()), i)
    return list(first.values())
