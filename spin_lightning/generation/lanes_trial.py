"""Whether torch's attention kernel reads lanes up to their lengths on this machine.

It is tried before its first use, since errors of a kernel would show only in responses. Where the
trial fails, decoding takes the slots of other devices.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from spin_lightning.generation.lanes import Lanes
from spin_lightning.policies.flex_attention import Scores, dense_attention
from spin_lightning.policies.heads import Heads
from spin_lightning.policies.trial import largest_error, problem_of

# Largest error over the largest number: far above the rounding of bfloat16, far below a wrong key.
_TOLERANCE = 0.05
_LENGTHS, _COLUMNS, _WINDOWS = (1, 37, 300, 129), 300, (None, 20)


class Kernel(NamedTuple):
    """What the kernel is used for.

    Attributes:
        device: Where it runs.
        dtype: Type of queries, keys and values.
        heads: The heads.
    """

    device: torch.device
    dtype: torch.dtype
    heads: Heads


# What is wrong with each kernel that this process has tried; None if it works.
_tried: dict[Kernel, str | None] = {}


def works(kernel: Kernel) -> bool:
    """Whether the kernel works; tried once per process.

    Warns:
        UserWarning: It does not.
    """
    if kernel not in _tried:
        _tried[kernel] = problem = _problem(kernel)
        if problem is not None:
            warnings.warn(
                f"torch's attention kernel for sequences of unequal length cannot decode on this "
                f"machine ({problem}). Decoding pads keys and values, which is slower.",
                stacklevel=2,
            )
    return _tried[kernel] is None


def deviations() -> dict[str, str]:
    """What this process computes otherwise since the kernel does not work."""
    problems = [problem for problem in _tried.values() if problem is not None]
    return {"decoding": f"padded: the varlen kernel fails ({problems[0]})"} if problems else {}


def _problem(kernel: Kernel) -> str | None:
    def worst() -> float:
        return max(_error(kernel, window) for window in _WINDOWS)

    return problem_of(worst, _TOLERANCE, "its results")


def _error(kernel: Kernel, window: int | None) -> float:
    """Largest error on random numbers, over the largest number."""
    count = len(_LENGTHS)
    lanes = Lanes.empty(count, _COLUMNS, kernel.device)
    lanes.lengths.copy_(torch.tensor(_LENGTHS))
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(rows, heads, kernel.heads.size, generator=generator).to(
            kernel.device, kernel.dtype
        )
        for rows, heads in (
            (count, kernel.heads.queries),
            (count * _COLUMNS, kernel.heads.keys),
            (count * _COLUMNS, kernel.heads.keys),
        )
    )
    found = lanes.attend(query, keys, values, None, window)
    expected = torch.cat(
        [
            _plain(query[i], lane[:length].float(), other[:length].float(), window)
            for i, (length, lane, other) in enumerate(
                zip(_LENGTHS, keys.split(_COLUMNS), values.split(_COLUMNS), strict=True)
            )
        ]
    )
    return largest_error(found, expected)


def _plain(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Attention over one lane, with all scores in memory, shape [1, heads, head size]."""
    last = len(keys) if window is None else window
    key, value = (x[-last:].transpose(0, 1)[None] for x in (keys, values))
    everything = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
    attended = dense_attention(query.float()[None, :, None], key, value, everything, Scores())
    return attended[:, :, 0]
