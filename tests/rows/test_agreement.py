"""Sampled responses have the log-probs that they were sampled with."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from spin_lightning.generation.base import Generator, Response
from spin_lightning.generation.local import LocalGenerator
from spin_lightning.generation.settings import GenerationSettings
from spin_lightning.policies.lora import LoraPolicy
from spin_lightning.policies.lora_settings import LoraSettings
from spin_lightning.rows.agreement import DisagreementError, Sampled, check_agreement
from spin_lightning.rows.making import Synthesis, Timing
from spin_lightning.rows.suspects import Suspect
from spin_lightning.types import PolicyId
from tests.toys.plans import PLAN, STOP, some_examples


def sampled(tokens: int, scored: float) -> Sampled:
    """A response sampled at 0 nats."""
    logps = {"sampled": 0.0, "scored": scored}
    return Sampled(Suspect(3, 1, {"generated": [5] * tokens}, logps), tokens, 0.0, scored)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_bias_beyond_a_fiftieth_of_a_nat_per_token_is_refused_with_the_rows(sign, tmp_path):
    """100 responses of 100 tokens: 0.02 and, for rounding, 1 / sqrt(10,000) = 0.01."""
    path = tmp_path / "rows.json"
    check_agreement([sampled(100, sign * 2.99)] * 100, 0.02, path, "scoring")
    with pytest.raises(DisagreementError, match=r"scoring: .*0\.030 nats per token.*10000.*Fix"):
        check_agreement([sampled(100, sign * 3.01)] * 100, 0.02, path, "scoring")
    written = json.loads(path.read_text())
    assert written["bias"] == pytest.approx(sign * 0.0301)
    assert len(written["rows"]) == 100
    assert written["rows"][0]["logps"] == {"sampled": 0.0, "scored": sign * 3.01}


def test_differences_of_both_signs_are_rounding(tmp_path):
    check_agreement([sampled(1, 0.5), sampled(1, -0.5)], 0.02, tmp_path / "rows.json", "scoring")


def test_few_tokens_may_differ_by_what_rounding_explains(tmp_path):
    """One token: 0.02 + 1."""
    check_agreement([sampled(1, 1.01)], 0.02, tmp_path / "rows.json", "scoring")
    with pytest.raises(DisagreementError):
        check_agreement([sampled(1, 1.03)], 0.02, tmp_path / "rows.json", "scoring")


def test_without_new_responses_there_is_nothing_to_compare(tmp_path):
    check_agreement([], 0.02, tmp_path / "rows.json", "scoring")


@dataclass
class OtherPolicy(Generator):
    """Samples from another iterate than the one asked for: 2 in place of 1."""

    inner: LocalGenerator

    def generate(self, policy, requests) -> list[Response]:
        swapped = [replace(r, opponent=2 if r.opponent == 1 else r.opponent) for r in requests]
        return self.inner.generate(policy, swapped)


@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_responses_of_another_policy_stop_the_run_before_the_unit_is_written(
    alpha, tiny_base, tiny_adapters, tmp_path
):
    policy = LoraPolicy(tiny_base, LoraSettings(r=2))
    policy.use_iterates({0: tmp_path / "iterate_000", **tiny_adapters})
    (tmp_path / "iterate_000").mkdir()
    local = LocalGenerator((STOP,), 0, GenerationSettings())
    opponent = replace(PLAN.opponent, weights={1: 1.0}, token_alpha=alpha)
    plan = replace(PLAN, opponent=opponent)
    if alpha:
        plan = replace(plan, members=(0, 1), token_alpha=alpha, token_members=(1,))
    assert PolicyId(1, alpha) in plan.scorers
    right, wrong = (Synthesis(policy, g, vocabulary=24) for g in (local, OtherPolicy(local)))
    assert list(right.make(plan, some_examples(), tmp_path / "right", Timing()))
    with pytest.raises(DisagreementError, match=r"iterate 2, work unit 0.*nats per token"):
        list(wrong.make(plan, some_examples(), tmp_path / "wrong", Timing()))
    assert not list(Path(tmp_path / "wrong").glob("part-*"))
    assert list(tmp_path.glob("wrong/__about__/disagreeing-00000.json"))
