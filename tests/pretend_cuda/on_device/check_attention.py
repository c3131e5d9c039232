"""Which kernel computes the attention of prompts with several responses, and what it gives."""

import pytest
import torch
from torch import nn
from transformers import Gemma2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from spin_lightning.policies import flex_attention, flex_trial
from spin_lightning.policies.fused_norm import fuse_norms
from spin_lightning.policies.pretrained import FrozenBase
from tests.policies.test_shared_prefix import (
    LAYERS,
    SIZES,
    build,
    folder_of,
    some_pairs,
    step,
)
from tests.pretend_cuda.counts import Counts
from tests.pretend_cuda.device import DEVICE, PretendTensor, to_host
from tests.pretend_cuda.on_device.check_training import step_on_device
from tests.toys.models import write_model

__all__ = ["folder_of"]

VARLEN, FLEX = "torch_attn::_varlen_attn", "flex_attention"


@pytest.fixture(autouse=True)
def untried(monkeypatch):
    monkeypatch.setattr(flex_trial, "_tried", {})


@pytest.mark.parametrize(
    ("name", "dtype", "capability", "kernel"),
    [
        ("llama", "bfloat16", (8, 0), VARLEN),
        ("llama", "float16", (7, 5), FLEX),
        ("llama", "float32", (8, 0), FLEX),
        ("mistral_window", "float32", (8, 0), FLEX),
        ("gemma2", "bfloat16", (8, 0), FLEX),
        ("gpt2", "float32", (7, 5), FLEX),
    ],
)
def test_a_layer_is_one_kernel(machine, folder_of, name, dtype, capability, kernel):
    base = FrozenBase(folder_of(name), compute_dtype=dtype)
    with machine(get_device_capability=capability) as counts:
        policy = build(base, device=DEVICE)
        policy.prompt_logps(some_pairs(2))
        counts.reset()
        policy.prompt_logps(some_pairs(2)).sum().backward()
        found = counts.copy()
    other = VARLEN if kernel == FLEX else FLEX
    assert found.kernels[kernel] == 2
    assert found.kernels[f"{kernel}_backward"] == (4 if kernel == FLEX else 2)
    assert not found.kernels[other]
    assert not found.kernels["scaled_dot_product_attention"]


@pytest.mark.parametrize(("size", "kernels"), [(12, 0), (20, 2)])
def test_head_sizes_from_16_on_are_one_kernel(machine, tmp_path, size, kernels):
    config = LlamaConfig(**SIZES, **{**LAYERS, "head_dim": size})
    base = FrozenBase(str(write_model(config, tmp_path)), compute_dtype="float32")
    expected = build(base).prompt_logps(some_pairs(2)).detach()
    with machine() as counts:
        policy = build(base, device=DEVICE)
        policy.prompt_logps(some_pairs(2))
        counts.reset()
        found = to_host(policy.prompt_logps(some_pairs(2)).detach())
        assert counts.kernels[FLEX] == kernels
        assert not counts.kernels[VARLEN]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


def work_of(machine, folder: str, **answers: object) -> Counts:
    """What a checkpointed step asks of the device once it is warm."""
    base = FrozenBase(folder, compute_dtype="bfloat16", quantization="nf4")
    with machine(**answers) as counts:
        policy = build(base, device=DEVICE, activation_checkpointing=True)
        policy.prompt_logps(some_pairs(3)).sum().backward()
        counts.reset()
        policy.prompt_logps(some_pairs(3)).sum().backward()
        return counts.copy()


def test_soft_capped_scores_cost_few_more_kernels_than_others(machine, folder_of):
    gemma2, mistral = (work_of(machine, folder_of(name)) for name in ("gemma2", "mistral"))
    assert gemma2.kernels.total() <= 1.3 * mistral.kernels.total()
    assert not gemma2.float32_products
    assert gemma2.syncs.total() <= mistral.syncs.total()


def test_masks_cost_nothing_per_layer(machine, tmp_path):
    """Every second layer of Gemma 2 has a window: two masks for 2 layers, and for 4."""
    found = []
    for layers in (2, 4):
        config = Gemma2Config(**SIZES, **{**LAYERS, "num_hidden_layers": layers}, sliding_window=6)
        found.append(work_of(machine, str(write_model(config, tmp_path / str(layers)))))
    shallow, deep = found
    assert deep.syncs == shallow.syncs
    copies = [made.kernels["aten::copy_"] for made in found]
    assert deep.kernels[FLEX] == 2 * shallow.kernels[FLEX] == 8  # forward and recomputed
    assert copies[0] <= copies[1] <= 2 * copies[0]


