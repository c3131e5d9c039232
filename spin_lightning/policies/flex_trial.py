"""Whether FlexAttention works on this machine: each kernel on small examples, before its use.

A compiler, a card or a shape that it lacks shows here, forward and backward, and not in the middle
of a step. Where the trial fails, attention goes piece by piece.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask

from spin_lightning.errors import first_line
from spin_lightning.out_of_memory import is_out_of_memory
from spin_lightning.policies.flex_attention import (
    Scores,
    Tiling,
    attend,
    block_mask,
    dense_attention,
    seen_keys,
)
from spin_lightning.policies.heads import Heads
from spin_lightning.policies.trial import largest_error, problem_of

# The kernel's products have at least 16 columns.
_SMALLEST_HEAD = 16
# Largest error over the largest number, far above rounding, that of TF32 and bfloat16 as well.
_TOLERANCE = 0.05
# torch's own tiling, then smaller ones. Its own takes 148 KB of shared memory for heads of 256 in
# bfloat16 and needs an A100 or H100: cards with 24 GB have 99 KB, Turing has 64.
_TILINGS: tuple[Tiling, ...] = (
    {},
    {
        "num_stages": 1,
        "fwd_BLOCK_M": 64,
        "fwd_BLOCK_N": 32,
        "bwd_BLOCK_M1": 32,
        "bwd_BLOCK_N1": 32,
        "bwd_BLOCK_M2": 32,
        "bwd_BLOCK_N2": 32,
    },
    {
        "num_stages": 1,
        "fwd_BLOCK_M": 32,
        "fwd_BLOCK_N": 16,
        "bwd_BLOCK_M1": 16,
        "bwd_BLOCK_N1": 16,
        "bwd_BLOCK_M2": 16,
        "bwd_BLOCK_N2": 16,
    },
)
# Prompts, responses and window. Two lengths: torch compiles for one length first, and for any
# length when it meets the second. Their blocks are full, partial and empty ones.
_EXAMPLES: tuple[tuple[Sequence[int], Sequence[Sequence[int]], int | None], ...] = (
    ((60, 1), ((50, 40), (1, 1)), 70),
    ((200, 33), ((100, 90, 17), (150, 5)), None),
)


class Kernel(NamedTuple):
    """What a kernel is compiled for.

    Attributes:
        device: Where it runs.
        dtype: Type of queries, keys and values.
        heads: The heads.
        scores: How scores are made.
    """

    device: torch.device
    dtype: torch.dtype
    heads: Heads
    scores: Scores


class Found(NamedTuple):
    """What the trial of a kernel found.

    Attributes:
        tiling: The first tiling that works, None if none does.
        problem: What is wrong with the last one, None if one works.
    """

    tiling: Tiling | None
    problem: str | None


# The kernels that this process has tried.
_tried: dict[Kernel, Found] = {}


def tiling_of(query: Tensor, key: Tensor, scores: Scores) -> Tiling | None:
    """The tiling with which `attend` serves attention of these shapes; tried once per process.

    Args:
        query: Shape [1, heads, tokens, head size].
        key: Shape [1, key heads, tokens, head size].
        scores: How scores are made.

    Returns:
        None where attention has to go piece by piece.

    Warns:
        UserWarning: The kernel should work, and does not.
    """
    kernel = _kernel_of(query, key, scores)
    if not query.is_cuda or kernel.heads.size < _SMALLEST_HEAD:
        return None
    if kernel not in _tried:
        _tried[kernel] = found = _trial(kernel)
        if found.problem is not None:
            _warn(found.problem)
    return _tried[kernel].tiling


def attended(
    query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scores: Scores, tiling: Tiling
) -> Tensor | None:
    """`attend`; None if the kernel fails on this row though its trial passed, now and from now on.

    Raises:
        Exception: Memory ran out.

    Warns:
        UserWarning: It failed.
    """
    try:
        return attend(query, key, value, mask, scores, tiling)
    # Kernels and compilers raise errors of many classes.
    except Exception as error:
        if is_out_of_memory(error):
            raise
        problem = f"in a row of {query.shape[2]:,} tokens: {first_line(error)}"
        _tried[_kernel_of(query, key, scores)] = Found(None, problem)
        _warn(problem)
        return None


def _kernel_of(query: Tensor, key: Tensor, scores: Scores) -> Kernel:
    heads = Heads(query.shape[1], key.shape[1], query.shape[-1])
    return Kernel(query.device, query.dtype, heads, scores)


def _warn(problem: str) -> None:
    warnings.warn(
        f"torch's FlexAttention does not work on this machine ({problem}). Attention goes prompt "
        "by prompt and response by response, which is slower.",
        stacklevel=3,
    )


def deviations() -> dict[str, str]:
    """What this process computes otherwise since a kernel does not work; `Policy.deviations`."""
    problems = [found.problem for found in _tried.values() if found.problem is not None]
    return {"attention": f"piece by piece: FlexAttention fails ({problems[0]})"} if problems else {}


def _trial(kernel: Kernel) -> Found:
    problem = None
    for tiling in _TILINGS:
        problem = _problem(kernel, tiling)
        if problem is None:
            return Found(tiling, None)
    return Found(None, problem)


def _problem(kernel: Kernel, tiling: Tiling) -> str | None:
    """What is wrong with a kernel, forward or backward; None if it works."""

    def worst() -> float:
        return max(_error(kernel, tiling, *example) for example in _EXAMPLES)

    return problem_of(worst, _TOLERANCE, "its results")


def _error(
    kernel: Kernel,
    tiling: Tiling,
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[Sequence[int]],
    window: int | None,
) -> float:
    """Largest error of results and gradients on random numbers, over the largest number of each."""
    seen = seen_keys(prompt_lengths, response_lengths, window)
    mask, row = block_mask(seen, kernel.device), torch.arange(seen.shape[1], device=kernel.device)
    visible = mask.mask_mod(row, row, row[:, None], row[None])
    generator = torch.Generator().manual_seed(0)
    queries, keys, _ = kernel.heads
    # Laid out as a model lays them out, token by token: torch compiles for each layout.
    query, key, value, upstream = (
        torch.randn(1, len(row), heads, kernel.heads.size, generator=generator)
        .to(kernel.device, kernel.dtype)
        .transpose(1, 2)
        for heads in (queries, keys, keys, queries)
    )
    given = (query, key, value, upstream)
    found = _outcome(partial(attend, mask=mask, scores=kernel.scores, tiling=tiling), *given)
    expected = _outcome(
        partial(dense_attention, mask=visible, scores=kernel.scores), *(x.float() for x in given)
    )
    return max(largest_error(a, b) for a, b in zip(found, expected, strict=True))


def _outcome(
    attention: Callable[[Tensor, Tensor, Tensor], Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    upstream: Tensor,
) -> list[Tensor]:
    """Result without gradients, result with them, and the gradients, wherever it is called."""
    with torch.no_grad():
        alone = attention(query, key, value)
    # Without the hooks of a checkpointed layer, in which the first use may be.
    with torch.enable_grad(), saved_tensors_hooks(_itself, _itself):
        inputs = [x.detach().requires_grad_() for x in (query, key, value)]
        attended = attention(*inputs)
        return [alone, attended.detach(), *torch.autograd.grad(attended, inputs, upstream)]


def _itself(tensor: Tensor) -> Tensor:
    return tensor
