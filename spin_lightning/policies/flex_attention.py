"""Attention over a whole row in one kernel, by torch's FlexAttention.

It takes the rows that torch's kernel for sequences of unequal length does not take: soft-capped
scores, float32, Turing cards, other head sizes. Prompts are not repeated: a mask says which keys
of the row a token sees. The kernel is compiled on first use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

# torch masks blocks of this many queries by as many keys; its default, which all tilings divide.
BLOCK = 128
# torch compiles again for gradients or none, one block or several, lengths seen once or often, and
# each model. Beyond its limit it would go on uncompiled, with all scores in memory.
_RECOMPILATIONS = 64
# Options of the kernel that decide how much shared memory it needs, by torch's names.
Tiling = Mapping[str, int]


class Scores(NamedTuple):
    """How attention scores are made from products of queries and keys.

    Attributes:
        scaling: Their factor; None is 1 / √(head size).
        softcap: Bound of the scores, reached by a tanh; None if they have none.
    """

    scaling: float | None = None
    softcap: float | None = None


def seen_keys(
    prompt_lengths: Sequence[int], response_lengths: Sequence[Sequence[int]], window: int | None
) -> Tensor:
    """Which keys of a row each token sees: two intervals of positions in the row.

    Args:
        prompt_lengths: Tokens of each prompt.
        response_lengths: Tokens of each of its responses.
        window: Number of positions that a token sees, including its own.

    Returns:
        int32, shape [3, tokens]: first key in the token's prompt, end of that interval, and first
        key of the interval that ends with the token itself. A prompt and its first response are
        one interval; their first one is empty.
    """
    parts, row = [], 0
    for prompt, (first, *others) in zip(prompt_lengths, response_lengths, strict=True):
        start, end = row, row + prompt
        for length in (prompt + first, *others):
            tokens = torch.arange(row, row + length, dtype=torch.int32)
            # A response follows its prompt's last token, wherever it lies in the row.
            distance = 0 if row == start else row - end
            oldest = torch.zeros_like(tokens) if window is None else tokens - window + 1
            in_prompt = (oldest - distance).clamp(start, end)
            if row == start:
                in_prompt.fill_(end)
            parts.append(torch.stack([in_prompt, torch.full_like(tokens, end), oldest.clamp(row)]))
            row += length
    return torch.cat(parts, dim=1)


def block_mask(seen: Tensor, device: torch.device) -> BlockMask:
    """The kernel's mask, in memory proportional to tokens × blocks.

    Args:
        seen: Result of `seen_keys`, on the CPU.
        device: Where the kernel runs.
    """
    tokens = seen.shape[1]
    edges = torch.arange(-(-tokens // BLOCK)) * BLOCK
    first, end, own = (limit[:, None] for limit in seen)
    after = torch.arange(1, tokens + 1)[:, None]
    counts = _overlap(first, end, edges) + _overlap(own, after, edges)
    pairs = torch.zeros(len(edges), len(edges), dtype=torch.int64)
    pairs.index_add_(0, torch.arange(tokens) // BLOCK, counts)
    full = pairs == BLOCK * BLOCK
    partial = (pairs > 0) & ~full
    keys_from, keys_to, own_from = (_sent(limit, device) for limit in seen)

    def is_seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_prompt = (key >= keys_from[query]) & (key < keys_to[query])
        return in_prompt | ((key >= own_from[query]) & (key <= query))

    # The gradients of keys and values go through the queries of each block of keys.
    keys_of, all_keys_of, queries_of, all_queries_of = (
        _listed(blocks, device) for blocks in (partial, full, partial.T, full.T)
    )
    return BlockMask(
        (tokens, tokens),
        *keys_of,
        *all_keys_of,
        *queries_of,
        *all_queries_of,
        BLOCK_SIZE=(BLOCK, BLOCK),
        mask_mod=is_seen,
    )


def _overlap(first: Tensor, end: Tensor, edges: Tensor) -> Tensor:
    """How many positions of [first, end) lie in each block, shape [tokens, blocks]."""
    return (torch.minimum(end, edges + BLOCK) - torch.maximum(first, edges)).clamp(0)


def _listed(blocks: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of blocks in each line of a square of booleans, and their places, those first."""
    places = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True)
    return _sent(blocks.sum(1)[None, None], device), _sent(places[None, None], device)


def _sent(numbers: Tensor, device: torch.device) -> Tensor:
    """The numbers as int32 on the device, which the host does not wait for."""
    return numbers.to(torch.int32).contiguous().to(device, non_blocking=True)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: BlockMask,
    scores: Scores,
    tiling: Tiling,
) -> Tensor:
    """Attention of a row, one kernel forward and two backward.

    Args:
        query: Shape [1, heads, tokens, head size].
        key: Shape [1, key heads, tokens, head size].
        value: Likewise.
        mask: Result of `block_mask`.
        scores: How scores are made.
        tiling: The kernel's tiling.

    Returns:
        Shape [1, heads, tokens, head size], laid out in memory as the query.
    """
    # As a symbol, torch's default for a number that changes, a soft-cap cannot be differentiated
    # by FlexAttention (torch 2.13). The stance of compiled policies does not concern this kernel.
    settings = torch._dynamo.config.patch(specialize_float=True, recompile_limit=_RECOMPILATIONS)
    with settings, torch.compiler.set_stance("default"):
        return _kernel()(
            query,
            key,
            value,
            score_mod=None if scores.softcap is None else _softcapping(scores.softcap),
            block_mask=mask,
            scale=scores.scaling,
            enable_gqa=query.shape[1] != key.shape[1],
            # Of two kernels, torch prefers one for decoding in rows below 128 tokens.
            kernel_options={"BACKEND": "TRITON", **tiling},
        )


@cache
def _kernel() -> Callable[..., Tensor]:
    # Lengths become symbols when they first change. With `dynamic=True` block sizes and the scaling
    # would be symbols, too.
    return torch.compile(flex_attention, fullgraph=True)


@cache
def _softcapping(cap: float) -> Callable[..., Tensor]:
    def soft_capped(score: Tensor, _b: Tensor, _h: Tensor, _query: Tensor, _key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return soft_capped


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scores: Scores
) -> Tensor:
    """The same attention by plain operations, with all scores in memory.

    Args:
        query: Shape [n, heads, queries, head size].
        key: Shape [n, key heads, keys, head size].
        value: Likewise.
        mask: Whether a query sees a key, bool, shape [queries, keys].
        scores: How scores are made.

    Returns:
        Shape [n, heads, queries, head size].
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scaling, softcap = scores
    products = query @ key.transpose(2, 3)
    products = products * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        products = softcap * torch.tanh(products / softcap)
    weights = products.masked_fill(~mask, -torch.inf).softmax(dim=-1, dtype=torch.float32)
    return weights.to(query.dtype) @ value
