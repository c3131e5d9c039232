"""A policy's iterates as models of lm-evaluation-harness. Needs the extra `eval`."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase

from spin_lightning import keyed
from spin_lightning.mixtures import Mixture
from spin_lightning.policies.base import Policy


class PolicyLM(HFLM):
    """Answers the harness's requests as a mixture of iterates, on the one base of a policy.

    The harness's own model does the work, once for every member, each time with another adapter
    active. log mu(y|x) = log sum_i w_i p_i(y|x) is exact; a continuation counts as greedy where it
    is greedy for every member; a generated response is one member's, drawn by the request's own
    text. With one member all of this is the harness's own model of that iterate.

    Args:
        policy: Who can act as the iterates.
        tokenizer: The run's; it is copied, since the harness sets a padding token.
        mixture: Which iterates answer; can be changed between two evaluations.
        batch_size: Requests in a forward.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        mixture: Mixture,
        batch_size: int,
    ) -> None:
        """Hand the policy's model to the harness."""
        self.policy = policy
        self.mixture = mixture
        # The harness puts the model into eval mode, which the block undoes.
        with policy.at(mixture.members[0]):
            super().__init__(
                pretrained=policy.model,
                backend="causal",
                tokenizer=copy.deepcopy(tokenizer),
                batch_size=batch_size,
            )

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = not sys.stderr.isatty()
    ) -> list[tuple[float, bool]]:
        """(log mu of the continuation in nats, whether it is greedy) per request."""
        answers = self._by_member(lambda: HFLM.loglikelihood(self, requests, disable_tqdm))
        scores = [[logp for logp, _ in answer] for answer in answers]
        greedy = (all(flags) for flags in zip(*([g for _, g in a] for a in answers), strict=True))
        return list(zip(self._mixed(scores), greedy, strict=True))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = not sys.stderr.isatty()
    ) -> list[float]:
        """Log mu of each whole text, nats."""
        return self._mixed(
            self._by_member(lambda: HFLM.loglikelihood_rolling(self, requests, disable_tqdm))
        )

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = not sys.stderr.isatty()
    ) -> list[str]:
        """One response per request, each by a member of its own."""
        drawn = [self._drawn(request) for request in requests]
        written: dict[int, str] = {}
        for member in self.mixture.members:
            mine = [i for i, who in enumerate(drawn) if who == member]
            if mine:
                with self.policy.at(member):
                    texts = HFLM.generate_until(self, [requests[i] for i in mine], disable_tqdm)
                written.update(zip(mine, texts, strict=True))
        return [written[i] for i in range(len(requests))]

    def _by_member(self, answer: Callable[[], Any]) -> list[Any]:
        answers = []
        for member in self.mixture.members:
            with self.policy.at(member):
                answers.append(answer())
        return answers

    def _mixed(self, scores: Sequence[Sequence[float]]) -> list[float]:
        """log sum_i w_i exp(score_i), nats, from scores by member and request."""
        members = self.mixture.members
        tensors = (torch.tensor(one, dtype=torch.float64) for one in scores)
        mixed: list[float] = self.mixture.logps(dict(zip(members, tensors, strict=True))).tolist()
        return mixed

    def _drawn(self, request: Instance) -> int:
        text = json.dumps(request.args, sort_keys=True, default=str)
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)
        return self.mixture.draw(keyed.opponent_uniform(key))
