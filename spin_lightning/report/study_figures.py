"""A picture of each part of a grid: over a setting if lines differ in one, else over iterates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from spin_lightning.report.figures import log_values
from spin_lightning.report.study import CURVES, Curves, draw_study
from spin_lightning.report.study_plan import Play
from spin_lightning.report.study_results import Line
from spin_lightning.report.thresholds import best_response_threshold

# With fewer values of a setting, curves over iterates say more.
_FEWEST_VALUES = 3
_BETA = "model.beta"


def draw_part(lines: Sequence[Line], path: Path) -> Path | None:
    """Draw one part of a grid.

    Args:
        lines: Its lines.
        path: Where the picture goes.

    Returns:
        The picture's path; None if the runs have no metric in common that is drawn.
    """
    runs = [run for line in lines for run in line.runs.values()]
    metrics = [metric for metric in CURVES if all(metric in run[-1] for run in runs)]
    if not metrics:
        return None
    setting = _axis(lines)
    if setting is None:
        curves: Curves = {m: {line.label: line.points(m) for line in lines} for m in metrics}
        return draw_study(curves, path)
    figure = Figure(figsize=(12, 4.8), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharex=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for variant in dict.fromkeys(line.variant for line in lines):
            own = [line for line in lines if line.variant == variant]
            late = {line.settings[setting]: line.late(metric) for line in own}
            _draw_over(axes, variant, late, _threshold(own[0]) if setting == _BETA else None)
        _draw_start(axes, [points[0] for line in lines for points in line.points(metric)])
        axes.set_title(CURVES[metric].replace(": ", ":\n", 1), fontsize=9)
        axes.set_xscale("log")
        values = sorted({line.settings[setting] for line in lines})
        axes.set_xticks(values, [f"{value:g}" for value in values])
        axes.xaxis.set_minor_locator(NullLocator())
        if metric.startswith("exact/"):
            log_values(axes)
        axes.grid(alpha=0.3)
    note = "; dotted: threshold of exact best responses" if setting == _BETA else ""
    figure.supxlabel(f"{setting}: mean over the second half of the iterates{note}", fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    # (Matplotlib lists lines before error bars.)
    figure.legend(
        handles[1:] + handles[:1], labels[1:] + labels[:1], loc="outside upper center", ncols=5
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def _axis(lines: Sequence[Line]) -> str | None:
    """The one setting, a positive number, in which lines differ; None if there is none."""
    settings = {name for line in lines for name in line.settings}
    if len(settings) != 1:
        return None
    (name,) = settings
    values = [line.settings.get(name) for line in lines]
    are_numbers = all(isinstance(value, int | float) and value > 0 for value in values)
    return name if are_numbers and len(set(values)) >= _FEWEST_VALUES else None


def _threshold(line: Line) -> float | None:
    """See `best_response_threshold`; settings that only the config has are not known here."""
    play = Play.of(line.variant, 0)
    shared = {name.removeprefix("model."): value for name, value in line.common.items()}
    known = {name: value for name, value in shared.items() if value is not None}
    return best_response_threshold(play.model, {**known, **play.settings})


def _draw_over(
    axes: Axes, variant: str, late: Mapping[float, Sequence[float]], threshold: float | None
) -> None:
    """The median over seeds at each value, a bar from the smallest to the largest."""
    values = sorted(late)
    middle = [median(late[value]) for value in values]
    below = [m - min(late[value]) for m, value in zip(middle, values, strict=True)]
    above = [max(late[value]) - m for m, value in zip(middle, values, strict=True)]
    bars = axes.errorbar(
        values, middle, yerr=[below, above], marker="o", markersize=4, capsize=3, label=variant
    )
    if threshold is not None:
        axes.axvline(threshold, color=bars[0].get_color(), linestyle=":", alpha=0.8)


def _draw_start(axes: Axes, starts: Sequence[float]) -> None:
    axes.axhline(median(starts), color="grey", linestyle="--", linewidth=1, label="start, p0")
