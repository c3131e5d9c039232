"""Output in the terminal: progress, the table of iterates, sample pairs."""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import lightning as L
from lightning.pytorch.callbacks import ModelSummary
from lightning.pytorch.utilities.model_summary import summarize
from lightning.pytorch.utilities.model_summary.model_summary import get_human_readable_count
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import set_tqdm_hook

from spin_lightning.callbacks.speed import speed_line
from spin_lightning.report.verdicts import Verdict
from spin_lightning.run.packages import ignore_renamed
from spin_lightning.run.progress import Phase, ProgressLog
from spin_lightning.run.records import IterateRecord, TrainingRecord

_LINES_SHOWN = 8
# What rows are after each stage.
ROW_STEPS = {"generating": "generated", "scoring": "scored"}
_LOG_WIDTH = 160

# Without a terminal there is no width to fit, and a log file should not be cut. A notebook gets the
# same plain text: rich would show each line as an output of its own, and ask for ipywidgets.
console = Console(
    soft_wrap=True,
    highlight=False,
    width=None if sys.stdout.isatty() else _LOG_WIDTH,
    force_jupyter=False,
)


# Known on the testbed only, and shown there only.
_EXACT = "exact KL"
# Name, width and format.
_COLUMNS: tuple[tuple[str, int, str], ...] = (
    ("iterate", 7, "d"),
    ("opponent", 10, "s"),
    ("rows", 7, "d"),
    ("gen/real len", 13, "s"),
    ("loss", 7, ".4f"),
    ("margin", 7, ".3f"),
    ("acc", 5, ".2f"),
    ("val NLL", 8, ".4f"),
    (_EXACT, 8, ".4f"),
    ("gen s", 6, ".1f"),
    ("score s", 7, ".1f"),
    ("train s", 7, ".1f"),
)
# Which columns a narrow terminal lacks, in the order in which they go.
_DROPPED_FIRST = ("score s", "gen s", "train s", "rows", "opponent", "gen/real len", "loss")


def show_iterates(records: Sequence[IterateRecord]) -> None:
    """Show the table of iterates so far; of a long one the last lines."""
    head, *lines = iterate_lines(records, console.width)
    console.print(head, style="bold")
    for line in lines:
        console.print(line)
    training = records[-1].training
    speed = "" if training is None else speed_line(training.speed)
    if speed:
        console.print(f"Speed: {speed}.", style="dim")


def iterate_lines(records: Sequence[IterateRecord], width: int) -> list[str]:
    """The head of the table of iterates and its last lines, as many columns as fit in a width."""
    cells = [_cells(record) for record in records[-_LINES_SHOWN:]]
    shown = [
        column
        for column in _COLUMNS
        if column[0] != _EXACT or any(line[_EXACT] is not None for line in cells)
    ]
    for name in _DROPPED_FIRST:
        if sum(size + 2 for _, size, _ in shown) - 2 > width:
            shown = [column for column in shown if column[0] != name]
    head = "  ".join(f"{name:>{size}}" for name, size, _ in shown)
    lines = (
        "  ".join(_cell(line[name], size, form) for name, size, form in shown) for line in cells
    )
    return [head, *lines]


@contextmanager
def quiet() -> Iterator[None]:
    """Print nothing but warnings inside the block, in a notebook or for many runs in a row.

    Create the trainer inside as well: Lightning prints a few lines when it is made. The bars of
    `quiet_libraries` stay off afterwards.

    Example:
        >>> from spin_lightning import quiet
        >>> with quiet():
        ...     pass  # Trainer(max_epochs=4).fit(module, data)
    """
    quiet_libraries()
    logs = [logging.getLogger(f"lightning.{part}") for part in ("pytorch", "fabric")]
    shown, levels = console.quiet, [log.level for log in logs]
    console.quiet = True
    for log in logs:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            ignore_renamed()
            yield
    finally:
        console.quiet = shown
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def quiet_libraries() -> None:
    """Silence output of other libraries that does not concern a run; warnings still show.

    Silenced are transformers' bars for reading and writing weights, and Lightning's tips
    for other products. Bars of downloads stay. Calling this twice is harmless.
    """
    set_tqdm_hook(_without_weight_bars)
    # The logger of Lightning's rank_zero_info.
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_not_a_tip)


class ParameterCount(ModelSummary):
    """Prints how many parameters are trained and how many are frozen, in one line.

    In place of Lightning's summary, which lists modules and how many of them are in train mode:
    self-play switches modes all the time.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print the line."""
        if trainer.is_global_zero:
            summary = summarize(pl_module)
            trained = summary.trainable_parameters
            counts = (trained, summary.total_parameters - trained)
            shown = [get_human_readable_count(count).strip() for count in counts]
            console.print(f"Parameters: {shown[0]} trained, {shown[1]} frozen.")


def show_table(rows: Sequence[Sequence[str]]) -> None:
    """Show rows of text as a table; the first row is its head.

    Where the terminal is too narrow, iterates between the first and the newest are left out.
    """
    shown = fitting_columns(rows, console.width)
    table = Table()
    for i in shown:
        table.add_column(rows[0][i], overflow="fold")
    for row in rows[1:]:
        table.add_row(*(Text(row[i]) for i in shown))
    console.print(table)
    left_out = [name for i, name in enumerate(rows[0]) if i not in shown]
    if left_out:
        console.print(f"Left out, since the terminal is narrow: {', '.join(left_out)}.")


