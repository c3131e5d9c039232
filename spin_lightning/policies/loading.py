"""Loading the frozen base, bare or with an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from spin_lightning.errors import SettingError, first_line
from spin_lightning.frozen_linear import freeze_linear
from spin_lightning.policies.adapter_check import check_none_loaded
from spin_lightning.policies.causality import check_causal
from spin_lightning.policies.pretrained import FrozenBase, check_quantizable, load_config

_PEFT_NOISE = (
    "fan_in_fan_out is set to",
    "Model has `tie_word_embeddings=True`",
    "Model with `tie_word_embeddings=True`",
    "Input and output embeddings are no longer tied after merging",
    "`lora_bias=True` was passed",
    r".*LoRA tensor\(s\) have invalid shape",
)


def load_base(base: FrozenBase, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load the frozen base with its quantization, in eval mode and without gradients.

    Raises:
        SettingError: bitsandbytes cannot quantize this model, its weights cannot be read, or it is
            not causal.
    """
    model = read_base(base, device)
    freeze_linear(model)
    check_causal(base, model)
    return model


def read_base(base: FrozenBase, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Read the frozen base as transformers does, in eval mode and without gradients.

    Raises:
        SettingError: bitsandbytes cannot quantize this model, its weights cannot be read, or they
            come with an adapter.
    """
    check_quantizable(base)
    try:
        # (With `output_loading_info` the result is a pair, which its annotation does not cover.)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.name,
            config=load_config(base),
            dtype=base.dtype,
            quantization_config=quantization_config(base),
            device_map={"": str(device)},
            output_loading_info=True,
            **base.source,
        )
    except (AssertionError, torch.OutOfMemoryError):  # about the device
        raise
    # Readers of several file formats, and a check of shapes, may raise anything.
    except Exception as error:
        raise _unreadable(base, first_line(error)) from error
    model: PreTrainedModel = loaded[0]
    check_none_loaded(base, model)
    if missing := sorted(loaded[1]["missing_keys"]):
        # transformers only logs this and initializes them at random.
        raise _unreadable(base, f"{len(missing)} tensors are missing, such as {missing[0]}")
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in place in eval mode, for a
        # bfloat16 kernel without gradients; training would continue with the repacked weights.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.requires_grad_(False)
    return model.eval()


def _unreadable(base: FrozenBase, problem: str) -> SettingError:
    return SettingError(
        "model",
        base.name,
        f"its weights cannot be read ({problem})",
        fix="copy the model folder again, with its *.safetensors files",
    )


def load_with_adapter(
    base: FrozenBase, adapter: Path | None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Return the base with a frozen adapter (or bare), in eval mode, ready for `generate`."""
    model = load_base(base, device)
    if adapter is None:
        return model
    with quiet_peft():
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()


def quantization_config(base: FrozenBase) -> BitsAndBytesConfig | None:
    """How transformers is to quantize the base; None for a base that stays as it is."""
    if base.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=base.dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if base.quantization == "int8" else None


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Silence what PEFT warns of whenever it puts an adapter on certain models.

    GPT-2's layers are transposed, which it detects by itself. An adapter on one of two tied layers
    leaves the other as it is, here and in `merging`. A bias of LoRA has one dimension.
    """
    with warnings.catch_warnings():
        for message in _PEFT_NOISE:
            warnings.filterwarnings("ignore", message=message)
        yield


def adapter_name(iterate: int) -> str:
    """Name of an iterate's adapter in PEFT."""
    return f"iterate_{iterate:03d}"
