"""The exact metrics of every iterate, inside a run."""

import math

import pytest
import torch

from spin_lightning.testbed.evaluator import ExactMetrics
from spin_lightning.testbed.language import Language


class Module:
    """Iterates that answer u and v with known probabilities."""

    probabilities = ([0.5, 0.5], [0.25, 0.75], [0.9, 0.1])


@pytest.fixture
def evaluator(monkeypatch):
    even = torch.tensor([[0.5, 0.5]], dtype=torch.float64).log()
    evaluator = ExactMetrics()
    evaluator._language = Language(("a",), ("u", "v"), even, even)
    scored = []

    def score(module, t):
        scored.append(t)
        return torch.tensor([module.probabilities[t]], dtype=torch.float64).log()

    monkeypatch.setattr(evaluator, "_score", score)
    return evaluator, scored


def test_mixture_kl_is_that_of_the_mean_of_all_iterates(evaluator):
    """The means are (1/2, 1/2), (3/8, 5/8) and (0.55, 0.45); against (1/2, 1/2)."""
    means = [(0.5, 0.5), (3 / 8, 5 / 8), (0.55, 0.45)]
    for t, (u, v) in enumerate(means):
        found = evaluator[0].evaluate_iterate(Module(), t)["exact/mixture_kl"]
        assert found == pytest.approx(0.5 * math.log(0.25 / (u * v)), abs=1e-12)


def test_iterates_are_scored_once_and_all_of_them_after_a_resume(evaluator):
    exact, scored = evaluator
    exact.evaluate_iterate(Module(), 1)
    assert scored == [0, 1]
    exact.evaluate_iterate(Module(), 2)
    assert scored == [0, 1, 2]
