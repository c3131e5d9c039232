"""Real `fit` processes on the tiny model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.cli.test_fit import fit_arguments
from tests.faults.points import VARIABLE, Point

ROOT = Path(__file__).parents[2]
SETTINGS = ("--checkpoint_steps", "2", "--data.val_examples", "6")


def environment(**more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "MPLBACKEND": "Agg",
        **more,
    }


def fit_command(root: Path, model: Path, data: Path, *more: str) -> list[str]:
    arguments = map(str, fit_arguments(root, model, data))
    return [sys.executable, "-m", "tests.faults.killed_fit", *arguments, *SETTINGS, *more]


def kill_once_there(command: list[str], path: Path) -> None:
    """Start a command in processes of its own, and kill the first as soon as a path is there.

    Rank 0 alone: the processes that it started have to notice by themselves.
    """
    process = subprocess.Popen(command, env=environment(), start_new_session=True)
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def fit(
    root: Path, model: Path, data: Path, *more: str, killed_at: Point | None = None
) -> subprocess.CompletedProcess[str]:
    """Run `fit` to its end, or until it is killed at a point."""
    done = subprocess.run(
        fit_command(root, model, data, *more),
        env=environment(**({VARIABLE: killed_at.value} if killed_at else {})),
        capture_output=True,
        text=True,
        timeout=240,
    )
    wanted = -signal.SIGKILL if killed_at else 0
    assert done.returncode == wanted, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
