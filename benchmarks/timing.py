"""Measures time and memory, and prints and stores the results."""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.goals import Goal

_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "trl")


@dataclass
class Figure:
    """One line of the result.

    Attributes:
        name: Its key in `goals.SUBJECTS`.
        fields: Values that have goals, by name.
        peak_mb: Peak memory of our step and of the other side's, MB.
        seconds: All measurements behind it, by side.
        note: A remark printed with it.
    """

    name: str
    fields: dict[str, float] = field(default_factory=dict)
    peak_mb: tuple[float, float] | None = None
    seconds: dict[str, list[float]] = field(default_factory=dict)
    note: str = ""

    def verdicts(self, goals: Mapping[str, Goal]) -> dict[str, bool]:
        """Whether each measured goal is met, by field."""
        return {n: goal.met(self.fields[n]) for n, goal in goals.items() if n in self.fields}

    def line(self, goals: Mapping[str, Goal]) -> str:
        """The figure as printed, with a verdict on each goal."""
        parts = [self.name, *(f"{n}={v:.2f}" for n, v in self.fields.items() if n != "peak")]
        if self.peak_mb is not None:
            parts.append("peak_mb={:.0f}/{:.0f}".format(*self.peak_mb))
        parts += [
            f"[{name} {goals[name]}: {'met' if met else 'MISSED'}]"
            for name, met in self.verdicts(goals).items()
        ]
        if self.note:
            parts.append(f"({self.note})")
        return " ".join(parts)


def clock(work: Callable[[], Any], device: str) -> float:
    """Seconds that `work` takes."""
    _synchronize(device)
    start = time.perf_counter()
    work()
    _synchronize(device)
    return time.perf_counter() - start


def interleaved(
    sides: Mapping[str, Callable[[int], Any]], rounds: int, device: str, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds of every side in every round, the sides taking turns.

    Args:
        sides: The work of round i, by name of the side.
        rounds: Number of measured rounds.
        device: Device of the work.
        warmup: Number of unmeasured rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for i in range(-warmup, rounds):
        for name, side in sides.items():
            taken = clock(lambda side=side, i=i: side(max(i, 0)), device)
            if i >= 0:
                seconds[name].append(taken)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """The median over rounds of the ratio within a round."""
    return statistics.median(n / d for n, d in zip(numerator, denominator, strict=True))


def spread(values: Iterable[float]) -> float:
    """The largest value over the smallest."""
    values = list(values)
    return max(values) / min(values)


def peak_mb(work: Callable[[], Any], device: str) -> float:
    """Peak memory during `work` minus what was held before, MB.

    On the CPU this is Linux's resident set; on a GPU it is what torch allocated.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        work()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = _status_mb("VmRSS")
    work()
    return _status_mb("VmHWM") - before


def in_subprocess(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module arguments`; the JSON on its last line."""
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def publish(
    path: Path,
    figures: Sequence[Figure],
    goals: Mapping[str, Mapping[str, Goal]],
    about: Mapping[str, Any],
) -> None:
    """Write figures, their verdicts, and the setup and machine of the run, as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    judged = [{**asdict(figure), "met": figure.verdicts(goals[figure.name])} for figure in figures]
    path.write_text(json.dumps({**about, "figures": judged}, indent=2) + "\n")


def machine(device: str) -> dict[str, Any]:
    """Device, threads, date and package versions."""
    cpu = next(
        (
            line.split(":")[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "date": time.strftime("%Y-%m-%d"),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _status_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
