"""Checks that all processes of a run see one and the same run folder."""

from __future__ import annotations

import socket
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from spin_lightning.errors import RunFolderError
from spin_lightning.run.files import writing

# NFS clients may keep their view of a folder for 60 seconds (acdirmax, see nfs(5)).
_PATIENCE_SECONDS = 90.0
_POLL_SECONDS = 0.2
# A network file system that lags behind is not a folder of its own.
_MARK_PATIENCE_SECONDS = 8.0


@dataclass(frozen=True)
class View:
    """What one process sees of the run folder.

    Attributes:
        rank: Its rank.
        host: Its machine.
        sees_mark: Whether it sees the file that rank 0 has just created.
    """

    rank: int
    host: str
    sees_mark: bool


def place_mark(folder: Path) -> Path:
    """Create a file of a new name, which no machine can have cached as missing.

    Raises:
        RunFolderError: The folder is not writable.
    """
    mark = folder / f".shared-{uuid.uuid4().hex}"
    with writing(mark):
        folder.mkdir(parents=True, exist_ok=True)
        mark.touch()
    return mark


def sees(path: Path, patience: float = _MARK_PATIENCE_SECONDS) -> bool:
    """Whether a file is there, or appears within `patience` seconds."""
    deadline = time.monotonic() + patience
    while not path.exists():
        if time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True


def check_shared(folder: Path, views: Sequence[View]) -> None:
    """Refuse a run folder that is not the same one for all processes.

    Args:
        folder: The run folder, as this process names it.
        views: What every process sees, by rank.

    Raises:
        RunFolderError: A process does not see what rank 0 wrote.
    """
    blind = [view for view in views if not view.sees_mark]
    if blind:
        others = ", ".join(f"{view.rank} on {view.host}" for view in blind[:4])
        more = f" and {len(blind) - 4} others" if len(blind) > 4 else ""
        raise RunFolderError(
            f"{folder.absolute()} is not shared: rank 0 on {views[0].host} wrote a file into it "
            f"that rank {others}{more} cannot see",
            fix="name a folder on a file system that all machines share, by its absolute path, "
            "with --trainer.default_root_dir",
        )


def wait_for_file(path: Path, patience: float = _PATIENCE_SECONDS) -> None:
    """Wait until this machine sees a file that another process has finished writing.

    Raises:
        RunFolderError: It does not appear.
    """
    if not sees(path, patience):
        raise RunFolderError(
            f"{path} was written by rank 0, and is not visible on {socket.gethostname()} after "
            f"{patience:.0f} s",
            fix="mount the file system of the run folder without long caching of folders (NFS: a "
            "small acdirmax), and start the same command again",
        )
