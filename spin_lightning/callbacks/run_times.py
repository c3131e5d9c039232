"""Time, work and memory of each iterate, over all starts of a run."""

from __future__ import annotations

import resource
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch

from spin_lightning.rows.making import Timing
from spin_lightning.run.files import read_json, write_json
from spin_lightning.run.folder import RunFolder
from spin_lightning.run.records import PHASES
from spin_lightning.run.validation import NUMBERS, check_fields

_FIX: Final = "delete it: the time of earlier starts is then not counted"


@dataclass
class Spent(Timing):
    """What an iterate took: making its rows, and training on them.

    Attributes:
        training: Seconds of training, validation included.
        trained_rows: Rows of the batches trained on, as if all were full.
        peak_before: Peak memory that loading, held-out rows or evaluation reached before the
            iterate's rows were made, bytes; 0 if it was not above that of earlier phases.
        peak_generating: The same for generating responses.
        peak_scoring: The same for scoring them.
        peak_training: The same for training, validation included.
    """

    training: float = 0.0
    trained_rows: float = 0.0
    peak_before: float = 0
    peak_generating: float = 0
    peak_scoring: float = 0
    peak_training: float = 0

    def train(self, seconds: float, rows: float) -> None:
        """Add a stretch of training."""
        self.training += seconds
        self.trained_rows += rows

    @property
    def peaks(self) -> dict[str, int]:
        """The peaks that are known, by phase."""
        found = {phase: int(getattr(self, f"peak_{phase}")) for phase in PHASES}
        return {phase: peak for phase, peak in found.items() if peak}


class RunTimes:
    """What each iterate has taken so far, kept in the run folder's `times.json`.

    It is written with every stage of a work unit and with every checkpoint. Work that a crash lost
    and that was done again counts twice, as far as it was written: the time was spent.

    Args:
        path: The file; None to keep nothing, on ranks other than 0 and in a dry run.
        known: What earlier starts took, by the index of the iterate that was made.
    """

    def __init__(self, path: Path | None, known: dict[int, Spent] | None = None) -> None:
        """Go on from what earlier starts took."""
        self._path = path
        self._peak = 0
        self._spent: defaultdict[int, Spent] = defaultdict(Spent, known or {})

    @classmethod
    def of(cls, run: RunFolder, *, kept: bool) -> RunTimes:
        """The times of a run: of its earlier starts, or of a new one.

        Args:
            run: The run folder.
            kept: Whether this process writes them.

        Raises:
            RunFolderError: The file is damaged.
        """
        if not kept:
            return cls(None)
        goes_on = run.times.exists() and bool(run.known_iterates())
        return cls(run.times, read_json(run.times, _FIX, _parse) if goes_on else None)

    def spent_on(self, t: int) -> Spent:
        """What making iterate t took so far."""
        return self._spent[t]

    def making(self, t: int) -> Making:
        """Receives the progress of the rows that iterate t is trained on."""
        self.keep_peak(t, "before")
        return Making(self, t)

    def train(self, t: int, seconds: float, rows: float) -> None:
        """Add a stretch of training iterate t."""
        self._spent[t].train(seconds, rows)
        self.keep_peak(t, "training")
        self.write()

    def keep_peak(self, t: int, phase: str) -> None:
        """Give the phase that just ended the peak memory of the process, if the phase raised it."""
        peak = peak_memory()
        if peak > self._peak:
            self._peak, spent, name = peak, self._spent[t], f"peak_{phase}"
            setattr(spent, name, max(peak, getattr(spent, name)))

    def write(self) -> None:
        """Write the file."""
        if self._path is not None:
            write_json(self._path, {str(t): asdict(spent) for t, spent in self._spent.items()})


@dataclass(frozen=True)
class Making:
    """Counts what making an iterate's rows takes. A `rows.making.Reporter`.

    Attributes:
        times: Where it counts.
        t: The iterate that is trained on the rows.
    """

    times: RunTimes
    t: int

    def advance(self, stage: str, rows: int, seconds: float, tokens: int = 0) -> None:
        """Count the progress of a stage; rows of an existing part take no time."""
        if seconds:
            self.times.spent_on(self.t).advance(stage, rows, seconds, tokens)
            self.times.keep_peak(self.t, stage)
            self.times.write()


def peak_memory() -> int:
    """Peak memory so far, bytes: of tensors on the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _parse(content: Any) -> dict[int, Spent]:
    known = check_fields(content, dict.fromkeys(content, NUMBERS) if content else {})
    names = {field.name for field in fields(Spent)}
    # Fields of later versions are left out.
    return {
        int(t): Spent(**{name: value for name, value in spent.items() if name in names})
        for t, spent in known.items()
    }
