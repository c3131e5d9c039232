"""Shared prefixes against one padded sequence per response, on every architecture."""

import random
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from spin_lightning.losses import logistic
from spin_lightning.packing import pack_prompts
from spin_lightning.policies.lora import LoraPolicy, LoraSettings
from spin_lightning.policies.pretrained import BaseModel
from spin_lightning.policies.shared_prefix import ARCHITECTURES
from spin_lightning.types import PromptBatch

SIZES = {
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.15,
}
LAYERS = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
WITHOUT_GROUPS = {k: v for k, v in LAYERS.items() if k not in ("num_key_value_heads", "head_dim")}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES, **LAYERS),
    "llama_tied": LlamaConfig(**SIZES, **LAYERS, tie_word_embeddings=True),
    "mistral": MistralConfig(**SIZES, **LAYERS, sliding_window=None),
    "mistral_window": MistralConfig(**SIZES, **LAYERS, sliding_window=7),
    "qwen2": Qwen2Config(**SIZES, **{k: v for k, v in LAYERS.items() if k != "head_dim"}),
    "qwen2_window": Qwen2Config(
        **SIZES,
        **{k: v for k, v in LAYERS.items() if k != "head_dim"},
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=1,
    ),
    "qwen3": Qwen3Config(**SIZES, **LAYERS),
    "gemma": GemmaConfig(**SIZES, **LAYERS),
    "gemma2": Gemma2Config(
        **SIZES,
        **LAYERS,
        sliding_window=6,
        final_logit_softcapping=3.0,
        attn_logit_softcapping=2.0,
    ),
    "gemma3_text": Gemma3TextConfig(
        **SIZES, **LAYERS, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
    ),
    "gpt2": GPT2Config(**SIZES, n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "gpt_neox": GPTNeoXConfig(**SIZES, **WITHOUT_GROUPS),
}
NF4 = ("llama", "mistral_window", "qwen3", "gemma2", "gpt_neox")


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    @cache
    def write(name: str) -> str:
        folder = tmp_path_factory.mktemp(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(folder)
        return str(folder)

    return write


def some_pairs(seed: int, count: int = 7) -> PromptBatch:
    """Random lengths, among them prompts and responses of one token; not all end with a stop."""
    draw = random.Random(seed)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, 96) for _ in range(length)]

    lengths = [(1, 9, 4), (12, 1, 15), (5, 8, 1), (1, 1, 1)]
    lengths += [(draw.randint(2, 20), draw.randint(2, 15), draw.randint(2, 15))] * (count - 4)
    prompts = [ids(prompt) for prompt, _, _ in lengths]
    responses = [([*ids(real - 1), 2], ids(generated)) for _, real, generated in lengths]
    return pack_prompts(prompts, responses)


def build(base: BaseModel, settings: LoraSettings | None = None, **kwargs) -> LoraPolicy:
    """A policy whose adapter is far from zero."""
    policy = LoraPolicy(base, settings or LoraSettings(r=4), **kwargs)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in policy.trainable():
        parameter.data.normal_(0, 0.1, generator=generator)
    return policy


def step(policy: LoraPolicy, batch: PromptBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, margins and adapter gradients of one batch against a made-up reference."""
    logps = policy.prompt_logps(batch)
    reference = torch.linspace(-40, -20, len(logps), dtype=torch.float64)
    margins = (logps - reference).view(-1, 2).diff().neg().squeeze(-1)
    loss = logistic(margins, 0.1).mean()
    loss.backward()
    return (
        loss.detach(),
        margins.detach(),
        {n: p.grad for n, p in policy.trainable() if p.grad is not None},
    )


def assert_same_step(policy: LoraPolicy, plain: LoraPolicy, batch: PromptBatch, within: float):
    loss, margins, gradients = step(policy, batch)
    plain_loss, plain_margins, plain_gradients = step(plain, batch)
    torch.testing.assert_close(loss, plain_loss, rtol=within, atol=0)
    scale = plain_margins.abs().max()
    torch.testing.assert_close(margins, plain_margins, rtol=within, atol=within * float(scale))
    assert gradients.keys() == plain_gradients.keys() == {n for n, _ in policy.trainable()}
    for name, gradient in plain_gradients.items():
        error = (gradients[name] - gradient).norm() / gradient.norm()
        assert error < within, (name, float(error))


def test_every_architecture_is_built_here():
    assert {config.model_type for config in CONFIGS.values()} == ARCHITECTURES


@pytest.mark.parametrize("name", CONFIGS)
def test_step_equals_the_padded_one_in_float32(name, folder_of):
    base = BaseModel(folder_of(name), compute_dtype="float32")
    fast, plain = build(base), build(base, packing="padded", fused=False)
    assert fast.shares_prompts
    assert not plain.shares_prompts
    assert_same_step(fast, plain, some_pairs(seed=3), within=1e-5)
