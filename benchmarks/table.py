"""Write the figures of the last run of every size into the tables of docs/performance.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

from benchmarks.goals import SUBJECTS, goals_of
from benchmarks.setup import parser

PAGE = Path("docs/performance.md")
START = "<!-- figures of {}: python -m benchmarks.table -->"
END = "<!-- end of figures -->"
_UNITS = {
    "ratio": "{:.2f}× as fast",
    "floor": "{:.2f}× the floor's time",
    "peak": "{:.2f}× its memory",
    "cost": "{:.2f}× the time",
    "excess": "{:.2f}×",
    "spread": "{:.2f}×, largest over smallest",
}


def read_results(out: Path) -> list[dict[str, Any]]:
    """Results of all benchmarks, oldest first."""
    files = sorted(out.glob("*.json"), key=lambda path: path.stat().st_mtime)
    return [json.loads(path.read_text()) for path in files]


def verdict(results: Iterable[dict[str, Any]]) -> str:
    """A sentence with the number of goals met."""
    met = [
        value
        for result in results
        if not result["tiny"]
        for figure in result["figures"]
        for value in figure["met"].values()
    ]
    return f"{sum(met)} of {len(met)} goals met."


def markdown(results: Sequence[dict[str, Any]]) -> str:
    """The table of one size, with its notes and the machine it was measured on."""
    goals = goals_of(results[0]["size"])
    figures = {figure["name"]: figure for result in results for figure in result["figures"]}
    lines = ["| what | against | measured | goal | |", "|---|---|---|---|---|"]
    for name, subject in SUBJECTS.items():
        for field, value in figures.get(name, {}).get("fields", {}).items():
            goal = goals[name].get(field)
            against = "the floor" if field == "floor" else subject.against
            measured = _UNITS[field].format(value)
            if field == "peak":
                measured += " ({:.0f} of {:.0f} MB)".format(*figures[name]["peak_mb"])
            judged = ("–", "") if goal is None else (goal, "met" if goal.met(value) else "not met")
            lines.append(
                "| {} | {} | {} | {} | {} |".format(subject.what, against, measured, *judged)
            )
    notes = [f"- {SUBJECTS[n].what}: {f['note']}." for n, f in figures.items() if f["note"]]
    return "\n".join([*lines, "", *notes, "", _measured_on(results), ""])


def _measured_on(results: Sequence[dict[str, Any]]) -> str:
    machine = results[0]["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    dates = sorted({result["machine"]["date"] for result in results})
    return (
        f"Model size {results[0]['size']} with {results[0]['weights']} weights, "
        f"{machine['device']}, {machine['threads']} threads, "
        f"{' to '.join(dates)}; {versions}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Replace the tables of the sizes that were measured, between their marks on the page."""
    results = read_results(parser(__doc__).parse_args(arguments).out)
    for size, of_size in groupby(sorted(results, key=itemgetter("size")), itemgetter("size")):
        measured = list(of_size)
        start = START.format(size)
        before, rest = PAGE.read_text().split(start)
        after = rest.split(END, 1)[1]
        PAGE.write_text(f"{before}{start}\n{markdown(measured)}{END}{after}")
        print(f"{PAGE}, {size}: {verdict(measured)}")


if __name__ == "__main__":
    main(sys.argv[1:])
