"""Decoding of each kind of model, against full passes without a cache by transformers and peft.

Every id has to be the inverse CDF of its row's uniform number, given the ids before it, up to 1e-5
of a boundary of the cumulative distribution, whatever the order and the batches.
"""

from __future__ import annotations

import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spin_lightning.generation.base import Request, Response
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.keyed import position_uniforms
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.types import PolicyId
from tests.toys.adapters import plain_model, write_adapter
from tests.toys.models import family_config, write_model

# PEFT detects by itself that GPT-2's layers are transposed, and warns.
pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")

WORDS, STOP, PAD = 23, 2, 0
LONGEST, CAP = 9, 12
GROUPED = {"intermediate_size": 128, "num_key_value_heads": 2}
GEMMA = {**GROUPED, "head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 6}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 6},
    "qwen2": GROUPED,
    "qwen3": {**GROUPED, "head_dim": 16},
    "gemma2": {**GEMMA, "final_logit_softcapping": 2.0},
    "gemma3_text": {
        **GEMMA,
        "layer_types": ["sliding_attention", "full_attention"],
        "initializer_range": 0.05,
    },
    "gpt2": {},
    "gpt_neox": {"intermediate_size": 128},
}
# Convolutions beside attention; experts, which receive the tokens of all rows together.
OTHERS: dict[str, dict[str, Any]] = {
    "lfm2": {**GROUPED, "layer_types": ["conv", "full_attention"]},
    "qwen2_moe": {
        **GROUPED,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
    },
}


class Player:
    """A policy with iterates 0 to 3, and the same iterates by transformers and peft alone."""

    def __init__(self, root: Path, family: str, *, initial: bool, nf4: bool = False) -> None:
        model_dir = write_model(
            family_config(family, WORDS, **{**FAMILIES, **OTHERS}[family]), root / "model"
        )
        shape: dict[str, Any] = {"fan_in_fan_out": family == "gpt2"}
        narrow = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn"]}.get(family, "all-linear")
        shapes: dict[int, dict[str, Any]] = {
            1: {},
            2: {"r": 2, "lora_alpha": 6, "target_modules": narrow},
            3: {"r": 7, "use_rslora": True},
        }
        folders: dict[int, Path | None] = {
            t: write_adapter(model_dir, root / f"iterate_{t:03d}", seed=t, **shape, **own)
            for t, own in shapes.items()
        }
        start = root / "iterate_000"
        start.mkdir()
        folders[0] = write_adapter(model_dir, start, seed=9, **shape) if initial else None
        base = FrozenBase(
            str(model_dir), quantization="nf4" if nf4 else "none", compute_dtype="float32"
        )
        self.policy = LoraPolicy(
            base, LoraSettings(r=2), initial_adapter=str(start) if initial else None
        )
        self.policy.use_iterates({t: root / f"iterate_{t:03d}" for t in range(4)})
        with torch.random.fork_rng(), torch.no_grad():
            torch.manual_seed(9)
            for _, parameter in self.policy.trainable():
                parameter.normal_(std=0.2)  # the trained adapter differs from all iterates
        quantization = "nf4" if nf4 else "none"
        self.models = {t: plain_model(model_dir, folders[t], quantization) for t in range(4)}

    def generate(self, requests: list[Request], **settings: Any) -> list[Response]:
        generator = LocalGenerator((STOP,), PAD, GenerationSettings(**settings))
        return generator.generate(self.policy, requests)

    def next_token_logps(self, request: Request, ids: tuple[int, ...]) -> Tensor:
        """log of the distribution that each of `ids` is drawn from, [ids, words], float64."""
        tokens = torch.tensor([request.prompt_ids + ids])
        with torch.no_grad():
            own, base = (
                self.models[t](tokens, use_cache=False).logits[0].double().log_softmax(-1)
                for t in (request.opponent, 0)
            )
        alpha = request.token_alpha
        mixed = ((1 - alpha) * own + alpha * base).log_softmax(-1)
        return mixed[len(request.prompt_ids) - 1 : -1]


