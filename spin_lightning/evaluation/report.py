"""Pictures and tables of finished or running runs, from the files of their folders."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spin_lightning.errors import RunFolderError
from spin_lightning.run_folder import RunFolder


@dataclass(frozen=True)
class Curve:
    """One panel: a metric over the iterates.

    Attributes:
        metric: Name in the iterates' records.
        title: What the panel shows, with the unit.
        log: Whether the axis is logarithmic.
    """

    metric: str
    title: str
    log: bool = False


_CURVES = (
    Curve("exact/kl", "exact KL(p_data || p_t), nats", log=True),
    Curve("val/real_nll_per_token", "NLL of held-out real responses, nats per token"),
    Curve("val/kl_base", "KL(p_t || p_0), nats per response"),
    Curve("val/kl_previous", "KL(p_t || p_t-1), nats per response"),
    Curve("val/generated_tokens", "length of generated responses, tokens"),
    Curve("val/finished", "share of responses that end by themselves"),
)


def iterate_records(run: RunFolder) -> list[dict[str, Any]]:
    """What is known of each iterate of a run, ascending.

    Raises:
        RunFolderError: The folder holds no iterates.
    """
    known = run.known_iterates()
    if not known:
        raise RunFolderError(
            f"{run.root} holds no iterates", fix="name the folder of a run, as `fit` printed it"
        )
    return [run.read_iterate(t) for t in known]


def draw_iterates(runs: Sequence[RunFolder], path: Path) -> Path:
    """Draw every metric over the iterates, one line per run.

    Args:
        runs: The runs to compare.
        path: Where the picture goes.

    Returns:
        The picture's path.

    Raises:
        RunFolderError: A folder holds no iterates, or there is nothing to draw.
    """
    histories = {run.root.name: iterate_records(run) for run in runs}
    curves = [c for c in _CURVES if any(_points(h, c.metric) for h in histories.values())]
    if not curves:
        raise RunFolderError(
            f"{', '.join(histories)} has no metrics to draw, since nothing was held out",
            fix="hold examples out with data.val_examples",
        )
    figure = Figure(figsize=(10, 3.2 * ((len(curves) + 1) // 2)), layout="constrained")
    for place, curve in enumerate(curves, start=1):
        axes = figure.add_subplot((len(curves) + 1) // 2, 2, place)
        _draw(axes, curve, histories)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def comparison_table(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Rows of text: each metric of each run at every iterate; the first row is a head."""
    histories = {run.root.name: iterate_records(run) for run in runs}
    length = max(len(history) for history in histories.values())
    table = [["metric", "run", *(f"p{t}" for t in range(length))]]
    for curve in _CURVES:
        for name, history in histories.items():
            values = dict(_points(history, curve.metric))
            if values:
                cells = (f"{values[t]:.4f}" if t in values else "-" for t in range(length))
                table.append([curve.metric, name, *cells])
    return table


def _draw(axes: Axes, curve: Curve, histories: dict[str, list[dict[str, Any]]]) -> None:
    for name, history in histories.items():
        points = _points(history, curve.metric)
        errors = [history[t]["metrics"].get(f"{curve.metric}_error", 0.0) for t, _ in points]
        axes.errorbar(*_columns(points), yerr=errors, marker="o", capsize=2, label=name)
    if curve.metric == "val/generated_tokens":
        history = next(iter(histories.values()))
        real = _points(history, "val/real_tokens")
        axes.plot(*_columns(real), linestyle="--", color="gray", label="real responses")
    if curve.log:
        axes.set_yscale("log")
    axes.set_title(curve.title, fontsize=10)
    axes.set_xlabel("iterate")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)


def _points(history: Iterable[dict[str, Any]], metric: str) -> list[tuple[int, float]]:
    return [
        (record["index"], record["metrics"][metric])
        for record in history
        if metric in record.get("metrics", {})
    ]


def _columns(points: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [t for t, _ in points], [value for _, value in points]
