"""Log-probabilities of responses under a causal language model, exact."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spin_lightning.types import SequenceBatch


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
        Token log-probs, nats, float32, shape [n, r], r the longest response, and the bool mask
        [n, r] of the columns that hold a response token.
    """
    longest = int(batch.response_lengths.max())
    logits = last_logits(model, batch.input_ids, batch.attention_mask, keep=longest + 1)[:, :-1]
    targets = batch.input_ids[:, -longest:]
    # In float32 whatever the model computes in: a bfloat16 log-softmax is off by percents.
    token_logps = -functional.cross_entropy(
        logits.flatten(0, 1).float(), targets.flatten(), reduction="none"
    ).view_as(targets)
    columns = torch.arange(longest, 0, -1, device=targets.device)
    return token_logps, columns <= batch.response_lengths[:, None]


def last_logits(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, keep: int, **kwargs: Any
) -> Tensor:
    """Logits of the last `keep` columns of left-padded sequences, shape [n, keep, vocabulary].

    Architectures differ in what their forward takes: the head is restricted to the columns that
    are needed, and positions are given, wherever the model accepts that.
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
    """Names that the innermost model's forward takes; a PEFT wrapper forwards them all."""
    inner: Any = model
    while hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    return frozenset(inspect.signature(inner.forward).parameters)