def some_requests(count: int = 48) -> list[Request]:
    """Prompts of 1 to 9 words, some twice; iterates, alphas and caps of 1 to 12 all mixed."""
    draw = random.Random(3)
    words = [token for token in range(1, WORDS) if token != STOP]
    prompts = [(1, *draw.choices(words, k=draw.randrange(LONGEST))) for _ in range(count // 2)]
    return [
        Request(
            prompt_ids=draw.choice(prompts),
            opponent=draw.randrange(4),
            key=draw.getrandbits(63),
            cap=draw.randrange(1, CAP + 1),
            token_alpha=draw.choice([0.0, 0.0, 0.3, 0.8]),
        )
        for _ in range(count)
    ]


def assert_drawn(player: Player, requests: list[Request], responses: list[Response]) -> None:
    """Ids are the inverse CDF of the uniforms, log-probs those of teacher forcing."""
    for request, response in zip(requests, responses, strict=True):
        stops = [place for place, token in enumerate(response.ids) if token == STOP]
        assert stops == ([len(response.ids) - 1] if response.finished else [])
        assert response.finished or len(response.ids) == request.cap
        log_p = player.next_token_logps(request, response.ids)
        uniforms = torch.from_numpy(position_uniforms(request.key, request.cap))
        for token, edges, uniform in zip(
            response.ids, log_p.exp().cumsum(-1), uniforms, strict=False
        ):
            below = edges[token - 1] if token else 0.0
            assert below - 1e-5 <= uniform <= edges[token] + 1e-5
        wanted = log_p.gather(1, torch.tensor(response.ids)[:, None]).sum()
        assert response.logp == pytest.approx(float(wanted), abs=1e-5 * len(response.ids))


def assert_same_but_at_boundaries(
    player: Player, requests: list[Request], one: list[Response], other: list[Response]
) -> None:
    """Where ids differ first, the uniform is within 1e-5 of a boundary."""
    differing = 0
    for request, a, b in zip(requests, one, other, strict=True):
        if a.ids == b.ids:
            continue
        differing += 1
        place = [x == y for x, y in zip(a.ids, b.ids, strict=False)].index(False)
        edges = player.next_token_logps(request, a.ids)[place].exp().cumsum(-1)
        uniform = position_uniforms(request.key, request.cap)[place]
        assert (edges - uniform).abs().min() < 1e-5
    assert differing <= 1


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def player(family, tmp_path_factory) -> Player:
    return Player(tmp_path_factory.mktemp(family), family, initial=family in ("qwen2", "gpt2"))


def test_ids_and_log_probs_are_those_of_full_passes(player):
    requests = some_requests()
    responses = player.generate(requests)
    assert len({response.ids for response in responses}) > 25
    assert {response.finished for response in responses} == {False, True}
    assert_drawn(player, requests, responses)


@pytest.mark.parametrize("rows", [1, 7, 32])
def test_ids_do_not_depend_on_batches_order_and_company(rows, player):
    """In batches of about so many rows, shuffled, and the rows of each iterate alone."""
    requests = some_requests()
    everything = player.generate(requests)
    tokens = rows * (LONGEST + CAP)
    responses = player.generate(requests, batch_tokens=tokens)
    assert_same_but_at_boundaries(player, requests, everything, responses)
    assert player.generate(requests, batch_tokens=tokens) == responses, "and again the same"

    order = random.Random(rows).sample(range(len(requests)), len(requests))
    shuffled = player.generate([requests[i] for i in order], batch_tokens=tokens)
    back = [shuffled[order.index(i)] for i in range(len(requests))]
    assert_same_but_at_boundaries(player, requests, everything, back)

    for policy_id in {request.policy for request in requests}:
        alone = [i for i, request in enumerate(requests) if request.policy == policy_id]
        found = player.generate([requests[i] for i in alone], batch_tokens=tokens)
        assert_same_but_at_boundaries(
            player, [requests[i] for i in alone], [everything[i] for i in alone], found
        )


@pytest.mark.parametrize("initial", [False, True])
def test_ids_of_a_base_in_nf4_are_those_of_the_dequantized_one(initial, tmp_path):
    player = Player(tmp_path, "llama", initial=initial, nf4=True)
    requests = some_requests()
    assert len(player.policy.batch_groups({request.policy for request in requests})) == 2
    assert_drawn(player, requests, player.generate(requests))


@pytest.mark.parametrize(
    ("family", "slow"), [("lfm2", True), ("qwen2_moe", False), ("gpt2", False)]
)
def test_models_that_cache_more_than_keys_and_values_are_decoded_by_length_and_logged_once(
    family, slow, tmp_path, caplog
):
    player = Player(tmp_path, family, initial=False)
    generator = LocalGenerator((STOP,), PAD, GenerationSettings())
    requests = some_requests()
    if family == "qwen2_moe":  # PEFT cannot tell two members apart in it
        requests = [request for request in requests if not request.token_alpha]
    with caplog.at_level(logging.INFO):
        responses = generator.generate(player.policy, requests)
        assert generator.generate(player.policy, requests) == responses
    assert sum("one length" in record.getMessage() for record in caplog.records) == slow
    assert_drawn(player, requests, responses)


def test_one_generator_reads_the_config_of_each_policy_it_is_given(tmp_path):
    generator = LocalGenerator((STOP,), PAD, GenerationSettings())
    requests = some_requests(16)
    for family in ("lfm2", "llama", "gpt2"):
        player = Player(tmp_path / family, family, initial=False)
        found = generator.generate(player.policy, requests)
        assert found == player.generate(requests), family


def test_iterates_and_mixtures_share_batches_unless_a_layer_mixes_the_rows(tmp_path):
    ids = {PolicyId(t, alpha) for t in range(4) for alpha in (0.0, 0.5)}
    for family, together in (("llama", True), ("lfm2", True), ("qwen2_moe", False)):
        policy = Player(tmp_path / family, family, initial=False).policy
        groups = policy.batch_groups(ids)
        assert sorted(policy_id for group in groups for policy_id in group) == sorted(ids)
        assert len(groups) == (2 if together else len(ids)), family
        assert all(len({i.mixes_base for i in group}) == 1 for group in groups), family


def embeddings(model: nn.Module) -> nn.Module:
    return model.get_input_embeddings()


def test_prompts_that_are_the_same_are_read_once_for_each_policy(tmp_path):
    player = Player(tmp_path, "llama", initial=False)
    requests = [
        Request((1, 5, 9, 4), opponent=1 + i % 2, key=i, cap=1, token_alpha=0.0) for i in range(40)
    ]
    read = []
    hook = embeddings(player.policy.model).register_forward_hook(
        lambda _, args, __: read.append(args[0].numel())
    )
    responses = player.generate(requests)
    hook.remove()
    assert read[-2:] == [2 * 3, 40], "the first step feeds the last token of a prompt"
    assert_drawn(player, requests, responses)
