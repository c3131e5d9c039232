"""Growth of a step's time and memory with the number of pairs and the length of prompts."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from statistics import median

from benchmarks import memory, ours
from benchmarks.setup import Setup, benchmark
from benchmarks.timing import Figure, interleaved, spread
from benchmarks.workload import pair_of_lengths
from spin_lightning.data.dataset import Pair

_PAIRS = (4, 8, 16, 32)
_PROMPTS = (128, 256, 512, 1024)
_RESPONSE = 64


def run(setup: Setup) -> Iterator[Figure]:
    """Yield the figures of growth, all of our step alone."""
    if "growth_pairs" not in setup.goals:
        return
    step = ours.Step(setup)
    yield _over_pairs(setup, step)
    yield _over_prompts(setup, step)
    yield _memory(setup)


def _over_pairs(setup: Setup, step: ours.Step) -> Figure:
    """The same 32 pairs in 8 steps of 4, in 4 of 8, in 2 of 16, and in one of 32."""
    sizes = _PAIRS[:2] if setup.tiny else _PAIRS
    pairs = setup.workload("A").pairs(sizes[-1], setup.vocabulary)

    def in_steps_of(size: int) -> None:
        for i in range(0, len(pairs), size):
            step(pairs[i : i + size])

    seconds = interleaved(
        {str(size): lambda _, size=size: in_steps_of(size) for size in sizes},
        setup.count(3),
        setup.device,
    )
    each = {size: median(taken) / len(pairs) for size, taken in seconds.items()}
    return Figure(
        "growth_pairs",
        {"spread": spread(each.values())},
        seconds=seconds,
        note=_listed(each, 1e3, "ms per pair at {} pairs"),
    )


def _over_prompts(setup: Setup, step: ours.Step) -> Figure:
    prompts = (4, 8) if setup.tiny else _PROMPTS
    response = 4 if setup.tiny else _RESPONSE
    batches = {
        str(n): [pair_of_lengths(n, response, setup.vocabulary, seed) for seed in range(4)]
        for n in prompts
    }
    seconds = interleaved(
        {name: lambda _, batch=batch: step(batch) for name, batch in batches.items()},
        setup.count(5),
        setup.device,
    )
    each = {n: median(taken) / _distinct_tokens(batches[n]) for n, taken in seconds.items()}
    return Figure(
        "growth_prompt",
        {"spread": spread(each.values())},
        seconds=seconds,
        note=_listed(each, 1e6, "µs per distinct token at {} prompt tokens"),
    )


def _memory(setup: Setup) -> Figure:
    """Peak memory of steps on more and more pairs of one length, MB."""
    prompt, response = (8, 4) if setup.tiny else (128, 96)
    sizes = _PAIRS[:3] if setup.tiny else _PAIRS
    peaks = memory.of_pairs(setup, sizes, (prompt, response))
    return Figure(
        "growth_memory",
        # In a tiny run a step needs less than the allocator's granularity.
        {"spread": spread(max(peak, 1e-3) for peak in peaks)},
        note=_listed(dict(zip(map(str, sizes), peaks, strict=True)), 1, "MB at {} pairs"),
    )


def _distinct_tokens(pairs: Sequence[Pair]) -> int:
    """Tokens of the pairs, each prompt once."""
    return sum(len(p.prompt_ids) + len(p.real_ids) + len(p.generated_ids) for p in pairs)


def _listed(values: dict[str, float], scale: float, unit: str) -> str:
    numbers = ", ".join(f"{value * scale:.1f}" for value in values.values())
    return f"{numbers} {unit.format(', '.join(values))}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    benchmark(run, "growth", __doc__, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
