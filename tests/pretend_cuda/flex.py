"""What torch's compiled FlexAttention requires, what it reads from a block mask, what it launches.

Launches are those of `torch/_inductor/kernel/flex/flex_attention.py` in torch 2.13. Its lowering
makes one Triton kernel of the forward pass. The backward pass is the sum of output × gradient over
each head, which inductor fuses into one kernel, and one Triton kernel for the gradients of queries,
keys and values (a group's queries are a loop in it, not a sum afterwards). Inputs are read in any
layout, without copies.
"""

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

FORWARD, BACKWARD = 1, 2


def check(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask) -> None:
    """Assert what the kernel requires."""
    assert query.dtype == key.dtype == value.dtype
    assert query.shape[-1] >= 16
    assert query.shape[1] % key.shape[1] == 0
    assert mask.seq_lengths == (query.shape[2], key.shape[2])
    for name in BlockMask._TENSOR_ATTRS[:8]:
        tensor = getattr(mask, name)
        assert tensor.device == query.device
        assert tensor.dtype == torch.int32
        assert tensor.is_contiguous()


def blocks_of(count: Tensor, places: Tensor) -> Tensor:
    """A square of booleans from the number of blocks in each line and their places."""
    blocks = torch.zeros(places.shape[-2:], dtype=torch.bool)
    for line, (number, listed) in enumerate(zip(count[0, 0].tolist(), places[0, 0], strict=True)):
        blocks[line, listed[:number].long()] = True
    return blocks


def seen_by(mask: BlockMask, lists: list[Tensor], visible: Tensor) -> Tensor:
    """Which keys a query sees: those of full blocks, and of partial blocks what the mask allows.

    Args:
        mask: For its sizes.
        lists: Its first eight tensors, on the CPU.
        visible: What its function allows, bool, [queries, keys], on the CPU.
    """
    partial, full, by_key, full_by_key = (
        blocks_of(*lists[i : i + 2]) for i in range(0, len(lists), 2)
    )
    assert torch.equal(partial.T, by_key)
    assert torch.equal(full.T, full_by_key)
    size, (queries, keys) = mask.BLOCK_SIZE[0], mask.seq_lengths
    wide_partial, wide_full = (
        blocks.repeat_interleave(size, 0).repeat_interleave(size, 1)[:queries, :keys]
        for blocks in (partial, full)
    )
    return wide_full | (wide_partial & visible)
