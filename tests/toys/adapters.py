"""Adapters on the tiny model, and what transformers and peft alone say about them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

# Two unpadded sequences of the tiny model's words.
IDS = torch.tensor([[1, 5, 9, 14, 6, 23, 11], [1, 20, 20, 4, 7, 8, 13]])

_QUANTIZATION = {
    "none": None,
    "nf4": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "int8": BitsAndBytesConfig(load_in_8bit=True),
}


def write_wide_model(tiny: Path, folder: Path) -> Path:
    """The tiny model and its tokenizer again, as wide as NF4 needs.

    bitsandbytes 0.50 mixes up the blocks of 64 of a layer whose input is no multiple of 64 wide
    when it de-quantizes on a CPU.
    """
    config = AutoConfig.from_pretrained(tiny, hidden_size=64, intermediate_size=128, head_dim=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny).save_pretrained(folder)
    return folder


def write_adapter(base: Path, folder: Path, seed: int, **settings: Any) -> Path:
    """An adapter with both halves random, so that it is far from the base.

    Its dropout is large: logits are only reproduced where it is off.
    """
    config = {"r": 4, "lora_alpha": 4, "lora_dropout": 0.5, "target_modules": "all-linear"}
    model = AutoModelForCausalLM.from_pretrained(base)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        get_peft_model(
            model,
            LoraConfig(**{**config, **settings}, task_type="CAUSAL_LM", init_lora_weights=False),
        ).save_pretrained(folder)
    return folder


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
