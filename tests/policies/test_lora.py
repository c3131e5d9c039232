"""The policy: acting as iterates, snapshots, quantized bases, adapters that do not fit."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import GPT2Config

from spin_lightning.errors import RunFolderError, SettingError
from spin_lightning.packing import pack_padded
from spin_lightning.policies.loading import load_base, load_with_adapter
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings, check_adapter
from spin_lightning.policies.merging import merge_adapter
from spin_lightning.policies.pretrained import FrozenBase
from tests.toys.adapters import (
    IDS,
    logits,
    plain_logits,
    plain_model,
    write_adapter,
)
from tests.toys.models import write_model, write_wide_model

QUANTIZED = ["nf4", "int8"]
SEVEN = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    return write_wide_model(tiny_model_dir, tmp_path_factory.mktemp("wide"))


@pytest.fixture(scope="module")
def base(model_dir) -> FrozenBase:
    return FrozenBase(str(model_dir), compute_dtype="float32")


@pytest.fixture(scope="module")
def folders(model_dir, tmp_path_factory) -> dict[int, Path]:
    """Iterate 0, the bare base, and two adapters that differ in shape."""
    root = tmp_path_factory.mktemp("iterates")
    (root / "iterate_000").mkdir()
    return {
        0: root / "iterate_000",
        1: write_adapter(model_dir, root / "iterate_001", seed=1),
        2: write_adapter(model_dir, root / "iterate_002", seed=2, target_modules=["q_proj"]),
    }


def make_policy(base: FrozenBase, folders: dict[int, Path], **settings) -> LoraPolicy:
    """A policy whose trained adapter differs from the base and from all iterates."""
    policy = LoraPolicy(base, LoraSettings(r=4, alpha=8), **settings)
    policy.use_iterates(folders)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(9)
        for _, parameter in policy.trainable():
            parameter.normal_(std=0.2)
    return policy


@pytest.fixture
def policy(base, folders) -> LoraPolicy:
    return make_policy(base, folders)


def adapter_of(folders: dict[int, Path], t: int) -> Path | None:
    return folders[t] if t else None


def state_of(policy: LoraPolicy) -> dict:
    return {
        "active": policy.model.active_adapters,
        "requires_grad": {n for n, p in policy.named_parameters() if p.requires_grad},
        "training": {n for n, m in policy.named_modules() if m.training and "iterate_" not in n},
        "logits": logits(policy.model).detach().tolist(),
    }


# ------------------------------------------------------------------------------ acting as iterates


@pytest.mark.parametrize("t", [0, 1, 2])
def test_at_iterate_has_the_logits_of_transformers_and_peft_alone(t, policy, folders, model_dir):
    wanted = plain_logits(model_dir, adapter_of(folders, t))
    assert not torch.allclose(logits(policy.model), wanted, atol=0.1)
    for _ in range(2):  # from disk, then from memory
        policy.train()
        with policy.at(t):
            found = logits(policy.model)
        assert not found.requires_grad
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


def test_logps_are_sums_over_the_response_under_the_active_policy(policy, folders, model_dir):
    batch = pack_padded([[1, 5, 9], [1]], [[14, 2], [6, 23, 2]], pad_id=0)

    def by_hand(model: nn.Module, prompt: list[int], response: list[int]) -> float:
        ids = prompt + response
        log_p = model(torch.tensor([ids])).logits[0].detach().double().log_softmax(dim=-1)
        return sum(float(log_p[s - 1, ids[s]]) for s in range(len(prompt), len(ids)))

    with policy.at(1):
        found = policy.logps(batch)
    plain = plain_model(model_dir, folders[1])
    wanted = [by_hand(plain, [1, 5, 9], [14, 2]), by_hand(plain, [1], [6, 23, 2])]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(wanted, abs=1e-5)
    assert policy.logps(batch).requires_grad


@pytest.mark.parametrize("t", [0, 1, 7])
@pytest.mark.parametrize("fails", [False, True])
def test_at_left_normally_or_by_an_exception_restores_everything(t, fails, policy):
    policy.model.base_model.model.lm_head.eval()  # not the default mode
    next(p for _, p in policy.trainable()).requires_grad_(False)
    before = state_of(policy)
    try:
        with policy.at(t):
            logits(policy.model)
            if fails:
                raise KeyError("stop here")
    except (KeyError, RunFolderError):
        assert fails or t == 7
    assert state_of(policy) == before
    with policy.at(1):  # and it can act again
        pass


def test_at_inside_another_block_is_refused_and_the_outer_one_continues(policy, folders, model_dir):
    before = state_of(policy)
    with policy.at(1):
        with pytest.raises(RuntimeError, match="already acting as iterate 1"), policy.at(2):
            pass
        wanted = plain_logits(model_dir, folders[1])
        torch.testing.assert_close(logits(policy.model), wanted, atol=1e-6, rtol=0)
    assert state_of(policy) == before


@pytest.mark.parametrize("folders", [{}, {7: Path("/nowhere/iterate_007")}])
def test_at_iterate_that_is_missing_is_named(folders, policy):
    policy.use_iterates(folders)
    with pytest.raises(RunFolderError, match=r"iterate 7 is missing.*Fix:"), policy.at(7):
        pass


@pytest.mark.parametrize("t", [0, 1, 2])
def test_iterate_folder_is_that_of_its_adapter(t, folders, policy):
    assert policy.iterate_folder(t) == adapter_of(folders, t)


def test_evict_frees_the_adapter_and_it_comes_back_from_disk(policy, folders, model_dir):
    before = state_of(policy)
    sizes = []
    for t in (1, 2):
        with policy.at(t):
            sizes.append(sum(p.numel() for p in policy.parameters()))
    policy.evict(keep=[2])
    names = [name for name, _ in policy.named_parameters()]
    assert not any("iterate_001" in name for name in names)
    assert any("iterate_002" in name for name in names)
    policy.evict()
    smallest = sum(p.numel() for p in policy.parameters())
    assert smallest < sizes[0] < sizes[1]
    assert state_of(policy) == before
    with policy.at(1):
        wanted = plain_logits(model_dir, folders[1])
        torch.testing.assert_close(logits(policy.model), wanted, atol=1e-6, rtol=0)
    assert state_of(policy) == before


# ----------------------------------------------------------------------------------- the adapter


def test_snapshot_is_a_peft_adapter_with_the_bytes_of_the_trained_one(policy, model_dir, tmp_path):
    hashes = policy.snapshot(tmp_path / "ours")
    files = {p.name: p.read_bytes() for p in (tmp_path / "ours").iterdir()}
    assert hashes == {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    # PEFT's own writer saves a named adapter one folder down.
    policy.model.save_pretrained(tmp_path / "theirs", selected_adapters=["policy"])
    theirs = tmp_path / "theirs" / "policy"
    ours, wanted = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "ours", theirs))
    assert ours.keys() == wanted.keys()
    assert all(torch.equal(ours[name], wanted[name]) for name in ours)
    ours, wanted = (
        json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path / "ours", theirs)
    )
    assert set(ours.pop("target_modules")) == set(wanted.pop("target_modules"))
    assert ours == wanted
    trained = logits(policy.eval().model)
    found = plain_logits(model_dir, tmp_path / "ours")
    torch.testing.assert_close(found, trained, atol=1e-6, rtol=0)


def test_snapshot_of_the_same_adapter_has_the_same_bytes(base, folders, tmp_path):
    policy = make_policy(base, folders)
    first = policy.snapshot(tmp_path / "first")
    with policy.at(1):
        acting = policy.snapshot(tmp_path / "acting")
    other = make_policy(base, folders).snapshot(tmp_path / "other")
    assert first == acting == other
    # PEFT keeps them in a set, whose order differs between processes.
    targets = json.loads((tmp_path / "first" / "adapter_config.json").read_text())["target_modules"]
    assert len(targets) == 2 * 7
    assert targets == sorted(targets)


def test_fresh_adapter_is_the_base_and_depends_on_the_seed_alone(base, model_dir):
    state = torch.get_rng_state()
    first = LoraPolicy(base, LoraSettings(), seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    again, other = (LoraPolicy(base, LoraSettings(), seed=seed) for seed in (1, 2))
    wanted = plain_logits(model_dir)
    torch.testing.assert_close(logits(first.model), wanted, atol=1e-6, rtol=0)

    def weights(policy: LoraPolicy) -> torch.Tensor:
        return torch.cat([p.detach().flatten() for _, p in policy.trainable()])

    assert torch.equal(weights(first), weights(again))
    assert not torch.equal(weights(first), weights(other))


def test_initial_adapter_is_iterate_zero_and_its_config_replaces_the_settings(
    base, model_dir, tmp_path
):
    start = write_adapter(model_dir, tmp_path / "sft", seed=3, r=3, target_modules=["v_proj"])
    policy = LoraPolicy(base, LoraSettings(r=16), initial_adapter=str(start), fused=False)
    policy.use_iterates({0: start})
    shapes = {name.split(".")[-4]: p.shape for name, p in policy.trainable() if "lora_A" in name}
    assert shapes == {"v_proj": (3, 64)}
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == {
        name for name, _ in policy.trainable()
    }
    policy.snapshot(tmp_path / "copy")
    first, copied = (load_file(d / "adapter_model.safetensors") for d in (start, tmp_path / "copy"))
    assert all(torch.equal(copied[name], weight) for name, weight in first.items())
    wanted = plain_logits(model_dir, start)
    with torch.no_grad():
        for _, parameter in policy.trainable():
            parameter.add_(1.0)
    assert not torch.allclose(logits(policy.eval().model), wanted, atol=0.1)
    with policy.at(0):
        torch.testing.assert_close(logits(policy.model), wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("targets", "named"),
    [
        (("v_proj", "q_prj"), "q_prj"),
        (("proj",), "proj"),
        (("layers.q_proj",), "layers.q_proj"),
        ("q_proj", "q_proj"),  # PEFT treats a string as a pattern for the whole name
    ],
)
def test_check_adapter_target_that_matches_no_layer_is_refused(targets, named, base):
    with pytest.raises(SettingError, match=f"lora_target_modules='{named}'.*Fix: "):
        check_adapter(base, LoraSettings(target_modules=targets), None)


def test_check_adapter_lists_the_layers_that_an_adapter_can_be_put_on(base):
    with pytest.raises(SettingError) as refused:
        check_adapter(base, LoraSettings(target_modules=("nothing",)), None)
    listed = refused.value.fix.removeprefix("choose from ").split(", or ")[0].split(", ")
    assert set(listed) - {"lm_head", "embed_tokens"} == SEVEN


@pytest.mark.parametrize(
    "targets", ["all-linear", r".*\.(q|v)_proj", ("q_proj", "self_attn.v_proj", "lm_head")]
)
def test_check_adapter_targets_that_it_accepts_train(targets, base):
    lora = LoraSettings(target_modules=targets)
    check_adapter(base, lora, None)
    assert any(True for _ in LoraPolicy(base, lora).trainable())


def test_check_adapter_initial_adapter_without_a_config_is_refused(base, folders):
    check_adapter(base, LoraSettings(), str(folders[1]))
    with pytest.raises(SettingError, match=r"initial_adapter=.*no adapter_config\.json"):
        check_adapter(base, LoraSettings(), str(folders[0]))


# --------------------------------------------------------------------------------- quantized bases


@pytest.fixture(params=QUANTIZED)
def quantized(request, base) -> FrozenBase:
    return replace(base, quantization=request.param)


def gradients(policy: LoraPolicy) -> torch.Tensor:
    policy.zero_grad()
    policy.model(IDS, labels=IDS).loss.backward()
    assert {n for n, p in policy.named_parameters() if p.grad is not None} == {
        name for name, _ in policy.trainable()
    }
    return torch.cat([p.grad.flatten() for _, p in policy.trainable()])


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
def test_load_base_nf4_holds_every_layer_in_four_bits_doubly_quantized(compute_dtype, base):
    nf4 = replace(base, quantization="nf4", compute_dtype=compute_dtype)
    layers = [m for m in load_base(nf4).modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(layers) == 2 * 7
    for layer in layers:
        assert layer.weight.dtype == torch.uint8
        assert layer.weight.numel() == layer.in_features * layer.out_features // 2
        assert layer.weight.quant_state.quant_type == "nf4"
        assert layer.weight.quant_state.nested
        assert layer.compute_dtype == getattr(torch, compute_dtype)


def test_load_base_int8_holds_every_layer_in_eight_bits(base):
    int8 = replace(base, quantization="int8")
    layers = [m for m in load_base(int8).modules() if isinstance(m, bnb.nn.Linear8bitLt)]
    assert len(layers) == 2 * 7
    assert all(layer.weight.dtype == torch.int8 for layer in layers)


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_load_base_gpt2_holds_its_transposed_layers_quantized_too(quantization, tmp_path):
    config = GPT2Config(vocab_size=24, n_positions=32, n_embd=64, n_layer=1, n_head=2)
    write_model(config, tmp_path)
    base = FrozenBase(str(tmp_path), quantization=quantization, compute_dtype="float32")
    kind = {"nf4": bnb.nn.Linear4bit, "int8": bnb.nn.Linear8bitLt}[quantization]
    assert sum(isinstance(m, kind) for m in load_base(base).modules()) == 4


def test_quantized_base_is_near_the_unquantized_one(quantized, folders, model_dir):
    policy = make_policy(quantized, folders)
    with policy.at(0):
        found = logits(policy.model)
    plain = plain_logits(model_dir)
    assert not torch.allclose(found, plain, atol=1e-3), "nothing was rounded"
    similarity = torch.corrcoef(torch.stack([plain.flatten(), found.flatten()]))[0, 1]
    assert float(similarity) > {"nf4": 0.95, "int8": 0.999}[quantized.quantization]


def test_nf4_policy_in_training_is_its_dequantized_base_with_the_adapter(folders, base, tmp_path):
    """Logits and gradients, before it has acted as an iterate and after it."""
    policy = make_policy(replace(base, quantization="nf4"), folders)
    plain_model(base.name, quantization="nf4").save_pretrained(tmp_path)
    rounded = make_policy(FrozenBase(str(tmp_path), compute_dtype="float32"), folders)
    for acted in (None, 0, 1):
        if acted is not None:
            with policy.at(acted):
                logits(policy.model)
        torch.testing.assert_close(logits(policy.model), logits(rounded.model), atol=1e-4, rtol=0)
        torch.testing.assert_close(gradients(policy), gradients(rounded), atol=1e-4, rtol=1e-3)


def test_quantized_policy_learns_and_its_snapshot_acts_as_it_did(quantized, folders, tmp_path):
    policy = make_policy(quantized, folders)
    frozen = {n: p.clone() for n, p in policy.named_parameters() if "lora_" not in n}
    optimizer = torch.optim.SGD([p for _, p in policy.trainable()], lr=0.1)
    losses = []
    for _ in range(3):
        with policy.at(0):  # as scoring does between steps
            logits(policy.model)
        optimizer.zero_grad()
        loss = policy.model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    assert all(torch.equal(p, frozen[n]) for n, p in policy.named_parameters() if n in frozen)
    policy.snapshot(tmp_path / "iterate_003")
    policy.use_iterates({3: tmp_path / "iterate_003"})
    with policy.at(3):
        acted = logits(policy.model)
    policy.eval()
    torch.testing.assert_close(acted, logits(policy.model).detach(), atol=1e-6, rtol=0)
    plain = plain_logits(quantized.name, tmp_path / "iterate_003", quantized.quantization)
    torch.testing.assert_close(acted, plain, atol=1e-4, rtol=0)


# ------------------------------------------------------------------------- without the policy


@pytest.mark.parametrize("t", [0, 1, 2])
def test_merge_adapter_plain_is_the_adapter_model_without_peft(t, folders, base, model_dir):
    merged = merge_adapter(base, adapter_of(folders, t))[0]
    assert not any("lora" in name for name, _ in merged.named_modules())
    with torch.no_grad():
        found = logits(merged.eval())
    wanted = plain_logits(model_dir, adapter_of(folders, t))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("t", [0, 1])
def test_merge_adapter_nf4_is_the_dequantized_adapter_model_in_full_precision(t, folders, base):
    nf4 = replace(base, quantization="nf4")
    merged = merge_adapter(nf4, adapter_of(folders, t))[0]
    assert {type(m) for m in merged.modules() if isinstance(m, nn.Linear)} == {nn.Linear}
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    with torch.no_grad():
        found = logits(merged.eval())
        quantized = logits(load_with_adapter(nf4, adapter_of(folders, t)))
    wanted = plain_logits(base.name, adapter_of(folders, t), "nf4")
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(found, quantized, atol=1e-4, rtol=0)


@pytest.mark.parametrize("t", [0, 1])
def test_load_with_adapter_is_in_eval_mode_and_has_its_logits(t, folders, base, model_dir):
    model = load_with_adapter(base, adapter_of(folders, t))
    assert not any(module.training for module in model.modules())
    wanted = plain_logits(model_dir, adapter_of(folders, t))
    torch.testing.assert_close(logits(model).detach(), wanted, atol=1e-6, rtol=0)


def test_adapter_whose_load_fails_half_way_is_not_used_by_the_next_call(
    policy, folders, model_dir, monkeypatch
):
    """PEFT registers the adapter first, with random weights, and then reads them."""
    load = type(policy.model).load_adapter

    def fail(self, folder, adapter_name, **kwargs):
        load(self, folder, adapter_name=adapter_name, **kwargs)
        for name, parameter in self.named_parameters():
            if f".{adapter_name}." in name:
                parameter.data.zero_()
        raise torch.OutOfMemoryError("while its weights were copied")

    with monkeypatch.context() as patched:
        patched.setattr(type(policy.model), "load_adapter", fail)
        with pytest.raises(torch.OutOfMemoryError), policy.at(1):
            pass
    assert set(policy.model.peft_config) == {"policy"}
    wanted = plain_logits(model_dir, folders[1])
    with policy.at(1):
        torch.testing.assert_close(logits(policy.model), wanted, atol=1e-6, rtol=0)
