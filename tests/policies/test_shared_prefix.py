"""Shared prefixes against one padded sequence per response, on every architecture."""

import itertools
import random
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import (
    BloomConfig,
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

from spin_lightning import packing
from spin_lightning.errors import SettingError
from spin_lightning.losses import logistic
from spin_lightning.packing import pack_prompts, pad_prompts
from spin_lightning.policies import shared_prefix, varlen
from spin_lightning.policies.layout import Layout
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.policies.shared_prefix import ARCHITECTURES, shares_prefixes
from spin_lightning.types import PromptBatch
from tests.toys.models import write_model

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
        return str(write_model(CONFIGS[name], tmp_path_factory.mktemp(name)))

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


def build(base: FrozenBase, settings: LoraSettings | None = None, **kwargs) -> LoraPolicy:
    """A policy whose adapter is far from zero."""
    policy = LoraPolicy(base, settings or LoraSettings(r=4), **kwargs)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in policy.trainable():
        parameter.data.copy_(torch.empty(parameter.shape).normal_(0, 0.1, generator=generator))
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
    base = FrozenBase(folder_of(name), compute_dtype="float32")
    fast, plain = build(base), build(base, packing="padded", fused=False)
    assert fast.shares_prompts
    assert not plain.shares_prompts
    assert_same_step(fast, plain, some_pairs(seed=3), within=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_step_equals_the_padded_one_for_random_lengths(seed, folder_of):
    base = FrozenBase(folder_of("llama_tied"), compute_dtype="float32")
    fast, plain = build(base), build(base, packing="padded", fused=False)
    assert_same_step(fast, plain, some_pairs(seed, count=5 + 3 * seed), within=1e-5)


def pairs_of_few_shapes() -> PromptBatch:
    """12 pairs of two lengths of prompts and two of responses, with different ids."""
    draw = random.Random(7)

    def ids(length: int) -> list[int]:
        return [draw.randrange(3, 96) for _ in range(length)]

    prompts = [ids((3, 8)[i % 2]) for i in range(12)]
    return pack_prompts(prompts, [(ids((4, 9)[i % 3 // 2]), ids(4)) for i in range(12)])


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2", "gpt2"])
def test_step_by_shape_equals_the_padded_one_and_that_piece_by_piece(name, folder_of, monkeypatch):
    batch = pairs_of_few_shapes()
    assert Layout(batch).alike is not None
    base = FrozenBase(folder_of(name), compute_dtype="float32")
    fast, plain = build(base), build(base, packing="padded", fused=False)
    assert_same_step(fast, plain, batch, within=1e-5)
    monkeypatch.setattr(Layout, "alike", None)
    assert_same_step(build(base), build(base, packing="padded", fused=False), batch, within=1e-5)


@pytest.mark.parametrize("most", [1, 60])
def test_step_in_several_rows_equals_the_padded_one(most, folder_of, monkeypatch):
    monkeypatch.setitem(packing._TOKENS_OF_A_PASS, "cpu", most)
    base = FrozenBase(folder_of("gemma2"), compute_dtype="float32")
    fast, plain = build(base), build(base, packing="padded", fused=False)
    assert_same_step(fast, plain, some_pairs(seed=5), within=1e-5)


@pytest.mark.parametrize("name", NF4)
def test_step_equals_the_padded_one_in_4_bits(name, folder_of):
    base = FrozenBase(folder_of(name), quantization="nf4", compute_dtype="float32")
    fast, plain = build(base), build(base, packing="padded", fused=False)
    assert_same_step(fast, plain, some_pairs(seed=3), within=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2", "gpt2"])
def test_step_in_bfloat16_is_as_near_to_the_exact_one_as_the_padded_is(name, folder_of):
    """Compared with the same rounded weights in float32; plain is PEFT's pass under autocast."""
    found = {}
    for kind, dtype, settings in [
        ("exact", torch.float32, {"packing": "padded", "fused": False}),
        ("plain", torch.bfloat16, {"packing": "padded", "fused": False}),
        ("fast", torch.bfloat16, {}),
    ]:
        policy = build(FrozenBase(folder_of(name), compute_dtype="bfloat16"), **settings)
        policy = policy.to(dtype) if kind == "exact" else policy
        steps = []
        for seed in range(8):
            policy.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "plain"):
                _, margins, gradients = step(policy, some_pairs(seed))
            steps.append((margins, torch.cat([g.float().flatten() for g in gradients.values()])))
        found[kind] = [torch.cat(parts) for parts in zip(*steps, strict=True)]
    for part in (0, 1):
        exact, plain, fast = (found[kind][part] for kind in ("exact", "plain", "fast"))
        rounding = (plain - exact).norm()
        assert 0 < rounding < 0.2 * exact.norm()
        assert (fast - exact).norm() < 1.5 * rounding


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_step_with_recomputed_activations_is_the_same(name, folder_of):
    base = FrozenBase(folder_of(name), compute_dtype="float32")
    batch = some_pairs(seed=3)
    loss, _, gradients = step(build(base), batch)
    again, _, recomputed = step(build(base, activation_checkpointing=True), batch)
    assert torch.equal(loss, again)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient, atol=1e-6, rtol=1e-6)


def test_recomputed_activations_save_memory(folder_of):
    base = FrozenBase(folder_of("llama"), compute_dtype="float32")
    kept = [
        saved_bytes(build(base, activation_checkpointing=on), some_pairs(3)) for on in (False, True)
    ]
    assert kept[1] < kept[0] / 2


def test_memory_of_a_step_grows_with_the_number_of_pairs_alone(folder_of):
    """Memory of the backward pass at 4, 8, 16 and 32 pairs: all slopes equal that of 4 to 8."""
    policy = build(FrozenBase(folder_of("mistral_window"), compute_dtype="float32"))
    prompt, real, generated = ([5] * n for n in (20, 12, 9))
    kept = [
        saved_bytes(policy, pack_prompts([prompt] * n, [(real, generated)] * n))
        for n in (4, 8, 16, 32)
    ]
    slopes = [(b - a) / n for a, b, n in zip(kept, kept[1:], (4, 8, 16), strict=False)]
    assert max(slopes) < 1.15 * min(slopes)


def saved_bytes(policy: LoraPolicy, batch: PromptBatch) -> int:
    """Bytes saved for the backward pass, each storage counted once, without parameters."""
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    sizes: dict[int, int] = {}
    alive = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            sizes[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        policy.prompt_logps(batch)
    return sum(sizes.values())


# torch 2.13 warns about its own tracing: it makes an instance of the autograd function, and reads
# .grad after a graph break.
# https://github.com/pytorch/pytorch/tree/v2.13.0/torch/_dynamo/variables
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.slow
def test_step_of_compiled_layers_is_the_same_and_iterates_run_uncompiled(folder_of, tmp_path):
    base = FrozenBase(folder_of("llama"), compute_dtype="float32")
    plain, compiled = build(base), build(base, compiled=True)
    for seed in (3, 4, 5):  # other lengths need no recompilation
        assert_same_step(compiled, plain, some_pairs(seed), within=1e-5)
        for policy in (plain, compiled):
            policy.zero_grad()
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs > 0
    compiled.snapshot(tmp_path / "1")
    compiled.use_iterates({0: tmp_path, 1: tmp_path / "1"})
    with compiled.at(1):
        acting = compiled.prompt_logps(some_pairs(3))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    torch.testing.assert_close(acting, plain.prompt_logps(some_pairs(3)).detach())


def varlen_by_loops(q, k, v, query_starts, key_starts, most_queries, most_keys, **settings):
    """torch's kernel, which runs on a GPU only, as documented."""
    left, right = settings["window_size"]
    assert right == 0
    attended = []
    pieces = [list(itertools.pairwise(starts.tolist())) for starts in (query_starts, key_starts)]
    for (q_from, q_to), (k_from, k_to) in zip(*pieces, strict=True):
        queries, keys = q_to - q_from, k_to - k_from
        assert queries <= most_queries
        assert keys <= most_keys
        distance = torch.arange(keys - queries, keys)[:, None] - torch.arange(keys)
        seen = (distance >= 0) & ((distance <= left) | (left < 0))
        groups = q.shape[1] // k.shape[1]
        assert settings["enable_gqa"] == (groups > 1)
        scores = torch.einsum(
            "qhd,khd->hqk", q[q_from:q_to], k[k_from:k_to].repeat_interleave(groups, dim=1)
        )
        weights = (scores * settings["scale"]).masked_fill(~seen, -torch.inf).softmax(-1)
        values = v[k_from:k_to].repeat_interleave(groups, dim=1)
        attended.append(torch.einsum("hqk,khd->qhd", weights, values))
    return torch.cat(attended)


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gpt2"])
def test_step_through_a_kernel_for_unequal_lengths_is_the_same(name, folder_of, monkeypatch):
    base = FrozenBase(folder_of(name), compute_dtype="float32")
    fast, plain = build(base), build(base, packing="padded", fused=False)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_loops)
    monkeypatch.setattr(shared_prefix, "has_varlen", lambda *_: True)
    assert_same_step(fast, plain, some_pairs(seed=3), within=1e-5)
    with torch.no_grad():
        batch = pack_prompts([[5, 6], [8]], [[[7, 2]], [[9], [3, 4, 5], [6, 2]]])
        # Sums are float64 of float32 passes: the bound of its neighbors, not of the result type.
        torch.testing.assert_close(
            fast.prompt_logps(batch), plain.prompt_logps(batch), atol=1e-5, rtol=0
        )


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2", "gpt2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_step_on_a_gpu_is_the_padded_one(name, dtype, folder_of):
    base = FrozenBase(folder_of(name), compute_dtype=dtype)
    fast = build(base, device="cuda")
    plain = build(base, device="cuda", packing="padded", fused=False)
    assert_same_step(fast, plain, some_pairs(3), within=1e-4 if dtype == "float32" else 0.1)


# ------------------------------------------------------------------------------ any responses


@pytest.mark.parametrize("name", ["llama", "mistral_window", "gemma2", "gpt2"])
def test_prompts_with_any_number_of_responses_are_scored_as_each_response_alone(name, folder_of):
    policy = build(FrozenBase(folder_of(name), compute_dtype="float32"))
    prompts = [[5, 6, 7], [8], [9] * 12]
    responses = [[[11, 2]], [[12], [13, 14, 15], [12, 16, 2]], [[17] * 9, [18, 2]]]
    with torch.no_grad():
        together = policy.prompt_logps(pack_prompts(prompts, responses))
        alone = [
            policy.prompt_logps(pack_prompts([prompt], [[response]]))
            for prompt, group in zip(prompts, responses, strict=True)
            for response in group
        ]
    assert together.dtype == torch.float64
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)


def test_a_response_does_not_see_its_neighbor(folder_of):
    policy = build(FrozenBase(folder_of("llama"), compute_dtype="float32"))
    with torch.no_grad():
        first, second = (
            policy.prompt_logps(pack_prompts([[5, 6]], [[[7, 8, 2], other]]))
            for other in ([9, 10], [11, 12, 13])
        )
    assert first[0].item() == pytest.approx(second[0].item(), abs=1e-6)
    assert first[1].item() != pytest.approx(second[1].item(), abs=1e-2)


def test_model_attends_as_before_after_a_packed_pass_also_one_that_fails(folder_of):
    policy = build(FrozenBase(folder_of("llama"), compute_dtype="float32"))
    policy.prompt_logps(some_pairs(3))
    assert policy.model.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError):
        policy.prompt_logps(pack_prompts([[5]], [[[999]]]))
    assert policy.model.config._attn_implementation == "sdpa"


# ------------------------------------------------------------------------------ heads


@pytest.mark.parametrize("head", ["adapted", "trained"])
def test_head_that_is_not_frozen_gets_its_gradient(head, folder_of):
    base = FrozenBase(folder_of("llama"), compute_dtype="float32")
    settings = LoraSettings(r=4, target_modules=("q_proj", "lm_head"))
    fast = build(base, settings if head == "adapted" else None)
    plain = build(base, settings if head == "adapted" else None, packing="padded", fused=False)
    if head == "trained":
        for policy in (fast, plain):
            policy.model.get_output_embeddings().weight.requires_grad_(True)
    assert_same_step(fast, plain, some_pairs(3), within=1e-5)
    weights = [policy.model.get_output_embeddings().weight.grad for policy in (fast, plain)]
    if head == "trained":
        torch.testing.assert_close(*weights, atol=1e-6, rtol=1e-4)


# ------------------------------------------------------------------------------ the setting


@pytest.fixture(scope="module")
def unknown(tmp_path_factory) -> FrozenBase:
    """A model whose attention does not support positions that restart."""
    config = BloomConfig(vocab_size=96, hidden_size=64, n_layer=1, n_head=2)
    folder = write_model(config, tmp_path_factory.mktemp("bloom"))
    return FrozenBase(str(folder), compute_dtype="float32")


def test_packing_auto_pads_for_an_untested_architecture(unknown):
    policy = build(unknown, LoraSettings(r=2, target_modules=("query_key_value",)))
    assert not policy.shares_prompts
    batch = some_pairs(3)
    torch.testing.assert_close(
        policy.prompt_logps(batch), policy.logps(pad_prompts(batch)), atol=0, rtol=0
    )


def test_packing_shared_is_refused_for_an_untested_architecture(unknown):
    with pytest.raises(SettingError, match=r"packing='shared'.*'bloom'.*Fix: set packing: auto"):
        shares_prefixes(unknown, "shared")


@pytest.mark.parametrize(
    ("packing", "shared"), [("auto", True), ("shared", True), ("padded", False)]
)
def test_packing_of_a_tested_architecture_is_as_set(packing, shared, folder_of):
    assert shares_prefixes(FrozenBase(folder_of("gpt2")), packing) == shared
