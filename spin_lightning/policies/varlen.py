"""torch's attention kernel for sequences of unequal length, and where it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

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


def varlen_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    starts: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float | None,
    sliding_window: int | None,
    used: Tensor | None = None,
) -> Tensor:
    """Causal attention within each sequence; its last query is aligned with its last key.

    Args:
        query: Shape [queries, heads, head size].
        keys: Shape [keys, key heads, head size].
        values: Likewise.
        starts: Where the queries and the keys of each sequence start, with the end of the last
            one, int32, each of shape [sequences + 1].
        longest: Most queries and most keys of a sequence.
        scaling: Factor of the attention scores; None is 1 / √(head size).
        sliding_window: Number of positions that a query sees, including its own; None for all.
        used: Keys that each sequence has, the first ones of its room, int32; None if all are.

    Returns:
        Shape [queries, heads, head size].
    """
    attended: Any = varlen_attn(
        query,
        keys,
        values,
        *starts,
        *longest,
        scale=scaling,
        window_size=(sliding_window - 1 if sliding_window else -1, 0),
        enable_gqa=query.shape[1] != keys.shape[1],
        seqused_k=used,
    )
    result: Tensor = attended
    return result
