"""Whether a server computes our base: log-probs of a few prompts, the server's and ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spin_lightning.errors import SpinError
from spin_lightning.generation.vllm_server import VllmServer
from spin_lightning.packing import pack_prompts
from spin_lightning.policies.base import Policy

# Prompts that are compared, up to which length, and tokens of each.
_PROMPTS, _LONGEST, _TOKENS = 4, 48, 16
# With fewer tokens in all, the prompts are compared once more as one.
_ENOUGH = 32


@dataclass(frozen=True)
class BaseCheck:
    """Beginnings of prompts with our log-probs under iterate 0.

    Attributes:
        sequences: Ids of each.
        logps: log p of the last tokens of each, up to 16, nats.
    """

    sequences: tuple[tuple[int, ...], ...]
    logps: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, policy: Policy, prompts: Sequence[tuple[int, ...]], longest: int) -> BaseCheck:
        """Score the beginnings of a few prompts.

        Args:
            policy: The policy; its iterate 0 is the base, or the adapter that the run starts from.
            prompts: The prompts; of prompts that are a single token nothing is compared.
            longest: Tokens that a server takes at least.
        """
        longest = min(_LONGEST, longest - 1)
        distinct = list(dict.fromkeys(prompts))[: _PROMPTS * 4]
        chosen = [ids[:longest] for ids in distinct[:_PROMPTS]]
        if sum(len(ids) - 1 for ids in chosen) < _ENOUGH:
            chosen.append(tuple(i for ids in distinct for i in ids)[:longest])
        chosen = [ids for ids in chosen if len(ids) > 1]
        with policy.at(0):
            return cls(tuple(chosen), tuple(_last_logps(policy, ids) for ids in chosen))

    async def gap(self, server: VllmServer, model: str) -> float:
        """Mean absolute difference between a server's log-probs and ours, nats per token.

        Args:
            server: The server.
            model: Iterate 0 there: the base's name, or its adapter's.
        """
        differences: list[float] = []
        for ids, ours in zip(self.sequences, self.logps, strict=True):
            theirs = await server.prompt_logps(model, ids)
            pairs = zip(theirs[-len(ours) :], ours, strict=True)
            differences += [abs(there - here) for there, here in pairs]
        return math.fsum(differences) / len(differences) if differences else 0.0


def other_base(url: str, served: str, gap: float, largest: float) -> SpinError:
    """The error for a server whose log-probs are not ours.

    Args:
        url: The server.
        served: What it serves.
        gap: Mean absolute difference, nats per token.
        largest: The bound.
    """
    return SpinError(
        f"generation.servers: {url} serves {served}, whose log-probs differ from those of this "
        f"run's base by {gap:.3g} nats per token, more than generation.largest_gap ({largest:g})",
        fix="let it serve the run's base in the run's precision (spin-lightning serve prints the "
        "command); to accept a difference of precision, raise generation.largest_gap",
    )


def _last_logps(policy: Policy, ids: tuple[int, ...]) -> tuple[float, ...]:
    """log p of each of the last tokens of a sequence given all before it, nats."""
    places = range(max(1, len(ids) - _TOKENS), len(ids))
    batch = pack_prompts([ids[:k] for k in places], [[ids[k : k + 1]] for k in places])
    logps: list[float] = policy.score(batch).tolist()
    return tuple(logps)
