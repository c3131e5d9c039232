"""The training step: time compared with TRL and the floor, peak memory compared with TRL."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import memory, ours, peer
from benchmarks.floor import Floor
from benchmarks.setup import Setup, benchmark
from benchmarks.timing import Figure, interleaved, median_ratio
from benchmarks.workload import SIZES, batches_of
from spin_lightning.data.dataset import Pair

# Relative tolerance between the losses of both sides, which must compute the same thing.
_SAME_LOSS = {"float32": 1e-4, "bfloat16": 0.1}


def run(setup: Setup) -> Iterator[Figure]:
    """Yield the figures of the training step."""
    if "step_a" in setup.goals:
        yield _figure(setup, "step_a", "A", rounds=9, with_memory=True)
    if "step_b" in setup.goals:
        yield _figure(setup, "step_b", "B", rounds=5)
    if "step_a_nf4" in setup.goals:
        on_gpu = setup.device == "cuda"
        yield _figure(setup, "step_a_nf4", "A", rounds=7, quantization="nf4", with_memory=on_gpu)


def _figure(
    setup: Setup,
    name: str,
    workload: str,
    rounds: int,
    quantization: str = "none",
    with_memory: bool = False,
) -> Figure:
    figure = Figure(name)
    if with_memory and peer.is_there():
        # Before the models of the timed steps take memory here: TRL's step may need most of it.
        peaks = [memory.of_step(setup, side, workload, quantization) for side in ("ours", "trl")]
        figure.peak_mb = (peaks[0], peaks[1])
        figure.fields["peak"] = peaks[0] / peaks[1]
    rounds = setup.rounds(rounds)
    batches = batches_of(setup.workload(workload), rounds, setup.vocabulary)
    our_step = ours.Step(setup, quantization)
    sides: dict[str, Callable[[int], Any]] = {"ours": lambda i: our_step(batches[i])}
    if peer.is_there():
        their_step = peer.Step(setup, quantization)
        sides["trl"] = lambda i: their_step(batches[i])
        _check_same_loss(our_step, their_step, batches[0], setup)
    else:
        figure.note = peer.MISSING
    if quantization == "none":
        floor = Floor(SIZES[setup.size], setup.device, setup.dtype)
        inputs = [floor.prepare(batch) for batch in batches]
        sides["floor"] = lambda i: floor.step(inputs[i])
        sides["own_floor"] = lambda i: floor.step(inputs[i], own_kernels=True)
    figure.seconds = interleaved(sides, rounds, setup.device)
    if "trl" in sides:
        figure.fields["ratio"] = median_ratio(figure.seconds["trl"], figure.seconds["ours"])
    if "floor" in sides:
        figure.fields["floor"] = median_ratio(figure.seconds["ours"], figure.seconds["floor"])
        nearer = median_ratio(figure.seconds["ours"], figure.seconds["own_floor"])
        note = f"{nearer:.2f}× a floor that uses our kernels for its products"
        figure.note = "; ".join(filter(None, (figure.note, note)))
    return figure


def _check_same_loss(
    our_step: ours.Step, their_step: peer.Step, batch: Sequence[Pair], setup: Setup
) -> None:
    """Raise an error if the two steps do not compute the same loss."""
    mine, theirs = (float(step.loss(batch).detach()) for step in (our_step, their_step))
    tolerance = _SAME_LOSS[setup.dtype_name]
    if abs(mine - theirs) > tolerance * max(1.0, abs(theirs)):
        raise RuntimeError(f"the two sides differ: loss {mine} here, {theirs} in TRL")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    benchmark(run, "step", __doc__, arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
