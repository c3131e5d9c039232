"""Telling a lack of memory from other errors."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that memory ran out; torch has a class for some of them only."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    signs = (
        "can't allocate memory",  # CPU
        "_STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN and others, for their workspace
        "CUDA error: out of memory",  # driver
    )
    return any(sign in str(error) for sign in signs)
