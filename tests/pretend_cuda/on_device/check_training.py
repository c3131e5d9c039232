"""A packed training step on the pretend device: its results, and what it asks of the device."""

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig

from spin_lightning.losses import logistic
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.self_check import Tolerance, self_check
from tests.policies.test_shared_prefix import (
    CONFIGS,
    LAYERS,
    NF4,
    SIZES,
    build,
    folder_of,
    some_pairs,
    step,
)
from tests.pretend_cuda.counts import Counts
from tests.pretend_cuda.device import DEVICE, to_host
from tests.toys.models import write_model

__all__ = ["folder_of"]

BASES = [(name, "none") for name in CONFIGS] + [(name, "nf4") for name in NF4]


def step_on_device(policy, batch) -> tuple[Tensor, dict[str, Tensor]]:
    """Margins and adapter gradients of `step`, computed on the device, as tensors of the CPU."""
    logps = policy.prompt_logps(batch)
    reference = torch.linspace(-40, -20, len(logps), dtype=torch.float64, device=DEVICE)
    margins = (logps - reference).view(-1, 2).diff().neg().squeeze(-1)
    logistic(margins, 0.1).mean().backward()
    gradients = {n: to_host(p.grad) for n, p in policy.trainable() if p.grad is not None}
    return to_host(margins.detach()), gradients


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize(("name", "quantization"), BASES)
def test_the_step_is_that_of_the_cpu(machine, folder_of, name, quantization, checkpointed):
    """In bfloat16, whose rounding alone moves gradients by 6 %; three batches, not one."""
    base = FrozenBase(folder_of(name), compute_dtype="bfloat16", quantization=quantization)
    batches = [some_pairs(seed) for seed in (1, 2, 3)]
    on_cpu = build(base, activation_checkpointing=checkpointed)
    expected = [step(on_cpu, batch)[1:] for batch in batches]  # gradients add up
    with machine():
        policy = build(base, device=DEVICE, activation_checkpointing=checkpointed)
        found = [step_on_device(policy, batch) for batch in batches]
    for (margins, _), (margins_on_device, _) in zip(expected, found, strict=True):
        assert (margins_on_device - margins).abs().max() <= 0.2
    gradients, on_device = expected[-1][1], found[-1][1]
    assert on_device.keys() == gradients.keys()
    assert all(gradient.dtype == torch.float32 for gradient in on_device.values())
    flat, flat_on_device = (
        torch.cat([each[name].flatten() for name in gradients]) for each in (gradients, on_device)
    )
    assert (flat_on_device - flat).norm() <= 0.05 * flat.norm()


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_a_layer_launches_few_kernels_and_none_in_float32(machine, quantization, tmp_path):
    """Forward pass, recomputation and backward pass of a layer: the difference of two depths."""
    found: dict[int, Counts] = {}
    for layers in (2, 4):
        config = MistralConfig(
            **SIZES, **{**LAYERS, "num_hidden_layers": layers}, sliding_window=None
        )
        folder = str(write_model(config, tmp_path / str(layers)))
        base = FrozenBase(folder, compute_dtype="bfloat16", quantization=quantization)
        with machine() as counts:
            policy = build(base, device=DEVICE, activation_checkpointing=True)
            counts.reset()
            policy.prompt_logps(some_pairs(3)).sum().backward()
            found[layers] = counts.copy()
    shallow, deep = found[2], found[4]
    assert (deep.kernels.total() - shallow.kernels.total()) / 2 <= 170
    assert deep.casts == shallow.casts
    assert not deep.float32_products
    assert deep.syncs == shallow.syncs


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_the_fast_passes_agree_with_the_plain_ones(machine, folder_of, name):
    base = FrozenBase(folder_of(name), compute_dtype="bfloat16")
    with machine():
        found = self_check(build(base, device=DEVICE), some_pairs(3))
    assert found.agrees(Tolerance(0.2, 0.98)), str(found)
