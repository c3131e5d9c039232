"""Peak memory of a training step of one side, in a process of its own; prints JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import ours, peer
from benchmarks.measure import in_subprocess, peak_mb
from benchmarks.setup import Setup, parser, quiet, setup_of
from benchmarks.workload import batches_of

_SIDES: dict[str, Any] = {"ours": ours.Step, "trl": peer.Step}


def of_step(setup: Setup, side: str, workload: str) -> float:
    """Peak memory of one side's step, MB, in a process that has loaded nothing else."""
    if setup.tiny:
        return measure(setup, side, workload)
    return float(in_subprocess("benchmarks.memory", *setup.arguments, side, workload)["peak_mb"])


def measure(setup: Setup, side: str, workload: str) -> float:
    """The peak over two steps, MB, above what is held while no step runs."""
    step = _SIDES[side](setup)
    # The optimiser's state and the libraries' own buffers come with the first step.
    step(setup.workload("tiny").pairs(1, setup.vocabulary))
    batches = batches_of(setup.workload(workload), 2, setup.vocabulary)
    return max(peak_mb(lambda batch=batch: step(batch), setup.device) for batch in batches)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parser(__doc__)
    options.add_argument("side", choices=tuple(_SIDES))
    options.add_argument("workload", choices=("A", "B"))
    parsed = options.parse_args(arguments)
    with quiet():
        peak = measure(setup_of(parsed), parsed.side, parsed.workload)
    print(json.dumps({"peak_mb": peak}))


if __name__ == "__main__":
    main(sys.argv[1:])
