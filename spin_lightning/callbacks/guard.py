"""The run's lock, its checkpoints, stop signals, and waiting for other ranks."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.utilities import rank_zero_info

from spin_lightning.errors import SettingError
from spin_lightning.modules.trainer_access import is_mid_step, serve_others
from spin_lightning.run.files import replace_synced, writing
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.lock import FolderLock
from spin_lightning.run.shared import View, check_shared, place_mark, sees, wait_for_file

# The exit code that shells report for a process that SIGTERM ended: 128 + 15.
STOPPED = 128 + signal.SIGTERM
# A rank may wait for days while another one generates; a dead rank is noticed immediately.
_LONGEST_WAIT = timedelta(days=365)
# An NFS server keeps the locks of a machine that went down for its lease, 90 seconds by default.
_LEASE_SECONDS = 120.0
# Parts of the messages of torch's backends when the process at the other end is gone.
_GONE = ("closed by peer", "reset by peer", "Broken pipe", "remote process exited")


class Stopped(SystemExit):
    """A signal ended the process; everything that a resume needs is saved."""


class RankLost(RuntimeError):
    """Another process of the run has failed."""

    def __init__(self) -> None:
        super().__init__("another process of this run failed; see its error message")

    @classmethod
    def is_cause_of(cls, error: BaseException) -> bool:
        """Whether an error, this one or one of torch's collectives, is due to a lost rank."""
        return isinstance(error, cls) or (
            isinstance(error, RuntimeError) and any(words in str(error) for words in _GONE)
        )


