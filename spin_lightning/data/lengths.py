"""Lengths of prompts and responses in tokens: what fits, what is cut, and how they are spread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from spin_lightning.types import Example

# Which percentiles are shown; 100 is the longest.
PERCENTILES = (50, 90, 95, 99, 100)


def prompt_problem(length: int, longest: int | None, context: int) -> str | None:
    """What is wrong with a prompt of this length, if anything is.

    Args:
        length: Length of the prompt, tokens.
        longest: The user's cap; None for the context's length.
        context: Longest sequence that the model was made for.
    """
    if not length:
        return "a prompt without tokens"
    if longest is not None and length > longest:
        return f"a prompt of more than max_prompt_tokens={longest}: {length} tokens"
    if length >= context:
        return f"a prompt that fills the model's context of {context} tokens: {length} tokens"
    return None


def cut(example: Example, max_response_tokens: int, context: int) -> Example:
    """An example whose response is at most as long as the cap and as the context allows.

    A response that is longer keeps its first ids and is not finished.

    Args:
        example: The example with its whole response.
        max_response_tokens: Cap of the response, the stop id counted.
        context: Longest sequence that the model was made for.
    """
    cap = min(max_response_tokens, context - len(example.prompt_ids))
    if len(example.real_ids) <= cap:
        return example
    return replace(example, real_ids=example.real_ids[:cap], real_finished=False)


@dataclass(frozen=True)
class Lengths:
    """How many tokens the texts of a source have.

    Attributes:
        count: Number of texts.
        percentiles: Smallest length that this share of the texts (in percent) does not exceed.
        cap: Most tokens that are used; None without a cap.
        over: Number of texts over the cap.
    """

    count: int = 0
    percentiles: Mapping[int, int] = field(default_factory=dict)
    cap: int | None = None
    over: int = 0

    @classmethod
    def of(cls, lengths: Sequence[int], cap: int | None) -> Lengths:
        """Summarize lengths.

        >>> Lengths.of([3, 1, 2, 40], cap=8).percentiles
        {50: 2, 90: 40, 95: 40, 99: 40, 100: 40}
        """
        ordered = sorted(lengths)
        at = {p: ordered[ceil(p * len(ordered) / 100) - 1] for p in PERCENTILES if ordered}
        over = 0 if cap is None else sum(length > cap for length in ordered)
        return cls(len(ordered), at, cap, over)
