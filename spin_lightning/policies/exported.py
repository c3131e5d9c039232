"""An exported folder, loaded as its users load it: by transformers and PEFT alone."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import peft
import torch
from transformers import AutoModelForCausalLM

from spin_lightning.policies.adapter_check import ADAPTER_CONFIG
from spin_lightning.policies.loading import quantization_config, quiet_peft
from spin_lightning.policies.pretrained import FrozenBase

# Ids of a prompt, and of a response to it.
Pair = tuple[Sequence[int], Sequence[int]]


def load_exported(folder: Path, base: FrozenBase, device: torch.device | str) -> Any:
    """The model of an exported folder, in eval mode.

    Which base an adapter belongs to is read from the folder.

    Args:
        folder: A PEFT folder or a model folder.
        base: How the base is quantized and computed; not where it is.
        device: Where to load it.
    """
    is_adapter = (folder / ADAPTER_CONFIG).exists()
    where, revision, quantization = str(folder), None, None
    if is_adapter:
        known = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        where, revision = known["base_model_name_or_path"], known.get("revision")
        quantization = quantization_config(base)
    model: Any = AutoModelForCausalLM.from_pretrained(
        where,
        revision=revision,
        dtype=base.dtype,
        quantization_config=quantization,
        trust_remote_code=base.trust_remote_code,
        device_map={"": str(device)},
    )
    if is_adapter:
        with quiet_peft():
            model = peft.PeftModel.from_pretrained(model, str(folder))
    return model.eval()


@torch.no_grad()
def plain_logps(model: Any, pairs: Sequence[Pair]) -> Iterator[float]:
    """log p(response | prompt) of each pair in nats, one at a time and without padding."""
    device = next(model.parameters()).device
    for prompt, response in pairs:
        ids = torch.tensor([[*prompt, *response]], device=device)
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits[
            0, len(prompt) - 1 : -1
        ]
        logps = logits.double().log_softmax(-1)
        yield float(logps.gather(-1, ids[0, len(prompt) :, None]).sum())
