"""Speed of an iterate: tokens per second, and the share of time of each stage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from spin_lightning.policies.pretrained import FrozenBase, skeleton
from spin_lightning.rows.making import Timing

# Dense bfloat16 peaks in FLOP/s, by words of the device's name; the first match counts. Figures
# that data sheets quote for sparse matrices are halved.
_PEAKS = (
    # https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    # https://www.nvidia.com/en-us/data-center/h200/
    ("H200", 989e12),
    # https://www.nvidia.com/en-us/data-center/a100/
    ("A100", 312e12),
    # https://www.nvidia.com/en-us/data-center/l40s/
    ("L40S", 362e12),
    # https://www.nvidia.com/en-us/data-center/l4/
    ("L4", 121e12),
)


@dataclass(frozen=True)
class Trained:
    """What one process trained of an iterate.

    Attributes:
        seconds: Time it took, validation included.
        rows: Rows trained on; a row counts once per epoch.
        prompt_tokens: Mean tokens of a row's prompt.
        response_tokens: Mean tokens of its responses, real and generated together.
    """

    seconds: float
    rows: float
    prompt_tokens: float
    response_tokens: float


def measure_speed(
    made: Timing, trained: Trained, base: FrozenBase, device: torch.device
) -> dict[str, float]:
    """Metrics of one process's speed during an iterate.

    Args:
        made: What was generated and scored here, and how long it took.
        trained: What was trained here.
        base: The frozen base.
        device: The device that holds it.

    Returns:
        Tokens per second of each stage that took time, the share of each in their sum, and the
        model FLOPs utilization of training, in [0, 1], where the device's peak is known.
    """
    tokens = trained.rows * (trained.prompt_tokens + trained.response_tokens)
    stages = {
        "generating": ("generated", made.generated_tokens, made.generating),
        "scoring": ("scored", made.scored_tokens, made.scoring),
        "training": ("trained", tokens, trained.seconds),
    }
    total = sum(seconds for _, _, seconds in stages.values())
    metrics: dict[str, float] = {}
    for stage, (done, count, seconds) in stages.items():
        if count and seconds:
            metrics[f"speed/{done}_tokens_per_second"] = count / seconds
            metrics[f"speed/share_{stage}"] = seconds / total
    peak = peak_flops(base, device)
    if peak and trained.seconds:
        metrics["speed/mfu"] = training_flops(base, trained) / trained.seconds / peak
    return metrics


def peak_flops(base: FrozenBase, device: torch.device) -> float | None:
    """Dense peak of the device in the base's compute dtype, FLOP/s; None if it is not known."""
    if device.type != "cuda" or base.dtype not in (torch.bfloat16, torch.float16):
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in _PEAKS if re.search(rf"\b{part}\b", name)), None)


def training_flops(base: FrozenBase, trained: Trained) -> float:
    """Floating-point operations of training: products with frozen weights and input gradients.

    4 per weight and token: 2 in the forward pass, 2 for the gradient of the input. A prompt counts
    once for both responses, and the head counts at response tokens alone. Attention and adapters
    are left out.
    """
    model = skeleton(base)
    head = model.get_output_embeddings()
    body = sum(
        module.weight.numel()
        for module in model.modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head
    )
    tokens = trained.prompt_tokens + trained.response_tokens
    at_head = head.weight.numel() if head is not None else 0
    return 4 * trained.rows * (body * tokens + at_head * trained.response_tokens)


def speed_line(metrics: Mapping[str, float]) -> str:
    """The metrics in one line; empty where there are none."""
    parts = [
        f"{done} {metrics[f'speed/{done}_tokens_per_second']:,.0f} tokens/s "
        f"({metrics[f'speed/share_{stage}']:.0%} of the time)"
        for done, stage in (
            ("generated", "generating"),
            ("scored", "scoring"),
            ("trained", "training"),
        )
        if f"speed/share_{stage}" in metrics
    ]
    if "speed/mfu" in metrics:
        parts.append(f"{metrics['speed/mfu']:.0%} of the device's peak while training")
    return ", ".join(parts)
