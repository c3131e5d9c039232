"""Loading the frozen base, bare, with adapters on it, or merged with one."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from spin_lightning.errors import SettingError, first_line
from spin_lightning.frozen_linear import freeze_linear
from spin_lightning.policies.pretrained import FrozenBase, check_quantizable, load_config


def load_base(base: FrozenBase, device: torch.device | str = "cpu") -> PreTrainedModel:
    """Load the frozen base, quantized as it says, in eval mode and without gradients.

    Raises:
        SettingError: bitsandbytes cannot quantize this model, or its weights cannot be read.
    """
    model = _read(base, device)
    freeze_linear(model)
    return model


def _read(base: FrozenBase, device: torch.device | str = "cpu") -> PreTrainedModel:
    check_quantizable(base)
    try:
        # (With `output_loading_info` it gives a pair, which its types do not say.)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base.name,
            config=load_config(base),
            dtype=base.dtype,
            quantization_config=_quantization_config(base),
            device_map={"": str(device)},
            output_loading_info=True,
            **base.source,
        )
    except (AssertionError, torch.OutOfMemoryError):  # of the device
        raise
    # A reader of each kind of file, and a check of shapes: they raise whatever they like.
    except Exception as error:
        raise _unreadable(base, first_line(error)) from error
    model: PreTrainedModel = loaded[0]
    if told := sorted(loaded[1]["missing_keys"]):
        # transformers draws them at random, and only logs that.
        raise _unreadable(base, f"{len(told)} tensors are missing, such as {told[0]}")
    for module in model.modules():
        # On CPUs with AVX512-BF16, bitsandbytes repacks 4-bit weights in eval mode, in place, for a
        # kernel that has no gradient and computes in bfloat16; training would go on with them.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
    model.requires_grad_(False)
    return model.eval()


def _unreadable(base: FrozenBase, problem: str) -> SettingError:
    return SettingError(
        "model",
        base.name,
        f"its weights cannot be read ({problem})",
        fix="copy the model folder anew, with its *.safetensors files",
    )


def merge_adapter(base: FrozenBase, adapter: Path | None) -> PreTrainedModel:
    """Return the base with an adapter merged into its weights, in full precision.

    A quantized base is de-quantized first: its adapter was trained on the rounded weights, so they
    are what it belongs to, and merging into 4-bit weights would round the sum once more.
    """
    model = _read(base)
    if base.quantization != "none":
        model = model.dequantize(dtype=base.dtype)
    if adapter is None:
        return model
    merged: PreTrainedModel = peft.PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    return merged


def load_with_adapter(
    base: FrozenBase, adapter: Path | None, device: torch.device | str = "cpu"
) -> nn.Module:
    """Return the base with a frozen adapter on it (or bare), ready to generate from."""
    model = load_base(base, device)
    return model if adapter is None else peft.PeftModel.from_pretrained(model, str(adapter)).eval()


def load_with_adapters(
    base: FrozenBase, adapters: Mapping[int, Path | None], device: torch.device | str = "cpu"
) -> nn.Module:
    """Return the base with a frozen adapter per iterate on it, for `acting_as`."""
    model: nn.Module = load_base(base, device)
    for t, folder in adapters.items():
        if folder is None:
            continue
        if isinstance(model, peft.PeftModel):
            model.load_adapter(str(folder), adapter_name=adapter_name(t), torch_device=str(device))
        else:
            model = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=adapter_name(t))
    return model.eval()


def acting_as(model: nn.Module, t: int) -> AbstractContextManager[Any]:
    """Make a model of `load_with_adapters` act as iterate t inside the block."""
    if not isinstance(model, peft.PeftModel):
        return nullcontext()
    if adapter_name(t) not in model.peft_config:
        disabled: AbstractContextManager[Any] = model.disable_adapter()
        return disabled
    model.set_adapter(adapter_name(t))
    return nullcontext()


def _quantization_config(base: FrozenBase) -> BitsAndBytesConfig | None:
    if base.quantization == "nf4":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=base.dtype,
        )
    return BitsAndBytesConfig(load_in_8bit=True) if base.quantization == "int8" else None


def adapter_name(iterate: int) -> str:
    """PEFT's name of an iterate's adapter."""
    return f"iterate_{iterate:03d}"
