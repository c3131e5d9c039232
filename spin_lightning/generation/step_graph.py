"""A decoding step as one CUDA graph, so that a GPU does not wait for the host's launches."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

from spin_lightning.policies.trial import problem_of

# Steps before a capture, in which libraries set up what they keep.
_WARM_UP = 2
# How far a log-prob may move, nats: far above rounding, below what a wrong input does.
_TOLERANCE = 0.1

# What is wrong with graphs on this machine, once a capture has failed.
_problems: list[str] = []


class StepGraph:
    """Runs steps, from a graph where their form stays the same.

    Each capture is checked: one step from the graph and one without it, from the same state.

    Args:
        enabled: Whether to capture at all.
    """

    def __init__(self, *, enabled: bool) -> None:
        """Start without a graph."""
        self._enabled = enabled
        self._form: Hashable = None
        self._left = 0
        self._replay: Callable[[], None] | None = None

    def run(
        self, step: Callable[[], None], form: Hashable, state: Sequence[Tensor], logps: Tensor
    ) -> None:
        """Run a step.

        Args:
            step: Changes the state, at fixed addresses and without waiting for the device.
            form: Differs where the step's kernels or addresses differ.
            state: What the step changes and reads again.
            logps: Those of the state that are log-probs, which may move by rounding.

        Warns:
            UserWarning: The step cannot be captured; steps then run without a graph.
        """
        if not self._enabled or _problems:
            step()
            return
        if form != self._form:
            self._form, self._left, self._replay = form, _WARM_UP, None
        if self._replay is not None:
            self._replay()
        elif self._left:
            self._left -= 1
            step()
        else:
            self._replay = _checked(step, state, logps)


def deviations() -> dict[str, str]:
    """What this process computes otherwise since graphs do not work."""
    return {"cuda_graphs": f"not used: {_problems[0]}"} if _problems else {}


def capture(work: Callable[[], None]) -> Callable[[], None]:
    """Record the kernels of some work, which is not done; return what does it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        work()
    replay: Callable[[], None] = graph.replay
    return replay


def _checked(
    step: Callable[[], None], state: Sequence[Tensor], logps: Tensor
) -> Callable[[], None] | None:
    """Run a step; return its graph, None if it cannot be captured or does something else."""
    before = [part.clone() for part in state]
    step()
    expected, wanted = [part.clone() for part in state], logps.clone()
    _set(state, before)
    captured: list[Callable[[], None]] = []

    def moved() -> float:
        captured.append(capture(step))
        captured[0]()
        return float((logps - wanted).abs().nan_to_num(torch.inf).max())

    problem = problem_of(moved, _TOLERANCE, "log-probs from it")
    if problem is None:
        return captured[0]
    _set(state, expected)
    _problems.append(problem)
    warnings.warn(
        f"a decoding step cannot be captured as a CUDA graph on this machine ({problem}). Decoding "
        "goes on without graphs, which is slower.",
        stacklevel=2,
    )
    return None


def _set(state: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for part, value in zip(state, values, strict=True):
        part.copy_(value)
