"""What a grid gave: lines of runs that differ in their seed alone, and a table of each part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from spin_lightning.errors import RunFolderError
from spin_lightning.report.study import first_late, paired_interval
from spin_lightning.report.study_plan import Play

CONTROL: Final = "SFT"
_SETTINGS: Final = ("model.", "data.", "trainer.")
_HELD_OUT: Final = "val/real_nll_per_token"
_LATE: Final = ("exact/kl", "exact/mixture_kl")
_AT_BEST: Final = (
    "exact/kl",
    "exact/reverse_kl",
    "exact/total_variation",
    "exact/outside_mass",
    _HELD_OUT,
)
# They stand with their range over the seeds; the others with their median alone, for the width.
_WITH_RANGE: Final = ("exact/kl", "exact/mixture_kl")

# The metrics of the iterates of one run, ascending.
Run = Sequence[Mapping[str, float]]


@dataclass(frozen=True)
class Line:
    """Runs that differ in their seed alone.

    Attributes:
        variant: The variant with its settings.
        settings: Further settings by full name, as far as the lines of the part differ in them.
        common: Those that all lines of the part have.
        runs: The runs by seed.
    """

    variant: str
    settings: Mapping[str, Any]
    common: Mapping[str, Any]
    runs: Mapping[int, Run]

    @property
    def label(self) -> str:
        """The variant and its settings, for a legend."""
        shown = [f"{name.partition('.')[2]}={value}" for name, value in self.settings.items()]
        return ", ".join([self.variant, *shown])

    def is_like(self, other: Line) -> bool:
        """Whether another line has all settings that this one has."""
        return all(other.settings.get(name) == value for name, value in self.settings.items())

    def late(self, metric: str) -> list[float]:
        """The mean over the second half of the iterates, of each run that has the metric."""
        return [fmean(points[first_late(len(points)) :]) for points in self.points(metric)]

    def at_best(self, metric: str) -> dict[int, float]:
        """The metric of each run at its lowest held-out NLL, by seed."""
        return {
            seed: run[best(run)][metric] for seed, run in self.runs.items() if metric in run[-1]
        }

    def points(self, metric: str) -> list[list[float]]:
        """The metric over the iterates, of each run that has it."""
        return [[at[metric] for at in run] for run in self.runs.values() if metric in run[-1]]


def best(run: Run) -> int:
    """The iterate with the lowest held-out NLL; the last one where nothing is held out."""
    if _HELD_OUT not in run[-1]:
        return len(run) - 1
    return min(range(len(run)), key=lambda t: run[t][_HELD_OUT])


def read_results(path: Path) -> dict[str, list[Line]]:
    """Read `study.parquet`: the lines of each part, in the order of the file.

    Runs that ended early are left out: see `unfinished`.

    Raises:
        RunFolderError: It cannot be read, or is not such a table.
    """
    rows = [row for row in _rows(path) if row["complete"]]
    parts = dict.fromkeys(part for row in rows for part in row["parts"])
    return {part: _lines([row for row in rows if part in row["parts"]]) for part in parts}


def unfinished(path: Path) -> list[str]:
    """The cells of `study.parquet` that ended early.

    Raises:
        RunFolderError: As in `read_results`.
    """
    return list(dict.fromkeys(row["cell"] for row in _rows(path) if not row["complete"]))


def _rows(path: Path) -> list[dict[str, Any]]:
    fix = "give the study.parquet of `spin-lightning study --grid`"
    if not path.is_file():
        raise RunFolderError(f"there is no file {path}", fix=fix)
    try:
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    except (OSError, pa.ArrowException) as error:
        raise RunFolderError(f"{path} cannot be read ({error})", fix=fix) from error
    if not rows or not {"cell", "parts", "variant", "seed", "complete", "iterate"} <= set(rows[0]):
        raise RunFolderError(f"{path} is not the table of a grid", fix=fix)
    return rows


def _lines(rows: list[dict[str, Any]]) -> list[Line]:
    names = [name for name in rows[0] if name.startswith(_SETTINGS)]
    differing = [name for name in names if len({str(row[name]) for row in rows}) > 1]
    common = {name: rows[0][name] for name in names if name not in differing}
    lines: dict[str, Line] = {}
    runs: dict[str, dict[int, list[Mapping[str, float]]]] = {}
    for row in sorted(rows, key=lambda row: row["iterate"]):
        own = Play.of(row["variant"], 0).settings
        settings = {
            name: row[name]
            for name in differing
            if row[name] is not None and name.removeprefix("model.") not in own
        }
        line = Line(row["variant"], settings, common, {})
        lines.setdefault(line.label, line)
        metrics = {k: v for k, v in row.items() if "/" in k and v is not None}
        runs.setdefault(line.label, {}).setdefault(row["seed"], []).append(metrics)
    return [replace(line, runs=runs[label]) for label, line in lines.items()]


def results_table(lines: Sequence[Line]) -> list[list[str]]:
    """One row per line, as rows of text: medians over seeds, with the range for some metrics.

    *late* is the mean over the second half of a run's iterates, *best* its iterate with the lowest
    held-out NLL. *settled* counts the runs whose late KL is below that of their first iterate.
    The last column is the mean paired difference to the control with its 95 % interval, if the
    control is among the lines. The first row is the header.
    """
    settings = list(dict.fromkeys(name for line in lines for name in line.settings))
    runs = [run for line in lines for run in line.runs.values()]
    late, at_best = (
        [metric for metric in metrics if all(metric in run[-1] for run in runs)]
        for metrics in (_LATE, _AT_BEST)
    )
    controls = [line for line in lines if line.variant == CONTROL]
    compared = at_best[0] if at_best and controls and len(lines) > 1 else None
    header = ["variant", *(name.partition(".")[2] for name in settings)]
    header += ["settled" if late else "seeds"]
    header += [f"late {_short(m)}" for m in late] + [f"best {_short(m)}" for m in at_best]
    header += [] if compared is None else [f"best {_short(compared)} minus {CONTROL}"]
    table = [header]
    for line in lines:
        cells = [line.variant, *(str(line.settings.get(name, "")) for name in settings)]
        cells.append(_settled(line) if late else str(len(line.runs)))
        cells += [_shown(metric, line.late(metric)) for metric in late]
        cells += [_shown(metric, list(line.at_best(metric).values())) for metric in at_best]
        if compared is not None:
            # One that differs in a setting of its own is not a control.
            control = next((one for one in controls if one.is_like(line)), None)
            if control is None or control is line:
                cells.append("-")
            else:
                cells.append(_difference(line, control, compared))
        table.append(cells)
    return table


def _settled(line: Line) -> str:
    starts = [points[0] for points in line.points(_LATE[0])]
    below = [late < start for late, start in zip(line.late(_LATE[0]), starts, strict=True)]
    return f"{sum(below)} of {len(below)}"


def _short(metric: str) -> str:
    return metric.partition("/")[2].replace("_", " ")


def _shown(metric: str, values: Sequence[float]) -> str:
    middle = f"{median(values):.3f}"
    if metric not in _WITH_RANGE or len(values) < 2:
        return middle
    return f"{middle} ({min(values):.2f}–{max(values):.2f})"


def _difference(line: Line, control: Line, metric: str) -> str:
    own, theirs = line.at_best(metric), control.at_best(metric)
    seeds = [seed for seed in own if seed in theirs]
    if len(seeds) < 2:
        return "-"
    low, mean, high = paired_interval([own[s] for s in seeds], [theirs[s] for s in seeds])
    return f"{mean:+.3f} ({low:+.2f} to {high:+.2f})"
