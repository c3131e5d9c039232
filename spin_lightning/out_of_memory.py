"""Telling a lack of memory from other errors."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; torch has a class for its own allocator alone."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    # On a CPU; of the libraries on a GPU, which allocate workspace; of the driver.
    signs = ("can't allocate memory", "_STATUS_ALLOC_FAILED", "CUDA error: out of memory")
    return any(sign in str(error) for sign in signs)
