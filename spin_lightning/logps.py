"""Exact log-probabilities of responses under a causal language model."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from spin_lightning.frozen_linear import is_linear, product
from spin_lightning.types import SequenceBatch

# Logits are the largest tensor of a step; they are computed for this many tokens at a time.
_HEAD_ROWS = {"cpu": 256}
_HEAD_ROWS_ELSEWHERE = 1024


def response_logps(model: nn.Module, batch: SequenceBatch) -> Tensor:
    """Sum of log p(y_s | x, y_<s) over the response tokens, stop id included, at temperature 1.

    Args:
        model: A causal language model of transformers (or a PEFT wrapper around one).
        batch: n left-padded sequences on the model's device.

    Returns:
        log p(y|x), nats, float64, shape [n]; with gradient where the model has it.
    """
    token_logps, mask = response_token_logps(model, batch)
    return torch.where(mask, token_logps.double(), 0.0).sum(dim=-1)


def response_token_logps(model: nn.Module, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """log p(y_s | x, y_<s) of every response token, right-aligned.

    Args:
        model: A causal language model of transformers (or a PEFT wrapper around one).
        batch: n left-padded sequences on the model's device.

    Returns:
        Token log-probs, nats, float32, shape [n, r] with r the longest response, and the bool mask
        [n, r] of the columns that hold a response token.
    """
    longest = int(batch.response_lengths.max())
    logits = last_logits(model, batch.input_ids, batch.attention_mask, keep=longest + 1)[:, :-1]
    targets = batch.input_ids[:, -longest:]
    # Always in float32: a bfloat16 log-softmax is off by several percent.
    token_logps = -functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    ).view_as(targets)
    columns = torch.arange(longest, 0, -1, device=targets.device)
    return token_logps, columns <= batch.response_lengths[:, None]


def last_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int, **kwargs: Any
) -> Tensor:
    """Logits of the last `keep` columns of left-padded sequences, shape [n, keep, vocabulary].

    Architectures differ in the arguments of their forward. If the model accepts them, positions are
    passed, and the head is restricted to the needed columns.
    """
    accepted = forward_arguments(model)
    if "position_ids" in accepted:
        positions = (attention_mask.cumsum(dim=-1) - 1).clamp_min(0)
        kwargs["position_ids"] = positions[:, -input_ids.shape[1] :]
    if "logits_to_keep" in accepted:
        kwargs["logits_to_keep"] = keep
    kwargs.setdefault("use_cache", False)
    output = model(input_ids=input_ids, attention_mask=attention_mask, **kwargs)
    logits: Tensor = output.logits[:, -keep:]
    return logits


def forward_arguments(model: nn.Module) -> frozenset[str]:
    """Argument names of the innermost model's forward; PEFT wrappers pass all arguments on."""
    inner: Any = model
    while hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return frozenset(inspect.signature(inner.forward).parameters)


def head_logps(
    head: nn.Module, hidden: Tensor, targets: Tensor, softcap: float | None = None
) -> Tensor:
    """log p(target) of tokens from the hidden states that predict them.

    Logits are computed for a few hundred tokens at a time. If the head is frozen, the gradient with
    respect to the hidden state, d log p(y) / dh = W_y - sum_v p_v W_v, is computed along with them.
    That takes two products with the head instead of three, and the backward pass keeps no logits.

    Args:
        head: Maps hidden states to logits.
        hidden: Shape [tokens, width].
        targets: int64, shape [tokens].
        softcap: c, if the model's logits are c tanh(z / c) of the head's output z; else None.

    Returns:
        Nats, always float32, shape [tokens].
    """
    if _is_frozen_linear(head) and not torch.is_autocast_enabled(hidden.device.type):
        frozen_head: Any = _FrozenHead.apply  # untyped in torch
        logps: Tensor = frozen_head(hidden, head.weight, head.bias, targets, softcap)
        return logps
    most = head_rows(hidden.device)
    chunks = zip(torch.split(hidden, most), torch.split(targets, most), strict=True)
    return torch.cat([_plain_head_logps(head, h, y, softcap) for h, y in chunks])


def sum_by_response(token_logps: Tensor, lengths: Sequence[int]) -> Tensor:
    """Sum token log-probs, response by response.

    Args:
        token_logps: Shape [response tokens].
        lengths: Number of tokens of each of n responses.

    Returns:
        Nats, float64, shape [n].
    """
    by_response = torch.split(token_logps.double(), list(lengths))
    return pad_sequence(list(by_response), batch_first=True).sum(dim=-1)


def soft_capped(logits: Tensor, softcap: float | None) -> Tensor:
    """The model's logits from the output of its head, see `head_logps`."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def head_rows(device: torch.device) -> int:
    """Number of tokens whose logits are computed at a time."""
    return _HEAD_ROWS.get(device.type, _HEAD_ROWS_ELSEWHERE)


def _is_frozen_linear(head: nn.Module) -> bool:
    return is_linear(head) and not any(p.requires_grad for p in head.parameters())


def _plain_head_logps(
    head: nn.Module, hidden: Tensor, targets: Tensor, softcap: float | None
) -> Tensor:
    logits = soft_capped(head(hidden), softcap)
    return -functional.cross_entropy(logits.float(), targets, reduction="none")


class _FrozenHead(torch.autograd.Function):
    """Token log-probs with the gradient of the hidden state, chunk by chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        softcap: float | None,
    ) -> Tensor:
        gradient = torch.empty_like(hidden) if hidden.requires_grad else None
        logps = hidden.new_empty(len(hidden), dtype=torch.float32)
        most = head_rows(hidden.device)
        for start in range(0, len(hidden), most):
            rows = slice(start, start + most)
            h, y = hidden[rows], targets[rows, None]
            z, slope = _capped(product(h, weight, bias), softcap)
            # In place from here on: z becomes the probabilities, then the gradient of log p(y).
            highest = z.amax(dim=-1, keepdim=True)
            logp = z.gather(-1, y) - highest
            total = z.sub_(highest).exp_().sum(dim=-1, keepdim=True)
            logps[rows] = (logp - total.log()).squeeze(-1)
            if gradient is not None:
                z.div_(-total).scatter_add_(-1, y, torch.ones_like(total))
                z = z if slope is None else z.mul_(slope)
                gradient[rows] = product(z.to(h.dtype), weight.t())
        ctx.save_for_backward(gradient)
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * upstream[:, None]).to(gradient.dtype), None, None, None, None


def _capped(logits: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """The model's logits in float32, and their derivative with respect to the head's output."""
    if softcap is None:
        return logits.float(), None
    bent = torch.tanh(logits / softcap).float()
    return softcap * bent, 1 - bent.square()
