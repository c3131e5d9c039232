"""Reports of finished or running runs, from the files of their folders."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure

from spin_lightning.errors import RunFolderError
from spin_lightning.report.figures import draw_curve
from spin_lightning.report.measures import MEASURES, measures_of, points
from spin_lightning.report.page import make_page
from spin_lightning.report.run_view import iterate_records, read_runs
from spin_lightning.run.folder import RunFolder

# What the one picture of a run shows; the page shows all.
_IN_PICTURE = (
    "exact/kl",
    "val/real_nll_per_token",
    "val/kl_base",
    "val/kl_previous",
    "val/generated_tokens",
    "val/finished",
)


def write_report(runs: Sequence[RunFolder], folder: Path) -> Path:
    """Write one self-contained page on one run or several, and its pictures as PNG.

    Args:
        runs: The runs to put side by side.
        folder: Where `report.html` and `figures/*.png` go.

    Returns:
        The page.

    Raises:
        RunFolderError: A folder holds no iterates.
    """
    page = make_page(read_runs(runs), version("spin-lightning"))
    pictures = folder / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, figure in page.figures.items():
        figure.savefig(pictures / f"{name}.png", dpi=130)
    path = folder / "report.html"
    path.write_text(page.html, encoding="utf-8")
    return path


def draw_iterates(runs: Sequence[RunFolder], path: Path) -> Path:
    """Draw the main metrics over the iterates into one picture, one line per run.

    Args:
        runs: The runs to compare.
        path: Where the picture goes.

    Returns:
        The picture's path.

    Raises:
        RunFolderError: A folder holds no iterates, or there is nothing to draw.
    """
    histories = {run.root.name: iterate_records(run) for run in runs}
    measures = [
        m
        for m in MEASURES
        if m.name in _IN_PICTURE and any(points(h, m.name) for h in histories.values())
    ]
    if not measures:
        raise RunFolderError(
            f"{', '.join(histories)} has no metrics to draw, since nothing was held out",
            fix="hold examples out with data.val_examples",
        )
    rows = (len(measures) + 1) // 2
    figure = Figure(figsize=(10, 3.2 * rows), layout="constrained")
    for place, measure in enumerate(measures, start=1):
        axes = figure.add_subplot(rows, 2, place)
        draw_curve(axes, measure, histories)
        axes.set_title(measure.title, fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    return path


def comparison_table(runs: Sequence[RunFolder]) -> list[list[str]]:
    """Rows of text: each metric of each run at every iterate; the first row is a head."""
    views = read_runs(runs)
    histories = {view.name: view.records for view in views}
    length = max(len(records) for records in histories.values())
    table = [["metric", "run", *(f"p{t}" for t in range(length))]]
    for measure in measures_of(histories.values()):
        for name, records in histories.items():
            values = points(records, measure.name)
            if values:
                cells = (f"{values[t]:.4f}" if t in values else "-" for t in range(length))
                table.append([measure.name, name, *cells])
    return table
