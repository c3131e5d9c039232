"""Device, sizes and command line of every benchmark."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as hf_logging

from benchmarks.goals import Goal, goals_of
from benchmarks.timing import Figure, machine, publish
from benchmarks.workload import SIZES, WORKLOADS, Workload, base_model, has_weights

# Rounds of the sizes whose rounds take minutes on a CPU.
_ROUNDS = {"smollm2": 3}


@dataclass(frozen=True)
class Setup:
    """One run of a benchmark.

    Attributes:
        size: Name of the model in `workload.SIZES`.
        device: cpu or cuda.
        dtype_name: Compute dtype of the base: float32 or bfloat16.
        out: Folder of models, runs and results.
        tiny: Only check that the benchmark runs, with few short pairs.
    """

    size: str
    device: str
    dtype_name: str
    out: Path
    tiny: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """`dtype_name` as a torch dtype."""
        dtype: torch.dtype = getattr(torch, self.dtype_name)
        return dtype

    @property
    def vocabulary(self) -> int:
        """Size of the vocabulary."""
        return int(SIZES[self.size]["vocab_size"])

    @property
    def base(self) -> Path:
        """Folder of the base model."""
        return base_model(self.size, self.dtype, self.out / "models", self.device)

    @property
    def goals(self) -> Mapping[str, Mapping[str, Goal]]:
        """The figures that this size measures, and the goals of each."""
        return goals_of(self.size)

    def workload(self, name: str) -> Workload:
        """Workload A or B; short pairs in a tiny run."""
        return WORKLOADS["tiny" if self.tiny else name]

    def count(self, usual: int) -> int:
        """A number of rows; at most 2 in a tiny run."""
        return min(usual, 2) if self.tiny else usual

    def rounds(self, usual: int) -> int:
        """A number of rounds; fewer where one takes minutes, at most 2 in a tiny run."""
        return self.count(min(usual, _ROUNDS.get(self.size, usual)))

    @property
    def arguments(self) -> list[str]:
        """Command line arguments for this setup."""
        named = {"size": self.size, "device": self.device, "dtype": self.dtype_name}
        words = [word for name, value in named.items() for word in (f"--{name}", value)]
        return [*words, "--out", str(self.out), *(["--tiny"] if self.tiny else [])]


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser of the options common to all benchmarks."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--size", choices=tuple(SIZES), help="default: 22m, on a GPU 1b")
    options.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: float32, on a GPU bfloat16"
    )
    options.add_argument("--out", type=Path, default=Path("runs/bench"))
    options.add_argument(
        "--tiny", action="store_true", help="the smallest sizes, to check that it runs"
    )
    return options


def setup_of(options: argparse.Namespace) -> Setup:
    """The setup that the options describe."""
    size, dtype = ("1b", "bfloat16") if options.device == "cuda" else ("22m", "float32")
    return Setup(
        options.size or ("tiny" if options.tiny else size),
        options.device,
        options.dtype or dtype,
        options.out,
        options.tiny,
    )


def benchmark(
    run: Callable[[Setup], Iterable[Figure]],
    name: str,
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> list[Figure]:
    """Run a benchmark from its command line, print each figure at once, write all as JSON."""
    setup = setup_of(parser(description).parse_args(arguments))
    figures = []
    with quiet():
        for figure in run(setup):
            print(figure.line({} if setup.tiny else setup.goals[figure.name]), flush=True)
            figures.append(figure)
    about = {"benchmark": name, "size": setup.size, "dtype": setup.dtype_name, "tiny": setup.tiny}
    about["weights"] = "trained" if has_weights(setup.size) else "random"
    about["machine"] = machine(setup.device)
    publish(setup.out / f"{name}-{setup.size}.json", figures, setup.goals, about)
    return figures


@contextmanager
def quiet() -> Iterator[None]:
    """Silence logs and warnings of libraries."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels, verbosity = [logger.level for logger in loggers], hf_logging.get_verbosity()
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        hf_logging.set_verbosity_error()
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        hf_logging.set_verbosity(verbosity)
