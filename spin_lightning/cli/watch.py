"""The command `watch`: a run that another process writes, in the terminal."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Final

from spin_lightning.cli.parsing import command_parser
from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.run.folder import RunFolder

if TYPE_CHECKING:
    from rich.console import RenderableType

    from spin_lightning.cli.watch_page import Glance

_LEAST_SECONDS: Final = 0.1


def watch(args: list[str]) -> None:
    """Watch a run that another process writes: its phase, table, curves and samples.

    The run's files are only read. It ends when the run ends; Ctrl-C ends it earlier, and the run
    goes on. Without a terminal it prints a line whenever something changes.
    """
    parser = command_parser("watch", watch)
    parser.add_argument("run", help="The run folder.")
    parser.add_argument(
        "--interval", type=float, default=2.0, help="Seconds between two looks at the files."
    )
    parser.add_argument("--once", type=bool, default=False, help="Show the run as it is, and exit.")
    given = parser.parse_args(args)
    if not given.interval >= _LEAST_SECONDS:
        raise SettingError(
            "interval", given.interval, "out of range", fix=f"give {_LEAST_SECONDS} or more"
        )
    run = RunFolder(Path(given.run))
    if not run.root.is_dir():
        raise RunFolderError(
            f"there is no folder {run.root}",
            fix="name the folder of a run, as `fit` prints it, once it has begun",
        )

    from spin_lightning.callbacks.console import console
    from spin_lightning.cli.watch_page import RunReader, page

    reader = RunReader(run)
    try:
        if given.once:
            glance = reader.read()
        elif console.is_terminal:
            glance = _watch_live(reader.read, page, float(given.interval))
        else:
            glance = _watch_in_lines(reader.read, float(given.interval))
    except KeyboardInterrupt:
        console.print("Stopped watching; the run goes on.")
        return
    console.print(page(glance, console.width))


def _watch_live(
    read: Callable[[], Glance], page: Callable[[Glance, int], RenderableType], interval: float
) -> Glance:
    """Show the page, refreshed, until the run ends."""
    from rich.live import Live

    from spin_lightning.callbacks.console import console

    glance = read()
    with Live(
        page(glance, console.width), console=console, screen=True, auto_refresh=False
    ) as live:
        while not glance.has_ended:
            live.update(page(glance, console.width), refresh=True)
            time.sleep(interval)
            glance = read()
    return glance


def _watch_in_lines(read: Callable[[], Glance], interval: float) -> Glance:
    """Print the phase whenever it has advanced, until the run ends."""
    from spin_lightning.callbacks.console import console

    glance, said = read(), ""
    while not glance.has_ended:
        if glance.status != said:
            said = glance.status
            console.print(said, markup=False)
        time.sleep(interval)
        glance = read()
    return glance
