"""Token-level mixtures of an iterate with the base, against two separate models."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spin_lightning import packing
from spin_lightning.generation.base import Request
from spin_lightning.generation.kv_cache import ColumnCache
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.keyed import position_uniforms
from spin_lightning.packing import pack_padded, pack_prompts, pad_left
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from tests.toys.adapters import plain_model, write_adapter
from tests.toys.models import family_config, write_model

# PEFT warns that it detects GPT-2's transposed layers, and that it saves a head with an adapter.
pytestmark = [
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning"),
]

WORDS, STOP, PAD = 12, 2, 0
IDS = torch.tensor([[1, 5, 9, 4, 6, 3, 11], [1, 10, 10, 4, 7, 8, 3]])
GROUPED = {"intermediate_size": 128, "num_key_value_heads": 2}
# Logits are around 2: a cap of 2 bends them far from a linear head's.
CAPPED = {
    "final_logit_softcapping": 2.0,
    "head_dim": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 6,
}
FAMILIES = {"llama": GROUPED, "gpt2": {}, "qwen2": GROUPED, "gemma2": {**GROUPED, **CAPPED}}


@dataclass(frozen=True)
class Players:
    """A policy and the folders of its iterates, None for the bare base."""

    policy: LoraPolicy
    model_dir: Path
    adapters: dict[int, Path | None]
    quantization: str = "none"

    def plain(self, t: int) -> nn.Module:
        """Iterate t by transformers and peft alone."""
        return plain_model(self.model_dir, self.adapters[t], self.quantization)

    def mixed(self, t: int, alpha: float, ids: Tensor) -> Tensor:
        """Next-token log-probs from two separate models, nats, float64, [n, length, words]."""
        with torch.no_grad():
            own, base = (self.plain(i)(ids).logits.double().log_softmax(-1) for i in (t, 0))
        mixed = (1 - alpha) * own + alpha * base
        return mixed - mixed.logsumexp(-1, keepdim=True)

    def found(self, t: int, alpha: float, ids: Tensor) -> Tensor:
        """The same, from the policy."""
        with self.policy.at(t, alpha):
            return self.policy.model(input_ids=ids).logits.double().log_softmax(-1)


def make_players(
    root: Path, family: str, *, initial: bool = False, quantization: str = "none", **shape: Any
) -> Players:
    """Iterates 0 to 2; 0 is the bare base or, with `initial`, an adapter; 2 has a shape of its own.

    The trained adapter differs from all of them.
    """
    model_dir = write_model(family_config(family, WORDS, **FAMILIES[family]), root / "model")
    shape |= {"fan_in_fan_out": True} if family == "gpt2" else {}
    narrow = {"r": 2, "target_modules": ["c_attn"] if family == "gpt2" else ["q_proj", "down_proj"]}
    adapters: dict[int, Path | None] = {
        0: write_adapter(model_dir, root / "iterate_000", seed=3, **shape) if initial else None,
        1: write_adapter(model_dir, root / "iterate_001", seed=1, **shape),
        2: write_adapter(model_dir, root / "iterate_002", seed=2, **{**shape, **narrow}),
    }
    base = FrozenBase(str(model_dir), quantization=quantization, compute_dtype="float32")
    start = str(adapters[0]) if initial else None
    policy = LoraPolicy(base, LoraSettings(r=4, alpha=8), initial_adapter=start)
    (root / "iterate_000").mkdir(exist_ok=True)
    policy.use_iterates({t: root / f"iterate_{t:03d}" for t in adapters})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(9)
        for _, parameter in policy.trainable():
            parameter.normal_(std=0.2)
    return Players(policy, model_dir, adapters, quantization)


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def players(family, tmp_path_factory) -> Players:
    return make_players(tmp_path_factory.mktemp(family), family)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Players:
    return make_players(tmp_path_factory.mktemp("llama"), "llama")


# ------------------------------------------------------------------------- next-token distributions


@pytest.mark.parametrize("alpha", [0.3, 0.8])
@pytest.mark.parametrize("t", [1, 2])
def test_next_tokens_are_the_geometric_mixture_of_two_models(t, alpha, players):
    wanted = players.mixed(t, alpha, IDS)
    for other in (0.0, 1.0):
        assert (wanted - players.mixed(t, other, IDS)).abs().max() > 0.1
    torch.testing.assert_close(players.found(t, alpha, IDS), wanted, atol=1e-5, rtol=0)


def test_next_tokens_where_iterate_zero_is_an_adapter_are_pulled_towards_it(family, tmp_path):
    players = make_players(tmp_path, family, initial=True)
    bare = Players(players.policy, players.model_dir, {**players.adapters, 0: None})
    wanted = players.mixed(1, 0.6, IDS)
    assert (wanted - bare.mixed(1, 0.6, IDS)).abs().max() > 0.1
    torch.testing.assert_close(players.found(1, 0.6, IDS), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("initial", [False, True])
def test_next_tokens_in_nf4_are_those_of_the_dequantized_base(initial, tmp_path):
    players = make_players(tmp_path, "llama", initial=initial, quantization="nf4")
    found = players.found(1, 0.4, IDS)
    torch.testing.assert_close(found, players.mixed(1, 0.4, IDS), atol=1e-4, rtol=0)


def test_next_tokens_with_an_adapter_on_the_head_are_those_of_both_heads(tmp_path):
    players = make_players(tmp_path, "llama", target_modules=["q_proj", "lm_head"])
    wanted = players.mixed(1, 0.4, IDS)
    torch.testing.assert_close(players.found(1, 0.4, IDS), wanted, atol=1e-5, rtol=0)


def test_next_tokens_after_prompts_of_different_lengths_are_those_without_padding(players):
    prompts = [(1, 5, 9, 4, 6, 3, 11, 8), (1,), (1, 7, 7)]
    ids, mask = pad_left(prompts, PAD)
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    with players.policy.at(1, 0.3):
        logits = players.policy.model(
            input_ids=ids, attention_mask=mask, position_ids=positions
        ).logits
    for row, prompt in enumerate(prompts):
        wanted = players.mixed(1, 0.3, torch.tensor([prompt]))[0, -1]
        found = logits[row, -1].double().log_softmax(-1)
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_iterate_zero_is_the_same_under_any_alpha(alpha, players):
    found = players.found(0, alpha, IDS)
    assert torch.equal(found, players.found(0, 0.0, IDS))
    torch.testing.assert_close(found, players.mixed(0, 0.0, IDS), atol=1e-5, rtol=0)


@pytest.mark.parametrize("t", [1, 2])
def test_alpha_of_one_is_the_base_and_of_zero_the_iterate(t, players):
    for alpha, same in ((1.0, 0), (0.0, t)):
        wanted = players.mixed(same, 0.0, IDS)
        torch.testing.assert_close(players.found(t, alpha, IDS), wanted, atol=1e-5, rtol=0)


# ----------------------------------------------------------------------------- scoring and sampling


PROMPTS = [(1, 5, 9, 4), (1,), (1, 7)]
RESPONSES = [[(4, STOP), (3,)], [(6, 3, 11, 10, 8, STOP), (5, STOP)], [(STOP,), (9, 9, 9)]]


def mixed_logp(players: Players, t: int, alpha: float, x: tuple, y: tuple) -> float:
    """log g(y|x) from two separate models, nats."""
    log_p = players.mixed(t, alpha, torch.tensor([x + y]))[0, len(x) - 1 : -1]
    return float(log_p[range(len(y)), list(y)].sum())


def test_logps_are_sums_of_the_mixed_next_token_log_probs(players):
    responses = [first for first, _ in RESPONSES]
    with players.policy.at(2, 0.7):
        found = players.policy.logps(pack_padded(PROMPTS, responses, PAD))
    for value, x, y in zip(found.tolist(), PROMPTS, responses, strict=True):
        assert value == pytest.approx(mixed_logp(players, 2, 0.7, x, y), abs=1e-5)


def assert_prompt_logps_are_mixed(players: Players) -> None:
    batch = pack_prompts(PROMPTS, RESPONSES)
    for t in (1, 2):
        with players.policy.at(t, 0.7):
            assert players.policy.shares_prompts
            found = players.policy.prompt_logps(batch)
        assert found.dtype == torch.float64
        wanted = [
            mixed_logp(players, t, 0.7, x, y)
            for x, group in zip(PROMPTS, RESPONSES, strict=True)
            for y in group
        ]
        torch.testing.assert_close(found, torch.tensor(wanted).double(), atol=1e-5, rtol=0)


def test_prompts_are_computed_once_for_all_their_responses(players):
    assert_prompt_logps_are_mixed(players)


@pytest.mark.parametrize("initial", [False, True])
def test_prompts_are_computed_once_with_an_adapter_on_the_head_too(initial, tmp_path):
    shape = {"target_modules": ["q_proj", "lm_head"]}
    assert_prompt_logps_are_mixed(make_players(tmp_path, "llama", initial=initial, **shape))


def test_prompts_are_computed_once_in_several_passes(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_TOKENS_OF_A_PASS", {"cpu": 8})
    assert_prompt_logps_are_mixed(make_players(tmp_path, "llama", initial=True))


def test_probabilities_of_all_responses_up_to_the_cap_sum_to_one(players):
    cap, words = 3, [token for token in range(WORDS) if token != STOP]
    prefixes = [p for n in range(cap) for p in itertools.product(words, repeat=n)]
    responses = [(*p, STOP) for p in prefixes] + [*itertools.product(words, repeat=cap)]
    assert len(responses) == 1 + 11 + 121 + 1331
    batch = pack_padded([(1, 5, 9)] * len(responses), responses, PAD)
    with players.policy.at(1, 0.4):
        total = float(players.policy.logps(batch).exp().sum())
    assert total == pytest.approx(1.0, abs=1e-5)


def some_requests(count: int = 60) -> list[Request]:
    """Prompts of 1 to 9 words, iterates, alphas and caps of 1 to 12 all mixed."""
    draw = random.Random(3)
    words = [token for token in range(1, WORDS) if token != STOP]
    return [
        Request(
            prompt_ids=(1, *draw.choices(words, k=draw.randrange(9))),
            opponent=draw.randrange(3),
            key=draw.getrandbits(63),
            cap=draw.randrange(1, 13),
            token_alpha=draw.choice([0.0, 0.5]),
        )
        for _ in range(count)
    ]


def test_decoding_step_by_step_samples_the_mixture_of_whole_sequences(players, monkeypatch):
    """Every id is the inverse CDF of its uniform given the ids before it, computed from scratch."""
    compactions = []
    select = ColumnCache.select

    def spy(cache: ColumnCache, lanes: Tensor) -> None:
        compactions.append(len(lanes))
        select(cache, lanes)

    monkeypatch.setattr(ColumnCache, "select", spy)
    generator = LocalGenerator((STOP,), PAD, GenerationSettings(batch_tokens=300))
    requests = some_requests()
    responses = generator.generate(players.policy, requests)
    assert len(compactions) > 5
    assert 0 < sum(response.finished for response in responses) < len(responses)

    models = {t: players.plain(t) for t in players.adapters}
    for request, response in zip(requests, responses, strict=True):
        stops = [place for place, token in enumerate(response.ids) if token == STOP]
        assert stops == ([len(response.ids) - 1] if response.finished else [])
        assert response.finished or len(response.ids) == request.cap
        ids = torch.tensor([request.prompt_ids + response.ids])
        with torch.no_grad():
            own, base = (
                models[t](ids).logits[0].double().log_softmax(-1) for t in (request.opponent, 0)
            )
        mixed = (1 - request.token_alpha) * own + request.token_alpha * base
        edges = mixed.softmax(-1).cumsum(-1)[len(request.prompt_ids) - 1 : -1]
        uniforms = torch.from_numpy(position_uniforms(request.key, request.cap))
        for token, edge, uniform in zip(response.ids, edges, uniforms, strict=False):
            below = edge[token - 1] if token else 0.0
            assert below - 1e-5 <= uniform <= edge[token] + 1e-5


# ------------------------------------------------------------------------------- how it is computed


def head_rows(players: Players, t: int, alpha: float) -> list[int]:
    """Rows of each product with the head in one pass over `IDS`."""
    rows = []

    def count(_: nn.Module, args: tuple[Tensor, ...], __: Tensor) -> None:
        rows.append(args[0].shape[:-1].numel())

    with players.policy.at(t, alpha):
        handle = players.policy.model.get_output_embeddings().register_forward_hook(count)
        try:
            players.policy.model(input_ids=IDS)
        finally:
            handle.remove()
    return rows


def test_head_is_multiplied_once_for_both_members_unless_it_is_capped(players, family):
    copies = 2 if family == "gemma2" else 1
    assert head_rows(players, 1, 0.3) == [copies * IDS.numel()]
    assert head_rows(players, 1, 0.0) == [IDS.numel()]


def test_head_with_an_adapter_is_multiplied_for_each_member(tmp_path):
    players = make_players(tmp_path, "llama", target_modules=["q_proj", "lm_head"])
    assert head_rows(players, 1, 0.3) == [2 * IDS.numel()]


def hooks(policy: LoraPolicy) -> Iterator[int]:
    for module in policy.modules():
        yield from (*module._forward_pre_hooks, *module._forward_hooks)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_after_the_block_also_by_an_exception(fails, players):
    policy = players.policy.eval()
    before, logits = [*hooks(policy)], policy.model(input_ids=IDS).logits
    try:
        with policy.at(1, 0.5):
            assert [*hooks(policy)] != before
            policy.model(input_ids=IDS)
            if fails:
                raise KeyError("stop here")
    except KeyError:
        assert fails
    assert [*hooks(policy)] == before
    assert torch.equal(policy.model(input_ids=IDS).logits, logits)


def test_successive_alphas_do_not_affect_each_other(llama):
    for t, alpha in ((1, 0.5), (2, 0.0), (0, 0.5), (1, 0.2), (2, 0.9)):
        wanted = llama.mixed(t, alpha if t else 0.0, IDS)
        torch.testing.assert_close(llama.found(t, alpha, IDS), wanted, atol=1e-5, rtol=0)
        llama.policy.evict()


def test_a_call_that_bypasses_the_routing_is_refused(llama):
    """PEFT's `generate` calls the inner model, which would compute the bare base."""
    with (
        llama.policy.at(1, 0.4),
        pytest.raises(RuntimeError, match="no rows are routed to adapters"),
    ):
        llama.policy.model.get_base_model()(input_ids=IDS)
