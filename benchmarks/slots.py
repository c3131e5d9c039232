"""Decoding in 16, 64 and 128 slots, with and without CUDA graphs, and batches of `generate`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import ours, peer
from benchmarks.generation import unit
from benchmarks.setup import Setup, benchmark
from benchmarks.timing import Figure, interleaved, median_ratio, peak_mb
from benchmarks.workload import PAD, STOP
from spin_lightning.generation.base import Request
from spin_lightning.generation.decoding import Decoder
from spin_lightning.generation.sampler import Sampler
from spin_lightning.modules.spin import SPIN

SLOTS = (16, 64, 128)
_ROUNDS = 3


def run(setup: Setup) -> Iterator[Figure]:
    """Yield the figures of each quantization and number of slots."""
    for quantization in ("none", "nf4"):
        suffix = "" if quantization == "none" else f"_{quantization}"
        wanted = {f"slots_{slots}{suffix}": slots for slots in SLOTS}
        wanted = {name: slots for name, slots in wanted.items() if name in setup.goals}
        if wanted:
            yield from _figures(setup, quantization, wanted)


def _figures(setup: Setup, quantization: str, wanted: dict[str, int]) -> Iterator[Figure]:
    module = ours.load_module(setup, quantization)
    ours.use_iterates(module.policy, setup)
    model = peer.load_model(setup, quantization, adapters=ours.ADAPTERS)
    for name, slots in wanted.items():
        yield _figure(setup, name, setup.count(slots), module, model)


def _figure(setup: Setup, name: str, slots: int, module: SPIN, model: peer.PeftModel) -> Figure:
    units = [unit(setup, i, slots) for i in range(setup.rounds(_ROUNDS))]

    def mine(i: int) -> None:
        _decode(module, units[i], slots, cuda_graphs=True)

    def theirs(i: int) -> None:
        peer.generate_in_turn(model, units[i], slots)

    sides: dict[str, Callable[[int], Any]] = {"ours": mine, "generate": theirs}
    if setup.device == "cuda":
        sides["without graphs"] = lambda i: _decode(module, units[i], slots, cuda_graphs=False)
    # Kernels are compiled in the warm-up.
    seconds = interleaved(sides, len(units), setup.device)
    tokens = sum(request.cap for asked in units for request in asked)
    speeds = [f"{tokens / sum(taken):,.0f} {side}" for side, taken in seconds.items()]
    peaks = [peak_mb(lambda side=side: side(0), setup.device) for side in (mine, theirs)]
    return Figure(
        name,
        {"ratio": median_ratio(seconds["generate"], seconds["ours"])},
        peak_mb=(peaks[0], peaks[1]),
        seconds=seconds,
        note=f"tokens per second: {', '.join(speeds)}",
    )


def _decode(module: SPIN, requests: Sequence[Request], slots: int, *, cuda_graphs: bool) -> None:
    """Decode requests in exactly so many slots."""
    policy = module.policy
    sampler = Sampler(module.generation)
    decoder = Decoder(policy.model, sampler, (STOP,), PAD, cuda_graphs=cuda_graphs)
    for group in policy.batch_groups({request.policy for request in requests}):
        asked = [request for request in requests if request.policy in group]
        with policy.at_rows(group) as routing:
            decoder.decode(asked, routing, slots)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    benchmark(run, "slots", __doc__, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
