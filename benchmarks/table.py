"""Write the figures of the last run into the table of docs/performance.md."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.goals import SUBJECTS
from benchmarks.setup import parser

PAGE = Path("docs/performance.md")
START, END = "<!-- figures: python -m benchmarks.table -->", "<!-- end of figures -->"
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
    """The table, with its notes and the machine it was measured on."""
    figures = {figure["name"]: figure for result in results for figure in result["figures"]}
    lines = ["| what | against | measured | goal | |", "|---|---|---|---|---|"]
    for name, subject in SUBJECTS.items():
        for field, goal in subject.goals.items():
            value = figures.get(name, {}).get("fields", {}).get(field)
            if value is None:
                continue
            against = "the floor" if field == "floor" else subject.against
            measured = _UNITS[field].format(value)
            if field == "peak":
                measured += " ({:.0f} of {:.0f} MB)".format(*figures[name]["peak_mb"])
            verdict = "met" if goal.met(value) else "not met"
            lines.append(f"| {subject.what} | {against} | {measured} | {goal} | {verdict} |")
    notes = [f"- {SUBJECTS[n].what}: {f['note']}." for n, f in figures.items() if f["note"]]
    return "\n".join([*lines, "", *notes, "", _measured_on(results), ""])


def _measured_on(results: Sequence[dict[str, Any]]) -> str:
    machine = results[0]["machine"]
    versions = ", ".join(f"{name} {v}" for name, v in machine["versions"].items() if v)
    dates = sorted({result["machine"]["date"] for result in results})
    return (
        f"Model size {results[0]['size']}, {machine['device']}, {machine['threads']} threads, "
        f"{' to '.join(dates)}; {versions}."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Replace the table between the two marks of the page."""
    results = read_results(parser(__doc__).parse_args(arguments).out)
    page = PAGE.read_text()
    before, rest = page.split(START)
    after = rest.split(END)[1]
    PAGE.write_text(f"{before}{START}\n{markdown(results)}{END}{after}")
    print(f"{PAGE}: {verdict(results)}")


if __name__ == "__main__":
    main(sys.argv[1:])
