"""Sampling from four iterates, and from their token-level mixture with the base."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from benchmarks import ours, peer
from benchmarks.floor import Floor
from benchmarks.setup import Setup, benchmark
from benchmarks.timing import Figure, interleaved, median_ratio
from benchmarks.workload import SIZES
from spin_lightning.generation.base import Request
from spin_lightning.keyed import row_key

# Rows of one batch of `generate`. One of our work units is four of these: an iterate of 2,000 rows
# has such units by default.
_ROWS = 64
_ROUNDS = 2
_ALPHA = 0.3
OPPONENTS = range(1, ours.ADAPTERS + 1)


def run(setup: Setup) -> Iterator[Figure]:
    """Yield the figures of generation."""
    for quantization in ("none", "nf4"):
        suffix = "" if quantization == "none" else f"_{quantization}"
        if f"generation{suffix}" in setup.goals:
            yield from _figures(setup, quantization, suffix)


def _figures(setup: Setup, quantization: str, suffix: str) -> Iterator[Figure]:
    """Generate 64 responses for each of four iterates: one work unit here, four batches there.

    Responses end at the lengths of the workload on both sides: a model with random weights hardly
    ever produces a stop token.
    """
    module = ours.load_module(setup, quantization)
    ours.use_iterates(module.policy, setup)
    model = peer.load_model(setup, quantization, adapters=ours.ADAPTERS)
    units = [unit(setup, i, _ROWS) for i in range(setup.rounds(_ROUNDS))]
    mixed = [[replace(request, token_alpha=_ALPHA) for request in asked] for asked in units]
    decoder = ours.decoder(module)

    short = [replace(request, cap=2) for request in units[0]]
    decoder.generate(module.policy, short)
    peer.generate_in_turn(model, short, _ROWS)
    seconds = interleaved(
        {
            "ours": lambda i: decoder.generate(module.policy, units[i]),
            "mixture": lambda i: decoder.generate(module.policy, mixed[i]),
            "generate": lambda i: peer.generate_in_turn(model, units[i], _ROWS),
        },
        len(units),
        setup.device,
        warmup=0,
    )
    yield Figure(
        f"generation{suffix}",
        {"ratio": median_ratio(seconds["generate"], seconds["ours"])},
        seconds={"ours": seconds["ours"], "generate": seconds["generate"]},
    )
    yield Figure(
        f"token_mixture{suffix}",
        {"cost": median_ratio(seconds["mixture"], seconds["ours"])},
        seconds={"mixture": seconds["mixture"], "plain": seconds["ours"]},
        note=f"{_operations(setup, units):.2f}× the operations of plain sampling",
    )


def _operations(setup: Setup, units: Sequence[Sequence[Request]]) -> float:
    """Products of a mixture over those of plain sampling: each layer twice, the head once."""
    sizes = SIZES[setup.size]
    layers = sum(
        weight.numel() for layer in Floor(sizes, "meta", torch.float32).layers for weight in layer
    )
    head = sizes["vocab_size"] * sizes["hidden_size"]
    requests = [request for asked in units for request in asked]
    # The last token of a response is not fed back.
    read = layers * sum(len(request.prompt_ids) + request.cap - 1 for request in requests)
    answered = head * sum(request.cap for request in requests)
    return (2 * read + answered) / (read + answered)


def unit(setup: Setup, number: int, rows: int) -> list[Request]:
    """A work unit: prompts and lengths of the workload, answered by each iterate in turn.

    Args:
        setup: Device and sizes.
        number: Number of the unit.
        rows: Responses of each iterate.
    """
    count = setup.count(rows) * len(OPPONENTS)
    pairs = setup.workload("A").pairs(count, setup.vocabulary, seed=number)
    return [
        Request(
            prompt_ids=tuple(pair.prompt_ids.tolist()),
            opponent=OPPONENTS[i % len(OPPONENTS)],
            key=row_key(0, number, i, 0),
            cap=len(pair.real_ids),
        )
        for i, pair in enumerate(pairs)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    benchmark(run, "generation", __doc__, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
