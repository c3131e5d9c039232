"""The fused pass of LoRA layers against PEFT's own."""

import copy
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GPT2Config

from spin_lightning.policies import fused_lora
from spin_lightning.policies.loading import load_base
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from tests.toys.adapters import IDS, write_adapter
from tests.toys.models import write_wide_model


@pytest.fixture(scope="module")
def wide(tiny_model_dir, tmp_path_factory) -> Path:
    return write_wide_model(tiny_model_dir, tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Path:
    """Layers with a bias, whose weights are stored transposed."""
    folder = tmp_path_factory.mktemp("gpt2")
    config = GPT2Config(
        vocab_size=24,
        n_embd=64,
        n_layer=2,
        n_head=4,
        n_positions=32,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.data.normal_(0, 0.1)
        model.save_pretrained(folder)
    return folder


def with_adapters(base: FrozenBase, *, fused: bool, dropout: float = 0.0) -> PeftModel:
    """A base with two random adapters, `one` active."""
    model = load_base(base)
    turned = base.name.endswith("gpt2") or "gpt2" in base.name
    config = LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", lora_dropout=dropout, fan_in_fan_out=turned
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = get_peft_model(model, config, adapter_name="one")
        if fused:
            fused_lora.fuse(model, in_4_bits=base.quantization == "nf4")
        model.add_adapter("two", config)  # after `fuse`, as for iterates
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(0, 0.2)
    return model.train()


@contextmanager
def counting(calls: list[int]):
    """Count the layers that use the fused pass."""
    apply = fused_lora._LoraLinear.apply

    def counted(*args):
        calls.append(1)
        return apply(*args)

    fused_lora._LoraLinear.apply = counted
    try:
        yield
    finally:
        fused_lora._LoraLinear.apply = apply


def outcome(model: PeftModel, **kwargs) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and the gradients of the adapters."""
    logits = model(IDS, **kwargs).logits
    (logits.float() * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same(
    model: PeftModel, plain: PeftModel, within: float, gradients_within: float, **kwargs
) -> None:
    logits, gradients = outcome(model, **kwargs)
    plain_logits, plain_gradients = outcome(plain, **kwargs)
    assert logits.dtype == plain_logits.dtype
    assert (logits - plain_logits).norm() < within * plain_logits.norm()
    assert gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        assert gradients[name].dtype == gradient.dtype
        assert (gradients[name] - gradient).norm() < gradients_within * gradient.norm(), name


CASES = [("wide", "none", "float32", 1e-5, 1e-5), ("gpt2", "none", "float32", 1e-5, 1e-5)]
# PEFT multiplies LoRA in float32, the fused pass in bfloat16: gradients may differ by 5 %.
CASES += [("wide", "nf4", "float32", 1e-5, 1e-5), ("wide", "none", "bfloat16", 0.02, 0.05)]


@pytest.mark.parametrize(("model", "quantization", "dtype", "within", "gradients_within"), CASES)
def test_fused_layers_have_the_outputs_and_gradients_of_peft(
    model, quantization, dtype, within, gradients_within, request
):
    folder = request.getfixturevalue(model)
    base = FrozenBase(str(folder), quantization=quantization, compute_dtype=dtype)
    fused, calls = with_adapters(base, fused=True), []
    with counting(calls):
        assert_same(fused, with_adapters(base, fused=False), within, gradients_within)
    layers = sum("lora_A.one" in name for name, _ in fused.named_modules() if "one." not in name)
    assert len(calls) == layers > 0


def test_fused_layers_keep_nothing_dense_of_a_4_bit_base(wide):
    """Inputs and their low-rank image: no tensor of the size of a weight."""
    model = with_adapters(
        FrozenBase(str(wide), quantization="nf4", compute_dtype="float32"), fused=True
    )
    saved: list[tuple[int, ...]] = []
    layer = next(m for m in model.modules() if isinstance(m, fused_lora._Fused))
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tuple(tensor.shape)) or tensor, lambda tensor: tensor
    ):
        layer(torch.randn(1, 5, 64, requires_grad=True))
    assert sorted(saved) == [(5, 3), (5, 64)]


@pytest.mark.parametrize("active", [["two"], ["one", "two"], []])
def test_fused_layers_follow_the_active_adapters(active, wide):
    base = FrozenBase(str(wide), compute_dtype="float32")
    models = [with_adapters(base, fused=fused) for fused in (True, False)]
    found = []
    for model in models:
        with model.disable_adapter() if not active else _active(model, active), torch.no_grad():
            found.append(model(IDS).logits)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


@contextmanager
def _active(model: PeftModel, names: list[str]):
    model.base_model.set_adapter(names)
    yield


def test_fused_layers_leave_a_batch_of_several_adapters_to_peft(wide):
    base, calls = FrozenBase(str(wide), compute_dtype="float32"), []
    models = [with_adapters(base, fused=fused).eval() for fused in (True, False)]
    with counting(calls), torch.no_grad():
        found = [m(IDS, adapter_names=["one", "__base__"]).logits for m in models]
    assert torch.equal(*found)
    assert not calls


def test_fused_layers_leave_dropout_to_peft_in_training_only(wide):
    model = with_adapters(FrozenBase(str(wide), compute_dtype="float32"), fused=True, dropout=0.5)
    for mode, taken in ((True, False), (False, True)):
        calls: list[int] = []
        with counting(calls):
            model.train(mode)(IDS)
        assert bool(calls) == taken


def test_fused_layers_leave_autocast_to_peft(wide):
    model, calls = with_adapters(FrozenBase(str(wide), compute_dtype="float32"), fused=True), []
    with counting(calls), torch.autocast("cpu", dtype=torch.bfloat16):
        model(IDS)
    assert not calls


def test_fused_policy_snapshots_what_an_unfused_one_does(wide, tmp_path):
    base, written = FrozenBase(str(wide), compute_dtype="float32"), []
    for fused in (True, False):
        policy = LoraPolicy(base, LoraSettings(r=2), fused=fused, seed=3)
        assert any(isinstance(m, fused_lora._Fused) for m in policy.modules()) == fused
        written.append(policy.snapshot(tmp_path / str(fused)))
    assert written[0] == written[1]


def test_fused_policy_acts_as_iterates_that_are_loaded_later(wide, tmp_path):
    base = FrozenBase(str(wide), compute_dtype="float32")
    folders = {0: tmp_path, 1: write_adapter(wide, tmp_path / "1", seed=1)}
    found = []
    for fused in (True, False):
        policy = LoraPolicy(base, LoraSettings(r=2), fused=fused)
        policy.use_iterates(folders)
        with policy.at(1):
            found.append(policy.model(IDS).logits)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_in_bfloat16_the_trained_weights_stay_in_float32_and_products_follow_them(wide):
    """After a step the policy computes what one that starts with its weights does."""
    base = FrozenBase(str(wide), compute_dtype="bfloat16")
    policy, fresh = (LoraPolicy(base, LoraSettings(r=2), seed=3) for _ in range(2))
    generator = torch.Generator().manual_seed(1)
    policy.model(IDS)  # with the weights of before
    for each in (policy, fresh):
        generator.manual_seed(1)
        for _, parameter in each.trainable():
            assert parameter.dtype == torch.float32
            with torch.no_grad():
                parameter.copy_(torch.empty_like(parameter).normal_(0, 0.2, generator=generator))
    found = [each.model(IDS).logits for each in (policy, fresh)]
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(*found)


def test_in_bfloat16_an_iterate_is_in_the_compute_dtype_and_acts_as_the_policy_did(wide, tmp_path):
    base = FrozenBase(str(wide), compute_dtype="bfloat16")
    policy = LoraPolicy(base, LoraSettings(r=2), seed=3)
    for _, parameter in policy.trainable():
        parameter.data.normal_(0, 0.2)
    expected = policy.model(IDS).logits
    policy.snapshot(tmp_path / "1")
    policy.use_iterates({0: tmp_path, 1: tmp_path / "1"})
    with policy.at(1):
        found = policy.model(IDS).logits
    loaded = {p.dtype for n, p in policy.named_parameters() if "iterate_001" in n}
    assert loaded == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for _, parameter in policy.trainable())
    assert torch.equal(found, expected)


def test_copies_in_bfloat16_belong_to_the_policy_that_holds_them(wide):
    """After a deep copy and a cast."""
    policy = LoraPolicy(FrozenBase(str(wide), compute_dtype="bfloat16"), LoraSettings(r=2))
    clone = copy.deepcopy(policy)
    for _, parameter in clone.trainable():
        parameter.data.normal_(0, 0.2)
    own = policy.model(IDS).logits
    changed = clone.model(IDS).logits
    assert not torch.equal(changed, own)
    assert torch.equal(policy.model(IDS).logits, own)
    exact, unfused = (
        LoraPolicy(FrozenBase(str(wide), compute_dtype="bfloat16"), LoraSettings(r=2), fused=fused)
        for fused in (True, False)
    )
    for each in (exact, unfused):
        each.load_state_dict(clone.state_dict())
        each.to(torch.float32)
    torch.testing.assert_close(exact.model(IDS).logits, unfused.model(IDS).logits)
