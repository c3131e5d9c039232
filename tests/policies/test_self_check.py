"""The fast passes of a policy are compared with the plain ones, and given up where they differ."""

import logging

import pytest
import torch
from peft.tuners import lora
from torch import nn

from spin_lightning.policies import fused_lora, shared_prefix
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.self_check import plain_passes, self_check
from tests.policies.test_shared_prefix import build, folder_of, some_pairs, step

__all__ = ["folder_of"]


def classes(policy: LoraPolicy) -> list[type]:
    return [type(module) for module in policy.modules()]


# (bitsandbytes does not quantize GPT-2's transposed layers.)
@pytest.mark.parametrize(
    ("name", "quantization"),
    [("llama", "none"), ("llama", "nf4"), ("gemma2", "none"), ("gemma2", "nf4"), ("gpt2", "none")],
)
def test_in_float32_the_passes_agree(name, quantization, folder_of):
    base = FrozenBase(folder_of(name), compute_dtype="float32", quantization=quantization)
    found = self_check(build(base), some_pairs(3))
    assert found.difference <= 1e-5
    assert found.cosine >= 0.999999


def test_in_bfloat16_they_are_apart_by_rounding(folder_of):
    policy = build(FrozenBase(folder_of("llama"), compute_dtype="bfloat16"))
    found = self_check(policy, some_pairs(3))
    assert 0 < found.difference <= 0.2
    assert 0.98 <= found.cosine < 1
    policy.check_passes(some_pairs(3))
    assert policy.shares_prompts


def test_a_check_leaves_no_trace(folder_of, caplog):
    base = FrozenBase(folder_of("llama"), compute_dtype="float32")
    policy = build(base)
    before, state = classes(policy), torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        policy.check_passes(some_pairs(3))
    assert caplog.text.count("Self-check: fast and plain passes agree (log-probs differ") == 1
    assert classes(policy) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in policy.parameters())
    assert all(module.training for module in policy.modules())
    assert policy.shares_prompts
    again = step(build(base), some_pairs(3))
    for one, other in zip(step(policy, some_pairs(3))[:2], again[:2], strict=True):
        assert torch.equal(one, other)


def test_plain_passes_are_those_of_torch_and_peft(folder_of):
    policy = build(FrozenBase(folder_of("llama"), compute_dtype="float32"))
    with plain_passes(policy):
        assert not policy.shares_prompts
        kinds = set(classes(policy)[1:])
        assert lora.Linear in kinds
        assert nn.Linear in kinds
        assert not [kind for kind in kinds if kind.__module__.startswith("spin_lightning.")]
    assert policy.shares_prompts


PROBLEMS = {
    "value": r"Self-check: the fast passes disagree .* allowed: 0.001 .*padded sequences",
    "gradient": r"Self-check: the fast passes disagree .*cosine of the gradients -1",
    "nan": r"Self-check: the fast passes disagree .*by at most nan",
    "error": r"Self-check: the fast passes fail on this machine \(no kernel image",
}


@pytest.mark.parametrize("fault", PROBLEMS)
def test_a_policy_whose_fast_passes_are_wrong_goes_on_with_the_plain_ones(
    fault, folder_of, monkeypatch
):
    base = FrozenBase(folder_of("llama"), compute_dtype="float32")
    right = shared_prefix.prompt_logps

    def wrong(model, batch):
        if fault == "error":
            raise ValueError("no kernel image is available for execution on the device")
        logps = right(model, batch)
        added = {"value": 1.0, "nan": torch.nan, "gradient": (logps - logps.detach()) * -2.0}
        return logps + added[fault]

    monkeypatch.setattr(shared_prefix, "prompt_logps", wrong)
    policy = build(base)
    with pytest.warns(UserWarning, match=PROBLEMS[fault]):
        policy.check_passes(some_pairs(3))
    assert not policy.shares_prompts
    loss, margins, gradients = step(policy, some_pairs(3))
    plain_loss, plain_margins, plain_gradients = step(
        build(base, packing="padded", fused=False), some_pairs(3)
    )
    torch.testing.assert_close(loss, plain_loss)
    torch.testing.assert_close(margins, plain_margins)
    torch.testing.assert_close(gradients, plain_gradients)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_product_with_a_fresh_adapter_is_found(dtype, folder_of, monkeypatch):
    """B of a fresh adapter is 0, and would hide what becomes of A."""
    right = fused_lora.add_product
    monkeypatch.setattr(fused_lora, "add_product", lambda y, low, up, s: right(y, low, up, -5 * s))
    policy = LoraPolicy(FrozenBase(folder_of("llama"), compute_dtype=dtype), LoraSettings(r=4))
    before = [parameter.detach().clone() for _, parameter in policy.trainable()]
    with pytest.warns(UserWarning, match="the fast passes disagree"):
        policy.check_passes(some_pairs(3))
    for (_, parameter), kept in zip(policy.trainable(), before, strict=True):
        assert torch.equal(parameter, kept)


def test_a_lack_of_memory_is_raised_and_keeps_the_fast_passes(folder_of, monkeypatch):
    def too_large(model, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(shared_prefix, "prompt_logps", too_large)
    policy = build(FrozenBase(folder_of("llama"), compute_dtype="float32"))
    with pytest.raises(torch.OutOfMemoryError):
        policy.check_passes(some_pairs(3))
    assert policy.shares_prompts


def test_numbers_that_are_not_finite_are_left_to_the_step(folder_of, recwarn):
    policy = build(FrozenBase(folder_of("llama"), compute_dtype="float32"))
    next(iter(policy.trainable()))[1].data.fill_(torch.nan)
    policy.check_passes(some_pairs(3))
    assert not [w for w in recwarn if "Self-check" in str(w.message)]
    assert policy.shares_prompts
