"""Peak memory of one side's training steps, measured in a separate process; prints JSON.

In the same process, later steps would reuse the heap that earlier work left behind.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks import ours, peer
from benchmarks.setup import Setup, parser, quiet, setup_of
from benchmarks.timing import in_subprocess, peak_mb
from benchmarks.workload import batches_of, pair_of_lengths

_SIDES: dict[str, Any] = {"ours": ours.Step, "trl": peer.Step}


def of_step(setup: Setup, side: str, workload: str, quantization: str = "none") -> float:
    """Peak memory of one side's step, MB, in a fresh process."""
    if setup.tiny:
        return measure(setup, side, workload, quantization)
    words = [*setup.arguments, "--quantization", quantization, side, workload]
    return float(in_subprocess("benchmarks.memory", *words)["peak_mb"])


def of_pairs(setup: Setup, sizes: Sequence[int], lengths: tuple[int, int]) -> list[float]:
    """Peak memory of our steps on each number of pairs of one prompt and response length, MB."""
    if setup.tiny:
        return measure_pairs(setup, sizes, lengths)
    words = ["ours", "pairs", *map(str, (*lengths, *sizes))]
    peaks: list[float] = in_subprocess("benchmarks.memory", *setup.arguments, *words)["peak_mb"]
    return peaks


def measure_pairs(setup: Setup, sizes: Sequence[int], lengths: tuple[int, int]) -> list[float]:
    """The same as `of_pairs`, in this process."""
    step = ours.Step(setup)
    pairs = [pair_of_lengths(*lengths, setup.vocabulary, seed) for seed in range(max(sizes))]
    step(pairs[: min(sizes)])
    return [peak_mb(lambda size=size: step(pairs[:size]), setup.device) for size in sizes]


def measure(setup: Setup, side: str, workload: str, quantization: str = "none") -> float:
    """Peak memory over two steps, MB, minus what is held between steps."""
    step = _SIDES[side](setup, quantization)
    # The first step allocates the optimizer's state and the libraries' own buffers.
    step(setup.workload("tiny").pairs(1, setup.vocabulary))
    batches = batches_of(setup.workload(workload), 2, setup.vocabulary)
    return max(peak_mb(lambda batch=batch: step(batch), setup.device) for batch in batches)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    options = parser(__doc__)
    options.add_argument("side", choices=tuple(_SIDES))
    options.add_argument("workload", choices=("A", "B", "pairs"))
    options.add_argument("--quantization", choices=("none", "nf4"), default="none")
    options.add_argument("numbers", type=int, nargs="*", help="prompt, response, numbers of pairs")
    parsed = options.parse_args(arguments)
    setup = setup_of(parsed)
    peak: float | list[float]
    with quiet():
        if parsed.workload == "pairs":
            prompt, response, *sizes = parsed.numbers
            peak = measure_pairs(setup, sizes, (prompt, response))
        else:
            peak = measure(setup, parsed.side, parsed.workload, parsed.quantization)
    print(json.dumps({"peak_mb": peak}))


if __name__ == "__main__":
    main(sys.argv[1:])
