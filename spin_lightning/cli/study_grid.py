"""`study --grid`: many runs from one file, several at a time, and one table of all iterates."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from spin_lightning.errors import RunFolderError, SettingError, SpinError, first_line, is_whole
from spin_lightning.report.study_grid import Cell, Grid, Outcome, read_grid, write_table
from spin_lightning.run.fingerprint import fingerprint
from spin_lightning.run.folder import RunFolder

if TYPE_CHECKING:
    from spin_lightning.report.study_plan import Play
    from spin_lightning.run.records import IterateRecord

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class GridStudy:
    """A grid and the folder of its results.

    Attributes:
        grid: The cells.
        out: The folder: `study.parquet`, `cells/` with a file per cell, `runs/`.
        keep_runs: Whether the run folders stay once a cell is measured.
    """

    grid: Grid
    out: Path
    keep_runs: bool

    def outcome(self, cell: Cell) -> Outcome | None:
        """What a cell gave; None if it has not been played.

        Raises:
            RunFolderError: It was played with another config.
        """
        path = self.out / "cells" / f"{cell.name}.json"
        outcome = Outcome.read(path)
        if outcome is not None and outcome.content != self._content(cell):
            raise RunFolderError(
                f"{path} was made with another config or another meaning of this cell",
                fix="give another --out, or remove the file to play the cell again",
            )
        return outcome

    def outcomes(self) -> dict[str, Outcome]:
        """What the cells gave that were played, by name."""
        found = {name: self.outcome(cell) for name, cell in self.grid.cells.items()}
        return {name: one for name, one in found.items() if one is not None}

    def play(self, cell: Cell) -> Outcome:
        """Play one cell and write what it gave.

        It has one thread, so that its bytes are the same however many cells are played beside it.
        """
        import torch

        from spin_lightning.report.run_view import read_records

        torch.set_num_threads(1)
        runs, started, error = self.out / "runs", time.monotonic(), None
        run = RunFolder(cell.play.folder(runs))
        try:
            start = None if cell.start is None else self._started(cell.start, runs)
            play_quietly(cell.play, str(self.grid.config), runs, start)
            records = read_records(run)
        except (Exception, SystemExit) as raised:
            # Whatever it is, hours of other cells must not end with it.
            if not isinstance(raised, SpinError):
                _LOG.exception("%s ended early", cell.name)
            error, records = first_line(raised), _readable(run)
        outcome = Outcome(
            content=self._content(cell),
            seconds=time.monotonic() - started,
            rows=[{**(record.rows or {}), **(record.metrics or {})} for record in records],
            error=error,
        )
        outcome.write(self.out / "cells" / f"{cell.name}.json")
        if error is None and not self.keep_runs:
            shutil.rmtree(run.root, ignore_errors=True)
        return outcome

    def check(self, cell: Cell) -> None:
        """Read a cell's settings, and those of its start, without playing it.

        The module and the data check theirs; what files hold, and the trainer's values, are found
        out when it is played.

        Raises:
            SpinError: One is unknown, or its value cannot work.
        """
        from spin_lightning.cli.reading import check_arguments

        for play in (cell.start, cell.play):
            if play is not None:
                try:
                    check_arguments(play.arguments(str(self.grid.config), self.out))
                except SpinError as error:
                    raise SpinError(f"{play.name}: {error.problem}", fix=error.fix) from error

    def _started(self, play: Play, runs: Path) -> RunFolder:
        """The run that cells start from, played once even if several ask for it at a time."""
        import fcntl

        runs.mkdir(parents=True, exist_ok=True)
        with (runs / f".{play.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            return play_quietly(play, str(self.grid.config), runs)

    def _content(self, cell: Cell) -> dict[str, Any]:
        return {**cell.content, "config": self._config_hash}

    @cached_property
    def _config_hash(self) -> str:
        from spin_lightning.cli.reading import read_config

        # Of its settings: a comment may change.
        return fingerprint({"config": read_config(self.grid.config)})


def _readable(run: RunFolder) -> list[IterateRecord]:
    """The records of a run that ended early; none if they are damaged."""
    try:
        return run.records()
    except SpinError:
        return []


def play_quietly(play: Play, config: str, out: Path, started: RunFolder | None = None) -> RunFolder:
    """Play one run, from the best iterate of another one if there is one; return its folder."""
    from spin_lightning.callbacks.console import quiet
    from spin_lightning.cli.fit import SpinCLI, explained

    start = None if started is None else started.iterate(started.best()).resolve()
    with quiet(), explained():
        SpinCLI(play.arguments(config, out, start))
    return RunFolder(play.folder(out))


def play_grid(
    path: Path,
    out: Path | None,
    processes: int,
    cell: str | None,
    *,
    plan_only: bool,
    keep_runs: bool,
) -> None:
    """Play the cells of a grid that have not been played, and write the table.

    Args:
        path: The grid.
        out: Folder of the results; default: runs/<name of the grid>.
        processes: Cells that are played at a time.
        cell: Play this cell alone.
        plan_only: Print the cells and the time that is left, and play none.
        keep_runs: Whether run folders stay.

    Raises:
        SpinError: A cell cannot be played, or cells ended early.
    """
    from spin_lightning.callbacks.console import console, show_table
    from spin_lightning.run.progress import duration

    if not is_whole(processes, 1):
        raise SettingError("processes", processes, "out of range", fix="give 1 or more")
    grid = read_grid(path)
    chosen = list(grid.cells.values()) if cell is None else [grid.cell(cell)]
    study = GridStudy(grid, out or Path("runs") / path.stem, keep_runs)
    if study.out.exists() and not study.out.is_dir():
        raise SettingError("out", str(study.out), "it is a file", fix="name a folder")
    known = study.outcomes()
    if plan_only:
        show_table(plan_table(grid, known, processes))
        return
    missing = [one for one in chosen if not _is_complete(known.get(one.name))]
    # Seeds differ in nothing that can be refused.
    for one in {one.name.rpartition("-seed")[0]: one for one in missing}.values():
        study.check(one)
    console.print(f"{len(chosen)} cells, {len(chosen) - len(missing)} of them played before.")
    failed: dict[str, str] = {}
    took = [outcome.seconds for outcome in known.values() if _is_complete(outcome)]
    table = study.out / "study.parquet"
    try:
        for number, (one, outcome) in enumerate(_played(study, missing, processes), start=1):
            known[one.name] = outcome
            took.append(outcome.seconds)
            left = fmean(took) * (len(missing) - number) / processes
            state = "" if outcome.error is None else f" ENDED EARLY: {outcome.error}"
            console.print(
                f"[{number}/{len(missing)}] {one.name}: {duration(outcome.seconds)}, "
                f"{duration(left)} left{state}",
                markup=False,
            )
            if outcome.error is not None:
                failed[one.name] = outcome.error
    except BrokenProcessPool as error:
        raise SpinError(
            "a process was killed, probably for want of memory",
            fix="give fewer --processes, and run the same command again: finished cells are kept",
        ) from error
    finally:
        measured = [(one, known[name]) for name, one in grid.cells.items() if name in known]
        rows = write_table(measured, table)
        console.print(f"{table}: {rows:,} rows, one per cell and iterate.")
    if rows:
        show_results(table, study.out)
    if failed:
        name, reason = next(iter(failed.items()))
        raise SpinError(
            f"{len(failed)} of {len(missing)} cells ended early, such as {name} ({reason})",
            fix="their finished iterates are in the table; run the same command to try them again",
        )


def show_results(path: Path, out: Path) -> None:
    """Print a table of each part of a grid, and draw its picture.

    Args:
        path: The grid's `study.parquet`.
        out: Where the pictures go.
    """
    from spin_lightning.callbacks.console import console, show_table
    from spin_lightning.report.study_figures import draw_part
    from spin_lightning.report.study_results import read_results, results_table, unfinished

    if ended := unfinished(path):
        console.print(f"Left out, since they ended early: {', '.join(ended)}.", markup=False)
    for part, lines in read_results(path).items():
        console.print(f"\n{part}: medians over seeds (smallest to largest)")
        show_table(results_table(lines))
        picture = draw_part(lines, out / f"{part}.png")
        if picture is not None:
            console.print(f"Picture: {picture}")


def _played(study: GridStudy, cells: list[Cell], processes: int) -> Iterator[tuple[Cell, Outcome]]:
    """Play cells, several at a time, and yield each when it is measured."""
    pool = ProcessPoolExecutor(
        processes, get_context("spawn"), initializer=_end_with, initargs=(os.getpid(),)
    )
    with pool:
        waiting = {pool.submit(study.play, cell): cell for cell in cells}
        try:
            for done in as_completed(waiting):
                yield waiting[done], done.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _is_complete(outcome: Outcome | None) -> bool:
    return outcome is not None and outcome.error is None


def _end_with(parent: int) -> None:
    """End this process when its parent has ended, killed or not: a cell takes minutes."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def plan_table(grid: Grid, outcomes: Mapping[str, Outcome], processes: int) -> list[list[str]]:
    """Cells and hours by part, as rows of text; the first is the header.

    Hours are those of the cells that are left, at the mean time of the part's finished cells, or of
    all finished ones.
    """
    known = {name: one for name, one in outcomes.items() if _is_complete(one)}
    of_all = [outcome.seconds for outcome in known.values()]
    table = [["part", "cells", "played", "seconds per cell", f"hours left, {processes} at a time"]]
    cells = grid.cells.values()
    names = dict.fromkeys(part for cell in cells for part in cell.parts)
    total = 0.0
    for name in names:
        # A cell of several parts counts with the first.
        own = [cell for cell in cells if cell.parts[0] == name]
        played = [known[cell.name].seconds for cell in own if cell.name in known]
        seconds = fmean(played or of_all) if of_all else None
        left = None if seconds is None else seconds * (len(own) - len(played)) / processes / 3600
        total += left or 0.0
        shown = ["unknown"] * 2 if left is None else [f"{seconds:.0f}", f"{left:.2f}"]
        table.append([name, str(len(own)), str(len(played)), *shown])
    hours = f"{total:.2f}" if of_all else "play one cell (--cell) to know"
    table.append(["in all", str(len(cells)), str(len(known)), "", hours])
    return table
