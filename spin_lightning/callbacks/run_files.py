"""Writers of run files that Lightning's own would delete, or refuse to write, on a resume."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter
from lightning.pytorch.loggers.logger import rank_zero_experiment
from lightning.pytorch.utilities import rank_zero_only

from spin_lightning.redaction import masked
from spin_lightning.run.files import replace_synced, write_text, writing


class _AppendingWriter(ExperimentWriter):
    """Appends to what an earlier start of the run logged."""

    def _check_log_dir_exists(self) -> None:
        """Read the columns of an existing file, which Lightning would delete."""
        path = Path(self.metrics_file_path)
        self.lines = 0
        if path.is_file():
            _drop_torn_line(path)
            with path.open(newline="") as file:
                lines = csv.reader(file)
                self.metrics_keys = next(lines, [])
                self.lines = sum(1 for _ in lines)

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        """Record a line."""
        super().log_metrics(metrics_dict, step)
        self.lines += 1

    def save(self) -> None:
        """Write what was logged.

        Raises:
            RunFolderError: The disk is full, read-only or damaged.
        """
        with writing(Path(self.metrics_file_path)):
            super().save()

    def cut(self, lines: int) -> None:
        """Keep the first `lines` lines, and what they are called."""
        if lines >= self.lines:
            return
        with writing(Path(self.metrics_file_path)):
            super().save()
            self._rewrite(self.metrics_keys, lines)
        self.lines = lines

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Add columns atomically; Lightning's method would lose the file in a crash."""
        self._rewrite(fieldnames, None)

    def _rewrite(self, fieldnames: list[str], lines: int | None) -> None:
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))[:lines]
        temporary = path.with_name(f"{path.name}.tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(rows)
        replace_synced(temporary, path)


class RunCSVLogger(CSVLogger):
    """`metrics.csv` in the run folder: a resume continues it after its checkpoint's last line.

    Args:
        root: The run folder.
    """

    def __init__(self, root: str | Path) -> None:
        """Log into `root` itself, and write every line immediately."""
        super().__init__(root, name="", version="", flush_logs_every_n_steps=1)
        self.root = Path(root)

    @property
    def log_dir(self) -> str:
        """The run folder."""
        return self.save_dir

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        """The writer, created at first use."""
        if not isinstance(self._experiment, _AppendingWriter):
            self._experiment = _AppendingWriter(self.log_dir)
        return self._experiment

    @property
    def lines(self) -> int:
        """Number of lines so far."""
        return self._writer.lines

    def cut(self, lines: int) -> None:
        """Remove all lines but the first `lines`.

        Raises:
            RunFolderError: The disk is full, read-only or damaged.
        """
        self._writer.cut(lines)

    @property
    def _writer(self) -> _AppendingWriter:
        writer = self.experiment
        assert isinstance(writer, _AppendingWriter), "only rank 0 writes"
        return writer

    def log_hyperparams(self, params: Any = None) -> None:
        """Do nothing: `config.yaml` holds the settings."""


def _drop_torn_line(path: Path) -> None:
    """Remove an incomplete last line after a crash; the resumed run writes that line again."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if whole != content:
        with path.open("r+b") as file:
            file.truncate(len(whole))


class ConfigFile(Callback):
    """Writes the resolved configuration into the run folder, once.

    A later start with another configuration writes `config.resumed-<n>.yaml` beside it.

    Args:
        root: The run folder.
        text: The configuration as YAML.

    Attributes:
        text: The same, with keys and tokens masked.
    """

    def __init__(self, root: Path, text: str) -> None:
        """Keep the text, with keys and tokens masked, until training starts."""
        self._root = root
        self.text = masked(text)

    @rank_zero_only
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file; by now every check has passed."""
        names = ["config.yaml", *(f"config.resumed-{n}.yaml" for n in range(1, 10_000))]
        for path in (self._root / name for name in names):
            if not path.exists():
                write_text(path, self.text)
                return
            if path.read_text(encoding="utf-8", errors="replace") == self.text:
                return
