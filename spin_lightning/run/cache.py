"""The user's cache: folders that are made once and that all runs read."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from spin_lightning.errors import SettingError

_SCRATCH = ".spin-lightning-"
_LOCK = ".lock"


def cache_root() -> Path:
    """The cache folder; it need not exist yet.

    It is `$SPIN_LIGHTNING_CACHE`, else `spin-lightning` in the user's cache folder.
    """
    if own := os.environ.get("SPIN_LIGHTNING_CACHE"):
        return Path(own)
    user = os.environ.get("XDG_CACHE_HOME")
    return (Path(user) if user else Path.home() / ".cache") / "spin-lightning"


def make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Make a folder of the cache, unless it is there.

    It is made under a temporary name and renamed when it is complete, so a folder of the cache is
    always whole. Other processes that need the same folder wait for the first one.

    Args:
        folder: The folder.
        make: Creates and fills the folder that it gets.

    Returns:
        `folder`.

    Raises:
        SettingError: The cache cannot be written.
    """
    if not folder.is_dir():
        with scratch_folder(folder.parent) as scratch, _one_at_a_time(folder):
            if not folder.is_dir():
                made = scratch / folder.name
                make(made)
                _publish(made, folder)
    return folder


@contextmanager
def scratch_folder(parent: Path) -> Iterator[Path]:
    """A temporary folder on the file system of `parent`, so that a rename from it is atomic.

    Folders of processes that were killed are deleted. Each process holds a lock on its own.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
        _delete_abandoned(parent)
        handle, lock = tempfile.mkstemp(dir=parent, prefix=_SCRATCH, suffix=_LOCK)
        # The system releases it when the process dies.
        fcntl.flock(handle, fcntl.LOCK_EX)
        scratch = Path(lock.removesuffix(_LOCK))
        scratch.mkdir()
    except OSError as error:
        raise SettingError(
            "cache",
            str(parent),
            f"it cannot be written ({error.strerror})",
            fix="set SPIN_LIGHTNING_CACHE, or the output folder, to one that can be",
        ) from error
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        Path(lock).unlink(missing_ok=True)
        os.close(handle)


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder that is being made; wait where another process holds it."""
    path = folder.with_name(f".{folder.name}{_LOCK}")
    while True:
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_same_file(lock.fileno(), path):
                continue  # the process that held it before has deleted it
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return


def _is_same_file(handle: int, path: Path) -> bool:
    try:
        return os.fstat(handle).st_ino == path.stat().st_ino
    except FileNotFoundError:
        return False


def _publish(made: Path, folder: Path) -> None:
    """Move a finished folder into place atomically."""
    try:
        made.rename(folder)
    except OSError:
        # Another process has already made the same folder.
        if not folder.is_dir():
            raise


def _delete_abandoned(parent: Path) -> None:
    """Delete scratch folders whose process is gone."""
    for lock in parent.glob(f"{_SCRATCH}*{_LOCK}"):
        try:
            with lock.open("r+") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(lock.with_name(lock.name.removesuffix(_LOCK)), ignore_errors=True)
                lock.unlink(missing_ok=True)
        except OSError:  # it is in use, or another process deletes it
            continue
