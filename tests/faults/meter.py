"""A callback that records memory, open files and disk usage at every iterate."""

from __future__ import annotations

import ctypes
import gc
import json
from pathlib import Path

import lightning as L
from lightning.pytorch.callbacks import Callback

from spin_lightning import SelfPlayModule
from spin_lightning.run.folder import RunFolder


class Meter(Callback):
    """Appends a line of JSON after the rows of each iterate are made, and after the last iterate.

    Args:
        path: The file, outside the run folder.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._write(trainer, pl_module)

    def _write(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, SelfPlayModule)
        run, t = RunFolder(Path(trainer.default_root_dir)), module.iterate
        measured = {
            "iterate": t,
            "resident": resident_bytes(),
            "peak": _status("VmHWM"),
            "files": len(list(Path("/proc/self/fd").iterdir())),
            "checkpoint": size(run.last_checkpoint),
            "disk": size(run.root),
            "rows": size(run.rows(t)),
            "adapter": size(run.iterate(t) / "adapter_model.safetensors"),
        }
        with self.path.open("a") as file:
            file.write(json.dumps(measured) + "\n")


def resident_bytes() -> int:
    """Resident memory of this process, after it has returned free memory to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder; 0 if it does not exist."""
    if path.is_dir():
        return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return path.stat().st_size if path.exists() else 0
