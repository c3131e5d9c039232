"""Whether a loaded model is causal: no token may see those after it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedModel

from spin_lightning.errors import SettingError
from spin_lightning.policies.pretrained import FrozenBase

_TOKENS = 8
# Batch composition moves logits by rounding, such as where experts gather the tokens of all rows.
_ROUNDINGS = 16
# int8 layers quantize activations, and pick outlier columns by the whole batch.
_INT8_ROUNDING = 2.0**-7


def check_causal(base: FrozenBase, model: PreTrainedModel) -> None:
    """Refuse a model whose logits depend on later tokens.

    Two sequences that differ in the last token alone must have the same logits before it. The
    architecture's name proves nothing: encoders can be loaded with a causal head, and with
    `is_decoder` in their config they are causal.

    Args:
        base: What the model was loaded from.
        model: The loaded model in eval mode, without adapters.

    Raises:
        SettingError: Logits of earlier tokens move when the last token changes.
    """
    change, largest = _change_before_the_last_token(model)
    rounding = _INT8_ROUNDING if base.quantization == "int8" else torch.finfo(base.dtype).eps
    # (Logits that are not finite tell nothing of causality; scoring refuses them by their rows.)
    if not math.isfinite(change) or change <= _ROUNDINGS * rounding * max(largest, 1.0):
        return
    kind = model.config.model_type
    as_decoder = getattr(model.config, "is_decoder", None) is False
    raise SettingError(
        "model",
        base.name,
        f"its model of type {kind!r} is not causal: changing the last token moves the logits of "
        f"earlier tokens by up to {change:.2g}, so each token sees those after it",
        fix="give a decoder-only model, such as a Llama or GPT-2"
        + ("; this config says is_decoder: false, which is an encoder" if as_decoder else ""),
    )


@torch.no_grad()
def _change_before_the_last_token(model: PreTrainedModel) -> tuple[float, float]:
    """Largest change of logits before a changed last token, and the largest logit."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = (torch.arange(_TOKENS) * 7919 + 11) % vocabulary
    changed = ids.clone()
    changed[-1] = (ids[-1] + max(1, vocabulary // 2)) % vocabulary
    batch = torch.stack([ids, changed]).to(model.device)
    logits: Tensor = model(
        input_ids=batch, attention_mask=torch.ones_like(batch), use_cache=False
    ).logits.float()
    first, second = logits[:, :-1]
    return float((first - second).abs().max()), float(logits.abs().max())
