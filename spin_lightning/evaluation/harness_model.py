"""A policy's iterates as models of lm-evaluation-harness. Needs the extra `eval`."""

from __future__ import annotations

import copy
import datetime as dt
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import tqdm

from spin_lightning import keyed
from spin_lightning.data.templates import ChatTemplate
from spin_lightning.evaluation.counting import counting
from spin_lightning.evaluation.greedy import continue_batch, decoder_of, is_greedy
from spin_lightning.evaluation.shared_contexts import Continuation, SharedContexts
from spin_lightning.mixtures import Mixture
from spin_lightning.out_of_memory import TokenLimit
from spin_lightning.policies.base import Policy
from spin_lightning.policies.mixture_model import by_member, write_by_member

# Cost of a forward pass besides its tokens, in tokens: reading the weights; on a GPU, where a token
# costs far less, also launching the kernels (an estimate, not a measurement).
_PASS_COST = {"cpu": 16}
_PASS_COST_OF_KERNELS = 256


class PolicyLM(HFLM):
    """Answers the harness's requests as a mixture of iterates, on the one base of a policy.

    The harness's own model runs once per member, each time with that member's adapter active.
    log mu(y|x) = log sum_i w_i p_i(y|x) is exact. A continuation counts as greedy if it is greedy
    for every member. A generated response comes from one member, drawn by a hash of the request's
    text. With one member this equals the harness's own model of that iterate.

    Args:
        policy: The policy that acts as the iterates.
        tokenizer: The run's tokenizer; it is copied, since the harness sets a padding token.
        mixture: The iterates and their weights; may be replaced between two evaluations.
        batch_size: Requests per forward pass.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: PreTrainedTokenizerBase,
        mixture: Mixture,
        batch_size: int,
    ) -> None:
        """Set up the harness's own model on the policy's model."""
        self.policy = policy
        self.mixture = mixture
        self._limit = TokenLimit("evaluation")
        self._count: Callable[[int], None] = _nothing
        # The harness puts the model into eval mode; leaving the block restores its mode.
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
        with self._counting("scoring", len(requests) * len(self.mixture.members)):
            answers = by_member(
                self.policy,
                self.mixture,
                lambda: HFLM.loglikelihood(self, requests, disable_tqdm),
            )
        scores = {member: [logp for logp, _ in own] for member, own in answers.items()}
        flags = ([is_greedy for _, is_greedy in own] for own in answers.values())
        greedy = (all(of_request) for of_request in zip(*flags, strict=True))
        return list(zip(self._mixed(scores), greedy, strict=True))

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = not sys.stderr.isatty()
    ) -> list[float]:
        """Log mu of each whole text, nats."""
        with self._counting("scoring texts", len(requests) * len(self.mixture.members)):
            scores = by_member(
                self.policy,
                self.mixture,
                lambda: HFLM.loglikelihood_rolling(self, requests, disable_tqdm),
            )
        return self._mixed(scores)

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = not sys.stderr.isatty()
    ) -> list[str]:
        """One response per request, each from the member drawn for the request."""

        def write(rows: list[int]) -> list[str]:
            texts: list[str] = HFLM.generate_until(self, [requests[i] for i in rows], disable_tqdm)
            return texts

        with self._counting("generating", len(requests)):
            return write_by_member(self.policy, [self._drawn(r) for r in requests], write)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation, also by templates that read contents as lists of parts."""
        turns: list[Any] = list(chat_history)
        if self._reads_parts:
            turns = [
                {**turn, "content": [{"type": "text", "text": turn["content"]}]}
                for turn in chat_history
            ]
        text: str = HFLM.apply_chat_template(self, turns, add_generation_prompt)
        return text

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template is one of those of vision models, which would lose a plain text."""
        return ChatTemplate.of(self.tokenizer, dt.date.today()).parts

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """(log p in nats, whether it is greedy) per request; shared contexts are computed once.

        The harness's own way is taken where that is faster.

        Args:
            requests: Texts, tokens of the context and of the continuation.
            disable_tqdm: Show no progress.
            override_bs: Rows of a forward pass; default: the batch size.
        """
        # The harness cuts off at the left what does not fit.
        fitting = [
            place
            for place, (_, context, tokens) in enumerate(requests)
            if len(context) + len(tokens) <= self.max_length + 1
        ]
        shared = SharedContexts(
            [Continuation(tuple(requests[i][1]), tuple(requests[i][2])) for i in fitting]
        )
        plain = partial(
            super()._loglikelihood_tokens, disable_tqdm=disable_tqdm, override_bs=override_bs
        )
        rows = override_bs or self.batch_size
        pass_cost = _PASS_COST.get(self.device.type, _PASS_COST_OF_KERNELS)
        if not (self.policy.shares_prompts and shared.pays(rows, pass_cost)):
            answers: list[tuple[float, bool]] = plain(requests)
            return answers
        with tqdm(total=len(fitting), disable=disable_tqdm, desc="Scoring, shared contexts") as bar:

            def advance(scored: int) -> None:
                bar.update(scored)
                self._count(scored)

            scores = shared.scores(self.model, rows, advance, self._limit)
            found = dict(zip(fitting, scores, strict=True))
        others = [place for place in range(len(requests)) if place not in found]
        found.update(zip(others, plain([requests[i] for i in others]), strict=True))
        return [found[place] for place in range(len(requests))]

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any
    ) -> torch.Tensor:
        """Prompts and responses of a batch; greedy ones come from the decoder of self-play.

        Args:
            context: Left-padded prompts, int64, shape [n, columns].
            max_length: Largest number of columns of the result.
            stop: Texts that end a response.
            options: The mask of the prompts, and arguments of transformers' `generate`.

        Returns:
            int64, shape [n, longest].
        """
        self._count(len(context))
        asked = dict(options)
        mask = asked.pop("attention_mask", torch.ones_like(context))
        decoder = decoder_of(self.model, self.tokenizer, stop)
        if decoder.needs_equal_lengths or not is_greedy(self.model.generation_config, asked):
            plain: torch.Tensor = super()._model_generate(context, max_length, stop, **options)
            return plain
        return continue_batch(decoder, context, mask, max_length)

    def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Logits of a batch of the harness's own passes."""
        self._count(len(inps))
        logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
        return logits

    @contextmanager
    def _counting(self, what: str, requests: int) -> Iterator[None]:
        """Count requests inside the block; the harness scores equal ones once."""
        with counting(what, requests, "requests") as self._count:
            try:
                yield
            finally:
                self._count = _nothing

    def _mixed(self, scores: Mapping[int, Sequence[float]]) -> list[float]:
        """log sum_i w_i exp(score_i) of each request, nats, from the scores of each member."""
        tensors = {i: torch.tensor(own, dtype=torch.float64) for i, own in scores.items()}
        mixed: list[float] = self.mixture.logps(tensors).tolist()
        return mixed

    def _drawn(self, request: Instance) -> int:
        """The member that responds to a request."""
        text = json.dumps(request.args, sort_keys=True, default=str)
        key = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), signed=True)
        return self.mixture.draw(keyed.opponent_uniform(key))


def _nothing(requests: int) -> None:
    """Count nothing: no request is being answered."""
