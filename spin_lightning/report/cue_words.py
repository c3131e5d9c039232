"""What tells real from generated responses, in words."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

from transformers import PreTrainedTokenizerBase

from spin_lightning.rows.cues import Cue
from spin_lightning.rows.tells import Tell, Tells

CUE_NAMES: Final = {
    "finished": "finished or not",
    "special_token": "special token",
    "first_token": "first token",
    "last_token": "last token",
    "length": "length",
}
TELL_COLUMNS: Final = ["side", "text", "real", "generated", "log-odds", "z"]
# Of a run of blanks, which some tokenizers add as one token.
_BLANK: Final = " \t\r\n▁"


def special_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Tokens that a tokenizer adds to its vocabulary, such as `</s>` or `<think>`.

    Not all of them are marked as special: `<think>` is not in Qwen3's. Runs of blanks are no part
    of them.
    """
    added = tokenizer.added_tokens_decoder.items()
    named = {i for i, token in added if token.special or token.content.strip(_BLANK)}
    return named | set(tokenizer.all_special_ids)


def cue_words(cue: Cue, tokenizer: PreTrainedTokenizerBase) -> str:
    """The rule of a cue, such as `"Answer" starts real responses`."""
    side = "real" if cue.real else "generated"
    if cue.name == "length":
        return f"{side} responses have {cue.value} tokens or more"
    if cue.name == "finished":
        return f"{side} responses end more often"
    verb = {"first_token": "starts", "last_token": "ends", "special_token": "is in"}[cue.name]
    token = quoted((cue.value,), tokenizer) if cue.value >= 0 else "nothing"
    return f"{token} {verb} {side} responses"


def best_cue_line(tells: Tells, tokenizer: PreTrainedTokenizerBase) -> str:
    """The best single cue in one line."""
    best = tells.best
    found = f"{CUE_NAMES[best.name]}, {best.accuracy:.2f}"
    if not best.clear:
        return f"Best single cue: none above chance ({found})."
    return f"Best single cue: {found} ({cue_words(best, tokenizer)})."


def clear_cues(tells: Tells, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The rule in words of each cue that chance does not explain, by the cue's name."""
    return {cue.name: cue_words(cue, tokenizer) for cue in tells.cues if cue.clear}


def tell_rows(
    tells: Sequence[Tell], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[str, str, str, str, str, str]]:
    """A row of `TELL_COLUMNS` per token or pair."""
    return [
        (
            "real" if tell.z > 0 else "generated",
            quoted(tell.ids, tokenizer),
            str(tell.counts.real),
            str(tell.counts.generated),
            f"{tell.log_odds:+.2f}",
            f"{tell.z:+.1f}",
        )
        for tell in tells
    ]


def quoted(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of some tokens in quotes, with line breaks and the like escaped."""
    return json.dumps(str(tokenizer.decode(list(ids))), ensure_ascii=False)
