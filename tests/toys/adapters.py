"""Adapters with random weights, and their logits by transformers and peft alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

# Two unpadded sequences of the tiny model's words.
IDS = torch.tensor([[1, 5, 9, 14, 6, 23, 11], [1, 20, 20, 4, 7, 8, 13]])

_QUANTIZATION = {
    "none": None,
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def save_adapter(model: nn.Module, config: PeftConfig, folder: Path) -> Path:
    """A fresh adapter on a model, saved as a PEFT folder."""
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter with both halves random, so that it is far from the base.

    Its dropout is large: logits are only reproduced where it is off.
    """
    config = {"r": 4, "lora_alpha": 4, "lora_dropout": 0.5, "target_modules": "all-linear"}
    lora = LoraConfig(**{**config, **settings}, task_type="CAUSAL_LM", init_lora_weights=False)
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return save_adapter(model, lora, folder)


def plain_model(base: Path, adapter: Path | None = None, quantization: str = "none") -> nn.Module:
    """The base, with an adapter if there is one, as a user of transformers and peft loads it.

    An NF4 base is held in float32 again after rounding: the same values, without the kernels.
    """
    model = AutoModelForCausalLM.from_pretrained(
        base, dtype=torch.float32, quantization_config=_QUANTIZATION[quantization]
    )
    if quantization == "nf4":
        model = model.dequantize(dtype=torch.float32)
    return (model if adapter is None else PeftModel.from_pretrained(model, adapter)).eval()


def logits(model: nn.Module) -> Tensor:
    """Logits of `IDS`, shape [2, 7, vocabulary]."""
    return model(IDS).logits


def plain_logits(base: Path, adapter: Path | None = None, quantization: str = "none") -> Tensor:
    """Logits of `IDS` by transformers and peft alone."""
    with torch.no_grad():
        return logits(plain_model(base, adapter, quantization))
