"""Where a run is and what it was started with, for whoever finds it in its loggers."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning as L
import yaml

import spin_lightning
from spin_lightning.callbacks.log_samples import log_table
from spin_lightning.callbacks.run_files import ConfigFile
from spin_lightning.modules.trainer_access import callbacks_of
from spin_lightning.redaction import masked
from spin_lightning.run.folder import RunFolder


def log_origin(trainer: L.Trainer, run: RunFolder) -> None:
    """Log folder, machine, version, commit and configuration of a run to all its loggers.

    They are hyperparameters (`run/folder`, …) for loggers that keep any, and tables `run/origin`
    and `run/config` for those that show tables or texts.
    """
    if not trainer.is_global_zero or not trainer.loggers:
        return
    origin = run_origin(run)
    for logger in trainer.loggers:
        logger.log_hyperparams({f"run/{name}": value for name, value in origin.items()})
    step = trainer.global_step
    log_table(trainer.loggers, "run/origin", ["what", "value"], list(origin.items()), step)
    for callback in callbacks_of(trainer):
        if isinstance(callback, ConfigFile):
            rows = list(_flat(yaml.safe_load(callback.text)))
            log_table(trainer.loggers, "run/config", ["setting", "value"], rows, step)


def run_origin(run: RunFolder) -> dict[str, str]:
    """Folder, machine, version of this package, and commit of the working directory, if any."""
    commit = git_commit(Path.cwd())
    return {
        "folder": masked(str(run.root.resolve())),
        "host": socket.gethostname(),
        "version": spin_lightning.__version__,
        **({} if commit is None else {"commit": commit}),
    }


def git_commit(folder: Path) -> str | None:
    """The commit that is checked out in the git repository of a folder; None outside of one.

    Read from git's files, since git need not be installed.
    """
    for parent in (folder, *folder.parents):
        try:
            if (parent / ".git").exists():
                return _commit_in(parent / ".git")
        except (OSError, UnicodeDecodeError):
            return None
    return None


def _commit_in(git: Path) -> str | None:
    if git.is_file():  # a worktree or submodule names the folder of its own files
        git = git.parent / git.read_text(encoding="utf-8").removeprefix("gitdir:").strip()
    head = (git / "HEAD").read_text(encoding="utf-8").strip()
    if not head.startswith("ref:"):
        return head
    name = head.removeprefix("ref:").strip()
    common = git / "commondir"
    shared = git / common.read_text(encoding="utf-8").strip() if common.exists() else git
    for root in (git, shared):
        if (root / name).is_file():
            return (root / name).read_text(encoding="utf-8").strip()
    packed = shared / "packed-refs"
    lines = packed.read_text(encoding="utf-8").splitlines() if packed.is_file() else []
    found = (line.split(" ")[0] for line in lines if line.endswith(f" {name}"))
    return next(found, None)


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """`a.b.c` and its value, for each value of nested dictionaries that is set."""
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{name}.")
        elif value is not None:
            yield name, str(value)
