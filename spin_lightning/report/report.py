"""Reports of finished or running runs: a page, a picture of all curves, and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from matplotlib.figure import Figure

from spin_lightning.errors import RunFolderError
from spin_lightning.report.figures import draw_curve
from spin_lightning.report.measures import MEASURES, Records, measures_of, points
from spin_lightning.report.page import make_page
from spin_lightning.report.run_view import RunView

# The metrics in the one picture of a run; the page shows all of them.
_IN_PICTURE = (
    "exact/kl",
    "val/real_nll_per_token",
    "val/kl_base",
    "val/kl_previous",
    "val/generated_tokens",
    "val/finished",
)


def write_report(views: Sequence[RunView], folder: Path) -> Path:
    """Write one self-contained page on one run or several, and its figures as PNG.

    Args:
        views: The runs to put side by side, see `read_runs`.
        folder: The folder for `report.html` and `figures/*.png`.

    Returns:
        Path of the page.
    """
    page = make_page(views, version("spin-lightning"))
    pictures = folder / "figures"
    pictures.mkdir(parents=True, exist_ok=True)
    for name, figure in page.figures.items():
        figure.savefig(pictures / f"{name}.png", dpi=130)
    path = folder / "report.html"
    path.write_text(page.html, encoding="utf-8")
    return path


def draw_iterates(histories: Mapping[str, Records], path: Path) -> Path:
    """Draw the main metrics over the iterates into one picture, one line per run.

    Args:
        histories: The records of each run's iterates, by the run's name.
        path: Where the picture goes.

    Returns:
        The picture's path.

    Raises:
        RunFolderError: There is no metric to draw.
    """
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


def comparison_table(views: Sequence[RunView]) -> list[list[str]]:
    """Each metric of each run at every iterate as rows of text; the first row is the header."""
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
