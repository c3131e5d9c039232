"""Next tokens from logits and uniform numbers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper

from spin_lightning.generation.settings import GenerationSettings

# How many of the most likely tokens are looked at first for `top_p`.
_NUCLEUS = 256
# Tokens of a block of the cumulative distribution.
_BLOCK = 256
_BELOW_ONE = 1 - 2.0**-53


class Sampler:
    """Inverse-CDF sampling: a token is a function of its logits and one uniform number.

    Args:
        settings: Temperature and truncation.
    """

    def __init__(self, settings: GenerationSettings) -> None:
        """Put the steps together."""
        self._is_exact = settings.is_exact
        self._top_p = settings.top_p
        self._warpers: list[Callable[[Tensor, Tensor], Tensor]] = []
        if settings.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            self._warpers.append(TopKLogitsWarper(settings.top_k))

    def __call__(self, logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
        """Sample a token per row.

        Args:
            logits: Shape [n, vocabulary].
            uniforms: In [0, 1), float64, shape [n].

        Returns:
            The tokens, int64, shape [n], and their log-probs at temperature 1 without truncation,
            nats, float32, shape [n].
        """
        plain = logits.float()
        probabilities = self._probabilities(plain)
        tokens = inverse_cdf(probabilities, uniforms)[:, None]
        if self._is_exact:
            return tokens.squeeze(-1), probabilities.gather(1, tokens).log().squeeze(-1)
        logps = plain.gather(1, tokens) - plain.logsumexp(dim=-1, keepdim=True)
        return tokens.squeeze(-1), logps.squeeze(-1)

    def _probabilities(self, logits: Tensor) -> Tensor:
        for warper in self._warpers:
            logits = warper(torch.empty(0), logits)
        probabilities = logits.softmax(dim=-1)
        return nucleus(probabilities, self._top_p) if self._top_p < 1.0 else probabilities


def inverse_cdf(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """The token in whose share of the cumulative distribution each uniform number lies.

    Found in two steps, the block of tokens and the token in it, for summing up a vocabulary in
    float64 takes as long as the head.

    Args:
        probabilities: float32, shape [n, vocabulary]; each row's total may be a little off 1.
        uniforms: In [0, 1), float64, shape [n].

    Returns:
        Tokens of positive probability, int64, shape [n].
    """
    vocabulary = probabilities.shape[-1]
    whole = vocabulary - vocabulary % _BLOCK
    blocks = probabilities[:, :whole].unflatten(-1, (-1, _BLOCK)).sum(dim=-1)
    rest = probabilities[:, whole:].sum(dim=-1, keepdim=True)
    block, fraction = _find(torch.cat([blocks, rest], dim=-1), uniforms)
    places = block[:, None] * _BLOCK + torch.arange(_BLOCK, device=block.device)
    inside = probabilities.gather(1, places.clamp_max(vocabulary - 1))
    place, _ = _find(inside.masked_fill(places >= vocabulary, 0.0), fraction)
    # Of a row that is not finite, which scoring will refuse, nothing is found.
    return (block * _BLOCK + place).clamp_max(vocabulary - 1)


def _find(weights: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
    """Where fractions of the total, in [0, 1), fall in each row, and how far into that weight."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    # `right` so that a fraction of exactly 0 cannot pick a weight of 0.
    thresholds = (fractions * cumulative[:, -1])[:, None]
    found = torch.searchsorted(cumulative, thresholds, right=True)
    # Rounding may take a threshold to the total, which is reached first by the last weight above 0.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    found = torch.minimum(found, last).clamp_max(weights.shape[-1] - 1)
    share = weights.gather(1, found).double()
    into = (thresholds - cumulative.gather(1, found) + share) / share
    return found.squeeze(-1), into.clamp(0.0, _BELOW_ONE).squeeze(-1)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The most likely tokens up to a total of `top_p`, the one that reaches it included.

    Args:
        probabilities: Shape [n, vocabulary].
        top_p: In (0, 1).

    Returns:
        The probabilities with 0 in place of all others, shape [n, vocabulary].
    """
    vocabulary, most = probabilities.shape[-1], _NUCLEUS
    while True:
        # A few are sorted, and more only where they do not reach `top_p`: sorting a vocabulary
        # takes longer than the model.
        values, places = probabilities.topk(min(most, vocabulary), dim=-1)
        totals = values.cumsum(dim=-1)
        if most >= vocabulary or bool((totals[:, -1] >= top_p).all()):
            kept = values.masked_fill(totals - values >= top_p, 0.0)
            return torch.zeros_like(probabilities).scatter(1, places, kept)
        most *= 8
