"""Trying a kernel before its first use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spin_lightning.errors import first_line
from spin_lightning.out_of_memory import is_out_of_memory


def problem_of(error: Callable[[], float], tolerance: float, what: str) -> str | None:
    """What is wrong with a kernel; None if nothing is.

    Args:
        error: Runs the kernel and returns how far its results are off.
        tolerance: The largest error allowed.
        what: The results, in words.
    """
    try:
        found = error()
    # Kernels and compilers raise errors of many classes.
    except Exception as problem:
        if is_out_of_memory(problem):
            raise
        return first_line(problem)
    return None if found <= tolerance else f"{what} are off by {found:.2g}"


def largest_error(found: Tensor, expected: Tensor) -> float:
    """The largest error, over the largest number expected; infinite if a result is NaN."""
    error = (found.float() - expected).abs().max() / expected.abs().max()
    return float(error.nan_to_num(torch.inf))
