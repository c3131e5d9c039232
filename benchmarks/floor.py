"""A lower bound for a training step: its matrix products and its attention, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from spin_lightning.data.dataset import Pair
from spin_lightning.frozen_linear import product

_HEAD_CHUNK = 256


class Floor:
    """The products and attention of a step, on random numbers of the same shapes.

    Over every distinct token, a prompt once for both responses: the forward product of each linear
    layer and that of its input gradient (its weights are frozen). Attention forward and backward,
    [prompt, real] causal and [generated] on [prompt, generated]. At response tokens, two products
    with the head: logits, and the gradient of the hidden state. No LoRA, norm, rotation, softmax of
    the head, or optimizer.

    Args:
        sizes: Sizes of the model (`workload.SIZES`).
        device: Device of all tensors.
        dtype: Their dtype.
    """

    def __init__(self, sizes: dict[str, Any], device: str, dtype: torch.dtype) -> None:
        """Make the weights."""
        hidden, inner = sizes["hidden_size"], sizes["intermediate_size"]
        self.heads = sizes["num_attention_heads"]
        self.head_dim = hidden // self.heads
        keys = self.head_dim * sizes["num_key_value_heads"]
        shapes = [(hidden, hidden), (keys, hidden), (keys, hidden), (hidden, hidden)]
        shapes += [(inner, hidden), (inner, hidden), (hidden, inner)]
        self._like = {"device": device, "dtype": dtype}
        self.layers = [
            [torch.randn(shape, **self._like) * 0.02 for shape in shapes]
            for _ in range(sizes["num_hidden_layers"])
        ]
        self.head = torch.randn(sizes["vocab_size"], hidden, **self._like) * 0.02

    def prepare(self, pairs: Sequence[Pair]) -> _Inputs:
        """Inputs with the shapes of these pairs."""
        lengths = [(len(p.prompt_ids), len(p.real_ids), len(p.generated_ids)) for p in pairs]
        widths = {width for weight in self.layers[0] for width in weight.shape}
        tokens = sum(map(sum, lengths))
        inputs = {width: torch.randn(tokens, width, **self._like) for width in widths}
        responses = sum(real + generated for _, real, generated in lengths)
        hidden = torch.randn(responses, self.head.shape[1], **self._like)
        return _Inputs(inputs, [self._segments(*n) for n in lengths], hidden)

    def step(self, inputs: _Inputs, *, own_kernels: bool = False) -> None:
        """Compute one step.

        Args:
            inputs: Result of `prepare`.
            own_kernels: Use the kernels that this library chooses instead of torch's.
        """
        multiply = product if own_kernels else functional.linear
        for layer in self.layers:
            for weight in layer:
                rows, columns = weight.shape
                multiply(inputs.tokens[columns], weight)
                multiply(inputs.tokens[rows], weight.T)
            for segments in inputs.attention:
                for query, key, value, mask in segments:
                    attended = functional.scaled_dot_product_attention(
                        query, key, value, attn_mask=mask, is_causal=mask is None
                    )
                    torch.autograd.grad(attended, (query, key, value), attended.detach())
        for hidden in inputs.responses.split(_HEAD_CHUNK):
            multiply(multiply(hidden, self.head), self.head.T)

    def _segments(self, prompt: int, real: int, generated: int) -> list[_Segment]:
        """Query, key, value and mask of both parts of a pair's attention."""
        causal = torch.ones(generated, prompt + generated, dtype=torch.bool).tril(prompt)
        return [
            (*self._qkv(prompt + real, prompt + real), None),
            (*self._qkv(generated, prompt + generated), causal.to(self._like["device"])),
        ]

    def _qkv(self, queries: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
        like = {**self._like, "requires_grad": True}
        query, key, value = (
            torch.randn(1, self.heads, length, self.head_dim, **like)
            for length in (queries, keys, keys)
        )
        return query, key, value


_Segment = tuple[Tensor, Tensor, Tensor, Tensor | None]


class _Inputs:
    """Inputs of one step of the floor."""

    def __init__(
        self, tokens: dict[int, Tensor], attention: list[list[_Segment]], responses: Tensor
    ) -> None:
        self.tokens = tokens
        self.attention = attention
        self.responses = responses
