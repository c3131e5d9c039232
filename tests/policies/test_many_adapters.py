"""Many iterates in one batch, each row against transformers and peft alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.policies.pretrained import FrozenBase
from spin_lightning.types import PolicyId
from tests.toys.adapters import plain_model, write_adapter
from tests.toys.models import write_wide_model

IDS = torch.tensor([[1, 5, 9, 14, 6, 23, 11], [1, 20, 20, 4, 7, 8, 13]])
# Each with its own rank, scaling and layers.
SHAPES: dict[int, dict[str, Any]] = {
    1: {},
    2: {"r": 2, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]},
    3: {"r": 5, "use_rslora": True, "rank_pattern": {"v_proj": 3}},
}
ODD: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "whole layers": {"modules_to_save": ["lm_head"]},
    "tokens": {"trainable_token_indices": {"embed_tokens": [5, 9]}},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
}


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir, tmp_path_factory) -> Path:
    return write_wide_model(tiny_model_dir, tmp_path_factory.mktemp("wide"))


def make_policy(
    model_dir: Path, root: Path, *, initial: bool = False, quantization: str = "none"
) -> tuple[LoraPolicy, dict[int, nn.Module]]:
    """A policy with iterates 0 to 3, and these iterates by transformers and peft alone."""
    folders: dict[int, Path | None] = {
        t: write_adapter(model_dir, root / str(t), seed=t, **shape) for t, shape in SHAPES.items()
    }
    (root / "0").mkdir()
    folders[0] = write_adapter(model_dir, root / "0", seed=7) if initial else None
    base = FrozenBase(str(model_dir), quantization=quantization, compute_dtype="float32")
    start = str(root / "0") if initial else None
    policy = LoraPolicy(base, LoraSettings(r=2), initial_adapter=start)
    policy.use_iterates({t: root / str(t) for t in folders})
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(9)
        for _, parameter in policy.trainable():
            parameter.normal_(std=0.2)
    models = {t: plain_model(model_dir, folder, quantization) for t, folder in folders.items()}
    return policy, models


@pytest.fixture(scope="module")
def plain_policy(model_dir, tmp_path_factory) -> tuple[LoraPolicy, dict[int, nn.Module]]:
    return make_policy(model_dir, tmp_path_factory.mktemp("adapters"))


def wanted(models: dict[int, nn.Module], policies: list[PolicyId], ids: Tensor) -> Tensor:
    """Next-token log-probs of each row under its own policy, float64."""
    rows = []
    for (t, alpha), row in zip(policies, ids, strict=True):
        with torch.no_grad():
            own, base = (models[i](row[None]).logits.double().log_softmax(-1) for i in (t, 0))
        rows.append(((1 - alpha) * own + alpha * base).log_softmax(-1)[0])
    return torch.stack(rows)


PLAIN = [PolicyId(1), PolicyId(0), PolicyId(3), PolicyId(2), PolicyId(0, 0.5), PolicyId(3)]
MIXED = [PolicyId(3, 0.4), PolicyId(2, 0.7), PolicyId(1, 0.4), PolicyId(2, 0.4)]


@pytest.mark.parametrize("policies", [PLAIN, MIXED], ids=["plain", "mixed"])
@pytest.mark.parametrize("one_by_one", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize(("quantization", "atol"), [("none", 1e-5), ("nf4", 1e-4)])
def test_rows_of_a_batch_are_those_of_their_policies(
    policies, one_by_one, initial, quantization, atol, model_dir, tmp_path, monkeypatch
):
    """Also when other rows of the same number take their place, and then fewer."""
    tokens = 1 if one_by_one else 1000
    monkeypatch.setattr("spin_lightning.policies.many_adapters._TOKENS_OF_ONE", tokens)
    policy, models = make_policy(model_dir, tmp_path, initial=initial, quantization=quantization)
    (group,) = policy.batch_groups(policies)
    with policy.at_rows(group) as routing:
        for rows in (policies, policies[::-1], policies[:3]):
            ids = IDS.repeat(4, 1)[: len(rows)]
            routing.assign(rows)
            found = policy.model(input_ids=ids).logits.double().log_softmax(-1)
            torch.testing.assert_close(found, wanted(models, rows, ids), atol=atol, rtol=0)


def test_rows_that_are_mixed_with_the_base_share_no_batch_with_others(plain_policy):
    policy, _ = plain_policy
    assert policy.batch_groups([*PLAIN, *MIXED]) == [sorted({*PLAIN}), sorted({*MIXED})]
    with (
        policy.at_rows([PolicyId(1), PolicyId(2, 0.5)]) as routing,
        pytest.raises(ValueError, match="batches of their own"),
    ):
        routing.assign([PolicyId(1), PolicyId(2, 0.5)])


@pytest.mark.parametrize("fails", [False, True])
def test_leaving_restores_the_forward_of_each_layer(fails, plain_policy):
    policy, _ = plain_policy
    layers = [module for module in policy.modules() if isinstance(module, LoraLayer)]
    own: Any = layers[0]
    calls = []

    def counted(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return type(own).forward(own, x, *args, **kwargs)

    own.forward = counted
    policy.train()
    before = policy.model(input_ids=IDS).logits
    grads = [parameter.requires_grad for parameter in policy.parameters()]
    try:
        with policy.at_rows([PolicyId(1), PolicyId(2)]) as routing:
            routing.assign([PolicyId(1), PolicyId(2)])
            assert not policy.training
            policy.model(input_ids=IDS)
            if fails:
                raise KeyError("stop here")
    except KeyError:
        assert fails
    assert len(calls) == 1, "ours, inside the block"
    assert own.forward is counted
    assert not any("forward" in layer.__dict__ for layer in layers[1:])
    del own.forward
    assert policy.training
    assert [parameter.requires_grad for parameter in policy.parameters()] == grads
    assert policy.model.active_adapters == ["policy"]
    assert torch.equal(policy.model(input_ids=IDS).logits, before)


def test_batch_groups_inside_a_block_is_refused(plain_policy):
    policy, _ = plain_policy
    with policy.at(1), pytest.raises(RuntimeError, match="already acting"):
        policy.batch_groups([PolicyId(1)])


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`:UserWarning")
@pytest.mark.parametrize("kind", ODD)
def test_adapters_that_are_not_plain_get_batches_of_their_own(kind, model_dir, tmp_path):
    policy, models = make_policy(model_dir, tmp_path)
    odd = write_adapter(model_dir, tmp_path / "4", seed=4, **ODD[kind])
    policy.use_iterates({**{t: tmp_path / str(t) for t in range(4)}, 4: odd})
    models[4] = plain_model(model_dir, odd)
    assert policy.batch_groups([PolicyId(4), PolicyId(1)]) == [[PolicyId(1)], [PolicyId(4)]]
    for policy_id in (PolicyId(4), PolicyId(1)):
        with policy.at_rows([policy_id]) as routing:
            routing.assign([policy_id, policy_id])
            found = policy.model(input_ids=IDS).logits.double().log_softmax(-1)
        torch.testing.assert_close(found, wanted(models, [policy_id] * 2, IDS), atol=1e-5, rtol=0)


def test_batch_groups_have_at_most_sixteen_policies(plain_policy):
    policy, _ = plain_policy
    ids = [PolicyId(t, alpha / 10) for t in range(4) for alpha in range(7)]
    plain = [policy_id for policy_id in ids if not policy_id.mixes_base]
    mixed = [policy_id for policy_id in ids if policy_id.mixes_base]
    assert policy.batch_groups(ids[::-1]) == [plain, mixed[:16], mixed[16:]]
