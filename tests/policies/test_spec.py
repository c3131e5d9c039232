"""A policy spec: what it refuses, what it builds, and what identifies it."""

import hashlib
from pathlib import Path

import pytest
import torch

from spin_lightning.errors import SettingError
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import content_hashes
from spin_lightning.policies.spec import PolicySpec


@pytest.fixture
def adapter(tiny_base, tmp_path) -> Path:
    """A LoRA adapter of rank 3."""
    folder = tmp_path / "adapter"
    PolicySpec(tiny_base, LoraSettings(r=3)).build("cpu", seed=0).snapshot(folder)
    return folder


def ranks(policy) -> set[int]:
    return {p.shape[0] for name, p in policy.trainable() if "lora_A" in name}


def test_lora_settings_not_given_have_their_defaults():
    assert LoraSettings.of(None, None, None, None, None) == LoraSettings(16, 32, 0.0, "all-linear")
    given = LoraSettings.of(4, None, 0.5, ["q_proj", "v_proj"], None)
    assert given == LoraSettings(4, 32, 0.5, ("q_proj", "v_proj"))


def test_lora_settings_with_an_initial_adapter_are_refused_by_name(adapter):
    with pytest.raises(SettingError, match=r"initial_adapter=.*lora_r, lora_dropout.*Fix: leave"):
        LoraSettings.of(4, None, 0.5, None, str(adapter))


def test_check_refuses_target_modules_that_the_base_does_not_have(tiny_base):
    PolicySpec(tiny_base, LoraSettings()).check()
    with pytest.raises(SettingError, match="lora_target_modules='query'"):
        PolicySpec(tiny_base, LoraSettings(target_modules=("query",))).check()


def test_build_puts_the_adapter_of_the_spec_on_the_base(tiny_base, adapter):
    fresh = PolicySpec(tiny_base, LoraSettings(r=2), packing="padded").build("cpu", seed=5)
    assert ranks(fresh) == {2}
    assert not fresh.shares_prompts
    started = PolicySpec(tiny_base, LoraSettings(), str(adapter)).build("cpu", seed=5)
    assert ranks(started) == {3}
    assert started.shares_prompts


def test_build_draws_the_adapter_from_the_seed_alone(tiny_base):
    spec = PolicySpec(tiny_base, LoraSettings(r=2))

    def weights(seed: int) -> torch.Tensor:
        torch.rand(3)
        policy = spec.build("cpu", seed)
        return torch.cat([p.detach().flatten() for _, p in policy.trainable()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_fingerprint_fields_are_the_dtype_and_the_files_of_base_and_adapter(tiny_base, adapter):
    assert PolicySpec(tiny_base, LoraSettings()).fingerprint_fields() == {
        "compute_dtype": str(tiny_base.dtype).removeprefix("torch."),
        "base_files": content_hashes(tiny_base),
        "initial_adapter": None,
    }
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in adapter.iterdir()
        if path.suffix in (".json", ".safetensors")
    }
    started = PolicySpec(tiny_base, LoraSettings(), str(adapter))
    assert started.fingerprint_fields()["initial_adapter"] == hashes


@pytest.mark.parametrize(
    ("packing", "in_use"),
    [
        ("auto", "shared ('llama', packing=auto)"),
        ("shared", "shared ('llama', packing=shared)"),
        ("padded", "padded ('llama', packing=padded)"),
    ],
)
def test_packing_in_use_names_the_architecture_and_the_setting(packing, in_use, tiny_base):
    assert PolicySpec(tiny_base, LoraSettings(), packing=packing).packing_in_use == in_use


def test_facts_of_the_model_come_from_its_files(tiny_base):
    spec = PolicySpec(tiny_base, LoraSettings())
    assert (spec.vocabulary, spec.context_length, spec.generation_stop_ids) == (24, 64, 2)
    assert spec.tokenizer is spec.tokenizer
    assert spec.tokenizer.eos_token_id == 2
