"""Tokens of a training pass, from the sizes of its model."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from spin_lightning.packing import pass_tokens

# Activations that a training pass keeps on a CPU, in bytes: shorter passes save memory, but from
# here on cost time (docs/performance.md).
_ACTIVATIONS = 512 << 20
# Fewer tokens are slower for every model. A pair stays whole, so longer ones take more memory.
_FEWEST = 256


def training_tokens(
    config: PretrainedConfig, dtype: torch.dtype, device: torch.device, is_checkpointed: bool
) -> int:
    """Tokens of a training pass that suits a model and a device.

    On a CPU, the activations that its layers keep have about the same size for every model. Each
    keeps about 8 h + 4 f numbers of a token, with width h and f units of the MLP (see
    `Memory._layer`). With checkpointing they are not kept, and the device alone decides.

    Args:
        config: The model's config.
        dtype: Type that it computes in.
        device: Where.
        is_checkpointed: Whether activations are recomputed in the backward pass.
    """
    suitable = pass_tokens(device)
    if device.type != "cpu" or is_checkpointed:
        return suitable
    text = config.get_text_config()
    width = text.hidden_size
    inner = getattr(text, "intermediate_size", None) or 4 * width  # GPT-2 names no such size
    of_a_token = text.num_hidden_layers * (8 * width + 4 * inner) * dtype.itemsize
    return min(suitable, max(_FEWEST, _ACTIVATIONS // of_a_token))