@pytest.mark.parametrize("fault", ["error", "numbers"])
def test_where_the_kernel_fails_attention_goes_piece_by_piece(
    machine, folder_of, monkeypatch, fault
):
    """One warning, the numbers of the CPU, and a record in the deviations of the policy."""
    base = FrozenBase(folder_of("gemma2"), compute_dtype="float32")
    on_cpu = build(base)
    _, expected, gradients = step(on_cpu, some_pairs(3))

    def failing(query, key, value, **_):
        if fault == "error":
            raise RuntimeError("Cannot find a working triton installation.\nMore on this")
        return query * (key.sum() + value.sum()) * 0

    with machine() as counts:
        monkeypatch.setattr(flex_attention, "_kernel", lambda: failing)
        policy = build(base, device=DEVICE)
        with pytest.warns(UserWarning, match="FlexAttention does not work on this machine") as told:
            policy.check_passes(some_pairs(3))
        assert len(told) == 1
        assert policy.shares_prompts
        reason = policy.deviations["attention"]
        assert reason.startswith("piece by piece: FlexAttention fails (")
        assert ("working triton" if fault == "error" else "off by 1") in reason
        assert "More on this" not in reason
        counts.reset()
        margins, found = step_on_device(policy, some_pairs(3))
        assert not counts.kernels[FLEX]
    torch.testing.assert_close(margins, expected, atol=1e-4, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_where_the_kernel_fails_after_its_trial_the_step_goes_on_piece_by_piece(
    machine, folder_of, monkeypatch
):
    """A length that the trial did not have: one warning, the CPU's numbers, and a record."""
    base = FrozenBase(folder_of("gemma2"), compute_dtype="float32")
    _, expected, gradients = step(build(base), some_pairs(3))

    def failing(*_, **__):
        raise RuntimeError("no such shape")

    with machine() as counts:
        policy = build(base, device=DEVICE)
        policy.check_passes(some_pairs(3))
        assert policy.deviations == {}
        monkeypatch.setattr(flex_attention, "_kernel", lambda: failing)
        with pytest.warns(UserWarning, match=r"in a row of [\d,]+ tokens: no such shape") as told:
            margins, found = step_on_device(policy, some_pairs(3))
        assert len(told) == 1
        assert "no such shape" in policy.deviations["attention"]
        counts.reset()
        with torch.no_grad():
            policy.prompt_logps(some_pairs(3))
        assert not counts.kernels[FLEX]
    torch.testing.assert_close(margins, expected, atol=1e-4, rtol=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-4)


def test_where_it_works_nothing_deviates(machine, folder_of):
    base = FrozenBase(folder_of("gemma2"), compute_dtype="bfloat16")
    with machine():
        policy = build(base, device=DEVICE)
        policy.check_passes(some_pairs(3))
        assert flex_trial._tried
    assert policy.deviations == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_with_one_added_to_their_weight_are_those_of_transformers(machine, dtype):
    plain = Gemma2RMSNorm(32, eps=1e-5)
    generator = torch.Generator().manual_seed(0)
    plain.weight = nn.Parameter(torch.randn(32, generator=generator).to(dtype), requires_grad=False)
    x, upstream = (torch.randn(5, 32, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    expected = plain(x)
    (gradient,) = torch.autograd.grad(expected, x, upstream)
    fuse_norms(plain)
    assert torch.equal(plain(x), expected)
    with machine() as counts:
        plain.factor = PretendTensor(plain.factor)
        on_device = PretendTensor(x.detach()).requires_grad_()
        counts.reset()
        found = plain(on_device)
        (found_gradient,) = torch.autograd.grad(found, on_device, PretendTensor(upstream))
        assert counts.kernels.total() == (2 if dtype == torch.float32 else 6)
    within = 1e-6 if dtype == torch.float32 else 2**-7  # a rounding of bfloat16, either way
    torch.testing.assert_close(to_host(found.detach()), expected.detach(), atol=1e-6, rtol=within)
    torch.testing.assert_close(to_host(found_gradient), gradient, atol=0.02, rtol=2 * within)
