"""Next tokens from logits and uniform random numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopKLogitsWarper

from spin_lightning.generation.settings import GenerationSettings

# Number of most likely tokens that `top_p` tries first.
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
        """Set up temperature and truncation."""
        self._is_exact = settings.is_exact
        self._top_p = settings.top_p
        self._warpers: list[Callable[[Tensor, Tensor], Tensor]] = []
        if settings.temperature != 1.0:
            self._warpers.append(TemperatureLogitsWarper(settings.temperature))
        if settings.top_k:
            self._warpers.append(TopKLogitsWarper(settings.top_k))

    @property
    def waits(self) -> bool:
        """Whether the host waits for a GPU."""
        return self._top_p < 1.0

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
    """The token whose interval of the cumulative distribution contains each uniform number.

    The search has two steps, the block of tokens and the token within it, since a cumulative sum
    over the vocabulary in float64 takes as long as the head.

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
    # In a non-finite row, which scoring refuses later, the search runs past the end.
    return (block * _BLOCK + place).clamp_max(vocabulary - 1)


def _find(weights: Tensor, fractions: Tensor) -> tuple[Tensor, Tensor]:
    """Index of the weight at a fraction, in [0, 1), of each row's total, and how far into it."""
    cumulative = _cumulative(weights, torch.float64)
    # `right=True`, so that a fraction of exactly 0 cannot select a weight of 0.
    thresholds = (fractions * cumulative[:, -1])[:, None]
    found = torch.searchsorted(cumulative, thresholds, right=True)
    # Rounding can lift a threshold to the total; the last weight above 0 reaches the total first.
    last = torch.searchsorted(cumulative, cumulative[:, -1:].contiguous())
    found = torch.minimum(found, last).clamp_max(weights.shape[-1] - 1)
    share = weights.gather(1, found).double()
    into = (thresholds - cumulative.gather(1, found) + share) / share
    return found.squeeze(-1), into.clamp(0.0, _BELOW_ONE).squeeze(-1)


def _cumulative(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Cumulative sums of each row, shape [n, k], also where only deterministic kernels are allowed.

    There torch refuses `cumsum` on a GPU: the order of additions varies in its kernel for a single
    sequence. It is fixed in the kernel for the rows of a matrix, which needs two rows or more.
    """
    if not weights.is_cuda:
        return weights.cumsum(dim=-1, dtype=dtype)
    rows = weights if len(weights) > 1 else weights.expand(2, -1)
    with _allowing_cumsum():
        return rows.cumsum(dim=-1, dtype=dtype)[: len(weights)]


@contextmanager
def _allowing_cumsum() -> Iterator[None]:
    mode = torch.get_deterministic_debug_mode()
    torch.set_deterministic_debug_mode("default")
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Keep the most likely tokens up to a total of `top_p`, including the one that reaches it.

    Args:
        probabilities: Shape [n, vocabulary].
        top_p: In (0, 1).

    Returns:
        The probabilities, 0 for all other tokens, shape [n, vocabulary].
    """
    vocabulary, most = probabilities.shape[-1], _NUCLEUS
    while True:
        # Sort a few tokens, and more only if those do not reach `top_p`: sorting the vocabulary
        # takes longer than the model.
        values, places = probabilities.topk(min(most, vocabulary), dim=-1)
        totals = _cumulative(values, values.dtype)
        if most >= vocabulary or bool((totals[:, -1] >= top_p).all()):
            kept = values.masked_fill(totals - values >= top_p, 0.0)
            return torch.zeros_like(probabilities).scatter(1, places, kept)
        most *= 8
