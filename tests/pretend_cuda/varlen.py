"""torch's attention over sequences of unequal length, from its documented contract.

Checked on the way in: what the CUDA kernel requires of types, strides, head size and offsets.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_TYPES = (torch.bfloat16, torch.float16)


class Sequences(NamedTuple):
    """Arguments that forward and backward pass share.

    Attributes:
        query: Shape [queries, heads, head size].
        key: Shape [keys, key heads, head size].
        value: Likewise.
        query_starts: int32, shape [sequences + 1].
        key_starts: Likewise.
        scale: Factor of the scores.
        window: Positions to the left and right that a query sees; -1 for all.
        used: Number of keys of each sequence, the first ones; None for all, int32.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    query_starts: Tensor
    key_starts: Tensor
    scale: float
    window: Sequence[int]
    used: Tensor | None = None

    @classmethod
    def of(
        cls,
        tensors: tuple[Tensor, Tensor, Tensor],
        starts: tuple[Tensor, Tensor],
        scale: float | None,
        window: Sequence[int],
        used: Tensor | None = None,
    ) -> "Sequences":
        """Arguments of a call, with the default of the scale."""
        default = tensors[0].shape[-1] ** -0.5
        return cls(*tensors, *starts, default if scale is None else scale, window, used)

    def check(self, most: tuple[int, int], is_causal: bool) -> None:
        """Assert what the kernel requires."""
        size = self.query.shape[-1]
        assert self.query.dtype in _TYPES, self.query.dtype
        assert self.query.dtype == self.key.dtype == self.value.dtype
        assert size <= 256, f"head size {size}"
        assert size % 8 == 0, f"head size {size}"
        assert is_causal == (list(self.window) == [-1, 0])
        pairs = ((self.query, self.query_starts), (self.key, self.key_starts))
        for (tensor, starts), longest in zip(pairs, most, strict=True):
            assert tensor.stride(-1) == 1
            assert starts.dtype == torch.int32
            assert starts.is_contiguous()
            assert int(starts[-1]) == len(tensor)
            assert int(starts.diff().max()) == longest
        if self.used is not None:
            assert self.used.dtype == torch.int32
            assert (self.used > 0).all()
            assert (self.used <= self.key_starts.diff()).all()

    def forward(self) -> Tensor:
        """The attended values, shape [queries, heads, head size]."""
        parts = []
        for queries, keys, seen in self._each():
            q, k, v = self._float(queries, keys)
            parts.append(torch.einsum("hqk,khd->qhd", self._weights(q, k, seen), v))
        return torch.cat(parts).to(self.query.dtype).contiguous()

    def backward(self, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of query, key and value."""
        tensors = (self.query, self.key, self.value)
        grad_q, grad_k, grad_v = (torch.zeros_like(t, dtype=torch.float32) for t in tensors)
        groups = self.query.shape[1] // self.key.shape[1]
        for queries, keys, seen in self._each():
            q, k, v = self._float(queries, keys)
            up, weights = upstream[queries].float(), self._weights(q, k, seen)
            slope = torch.einsum("qhd,khd->hqk", up, v)
            slope = weights * (slope - (slope * weights).sum(-1, keepdim=True)) * self.scale
            grad_q[queries] = torch.einsum("hqk,khd->qhd", slope, k)
            for gradient, of_heads in (
                (grad_k, torch.einsum("hqk,qhd->khd", slope, q)),
                (grad_v, torch.einsum("hqk,qhd->khd", weights, up)),
            ):
                gradient[keys] = of_heads.unflatten(1, (-1, groups)).sum(2)
        return tuple(g.to(self.query.dtype) for g in (grad_q, grad_k, grad_v))

    def _each(self) -> Iterator[tuple[slice, slice, Tensor]]:
        """Queries and keys of every sequence, and which query sees which key."""
        left, right = self.window
        starts = (self.query_starts.tolist(), self.key_starts.tolist())
        for i, ((a, b), (c, d)) in enumerate(zip(*map(itertools.pairwise, starts), strict=True)):
            d = d if self.used is None else c + int(self.used[i])
            distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
            seen = torch.ones_like(distance, dtype=torch.bool)
            seen = seen if right < 0 else seen & (distance >= -right)
            yield slice(a, b), slice(c, d), seen if left < 0 else seen & (distance <= left)

    def _float(self, queries: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
        groups = self.query.shape[1] // self.key.shape[1]
        k, v = (t[keys].float().repeat_interleave(groups, 1) for t in (self.key, self.value))
        return self.query[queries].float(), k, v

    def _weights(self, query: Tensor, key: Tensor, seen: Tensor) -> Tensor:
        scores = torch.einsum("qhd,khd->hqk", query, key) * self.scale
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)
