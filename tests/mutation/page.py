"""The page that says what mutation testing found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tests.mutation.forked import Verdict
from tests.mutation.mutants import Mutant
from tests.mutation.reasons import REASONS

_HOW = (
    "Written by `make mutation`: cosmic-ray's operators, one change a mutant. The module's test",
    "file runs on it in a fork of a warm process, until the first failure. One that runs into the",
    "limit of time counts as killed.",
)


@dataclass(frozen=True)
class Outcome:
    """What came of a mutant."""

    mutant: Mutant
    verdict: Verdict
    seconds: float


def write_page(outcomes: Sequence[Outcome], places: int, seed: int, path: Path) -> float:
    """Write the page; the share of mutants that were killed."""
    modules = list(dict.fromkeys(outcome.mutant.module for outcome in outcomes))
    killed = [outcome for outcome in outcomes if outcome.verdict != "survived"]
    share = len(killed) / len(outcomes)
    seconds = [outcome.seconds for outcome in outcomes]
    lines = [
        "# Mutation testing",
        "",
        *_HOW,
        "",
        f"{len(outcomes)} mutants drawn with seed {seed} from {places} places:",
        f"**{len(killed)} killed ({share:.1%})**.",
        f"Seconds a mutant: median {median(seconds):.1f}, most {max(seconds):.1f}.",
        "",
        "| module | mutants | killed | of these by the limit of time | survived |",
        "|---|---|---|---|---|",
    ]
    for module in sorted(modules):
        here = [outcome.verdict for outcome in outcomes if outcome.mutant.module == module]
        counts = [here.count(verdict) for verdict in ("killed", "timeout", "survived")]
        lines.append(
            f"| `{module}.py` | {len(here)} | {counts[0] + counts[1]} | {counts[1]} | {counts[2]} |"
        )
    lines += ["", "## Survivors", "", "| where | is | became | why it may survive |"]
    lines.append("|---|---|---|---|")
    survivors = [outcome.mutant for outcome in outcomes if outcome.verdict == "survived"]
    for mutant in sorted(survivors, key=lambda m: (m.module, m.line, m.after)):
        reason = REASONS.get((mutant.module, mutant.before, mutant.after), "**no reason known**")
        code = (f"`{text.replace('|', '&#124;')}`" for text in (mutant.before, mutant.after))
        lines.append(f"| `{mutant.module}.py:{mutant.line}` | {' | '.join(code)} | {reason} |")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return share
