"""A lock that allows one writer at a time in a run folder, on one machine or several."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import IO

from spin_lightning.errors import RunFolderError
from spin_lightning.run.files import writing

LOCK_FILE = ".lock"
# Workers of a killed process take a moment to exit.
_PATIENCE_SECONDS = 8.0
_POLL_SECONDS = 0.5
# What a file system without locks, or without its lock service, answers.
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP})


class FolderLock:
    """Held by every process of a run while it writes into the folder.

    The operating system releases the lock of a process that dies, so nothing has to be cleaned up
    by hand. Rank 0 locks the whole file, then leaves one byte to each of the other ranks: a rank
    that outlives its run also keeps the next run out.

    Args:
        folder: The run folder; it is created if it does not exist.
        rank: Rank of this process.
    """

    def __init__(self, folder: Path, rank: int = 0) -> None:
        """Name the lock file, without locking it."""
        self._path = folder / LOCK_FILE
        self._rank = rank
        self._file: IO[str] | None = None

    def acquire(self, patience: float = _PATIENCE_SECONDS) -> None:
        """Take the lock; rank 0 has to be first.

        Args:
            patience: Seconds to wait while another process holds it.

        Raises:
            RunFolderError: Another process writes into the folder, or the folder is not writable.
        """
        deadline = time.monotonic() + patience
        while not self._try():
            if time.monotonic() >= deadline:
                raise RunFolderError(
                    f"{self._path.parent} is being written by another run ({self._holder()})",
                    fix="wait until it ends, or stop it; or name another folder with "
                    "--trainer.default_root_dir",
                )
            time.sleep(_POLL_SECONDS)
        if self._rank == 0:
            assert self._file is not None
            self._file.truncate(0)
            self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
            self._file.flush()
            # Rank 0 keeps the first byte.
            fcntl.lockf(self._file, fcntl.LOCK_UN, 0, 1)

    def release(self) -> None:
        """Release the lock, and delete its file on rank 0. A second call does nothing."""
        if self._file is None:
            return
        if self._rank == 0:
            self._path.unlink(missing_ok=True)
        self._file.close()
        self._file = None

    def _try(self) -> bool:
        with writing(self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            file = self._path.open("a+", encoding="utf-8")
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, int(self._rank > 0), self._rank)
            # The process that held it before may have deleted the file in the meantime.
            is_there = os.fstat(file.fileno()).st_ino == self._path.stat().st_ino
        except OSError as error:
            if error.errno in _NO_LOCKS:
                file.close()
                raise RunFolderError(
                    f"the file system of {self._path.parent} has no locks ({error.strerror})",
                    fix="mount it with locks (Lustre: the option flock; NFS: without nolock, with "
                    "its lock service), or name another folder with --trainer.default_root_dir",
                ) from error
            is_there = False
        if is_there:
            self._file = file
        else:
            file.close()
        return is_there

    def _holder(self) -> str:
        try:
            return self._path.read_text(encoding="utf-8") or "which has just started"
        except OSError:
            return "which has just ended"
