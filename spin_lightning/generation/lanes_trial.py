"""Whether torch's attention kernel reads lanes up to their lengths on this machine.

It is tried before its first use, since errors of a kernel would show only in responses. Where the
trial fails, decoding takes the slots of other devices.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from torch import Tensor

from spin_lightning.errors import first_line
from spin_lightning.generation.lanes import Lanes
from spin_lightning.out_of_memory import is_out_of_memory
from spin_lightning.policies.flex_attention import Scores, dense_attention

# Largest error over the largest number: far above the rounding of bfloat16, far below a wrong key.
_TOLERANCE = 0.05
_LENGTHS, _COLUMNS, _WINDOWS = (1, 37, 300, 129), 300, (None, 20)


class Kernel(NamedTuple):
    """What the kernel is used for.

    Attributes:
        device: Where it runs.
        dtype: Type of queries, keys and values.
        heads: Number of heads of the queries.
        key_heads: Number of heads of keys and values.
        head_size: Numbers in a head.
    """

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    head_size: int


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
    try:
        worst = max(_error(kernel, window) for window in _WINDOWS)
    # Kernels raise errors of many classes.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return first_line(error)
    return None if worst <= _TOLERANCE else f"its results are off by {worst:.2g}"


def _error(kernel: Kernel, window: int | None) -> float:
    """Largest error on random numbers, over the largest number."""
    count = len(_LENGTHS)
    lanes = Lanes.empty(count, _COLUMNS, kernel.device)
    lanes.lengths.copy_(torch.tensor(_LENGTHS))
    generator = torch.Generator().manual_seed(0)
    query, keys, values = (
        torch.randn(rows, heads, kernel.head_size, generator=generator).to(
            kernel.device, kernel.dtype
        )
        for rows, heads in (
            (count, kernel.heads),
            (count * _COLUMNS, kernel.key_heads),
            (count * _COLUMNS, kernel.key_heads),
        )
    )
    found = lanes.attend(query, keys, values, None, window).float()
    expected = torch.cat(
        [
            _plain(query[i], lane[:length].float(), other[:length].float(), window)
            for i, (length, lane, other) in enumerate(
                zip(_LENGTHS, keys.split(_COLUMNS), values.split(_COLUMNS), strict=True)
            )
        ]
    )
    return float(((found - expected).abs().max() / expected.abs().max()).nan_to_num(torch.inf))


def _plain(query: Tensor, keys: Tensor, values: Tensor, window: int | None) -> Tensor:
    """Attention over one lane, with all scores in memory, shape [1, heads, head size]."""
    last = len(keys) if window is None else window
    key, value = (x[-last:].transpose(0, 1)[None] for x in (keys, values))
    everything = torch.ones(1, key.shape[2], dtype=torch.bool, device=key.device)
    attended = dense_attention(query.float()[None, :, None], key, value, everything, Scores())
    return attended[:, :, 0]
