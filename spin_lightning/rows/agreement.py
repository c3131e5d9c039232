"""The sampler's log-probs against the scorer's: two passes through the same policy."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from spin_lightning.errors import SpinError
from spin_lightning.rows.suspects import Suspect, write_suspects

# What rounding may add for one token, nats; it averages out over many. Six times the largest
# standard deviation that is expected in bfloat16: 0.15, with logits around -100.
_ROUNDING = 1.0
# Mean difference between a server's log-probs and ours, nats per token, from which on it is a
# warning.
_LARGE_GAP = 0.05
_LOG = logging.getLogger(__name__)


class DisagreementError(SpinError):
    """Responses were sampled from another distribution than the one that they are scored under."""


@dataclass(frozen=True)
class Sampled:
    """A response with its log-prob from sampling and from scoring.

    Attributes:
        suspect: The row, its ids and log-probs, as it is written if there is a disagreement.
        tokens: Number of its tokens.
        sampled: log-prob that the sampler summed, nats.
        scored: log-prob of the same response under the policy that generated it, nats.
    """

    suspect: Suspect
    tokens: int
    sampled: float
    scored: float


@dataclass(frozen=True)
class SamplerGap:
    """How far the log-probs of an engine elsewhere are from ours, over some responses.

    Attributes:
        nats: Sum over their tokens of the engine's log-prob minus ours.
        tokens: Number of their tokens.
    """

    nats: float
    tokens: int

    @classmethod
    def of(cls, responses: Iterable[Sampled]) -> SamplerGap:
        """The gap over the new responses of a work unit."""
        found = list(responses)
        nats = math.fsum(each.sampled - each.scored for each in found)
        return cls(nats, sum(each.tokens for each in found))

    @classmethod
    def sum(cls, gaps: Iterable[SamplerGap]) -> SamplerGap:
        """The gap over the responses of all of them."""
        found = list(gaps)
        return cls(math.fsum(gap.nats for gap in found), sum(gap.tokens for gap in found))

    @property
    def per_token(self) -> float | None:
        """Mean over the tokens, nats; None without tokens."""
        return self.nats / self.tokens if self.tokens else None

    def warn(self, where: Path) -> None:
        """Warn if it is large."""
        if self.per_token is not None and not abs(self.per_token) <= _LARGE_GAP:
            _LOG.warning(
                "The server's log-probs of the responses in %s differ from ours by %+.3f nats per "
                "token on average: they come from another distribution than they are scored under. "
                "See docs/vllm.md.",
                where,
                self.per_token,
            )


def check_agreement(
    responses: Sequence[Sampled], largest_bias: float, path: Path, what: str
) -> None:
    """Check that responses were sampled from the policy that scores them.

    Generation and scoring are different passes, through a cache and without one, in other batches.
    Where they do not compute the same policy, every reference is wrong, and nothing else shows it.

    Args:
        responses: The new responses of a work unit.
        largest_bias: Largest mean difference, nats per token, see `Policy.largest_bias`.
        path: Where to write them if they disagree.
        what: What was being done, for the message.

    Raises:
        DisagreementError: The mean difference exceeds `largest_bias` and what rounding explains.
    """
    tokens = sum(each.tokens for each in responses)
    if not tokens:
        return
    bias = math.fsum(each.scored - each.sampled for each in responses) / tokens
    if abs(bias) <= largest_bias + _ROUNDING / math.sqrt(tokens):
        return
    write_suspects(path, [each.suspect for each in responses], what=what, bias=bias)
    raise DisagreementError(
        f"{what}: scorer and sampler differ by {bias:+.3f} nats per token on average, over "
        f"{tokens} tokens, which rounding does not explain. The rows are written to {path}",
        fix="set model.packing: padded and model.fused_lora: false, and report the model's type "
        "with this file; with an engine of your own, check that it samples from the iterate's "
        "adapter and returns log-probs at temperature 1",
    )
