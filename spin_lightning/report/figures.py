"""Figures of runs, each small enough for a phone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any, Final

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from spin_lightning.report.measures import Measure, Records, points

# Okabe and Ito's colors, which color-blind readers can tell apart.
COLORS: Final = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_REAL = "#777777"
_SIZE = (4.8, 3.0)
_BINS = 30
# Characters of a line of the legend; without a bound, a long name leaves no room for the curve.
_LEGEND_WIDTH = 36


def curve_figure(measure: Measure, histories: Mapping[str, Records]) -> Figure:
    """A metric over the iterates, one line per run."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    draw_curve(figure.add_subplot(), measure, histories)
    return figure


def draw_curve(axes: Axes, measure: Measure, histories: Mapping[str, Records]) -> None:
    """Draw a metric over the iterates, with its standard errors if there are any."""
    for i, (name, records) in enumerate(histories.items()):
        values = points(records, measure.name)
        if not values:
            continue
        errors = points(records, f"{measure.name}_error")
        axes.errorbar(
            list(values),
            list(values.values()),
            yerr=[errors.get(t, 0.0) for t in values],
            marker="o",
            capsize=2,
            color=COLORS[i % len(COLORS)],
            label=textwrap.fill(name, _LEGEND_WIDTH),
        )
    if measure.name == "val/generated_tokens":
        real = points(next(iter(histories.values())), "val/real_tokens")
        axes.plot(list(real), list(real.values()), "--", color=_REAL, label="real responses")
    if measure.log:
        log_values(axes)
    axes.set_xlabel("iterate")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def log_values(axes: Axes) -> None:
    """Scale the values logarithmically, with plain numbers at 1, 2 and 5."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def histogram_figure(
    real: NDArray[Any], generated: NDArray[Any], label: str, color: str, bins: NDArray[Any]
) -> Figure:
    """Two overlaid histograms, in shares of their responses."""
    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.add_subplot()
    for values, name, style in (
        (real, "real", {"color": _REAL, "alpha": 0.45}),
        (generated, "generated", {"color": color, "histtype": "step", "linewidth": 1.8}),
    ):
        weights = np.full(len(values), 1 / max(1, len(values)))
        axes.hist(values, bins=bins, weights=weights, label=name, **style)  # type: ignore[arg-type]
    axes.set_xlabel(label)
    axes.set_ylabel("share")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    return figure


def length_bins(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> NDArray[Any]:
    """Bin edges between whole numbers of tokens, the same for every histogram of a report."""
    longest = max(int(values.max(initial=1)) for pair in pairs for values in pair)
    step = max(1, -(-longest // _BINS))
    return np.arange(0, longest + 2 * step, step) - 0.5


def reward_bins(pairs: Sequence[tuple[NDArray[Any], NDArray[Any]]]) -> NDArray[Any]:
    """Bin edges around all values but the outermost half percent on either side."""
    values = np.concatenate([values for pair in pairs for values in pair])
    low, high = np.quantile(values, [0.005, 0.995])
    return np.linspace(low, max(high, low + 1e-6), _BINS + 1)


def svg(figure: Figure) -> bytes:
    """A figure as SVG, text as paths; the same figure gives the same bytes."""
    buffer = BytesIO()
    with mpl.rc_context({"svg.fonttype": "path", "svg.hashsalt": "spin-lightning"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
