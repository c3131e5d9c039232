"""The lock of a run folder: one writer at a time, released when its process dies."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from spin_lightning.errors import RunFolderError
from spin_lightning.run.lock import LOCK_FILE, FolderLock

ROOT = Path(__file__).parents[1]
HOLD = """
import sys, time
from pathlib import Path
from spin_lightning.run.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]), int(sys.argv[2]))
lock.acquire(patience=0)
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(folder: Path, rank: int) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock as a rank of a run, until it is killed."""
    command = [sys.executable, "-c", HOLD, str(folder), str(rank)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_lock_taken_and_let_go_leaves_nothing(tmp_path):
    lock = FolderLock(tmp_path / "run")
    lock.acquire()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    lock.release()
    lock.release()
    assert not list((tmp_path / "run").iterdir())


def test_lock_held_by_another_process_names_it_and_goes_with_it(tmp_path):
    with holder(tmp_path, 0) as process:
        with pytest.raises(RunFolderError, match=rf"process {process.pid} on .*Fix: wait"):
            FolderLock(tmp_path).acquire(patience=0)
        # Other ranks of the same run get the lock, too.
        rank = FolderLock(tmp_path, rank=1)
        rank.acquire(patience=0)
        rank.release()
    assert (tmp_path / LOCK_FILE).exists(), "nobody took it away"
    lock = FolderLock(tmp_path)
    lock.acquire(patience=5)
    lock.release()


def test_lock_of_a_rank_that_outlived_its_run_keeps_the_next_one_out(tmp_path):
    with (
        holder(tmp_path, 1),
        pytest.raises(RunFolderError, match="is being written by another run"),
    ):
        FolderLock(tmp_path).acquire(patience=0)


def test_lock_in_a_folder_that_cannot_be_made_says_how_to_go_on(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(RunFolderError, match=r"cannot be written.*Fix: .*same command again"):
        FolderLock(tmp_path / "file" / "run").acquire()