def fitting_columns(rows: Sequence[Sequence[str]], width: int) -> list[int]:
    """Indices of the columns of a table that fit in a width, in characters.

    Columns that are not an iterate's stay, and so do those of the first and of the last iterate.
    """
    shown = list(range(len(rows[0])))
    # A blank on both sides of a cell, and lines between and around them.
    widths = [max(map(len, column)) + 3 for column in zip(*rows, strict=True)]
    iterates = [i for i in shown if re.fullmatch(r"p\d+", rows[0][i])]
    for i in iterates[1:-1]:
        if sum(widths[k] for k in shown) + 1 > width:
            shown.remove(i)
    return shown


def show_samples(pairs: Sequence[tuple[str, str, str]]) -> None:
    """Show (prompt, real, generated) texts."""
    for prompt, real, generated in pairs:
        for label, text in (("prompt", prompt), ("real", real), ("generated", generated)):
            console.print(Text(f"  {label:>9}  {_shorten(text)}", style="dim"))
        console.print()


def show_verdicts(verdicts: Sequence[Verdict]) -> None:
    """Show known states of the run, with what to do."""
    for v in verdicts:
        style = "yellow" if v.level == "warning" else "dim"
        text = f"{v.level.upper()}: {v.state} ({v.where}). Measured: {v.measured}. {v.cause} "
        console.print(Text(f"{text}{v.advice} See {v.entry}.", style=style))


class RowProgress:
    """Two bars, generation and scoring, with rate and remaining time. A `rows.making.Reporter`.

    Args:
        title: What the rows are.
        rows: Their number.
        visible: Whether this process shows bars.
        log: Receives the same progress, for log files and `spin-lightning watch`.
    """

    def __init__(
        self, title: str, rows: int, *, visible: bool = True, log: ProgressLog | None = None
    ) -> None:
        """Prepare the bars."""
        self._log = ProgressLog(None) if log is None else log
        self._entered = self._log.phase(title, rows, "rows", *ROW_STEPS.values())
        self._phase: Phase | None = None
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total} rows"),
            _Rate(),
            TimeRemainingColumn(),
            console=console,
            # (Without a terminal it would print an empty line.)
            disable=not (visible and (console.is_terminal or console.is_jupyter)),
            transient=True,
        )
        self._tasks = {
            stage: self._progress.add_task(f"{title}: {stage}", total=rows)
            for stage in ("generating", "scoring")
        }
        self._ahead = 0

    def respond(self, responses: int) -> None:
        """Show responses that are complete before their work unit is."""
        self._ahead += responses
        self._advance("generating", responses)

    def advance(self, stage: str, rows: int, seconds: float, tokens: int = 0) -> None:
        """Count `rows` more rows of a stage, of which some may be shown already."""
        if stage == "generating":
            rows, self._ahead = rows - self._ahead, 0
        self._advance(stage, rows, found=not seconds)

    def _advance(self, stage: str, rows: int, *, found: bool = False) -> None:
        self._progress.advance(self._tasks[stage], rows)
        if self._phase is not None:
            self._log.advance(self._phase, rows, ROW_STEPS[stage], found=found)

    def __enter__(self) -> Self:
        """Show the bars."""
        self._progress.start()
        self._phase = self._entered.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Remove the bars."""
        self._progress.stop()
        self._phase = None
        self._entered.__exit__(None, None, None)


class _Rate(ProgressColumn):
    """Rows per second."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.speed or task.finished_speed or 0:.1f} rows/s")


def _without_weight_bars(
    make: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Make one of transformers' progress bars; those for weights are disabled."""
    hidden = kwargs.get("desc") in ("Loading weights", "Writing model shards")
    return make(*args, **(kwargs | {"disable": True} if hidden else kwargs))


def _is_not_a_tip(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("💡 Tip:")


def _cells(record: IterateRecord) -> dict[str, Any]:
    """One iterate's values by column; None where one is not known."""
    training, metrics = record.training or TrainingRecord(), record.metrics or {}
    seconds = training.seconds
    lengths = None
    if "val/generated_tokens" in metrics:
        generated, real = metrics["val/generated_tokens"], metrics["val/real_tokens"]
        lengths = f"{generated:.1f}/{real:.1f}"
    values = (
        record.index,
        training.opponent,
        training.rows,
        lengths,
        training.loss,
        training.margin,
        training.accuracy,
        metrics.get("val/real_nll_per_token"),
        metrics.get("exact/kl"),
        seconds.get("generating"),
        seconds.get("scoring"),
        seconds.get("training"),
    )
    return dict(zip((name for name, *_ in _COLUMNS), values, strict=True))


def _cell(value: Any, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def _shorten(text: str, width: int = 160) -> str:
    line = " ⏎ ".join(text.strip().splitlines())
    return line if len(line) <= width else f"{line[: width - 1]}…"
