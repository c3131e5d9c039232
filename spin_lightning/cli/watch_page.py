"""What `watch` shows: read from the files of a run while another process writes them."""

from __future__ import annotations

import csv
import io
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Final, TypeVar

import pyarrow as pa
from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spin_lightning.callbacks.console import iterate_lines
from spin_lightning.errors import SpinError
from spin_lightning.report.measures import MEASURES, points
from spin_lightning.report.samples import sample_pairs
from spin_lightning.report.verdicts import Verdict, find_verdicts
from spin_lightning.rows.manifest import read_manifest
from spin_lightning.rows.store import read_rows
from spin_lightning.run.files import read_json
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.progress import LINE_SECONDS, Progress, duration
from spin_lightning.run.records import IterateRecord

_BLOCKS: Final = "▁▂▃▄▅▆▇█"
_MOST_CURVES: Final = 7
_PAIRS: Final = 3
# From this width on, curves and samples stand side by side.
_WIDE: Final = 130
# A live process writes its progress every half minute.
_SILENT_SECONDS: Final = 3 * LINE_SECONDS
_ENDINGS: Final = {
    "finished": ("The run has finished.", "green"),
    "stopped": ("The run was stopped. Start the same command again to continue.", "yellow"),
    "failed": ("The run has failed; its terminal or log says why.", "red"),
}
T = TypeVar("T")
# What a file may raise that is half written, or is replaced while it is read.
_UNREADABLE = (SpinError, OSError, ValueError, KeyError, TypeError, pa.ArrowException, csv.Error)


@dataclass(frozen=True)
class Curve:
    """A metric over the iterates, or over the steps.

    Attributes:
        title: Its name.
        values: Its values, in order.
    """

    title: str
    values: Sequence[float]


@dataclass(frozen=True)
class Glance:
    """A run at one moment.

    Attributes:
        name: The run folder.
        records: The record of each iterate that can be read, ascending.
        progress: What its process does; None for a run that writes no such file.
        silent: Seconds for which the process has given no sign of life, as far as it was watched.
        loss: Training loss over the logged steps.
        pairs: (prompt, real, generated) of held-out rows of the newest iterate that answered them.
        answered_by: That iterate.
        verdicts: Known states of the run.
    """

    name: str
    records: Sequence[IterateRecord]
    progress: Progress | None
    silent: float
    loss: Sequence[float]
    pairs: Sequence[tuple[str, str, str]]
    answered_by: int
    verdicts: Sequence[Verdict]

    @property
    def has_ended(self) -> bool:
        """Whether there is nothing more to wait for."""
        progress = self.progress
        return progress is not None and (progress.state != "running" or progress.is_gone)

    @property
    def status(self) -> str:
        """The phase, or how the run ended, in a line."""
        if self.progress is None:
            return "No progress yet: the run has not begun, or an older version writes it."
        if self.progress.is_gone:
            return "The process of the run is gone. Start the same command again to continue."
        if self.progress.state in _ENDINGS:
            return _ENDINGS[self.progress.state][0]
        return str(self.progress)

    @property
    def curves(self) -> list[Curve]:
        """The metrics that are known of two iterates or more, and the training loss."""
        over_iterates = (
            Curve(measure.title, list(points(self.records, measure.name).values()))
            for measure in MEASURES
        )
        known = [curve for curve in over_iterates if len(curve.values) > 1][:_MOST_CURVES]
        steps = [Curve("Training loss over steps", self.loss)] if len(self.loss) > 1 else []
        return [*steps, *known]


class RunReader:
    """Reads a run again and again, and never writes into its folder.

    A file that cannot be read at the moment shows what it held before.

    Args:
        run: The run folder.
    """

    def __init__(self, run: RunFolder) -> None:
        """Read nothing yet."""
        self._run = run
        self._records: dict[int, IterateRecord] = {}
        self._progress: Progress | None = None
        self._heard_at = time.monotonic()
        self._loss: list[float] = []
        self._pairs: list[tuple[str, str, str]] = []
        self._answered_by = -1

    def read(self) -> Glance:
        """The run as it is now."""
        self._read_progress()
        known = _or(self._run.known_iterates, list(self._records))
        found = {t: _or(partial(self._run.record, t), self._records.get(t)) for t in known}
        self._records = {t: record for t, record in found.items() if record is not None}
        self._loss = _or(self._read_loss, self._loss)
        for t in reversed(known):
            if t == self._answered_by or _or(partial(self._read_pairs, t), False):
                break
        records = [self._records[t] for t in sorted(self._records)]
        return Glance(
            str(self._run.root),
            records,
            self._progress,
            time.monotonic() - self._heard_at,
            self._loss,
            self._pairs,
            self._answered_by,
            _or(lambda: find_verdicts(records, self._run.best_record()), []) if records else [],
        )

    def _read_progress(self) -> None:
        before = self._progress
        self._progress = _or(partial(read_json, self._run.progress, "wait", Progress.of), before)
        if self._progress != before:
            self._heard_at = time.monotonic()

    def _read_loss(self) -> list[float]:
        text = (self._run.root / "metrics.csv").read_text(encoding="utf-8")
        # Without a last line that is still being written.
        rows = csv.DictReader(io.StringIO(text[: text.rfind("\n") + 1]))
        cells = (row.get("train/loss") for row in rows)
        return [value for cell in cells if cell and math.isfinite(value := float(cell))]

    def _read_pairs(self, t: int) -> bool:
        """Read samples of iterate t, if it has answered the held-out prompts."""
        folder = self._run.val_rows(t)
        if read_manifest(folder) is None:
            return False
        # (Importing transformers takes seconds, which a run without rows need not wait for.)
        from spin_lightning.policies.saved import load_tokenizer

        self._pairs = sample_pairs(read_rows(folder), load_tokenizer(self._run.root), _PAIRS)
        self._answered_by = t
        return True


