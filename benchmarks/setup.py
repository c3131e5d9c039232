"""Where and how large: what the command line of every benchmark says."""

from __future__ import annotations

import argparse
import logging
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning
import torch
import transformers

from benchmarks.measure import Figure, machine, publish
from benchmarks.workload import SIZES, WORKLOADS, Workload, base_model


@dataclass(frozen=True)
class Setup:
    """One run of a benchmark.

    Attributes:
        size: Name of the model in `workload.SIZES`.
        device: cpu or cuda.
        out: Where models, runs and results go.
        tiny: Whether it is to show only that it runs: few, short pairs.
    """

    size: str
    device: str
    out: Path
    tiny: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """In what the base computes."""
        return torch.bfloat16 if self.device == "cuda" else torch.float32

    @property
    def vocabulary(self) -> int:
        """Number of ids."""
        return int(SIZES[self.size]["vocab_size"])

    @property
    def base(self) -> Path:
        """Folder of the base model."""
        return base_model(self.size, self.dtype, self.out / "models")

    def workload(self, name: str) -> Workload:
        """Workload A or B; short pairs in a tiny run."""
        return WORKLOADS["tiny" if self.tiny else name]

    def count(self, usual: int) -> int:
        """A number of rounds or rows; few in a tiny run."""
        return min(usual, 2) if self.tiny else usual

    @property
    def arguments(self) -> list[str]:
        """The command line that gives this setup."""
        words = ["--size", self.size, "--device", self.device, "--out", str(self.out)]
        return [*words, "--tiny"] if self.tiny else words


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark takes."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    options.add_argument("--size", choices=tuple(SIZES), help="default: 22m, on a GPU 1b")
    options.add_argument("--out", type=Path, default=Path("runs/bench"))
    options.add_argument(
        "--tiny", action="store_true", help="the smallest sizes, to see that it runs"
    )
    return options


def setup_of(options: argparse.Namespace) -> Setup:
    """What the options say."""
    usual = "1b" if options.device == "cuda" else "22m"
    size = options.size or ("tiny" if options.tiny else usual)
    return Setup(size, options.device, options.out, options.tiny)


def benchmark(
    run: Callable[[Setup], Iterable[Figure]],
    name: str,
    description: str | None,
    arguments: Sequence[str] | None = None,
) -> list[Figure]:
    """Run a benchmark from its command line, print its figures as they come, write them down."""
    setup = setup_of(parser(description).parse_args(arguments))
    be_quiet()
    figures = []
    for figure in run(setup):
        print(figure.line(judged=not setup.tiny), flush=True)
        figures.append(figure)
    about = {"size": setup.size, "tiny": setup.tiny, "machine": machine(setup.device)}
    publish(name, figures, setup.out, about)
    return figures


def be_quiet() -> None:
    """Silence libraries whose advice is about other things than speed."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    assert lightning.__version__  # the loggers above are set up by its import
