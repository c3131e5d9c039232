"""Which examples are held out for validation."""

from __future__ import annotations

from collections.abc import Sequence

from spin_lightning import keyed
from spin_lightning.errors import SettingError
from spin_lightning.types import Example

MOST_HELD_OUT = 256
# With fewer prompts, holding whole prompts out would leave too few to train or to validate on.
_FEWEST_PROMPTS = 64


def held_out_count(examples: int, fraction: float, count: int | None) -> int:
    """Number of examples to hold out.

    Args:
        examples: Number of examples in all.
        fraction: Share to hold out, at most 256 examples, if `count` is None.
        count: Number to hold out.

    Raises:
        SettingError: No example would be left.
    """
    share = min(MOST_HELD_OUT, round(fraction * examples))
    count = share if count is None else count
    if count >= examples:
        raise SettingError(
            "data.val_examples",
            count,
            f"there are only {examples} examples in all",
            fix="hold out fewer",
        )
    return count


def hold_out(examples: Sequence[Example], count: int) -> tuple[list[Example], list[Example], str]:
    """Split off at most `count` examples: whole prompts, or single responses if prompts are few.

    The seed determines which ones. A prompt with several responses is on one side only, unless
    single responses are held out.

    Args:
        examples: All examples.
        count: How many to hold out; fewer if the remaining prompts all have too many responses.

    Returns:
        The examples to train on, those held out, and a description of the latter.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(example.prompt_ids, []).append(i)
    by_prompt = len(groups) >= _FEWEST_PROMPTS
    clusters = list(groups.values()) if by_prompt else [[i] for i in range(len(examples))]
    seed = keyed.global_seed()
    order = keyed.epoch_order(keyed.row_key(seed, -1, 0, 0), 0, len(clusters))
    held: set[int] = set()
    for cluster in order:
        # Skip a prompt with more responses than are still wanted: a smaller one may follow.
        if len(held) + len(clusters[cluster]) <= count:
            held.update(clusters[cluster])
    train = [example for i, example in enumerate(examples) if i not in held]
    val = [example for i, example in enumerate(examples) if i in held]
    what = (
        f"{len(val)} examples with prompts of their own"
        if by_prompt
        else f"{len(val)} responses (not prompts: the data has only {len(groups)} distinct prompts)"
    )
    return train, val, what