def page(glance: Glance, width: int) -> RenderableType:
    """The page for a terminal of this many columns."""
    parts: list[RenderableType] = [*_head(glance, width)]
    if glance.records:
        head, *lines = iterate_lines(glance.records, width)
        parts += [Text(head, style="bold"), *map(Text, lines), Text()]
    for verdict in glance.verdicts:
        style = "yellow" if verdict.level == "warning" else "dim"
        text = f"{verdict.level.upper()}: {verdict.state} ({verdict.where}). {verdict.advice}"
        parts.append(Text(text, style=style, no_wrap=False, overflow="fold"))
    if width >= _WIDE:
        half = (width - 4) // 2
        grid = Table.grid(padding=(0, 4, 0, 0))
        grid.add_column(width=half)
        grid.add_column(width=half - 4)
        grid.add_row(Group(*_curves(glance, half)), Group(*_samples(glance, half - 4)))
        parts.append(grid)
    else:
        parts += [*_curves(glance, width), *_samples(glance, width)]
    return Group(*parts)


def sparkline(values: Sequence[float], width: int) -> str:
    """Values as blocks of eight heights; more values than columns are averaged.

    >>> sparkline([0.0, 1.0, 2.0, 7.0], 10)
    '▁▂▃█'
    >>> sparkline([3.0, 3.0], 10)
    '▁▁'
    """
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means = [math.fsum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BLOCKS[round((mean - low) * scale)] for mean in means)


def _head(glance: Glance, width: int) -> Iterator[RenderableType]:
    variant = f"  {glance.records[0].variant}" if glance.records else ""
    yield Text(f"{glance.name}{variant}", style="bold cyan", overflow="ellipsis", no_wrap=True)
    progress = glance.progress
    if progress is None or glance.has_ended:
        style = _ENDINGS[progress.state][1] if progress and progress.state in _ENDINGS else "yellow"
        yield Text(glance.status, style=style, no_wrap=False, overflow="fold")
    else:
        yield Text(glance.status, no_wrap=False, overflow="fold")
        if progress.total:
            done = sum(progress.counts.values()) / len(progress.counts)
            yield ProgressBar(total=progress.total, completed=done, width=min(width, 60))
        if glance.silent > _SILENT_SECONDS:
            text = f"No sign of life for {duration(glance.silent)}: is its machine still up?"
            yield Text(text, style="yellow")
    yield Text()


def _curves(glance: Glance, width: int) -> Iterator[RenderableType]:
    curves = glance.curves
    if not curves:
        return
    # A title, blocks as far as there is room, and the first and last value in 20 characters.
    blocks = min(max(len(curve.values) for curve in curves), width // 3)
    title = min(max(len(curve.title) for curve in curves), max(12, width - blocks - 22))
    room = max(blocks, width - title - 22)
    for curve in curves:
        name = curve.title if len(curve.title) <= title else f"{curve.title[: title - 1]}…"
        line = Text(f"{name:<{title}} ")
        line.append(f"{sparkline(curve.values, room)} ", style="cyan")
        line.append(f"{curve.values[0]:.4g} → {curve.values[-1]:.4g}", style="bold")
        yield line
    yield Text()


def _samples(glance: Glance, width: int) -> Iterator[RenderableType]:
    if glance.pairs:
        yield Text(f"Held-out prompts, answered by iterate {glance.answered_by}", style="bold")
    for prompt, real, generated in glance.pairs:
        for label, text in (("prompt", prompt), ("real", real), ("generated", generated)):
            short = " ⏎ ".join(text.strip().splitlines())
            line = Text(f"{label:>9}  ", style="dim")
            line.append(short, style="" if label == "generated" else "dim")
            line.truncate(max(20, width), overflow="ellipsis")
            yield line
        yield Text()


def _or(read: Callable[[], T], otherwise: T) -> T:
    """What can be read; else something else."""
    try:
        return read()
    except _UNREADABLE:
        return otherwise
