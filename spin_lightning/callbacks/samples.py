"""Pairs of a real and a generated response, as text."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from spin_lightning.data.rows import RowTable


def sample_pairs(
    table: RowTable, tokenizer: PreTrainedTokenizerBase, count: int
) -> list[tuple[str, str, str]]:
    """(prompt, real, generated) of the first rows with different prompts, the same every time.

    Special tokens are shown where the response has them: whether a response ended is part of it.
    """
    first_of_prompt: dict[tuple[int, ...], int] = {}
    for i in range(len(table)):
        first_of_prompt.setdefault(tuple(table.prompt_ids[i].tolist()), i)
    return [
        (
            str(tokenizer.decode(table.prompt_ids[i].tolist(), skip_special_tokens=True)),
            str(tokenizer.decode(table.real_ids[i].tolist())),
            str(tokenizer.decode(table.generated_ids[i].tolist())),
        )
        for i in list(first_of_prompt.values())[:count]
    ]
