"""Inverse-CDF sampling against one cumulative sum over the whole vocabulary."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spin_lightning.generation.sampler import inverse_cdf

BELOW_ONE = 1 - 2.0**-53


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 512, 1000])
@pytest.mark.parametrize("spread", [0.1, 8.0])
def test_tokens_are_the_same_except_at_a_boundary(vocabulary, spread):
    source = torch.Generator().manual_seed(vocabulary)
    n = 400
    logits = torch.randn(n, vocabulary, generator=source) * spread
    probabilities = logits.softmax(dim=-1)
    uniforms = torch.rand(n, generator=source, dtype=torch.float64)

    tokens = inverse_cdf(probabilities, uniforms)

    for p, u, token in zip(probabilities.double().numpy(), uniforms.numpy(), tokens, strict=True):
        cumulative = np.cumsum(p) / p.sum()
        if np.abs(cumulative - u).min() > 1e-6:
            assert token == np.searchsorted(cumulative, u, side="right")


def test_tokens_equal_those_by_hand():
    """Weights 1/8, 0, 1/2, 3/8: shares [0, 1/8), none, [1/8, 5/8), [5/8, 1)."""
    row = torch.tensor([0.125, 0.0, 0.5, 0.375])
    uniforms = torch.tensor([0.0, 0.12, 0.125, 0.6, 0.625, BELOW_ONE], dtype=torch.float64)
    assert inverse_cdf(row.expand(6, 4), uniforms).tolist() == [0, 0, 2, 2, 3, 3]


@pytest.mark.parametrize("uniform", [0.0, 2.0**-53, 0.5, BELOW_ONE])
@pytest.mark.parametrize("place", [0, 255, 256, 300, 511, 599])
def test_a_token_of_probability_0_is_never_drawn(uniform, place):
    probabilities = torch.zeros(1, 600)
    probabilities[0, place] = 0.7
    assert inverse_cdf(probabilities, torch.tensor([uniform], dtype=torch.float64)) == place


def test_boundaries_of_equal_tokens_are_evenly_spaced():
    """Six hundred equal tokens: the i-th has [i / 600, (i + 1) / 600)."""
    probabilities = torch.full((600, 600), 1 / 600)
    middles = (torch.arange(600, dtype=torch.float64) + 0.5) / 600
    assert inverse_cdf(probabilities, middles).tolist() == list(range(600))
    just_inside = (torch.arange(600, dtype=torch.float64) + 1e-4) / 600
    assert inverse_cdf(probabilities, just_inside).tolist() == list(range(600))


@pytest.mark.parametrize("vocabulary", [1, 24, 256, 300])
def test_a_non_finite_row_gives_some_token_and_no_error(vocabulary):
    rows = torch.full((2, vocabulary), torch.nan)
    tokens = inverse_cdf(rows, torch.tensor([0.0, 0.9], dtype=torch.float64))
    assert ((tokens >= 0) & (tokens < vocabulary)).all()
