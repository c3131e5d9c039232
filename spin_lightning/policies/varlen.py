"""Where torch's attention kernel for sequences of unequal length runs."""

from __future__ import annotations

import torch

# What the kernel requires: Ampere or newer.
_FIRST_CAPABILITY = (8, 0)
_LARGEST_HEAD = 256


def has_varlen(device: torch.device, dtype: torch.dtype, head_size: int) -> bool:
    """Whether the kernel supports heads of a size and type on a device."""
    return (
        device.type == "cuda"
        and dtype in (torch.bfloat16, torch.float16)
        and head_size % 8 == 0
        and head_size <= _LARGEST_HEAD
        and torch.cuda.get_device_capability(device) >= _FIRST_CAPABILITY
    )
