"""Frozen iterates on the pretend device: their responses, their scores, and the device's work."""

import itertools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from spin_lightning.generation.base import Request, Response
from spin_lightning.generation.local import LocalGenerator, default_batch_tokens
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.generation.varlen_slots import fits
from spin_lightning.packing import pack_prompts
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.types import PolicyId
from tests.policies.test_shared_prefix import folder_of, some_pairs
from tests.pretend_cuda.device import DEVICE, to_host

__all__ = ["folder_of"]

STOP, PAD = 2, 0
POLICIES = [PolicyId(0), PolicyId(1), PolicyId(2), PolicyId(2, 0.3)]
CASES = [(name, "none") for name in ("llama", "mistral_window", "qwen3", "gemma2", "gpt2")]
CASES += [("llama", "nf4")]


def iterates(base: FrozenBase, root: Path) -> dict[int, Path]:
    """Folders of iterate 0, the bare base, and of two adapters far from zero."""
    policy = LoraPolicy(base, LoraSettings(r=4))
    folders = {0: root}
    for t in (1, 2):
        generator = torch.Generator().manual_seed(t)
        for _, parameter in policy.trainable():
            parameter.data.normal_(0, 0.1, generator=generator)
        policy.snapshot(root / str(t))
        folders[t] = root / str(t)
    return folders


def requests(policies: list[PolicyId], count: int) -> list[Request]:
    draw = random.Random(5)
    return [
        Request(
            prompt_ids=tuple(draw.randrange(3, 96) for _ in range(draw.randint(1, 9))),
            opponent=iterate,
            token_alpha=alpha,
            cap=draw.randint(1, 12),
            key=i,
        )
        for i, (iterate, alpha) in zip(range(count), itertools.cycle(policies), strict=False)
    ]


@pytest.mark.parametrize(
    "settings", [GenerationSettings(), GenerationSettings(top_p=0.8, temperature=0.7)]
)
@pytest.mark.parametrize(("name", "quantization"), CASES)
def test_responses_are_those_of_the_cpu(machine, folder_of, name, quantization, settings, tmp_path):
    base = FrozenBase(folder_of(name), compute_dtype="float32", quantization=quantization)
    folders = iterates(base, tmp_path)
    asked = requests(POLICIES, 60)
    generator = LocalGenerator((STOP,), PAD, settings)
    on_cpu = LoraPolicy(base, LoraSettings(r=4))
    on_cpu.use_iterates(folders)
    with machine():
        policy = LoraPolicy(base, LoraSettings(r=4), device=DEVICE)
        policy.use_iterates(folders)
        torch.use_deterministic_algorithms(True)
        try:
            on_device = generator.generate(policy, asked)
        finally:
            torch.use_deterministic_algorithms(False)
    assert [r.ids for r in on_device] == [r.ids for r in generator.generate(on_cpu, asked)]


@pytest.mark.parametrize(("name", "quantization"), CASES)
def test_in_bfloat16_only_rounding_moves_draws_and_sampler_and_scorer_agree(
    machine, folder_of, name, quantization, tmp_path
):
    """The device's draws differ from the CPU's no more often than the CPU's from float32's."""
    base = FrozenBase(folder_of(name), compute_dtype="bfloat16", quantization=quantization)
    folders, asked = iterates(base, tmp_path), requests(POLICIES, 60)
    generator = LocalGenerator((STOP,), PAD, GenerationSettings())
    on_cpu = []
    for exact in (replace(base, compute_dtype="float32"), base):
        policy = LoraPolicy(exact, LoraSettings(r=4))
        policy.use_iterates(folders)
        on_cpu.append(generator.generate(policy, asked))
    with machine() as counts:
        policy = LoraPolicy(base, LoraSettings(r=4), device=DEVICE)
        policy.use_iterates(folders)
        fits(policy.model)  # tries the kernel, in float32, too
        counts.reset()
        responses = generator.generate(policy, asked)
        assert not counts.float32_products
        differences = []
        for policy_id in POLICIES:
            own = [(q, r) for q, r in zip(asked, responses, strict=True) if q.policy == policy_id]
            batch = pack_prompts([q.prompt_ids for q, _ in own], [[r.ids] for _, r in own])
            with policy.at(*policy_id):
                scored = to_host(policy.prompt_logps(batch)).tolist()
            differences += [s - (r.logp or 0.0) for s, (_, r) in zip(scored, own, strict=True)]
    tokens = sum(len(response.ids) for response in responses)
    assert abs(sum(differences)) <= 0.02 * tokens
    assert max(map(abs, differences)) <= 0.3
    in_float32, in_bfloat16 = on_cpu
    assert moved(responses, in_bfloat16) <= moved(in_bfloat16, in_float32)


def moved(some: Sequence[Response], others: Sequence[Response]) -> float:
    """Share of draws that differ although all draws before them are the same."""
    drawn = changed = 0
    for one, other in zip(some, others, strict=True):
        pairs = list(zip(one.ids, other.ids, strict=False))
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        changed += same < len(pairs)
        drawn += min(same + 1, len(pairs))
    return changed / drawn


def test_scoring_a_token_mixture_copies_nothing_per_layer(machine, folder_of, tmp_path):
    """PEFT's mixed batches index each layer by lists, which are copied to the device."""
    base = FrozenBase(folder_of("llama"), compute_dtype="bfloat16")
    folders = iterates(base, tmp_path)
    batch = some_pairs(2)
    on_cpu = LoraPolicy(base, LoraSettings(r=4))
    on_cpu.use_iterates(folders)
    with on_cpu.at(1, 0.3):
        expected = on_cpu.prompt_logps(batch)
    with machine() as counts:
        policy = LoraPolicy(base, LoraSettings(r=4), device=DEVICE)
        policy.use_iterates(folders)
        with policy.at(1, 0.3):
            counts.reset()
            found = to_host(policy.prompt_logps(batch))
    torch.testing.assert_close(found, expected, atol=0.2, rtol=0.02)
    assert not counts.syncs["index to the device"]
    assert not counts.float32_products


@pytest.mark.parametrize(
    ("capability", "on_gpu"), [((7, 5), torch.float32), ((8, 6), torch.bfloat16)]
)
def test_auto_computes_in_bfloat16_on_gpus_that_do(machine, capability, on_gpu):
    with machine(get_device_capability=capability):
        base = FrozenBase("some/model")
        assert base.dtype == base.on(DEVICE).dtype == on_gpu
        assert base.on(torch.device("cpu")).dtype == torch.float32
        chosen = FrozenBase("some/model", compute_dtype="bfloat16")
        assert chosen.on(torch.device("cpu")) is chosen


def test_a_batch_of_decoding_fills_three_quarters_of_the_card_less_the_weights(machine, folder_of):
    """2 layers, keys and values of 2 heads of 16 in bfloat16: 256 bytes a token."""
    base = FrozenBase(folder_of("llama"), compute_dtype="bfloat16")
    memory = 2**31 + 2**24
    card = SimpleNamespace(total_memory=(memory + 2**20) * 4 // 3)
    with machine(get_device_properties=card):
        model = LoraPolicy(base, LoraSettings(r=4), device=DEVICE).model
        base_weights = [p for name, p in model.named_parameters() if "lora_" not in name]
        weights = sum(p.numel() * p.element_size() for p in base_weights)
        assert default_batch_tokens(model) == 2**17
        model.config.num_hidden_layers = 512
        assert default_batch_tokens(model) == (memory + 2**20 - weights) // 2**16
