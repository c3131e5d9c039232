"""The report's section on what tells real from generated responses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

from transformers import PreTrainedTokenizerBase

from spin_lightning.report.cue_words import CUE_NAMES, TELL_COLUMNS, best_cue_line, tell_rows
from spin_lightning.report.run_view import RunView
from spin_lightning.rows.cues import CUES
from spin_lightning.rows.tells import Tell, Tells

# Iterates of a run whose tokens are listed; the newest ones, since rows are read for each.
_LISTED: Final = 4


def tells_of_runs(views: Mapping[str, RunView]) -> list[dict[str, Any]]:
    """Per run with rows, a table of cues over the iterates and the tokens of the newest ones."""
    sections = []
    for name, view in views.items():
        with_rows = [record.index for record in view.records if record.rows is not None]
        found = {t: tells for t in with_rows[-_LISTED:] if (tells := view.tells(t)) is not None}
        if found:
            sections.append(_section(name, found, view.tokenizer))
    return sections


def _section(
    name: str, found: Mapping[int, Tells], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Any]:
    cues = [
        (CUE_NAMES[cue], [f"{tells.cues[place].accuracy:.2f}" for tells in found.values()])
        for place, cue in enumerate(CUES)
    ]
    parts = [_part(t, tells, tokenizer) for t, tells in found.items()]
    return {"name": name, "iterates": list(found), "cues": cues, "parts": parts}


def _part(t: int, tells: Tells, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    real, generated = tells.responses
    titles = (("tokens", tells.tokens), ("token pairs", tells.pairs))
    tables = [
        _table(f"{title} of {side} responses", kept, tokenizer)
        for title, grams in titles
        for side in ("real", "generated")
        if (kept := [tell for tell in grams if (tell.z > 0) == (side == "real")])
    ]
    return {
        "iterate": t,
        "line": best_cue_line(tells, tokenizer),
        "responses": f"{real:,} real and {generated:,} generated responses.",
        "tables": tables,
    }


def _table(title: str, tells: Sequence[Tell], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    rows = [row[1:] for row in tell_rows(tells, tokenizer)]
    return {"title": title, "columns": TELL_COLUMNS[2:], "rows": rows}
