"""Attention as fused kernels compute it, in float32 inside, for tensors on the CPU."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Scoring = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seen: Tensor,
    scoring: Scoring | None,
    scale: float | None,
) -> Tensor:
    """The result in float32, 0 for a query that sees nothing.

    Args:
        query: Shape [batch, heads, queries, head size].
        key: Shape [batch, key heads, keys, head size].
        value: Likewise.
        seen: Which query sees which key, bool, broadcast to [batch, heads, queries, keys].
        scoring: Changes scores by their batch, head, query and key.
        scale: Factor of the scores.
    """
    groups = query.shape[1] // key.shape[1]
    keys, values = (t.float().repeat_interleave(groups, 1) for t in (key, value))
    scores = query.float() @ keys.transpose(-1, -2)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    if scoring is not None:
        batch, heads, queries, columns = (torch.arange(n) for n in scores.shape)
        scores = scoring(scores, batch[:1], heads[:1], queries[:, None], columns[None])
    blind = ~seen.any(-1, keepdim=True)
    weights = scores.masked_fill(~(seen | blind), -torch.inf).softmax(-1).masked_fill(blind, 0.0)
    result: Tensor = weights @ values
    return result


def gradients(upstream: Tensor, inputs: tuple[Tensor, ...], *rest: Any) -> tuple[Tensor, ...]:
    """Gradients of query, key and value of `attention`."""
    with torch.enable_grad():
        wide = [tensor.detach().float().requires_grad_() for tensor in inputs]
        attended = attention(*wide, *rest)
    found = torch.autograd.grad(attended, wide, upstream.float())
    return tuple(g.to(t.dtype) for g, t in zip(found, inputs, strict=True))
