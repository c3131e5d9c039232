"""How far a phase of a run is: a line in the log now and then, and `progress.json` for others.

A process that has no terminal to draw bars on says every half minute what it is doing, also while
nothing advances. `spin-lightning watch` reads the file.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, Self

from spin_lightning.run.validation import NUMBER, NUMBERS, TEXT, WHOLE, check_fields, optional

State = Literal["running", "finished", "stopped", "failed"]
# Seconds between two lines, and between two writes of the file.
LINE_SECONDS: Final = 30.0
_FILE_SECONDS: Final = 1.0


@dataclass
class Phase:
    """A stretch of work whose end is known.

    Attributes:
        title: What is done, such as `iterate 1 training`.
        total: How much there is to do.
        unit: What is counted, such as `rows`.
        counts: How much each step of the work has done, by its name.
        note: What to say besides, such as the loss.
        started: When it began, seconds of a monotonic clock.
        found: How much of each step an earlier start had done.
    """

    title: str
    total: int
    unit: str
    counts: dict[str, int]
    note: str = ""
    started: float = 0.0
    found: dict[str, int] = field(default_factory=dict)

    def left(self, now: float) -> float | None:
        """Seconds until the end, judging by what was done so far; None while that is unknown."""
        steps = len(self.counts) * self.total
        done, before = sum(self.counts.values()), sum(self.found.values())
        if done <= before or not steps:
            return None
        return max(0.0, (now - self.started) * (steps - done) / (done - before))

    def rate(self, now: float) -> float | None:
        """Units per second of the first step; None before the first."""
        name = next(iter(self.counts))
        done = self.counts[name] - self.found.get(name, 0)
        return done / (now - self.started) if done and now > self.started else None


@dataclass(frozen=True)
class Progress:
    """What `progress.json` holds.

    Attributes:
        state: Whether the run goes on, and how it ended.
        title: The current phase.
        total: How much it has to do.
        unit: What is counted.
        counts: How much each step of it has done, by its name.
        note: What to say besides.
        rate: Units per second of the first step.
        left: Seconds until the end of the phase.
        process: Id of the process.
        host: Name of its machine.
        beat: Number of the write: whoever waits sees from it that the process is alive.
    """

    state: State
    title: str
    total: int
    unit: str
    counts: Mapping[str, float]
    note: str
    rate: float | None
    left: float | None
    process: int
    host: str
    beat: int

    @classmethod
    def of(cls, content: object) -> Progress:
        """Read the file's content.

        Raises:
            ValueError: A field is missing or has an invalid value.
        """
        known = check_fields(content, _RULES, required=_RULES)
        return cls(**{name: known[name] for name in _RULES})

    @property
    def is_gone(self) -> bool:
        """Whether its process ended without a word; only known on the same machine."""
        if self.state != "running" or self.host != socket.gethostname():
            return False
        try:
            os.kill(self.process, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # a process of another user
            pass
        return False

    def __str__(self) -> str:
        """The phase in a line."""
        if not self.total:
            return self.title
        done = [f"{count:,.0f} {name}" for name, count in self.counts.items()]
        done[0] = done[0].replace(" ", f" of {self.total:,} {self.unit} ", 1).rstrip()
        line = f"{self.title}: {', '.join(done)}"
        line += "" if self.rate is None else f"; {self.rate:.3g} {self.unit}/s"
        line += "" if self.left is None else f"; {duration(self.left)} left"
        return f"{line}; {self.note}" if self.note else line


class ProgressLog:
    """Says how far the current phase is; used as a context manager.

    Args:
        write: Receives a line every `every` seconds; None where bars are drawn.
        path: The file; None for no file.
        every: Seconds between two lines.
        clock: A monotonic clock.
    """

    def __init__(
        self,
        write: Callable[[str], None] | None,
        path: Path | None = None,
        every: float = LINE_SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Say nothing yet."""
        self._write, self._path, self._every, self._clock = write, path, every, clock
        self._phases: list[Phase] = []
        self._state: State = "running"
        self._beat, self._written_at, self._said_at = 0, float("-inf"), clock()
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        """Start to say how far the work is."""
        self._file()
        self._thread = threading.Thread(target=self._run, name="progress", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Stop."""
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @contextmanager
    def phase(self, title: str, total: int, unit: str, *steps: str) -> Iterator[Phase]:
        """A phase inside the block; the phase around it goes on afterwards.

        Args:
            title: What is done.
            total: How much there is to do.
            unit: What is counted.
            steps: Names of the steps that each unit goes through; default one without a name.
        """
        counts = dict.fromkeys(steps or ("",), 0)
        phase = Phase(title, total, unit, counts, started=self._clock())
        self._phases.append(phase)
        self._file()
        try:
            yield phase
        finally:
            self._phases.remove(phase)

    def advance(
        self, phase: Phase, done: int, step: str | None = None, *, found: bool = False
    ) -> None:
        """Count what was done.

        Args:
            phase: The phase.
            done: How many units more.
            step: The step; default the first.
            found: Whether an earlier start had done them.
        """
        name = next(iter(phase.counts)) if step is None else step
        phase.counts[name] += done
        if found:
            phase.found[name] = phase.found.get(name, 0) + done
        self.tell()

    @property
    def is_due(self) -> bool:
        """Whether the next `tell` writes the file."""
        return self._clock() - self._written_at >= _FILE_SECONDS

    def tell(self) -> None:
        """Write the file and a line if they are due."""
        now = self._clock()
        if self.is_due:
            self._file()
        if now - self._said_at >= self._every:
            self._line()

    def end(self, state: State) -> None:
        """Write how the run ended."""
        self._state = state
        self._file()

    @property
    def progress(self) -> Progress:
        """How far the current phase is."""
        phase, now = self._phases[-1] if self._phases else _IDLE, self._clock()
        return Progress(
            state=self._state,
            title=phase.title,
            total=phase.total,
            unit=phase.unit,
            counts=dict(phase.counts),
            note=phase.note,
            rate=phase.rate(now),
            left=phase.left(now),
            process=os.getpid(),
            host=socket.gethostname(),
            beat=self._beat,
        )

    def _run(self) -> None:
        while not self._ended.wait(self._every):
            self._line()
            self._file()

    def _line(self) -> None:
        with self._lock:
            # The other thread may have been faster. (It wakes up a little early at times.)
            if self._clock() - self._said_at < 0.9 * self._every:
                return
            self._said_at = self._clock()
            if self._write is not None:
                self._write(f"{time.strftime('%H:%M:%S')} {self.progress}")

    def _file(self) -> None:
        self._written_at = self._clock()
        if self._path is None:
            return
        # A full disk must not end a run because of this file.
        with self._lock, suppress(OSError):
            self._beat += 1
            temporary = self._path.with_name(f".{self._path.name}.tmp")
            temporary.write_text(json.dumps(asdict(self.progress)), encoding="utf-8")
            temporary.replace(self._path)


def duration(seconds: float) -> str:
    """A time span as it is shown: seconds, minutes from one on, hours from two on."""
    if seconds >= 7200:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


# Between two phases: weights are loaded, an iterate is measured or saved.
_IDLE: Final = Phase("preparing", 0, "", {"": 0})
_RULES: Final[Mapping[str, Any]] = {
    "state": TEXT,
    "title": TEXT,
    "total": WHOLE,
    "unit": TEXT,
    "counts": NUMBERS,
    "note": TEXT,
    "rate": optional(NUMBER),
    "left": optional(NUMBER),
    "process": WHOLE,
    "host": TEXT,
    "beat": WHOLE,
}