class StopSignals:
    """Remembers a signal to stop until the next point at which the process can safely end.

    SIGTERM, and inside a Slurm job SIGUSR1, which `sbatch --signal` sends ahead of the time limit.
    """

    def __init__(self) -> None:
        """Catch no signal yet."""
        self.received = False
        self._forward: Callable[[int], None] | None = None
        self._previous: dict[int, Any] = {}

    def catch(self, trainer: L.Trainer) -> None:
        """Install the handler; call again after Lightning has installed its own over it.

        Lightning's handler starts a collective at an arbitrary point in the program, and raises
        before anything is saved.
        """
        launcher = trainer.strategy.launcher
        self._forward = getattr(launcher, "kill", None)
        wanted = [signal.SIGTERM, *([signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else [])]
        for signum in wanted:
            try:
                before = signal.signal(signum, self._on_signal)
            except ValueError:  # only the main thread can install handlers
                return
            self._previous.setdefault(signum, before)
        # Lightning restores, at its end, the handlers it found: that would be this one.
        theirs = trainer._signal_connector._original_handlers
        theirs.update(
            {signum: before for signum, before in self._previous.items() if signum in theirs}
        )

    def release(self) -> None:
        """Restore the handlers that were installed before."""
        for signum, handler in self._previous.items():
            # (None: a handler that Python did not install and cannot restore.)
            signal.signal(signum, signal.SIG_DFL if handler is None else handler)
        self._previous = {}

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        first, self.received = not self.received, True
        if first and self._forward is not None:
            self._forward(signum)
        previous = self._previous.get(signum)
        if first and callable(previous):
            previous(signum, frame)


class RunGuard:
    """Holds the folder's lock, writes `last.ckpt`, and stops where no work is lost.

    Args:
        minutes: Write a checkpoint this many minutes after the last one; None: never.
        steps: Write one after this many optimizer steps; None: never.

    Raises:
        SettingError: A value that is not positive.
    """

    def __init__(self, minutes: float | None, steps: int | None) -> None:
        """Keep the settings."""
        for name, value in (("checkpoint_minutes", minutes), ("checkpoint_steps", steps)):
            if value is not None and not value > 0:
                raise SettingError(name, value, "out of range", fix="give more than 0, or null")
        self._minutes = minutes
        self._steps = steps
        self._signals = StopSignals()
        self._lock: FolderLock | None = None
        self._group: Any = None
        self._saved_at = (0, 0.0)

    def open(self, trainer: L.Trainer, run: RunFolder) -> None:
        """Lock the folder, rank 0 first, and catch signals.

        Raises:
            RunFolderError: Another run writes into the folder, the folder cannot be written, or it
                is not the same folder for all ranks.
        """
        self._signals.received = False
        self._signals.catch(trainer)
        self._group = None
        if dist.is_available() and dist.is_initialized() and trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=_LONGEST_WAIT)
            self._check_shared(trainer, run)
        self._lock = FolderLock(run.root, trainer.global_rank)
        patience = {"patience": _LEASE_SECONDS} if trainer.num_nodes > 1 else {}
        if trainer.is_global_zero:
            self._lock.acquire(**patience)
        self.wait(trainer)
        if not trainer.is_global_zero:
            self._lock.acquire(**patience)

    def close(self, trainer: L.Trainer, error: BaseException | None = None) -> None:
        """Release the folder and the signals; after an error, end the other ranks as well."""
        self._signals.release()
        if self._lock is not None:
            self._lock.release()
            self._lock = None
        kill = getattr(trainer.strategy.launcher, "kill", None)
        if error is not None and not isinstance(error, Stopped) and kill is not None:
            # They would wait for this one: Lightning ends only the process that failed.
            kill(signal.SIGKILL)

    def start(self, trainer: L.Trainer) -> None:
        """Start to count steps and minutes."""
        self._signals.catch(trainer)
        self._saved_at = (trainer.global_step, time.monotonic())

    def wait(self, trainer: L.Trainer) -> None:
        """Wait for all ranks, without a timeout, and serve those that need this one's passes.

        Raises:
            Stopped: A signal came, and another rank has already stopped.
            RankLost: Another rank has failed.
        """
        if self._group is None:
            return
        try:
            serve_others(trainer)
            dist.barrier(group=self._group)
        except RuntimeError as error:
            if self._signals.received:
                self._stop(trainer)
            raise RankLost from error

    def wait_for(self, trainer: L.Trainer, path: Path) -> None:
        """Wait for all ranks, and until this one sees a file that rank 0 has written.

        Raises:
            RunFolderError: The file does not appear on this machine.
            Stopped: A signal came, and another rank has already stopped.
            RankLost: Another rank has failed.
        """
        self.wait(trainer)
        wait_for_file(path)

    def save(self, trainer: L.Trainer, run: RunFolder) -> None:
        """Write `last.ckpt` atomically."""
        temporary = run.last_checkpoint.with_name("last.tmp")
        with writing(run.last_checkpoint):
            trainer.save_checkpoint(temporary, weights_only=False)
            if trainer.is_global_zero:
                replace_synced(temporary, run.last_checkpoint)
        self.wait(trainer)
        self._saved_at = (trainer.global_step, time.monotonic())

    def after_batch(self, trainer: L.Trainer, run: RunFolder) -> None:
        """Save a checkpoint if one is due, and stop if a signal came.

        Raises:
            Stopped: A signal came; the checkpoint is written.
        """
        if is_mid_step(trainer):
            # A checkpoint in the middle of a step cannot be resumed.
            return
        # Ranks decide together: their clocks differ, and a signal reaches them at different times.
        stop = self._any_rank(trainer, self._signals.received)
        due = self._any_rank(trainer, self._is_due(trainer))
        if stop or due:
            self.save(trainer, run)
        if stop:
            self._stop(trainer)

    def between_units(self, trainer: L.Trainer) -> None:
        """Stop if a signal came, once no rank needs this one: every finished unit is on disk.

        Raises:
            Stopped: A signal came.
        """
        if self._signals.received:
            serve_others(trainer)
            self._stop(trainer)

    def _check_shared(self, trainer: L.Trainer, run: RunFolder) -> None:
        """Let every rank look for a file that rank 0 creates, and all of them refuse together."""
        name = place_mark(run.root).name if trainer.is_global_zero else ""
        mark = run.root / trainer.strategy.broadcast(name)
        views: list[View] = [None] * trainer.world_size  # type: ignore[list-item]
        own = View(trainer.global_rank, socket.gethostname(), sees(mark))
        dist.all_gather_object(views, own, group=self._group)
        if trainer.is_global_zero:
            mark.unlink()
        check_shared(run.root, views)

    def _is_due(self, trainer: L.Trainer) -> bool:
        step, since = self._saved_at
        by_steps = self._steps is not None and trainer.global_step - step >= self._steps
        by_time = self._minutes is not None and time.monotonic() - since >= 60 * self._minutes
        return by_steps or by_time

    def _any_rank(self, trainer: L.Trainer, value: bool) -> bool:
        if trainer.world_size == 1:
            return value
        return trainer.strategy.reduce_boolean_decision(value, all=False)

    def _stop(self, trainer: L.Trainer) -> None:
        rank_zero_info(
            "Stopped by a signal. All work is saved; run the same command again to continue."
        )
        # Lightning kills the whole run when a process that it started ends with a nonzero code.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_child = isinstance(environment, LightningEnvironment) and trainer.global_rank > 0
        raise Stopped(0 if is_child else STOPPED)
