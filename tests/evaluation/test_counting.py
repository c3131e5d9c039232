"""Evaluations say how far they are where there is no terminal."""

import pytest

from spin_lightning.evaluation import counting


@pytest.fixture
def lines(monkeypatch):
    """Lines of the log; one for each count, since half a minute has always passed."""
    found = []
    monkeypatch.setattr(counting, "rank_zero_info", found.append)

    class Impatient(counting.ProgressLog):
        def __init__(self, write):
            super().__init__(write, every=0.0)

    monkeypatch.setattr(counting, "ProgressLog", Impatient)
    # (With no time between lines the thread would never rest.)
    monkeypatch.setattr(Impatient, "_run", lambda self: None)
    return found


def test_evaluation_writes_lines_in_a_log(lines):
    with counting.counting("scoring", 40, "requests") as count:
        count(10)
        count(30)
    assert "scoring: 10 of 40 requests" in lines[0]
    assert "scoring: 40 of 40 requests" in lines[1]


def test_evaluation_leaves_a_terminal_to_its_bars(lines, monkeypatch):
    monkeypatch.setattr(counting.sys.stderr, "isatty", lambda: True, raising=False)
    with counting.counting("scoring", 40, "requests") as count:
        count(40)
    assert lines == []


def test_harness_counts_every_request(lines, tiny_base, tiny_model_dir, tiny_adapters):
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from transformers import AutoTokenizer

    from spin_lightning.evaluation.harness_model import PolicyLM
    from spin_lightning.mixtures import Mixture
    from spin_lightning.policies.lora import LoraPolicy
    from spin_lightning.policies.lora_settings import LoraSettings

    policy = LoraPolicy(tiny_base, LoraSettings(r=1))
    policy.use_iterates(tiny_adapters)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = PolicyLM(policy, tokenizer, Mixture({1: 1.0}), 2)
    asked = [(f"w{i} w2", " w3 w4") for i in range(6)]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(asked)]
    model.loglikelihood(requests)
    assert "scoring: 6 of 6 requests" in lines[-1]
    asked = [(f"w{i} w2", {"until": ["w9"], "max_gen_toks": 3}) for i in range(4)]
    requests = [Instance("generate_until", {}, pair, i) for i, pair in enumerate(asked)]
    model.generate_until(requests)
    assert "generating: 4 of 4 requests" in lines[-1]
